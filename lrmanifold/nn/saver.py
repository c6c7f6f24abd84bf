"""Models of transformers: what ``save_pretrained`` has to write beside the weights."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from typing import Any

from torch import nn

from .layer import LowRankLayer

#: Under this name the configuration keeps the ranks.
KEY = "lrmanifold"


class Saver:
    """``model.save_pretrained`` of a factorized model: the ranks go into its configuration first.

    An attribute of the model object, which it is made for by :func:`mark`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the class's own ``save_pretrained``."""
        from .structure import structure

        model: Any = self.model
        if not _is_low_rank(model):  # a part of it was made dense, and that was all
            mark(model)
            return model.save_pretrained(*args, **kwargs)
        setattr(model.config, KEY, structure(model))
        warnings.warn(
            "the model is low-rank, its ranks are saved in its configuration: load it by "
            "lrmanifold.interop.huggingface.from_pretrained, or densify it first for "
            f"{type(model).__name__}.from_pretrained",
            stacklevel=2,
        )
        method = type(model).save_pretrained
        # transformers 5 writes some models in the layout of older files, with other names and with
        # weights joined or split: packed weights have no such layout
        if "save_original_format" in inspect.signature(method).parameters:
            kwargs.setdefault("save_original_format", False)
        return method(model, *args, **kwargs)


def mark(module: nn.Module) -> None:
    """Give a model of transformers with low-rank layers a :class:`Saver`; take it from others.

    The ranks are written into its configuration at once, too: a larger model around it, which no
    conversion sees, mostly has the same configuration object and saves that.
    """
    from .structure import structure

    kind = type(module)
    # a hub mixin has no such configuration, and builds its model by its own constructor
    if not (hasattr(kind, "save_pretrained") and hasattr(kind, "config_class")):
        return
    config = getattr(module, "config", None)
    if hasattr(config, KEY):
        delattr(config, KEY)
    if _is_low_rank(module):
        module.__dict__["save_pretrained"] = Saver(module)
        if config is not None:
            with contextlib.suppress(ValueError):  # adapters: said when the model itself is saved
                setattr(config, KEY, structure(module))
    elif isinstance(module.__dict__.get("save_pretrained"), Saver):
        del module.__dict__["save_pretrained"]


def _is_low_rank(model: nn.Module) -> bool:
    return any(isinstance(m, LowRankLayer) for m in model.modules())
