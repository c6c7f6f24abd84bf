"""What belonged to a layer goes on to the one that takes its place."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor, nn

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
# What a layer's class keeps on it for itself: it means nothing to another class.
_OF_THE_CLASS = frozenset(
    {"_manifold", "_lead", "_pad", "_is_sharded", "_own_weight", "_compiled_call_impl"}
)


def carry_over(old: nn.Module, new: nn.Module) -> None:
    """Give `new` all of `old` but its class and its weight.

    The bias itself, not a copy, so that it stays tied to what it was tied to; hooks, and the
    parameters, buffers, submodules and attributes that somebody added, which hooks may use.
    """
    for key in _HOOKS:
        # The same dictionaries, so that the handles which remove the hooks go on to work.
        new.__dict__[key] = old.__dict__[key]
    for hook in new.__dict__["_load_state_dict_pre_hooks"].values():
        if getattr(hook, "with_module", False):
            hook.module = weakref.ref(new)
    inner = frozenset(getattr(old, "inner_parts", ())) | getattr(new, "replaced_parts", frozenset())
    for kind in ("_parameters", "_buffers", "_modules"):
        for name, value in old.__dict__[kind].items():
            if name not in inner and (kind, name) != ("_parameters", "weight"):
                _put(new, kind, name, value)
    new._non_persistent_buffers_set |= old._non_persistent_buffers_set
    for key, value in vars(old).items():
        if key not in vars(new) and key not in _OF_THE_CLASS:
            new.__dict__[key] = value
    for name in inner:  # what both have, such as the output projection of an attention
        mine, theirs = new._modules.get(name), old._modules.get(name)
        if mine is not None and theirs is not None:
            carry_over(theirs, mine)
    if "bias" in vars(old):  # computed by a hook before each forward pass
        new._parameters.pop("bias", None)


def take_marks(new: Tensor, old: Tensor) -> None:
    """Give a weight what somebody noted on the one before it, such as ``no_weight_decay``.

    No tensors, which belong to entries of the old one.
    """
    for key, value in vars(old).items():
        if key != "manifold" and key not in vars(new) and not isinstance(value, Tensor):
            setattr(new, key, value)


def _put(new: nn.Module, kind: str, name: str, value: Any) -> None:
    if name == "bias" and hasattr(new, "take_bias"):
        new.take_bias(value)  # type: ignore[operator]
        return
    new.__dict__[kind][name] = value
