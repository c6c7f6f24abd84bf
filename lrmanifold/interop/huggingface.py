"""transformers: factorized models are saved with their ranks, and loaded with them.

``model.save_pretrained(folder)`` of a factorized model writes the ranks into ``config.json``, under
"lrmanifold", and the packed factors into the file of weights. transformers itself would build the
dense model from that configuration and find no weights that fit, so that the model is loaded here.
A warning says so at saving. A model that :func:`lrmanifold.densify` made dense again is saved and
loaded as always.

Give :func:`lrmanifold.factorize` the model that will be saved, and choose its layers by `include`.
Of a part alone, only transformers' base model (``model.base_model``) works too, without the
warning: its ranks at that time are in the configuration that both share. Ranks of other parts, and
of layers put in by hand, are not written, and :func:`from_pretrained` refuses such a folder.

A model of one's own with ``huggingface_hub.PyTorchModelHubMixin`` needs nothing of this module, if
its constructor factorizes it: the mixin keeps the arguments of the constructor::

    class Net(nn.Module, PyTorchModelHubMixin):
        def __init__(self, rank=8):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
            lrm.factorize(self, rank)

    Net(rank=4).save_pretrained("net")
    model = Net.from_pretrained("net")
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._arguments import check_dtype
from ..nn.saver import KEY, mark
from ..nn.structure import restructure
from ..precision import STORAGE_DTYPES

__all__ = ["from_pretrained"]

_FILE_OPTIONS = (
    "cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token",
)  # fmt: skip
_FILES = ("model.safetensors", "model.safetensors.index.json")


def from_pretrained(
    cls: Any, name_or_path: str, *, dtype: torch.dtype | None = None, **options: Any
) -> nn.Module:
    """A factorized model from what its ``save_pretrained`` wrote.

    Parameters
    ----------
    cls : class
        The model's class, or one of transformers' ``AutoModel`` classes. A configuration of
        generation that was saved beside the weights is loaded with them.
    name_or_path : str
        A folder, or a repository of the hub.
    dtype : torch.dtype, optional
        Of the weights, whatever dtype they were saved in; torch's default by default.
        ``torch_dtype`` is its older name.
    **options
        For the files, as ``revision`` or ``cache_dir``, and attributes of the configuration.

    Returns
    -------
    nn.Module
        In evaluation mode, as transformers gives it. Build the optimizer after this.

    Raises
    ------
    ImportError
        Without transformers.
    TypeError
        For options that are neither, as ``device_map``: move the model afterwards.
    ValueError
        If the configuration holds no ranks or is of another class, or if the weights do not fit it,
        are off their manifold, or their file is damaged.

    Examples
    --------
    >>> from lrmanifold.interop import huggingface
    >>> model = GPT2LMHeadModel.from_pretrained("gpt2")
    >>> lrm.factorize(model, 0.25)
    >>> model.save_pretrained("small")
    >>> model = huggingface.from_pretrained(GPT2LMHeadModel, "small")
    """
    from transformers import AutoConfig, GenerationConfig
    from transformers.utils import GENERATION_CONFIG_NAME

    if "torch_dtype" in options:
        older = options.pop("torch_dtype")
        if dtype is not None:
            raise TypeError(f"give dtype or torch_dtype, not both, got {dtype} and {older}")
        dtype = older
    check_dtype("dtype", dtype, STORAGE_DTYPES)
    files = {key: options[key] for key in _FILE_OPTIONS if key in options}
    config, unused = AutoConfig.from_pretrained(name_or_path, return_unused_kwargs=True, **options)
    if unknown := sorted(unused.keys() - files.keys()):
        raise TypeError(
            f"options must be for the files ({', '.join(_FILE_OPTIONS)}) or attributes of "
            f"{type(config).__name__}, got {', '.join(unknown)}"
        )
    found = getattr(config, KEY, None)
    if found is None:
        raise ValueError(
            f"{name_or_path!r} must hold a factorized model, but its configuration has no "
            f"{KEY!r}: load it by {cls.__name__}.from_pretrained, or, if a part of it was "
            "factorized, load its weights into a model with that part factorized as it was"
        )
    kind = getattr(cls, "config_class", None)
    if isinstance(kind, type) and not isinstance(config, kind):
        raise ValueError(
            f"cls must be a class for {type(config).__name__}, as {name_or_path!r} has, got "
            f"{cls.__name__}"
        )
    with _default_dtype(dtype or torch.get_default_dtype()) as wanted:
        if getattr(config, "dtype", None) is not None:  # in which from_config builds
            config.dtype = wanted
        model: Any = cls.from_config(config) if hasattr(cls, "from_config") else cls(config)
    restructure(_owner(model, found), found)
    mark(model)
    state = _state(name_or_path, files)
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise ValueError(f"the weights of {name_or_path!r} cannot be loaded: {error}") from error
    model.tie_weights()
    parameters = model.state_dict(keep_vars=True)
    loaded = {id(parameters[key]) for key in state if key in parameters}
    lost = [key for key in missing if id(parameters[key]) not in loaded]
    if lost or unexpected:
        raise ValueError(
            f"the weights of {name_or_path!r} must be those of a {type(model).__name__}, but "
            f"{lost[:3]} are missing and {list(unexpected)[:3]} are none of it"
        )
    if model.can_generate() and _file(name_or_path, GENERATION_CONFIG_NAME, files) is not None:
        model.generation_config = GenerationConfig.from_pretrained(name_or_path, **files)
    return model.eval()


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[torch.dtype]:
    """Build in a dtype: a later cast would round what stays float32, as angles of positions."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield dtype
    finally:
        torch.set_default_dtype(before)


def _owner(model: Any, found: Any) -> nn.Module:
    """The model that was factorized: `model`, or the base model in it, by the names of layers."""
    layers = found.get("layers") if isinstance(found, Mapping) else None
    first = {
        str(name).partition(".")[0] for name in (layers if isinstance(layers, Mapping) else ())
    }
    return model if first <= {name for name, _ in model.named_children()} else model.base_model


def _file(place: str, name: str, options: dict[str, Any]) -> str | None:
    from transformers.utils import cached_file

    return cached_file(place, name, _raise_exceptions_for_missing_entries=False, **options)


def _state(place: str, options: dict[str, Any]) -> dict[str, Tensor]:
    single, index = (_file(place, name, options) for name in _FILES)
    if single is not None:
        return _tensors(single)
    if index is None:
        raise ValueError(f"{place!r} must hold {_FILES[0]}, which is not there")
    with open(index, encoding="utf-8") as file:
        names = sorted(set(json.load(file)["weight_map"].values()))
    state: dict[str, Tensor] = {}
    for name in names:
        if (part := _file(place, name, options)) is None:
            raise ValueError(f"{place!r} must hold {name}, which is not there")
        state.update(_tensors(part))
    return state


def _tensors(path: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: is damaged ({error})") from error
