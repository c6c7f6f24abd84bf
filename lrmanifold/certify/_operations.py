"""Functions and methods that a traced forward may call, and what they do to distances."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from .bounds import Bound, BoundError, Context, module_bound

# A live value depends on the input; everything else is a constant of the forward.
Live = Callable[[Any], bool]

_MODULES: dict[Any, tuple[type[nn.Module], tuple[str, ...]]] = {
    torch.relu: (nn.ReLU, ()),
    F.relu: (nn.ReLU, ("inplace",)),
    F.relu6: (nn.ReLU6, ("inplace",)),
    F.leaky_relu: (nn.LeakyReLU, ("negative_slope", "inplace")),
    F.elu: (nn.ELU, ("alpha", "inplace")),
    F.celu: (nn.CELU, ("alpha", "inplace")),
    F.selu: (nn.SELU, ("inplace",)),
    F.silu: (nn.SiLU, ("inplace",)),
    F.mish: (nn.Mish, ("inplace",)),
    F.gelu: (nn.GELU, ("approximate",)),
    F.softplus: (nn.Softplus, ("beta", "threshold")),
    F.hardtanh: (nn.Hardtanh, ("min_val", "max_val", "inplace")),
    F.hardswish: (nn.Hardswish, ("inplace",)),
    F.hardsigmoid: (nn.Hardsigmoid, ("inplace",)),
    F.logsigmoid: (nn.LogSigmoid, ()),
    F.softsign: (nn.Softsign, ()),
    F.tanhshrink: (nn.Tanhshrink, ()),
    F.softshrink: (nn.Softshrink, ("lambd",)),
    torch.tanh: (nn.Tanh, ()),
    F.tanh: (nn.Tanh, ()),
    torch.sigmoid: (nn.Sigmoid, ()),
    F.sigmoid: (nn.Sigmoid, ()),
    F.softmax: (nn.Softmax, ("dim",)),
    torch.softmax: (nn.Softmax, ("dim",)),
    F.avg_pool1d: (
        nn.AvgPool1d,
        ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad"),
    ),
    F.adaptive_avg_pool1d: (nn.AdaptiveAvgPool1d, ("output_size",)),
    F.adaptive_avg_pool2d: (nn.AdaptiveAvgPool2d, ("output_size",)),
    F.adaptive_avg_pool3d: (nn.AdaptiveAvgPool3d, ("output_size",)),
    F.pixel_shuffle: (nn.PixelShuffle, ("upscale_factor",)),
    F.pixel_unshuffle: (nn.PixelUnshuffle, ("downscale_factor",)),
    "relu": (nn.ReLU, ()),
    "relu_": (nn.ReLU, ()),
    "tanh": (nn.Tanh, ()),
    "sigmoid": (nn.Sigmoid, ()),
    "softmax": (nn.Softmax, ("dim",)),
}
_AVERAGE = (
    "kernel_size",
    "stride",
    "padding",
    "ceil_mode",
    "count_include_pad",
    "divisor_override",
)
_MAXIMUM = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
for _d in (1, 2, 3):
    _MODULES[getattr(F, f"max_pool{_d}d")] = (getattr(nn, f"MaxPool{_d}d"), _MAXIMUM)
    _MODULES[getattr(torch, f"max_pool{_d}d")] = (getattr(nn, f"MaxPool{_d}d"), _MAXIMUM[:-1])
    if _d > 1:
        _MODULES[getattr(F, f"avg_pool{_d}d")] = (getattr(nn, f"AvgPool{_d}d"), _AVERAGE)

# These keep the entries of each sample; that they keep the batch apart is checked by shape.
_REARRANGE = {
    torch.flatten,
    torch.reshape,
    torch.squeeze,
    torch.unsqueeze,
    torch.permute,
    torch.transpose,
    torch.movedim,
    "flatten",
    "reshape",
    "view",
    "squeeze",
    "unsqueeze",
    "permute",
    "transpose",
    "movedim",
    "contiguous",
    "clone",
}
_ADD = {operator.add, operator.iadd, torch.add, "add", "add_"}
_SUB = {operator.sub, operator.isub, torch.sub, "sub", "sub_"}
_MUL = {operator.mul, operator.imul, torch.mul, "mul", "mul_"}
_DIV = {operator.truediv, operator.itruediv, torch.div, torch.true_divide, "div", "div_"}
_NEGATE = {operator.neg, torch.neg, "neg"}
SUMS = _ADD | _SUB


def shape_nodes(graph: fx.GraphModule) -> set[str]:
    """Names of the nodes that are numbers about shapes: size(), .shape, and arithmetic on those.

    Only rearrangements may make use of one.
    """
    found: set[str] = set()
    for node in graph.graph.nodes:
        sources = node.all_input_nodes
        reads = node.op == "call_method" and node.target in ("size", "dim", "ndimension")
        reads |= node.target is getattr and node.args[1] in ("shape", "ndim")
        derived = node.op == "call_function" and bool(sources)
        if reads or (derived and all(n.name in found for n in sources)):
            found.add(node.name)
    return found


def rearranges(node: fx.Node) -> bool:
    """Whether a node is a reshape of some kind."""
    # view(dtype) reads the same bits as other numbers
    bits = any(isinstance(a, torch.dtype) for a in (*node.args, *node.kwargs.values()))
    return node.op in ("call_function", "call_method") and node.target in _REARRANGE and not bits


def operation(
    node: fx.Node, live: Live, constants: Callable[[Any], Any], context: Context
) -> tuple[Bound, str]:
    """Bound of a traced function or method, and how its live arguments come together.

    That is "chain" for one, "sum" and "cat" for several.
    """
    target, args, kwargs = node.target, node.args, dict(node.kwargs)
    number = sum(map(live, node.all_input_nodes))
    words = getattr(target, "__name__", str(target))
    if target in _MODULES and number == 1 and live(args[0] if args else kwargs.get("input")):
        kind, names = _MODULES[target]
        given = dict(zip(names, args[1:], strict=False))
        given |= {k: v for k, v in kwargs.items() if k in names and v is not None}
        strange = set(kwargs) - set(names) - {"input", "_stacklevel", "dtype"}
        if strange or kwargs.get("dtype") is not None or len(args) - 1 > len(names):
            raise _unknown(node, context)
        given = {k: constants(v) for k, v in given.items() if v is not None}
        try:
            module = kind(**given)
        except (AssertionError, TypeError, ValueError) as error:
            raise BoundError(f"{context.name}: {words} does not take {given}: {error}") from error
        return module_bound(module, context), "chain"
    if target is F.dropout and number == 1:
        on = kwargs.get("training", args[2] if len(args) > 2 else True)
        if on:
            raise BoundError(
                f"{context.name}: dropout that is on in evaluation mode is random; pass "
                "training=self.training"
            )
        return Bound(1.0, "the identity in evaluation mode", slope=0.0), "chain"
    if rearranges(node) and number == 1:
        if context.input_shape is None and not _keeps_batch(node):
            context.need_shape("whether this rearrangement keeps samples apart depends on sizes")
        return Bound(1.0, "rearranges entries", slope=0.0), "chain"
    if target in _NEGATE and number == 1:
        return Bound(1.0, "sign", slope=0.0), "chain"
    if target in _ADD | _SUB | _MUL | _DIV and len(args) == 2 and not kwargs:
        return _arithmetic(node, live, constants, context)
    if target in (torch.cat, torch.concat):
        dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
        parts: Any = args[0] if args else kwargs.get("tensors", ())
        if isinstance(dim, int) and dim != 0 and all(map(live, parts)):
            return Bound(1.0, "side by side", slope=0.0), "cat"
    if target is F.pad and number == 1 and kwargs.get("mode", "constant") == "constant":
        pads: Any = kwargs.get("pad", args[1] if len(args) > 1 else ())
        if len(args) <= 2 and all(isinstance(p, int) and p >= 0 for p in pads):
            return Bound(1.0, "constants around the image", slope=0.0), "chain"
    raise _unknown(node, context, words)


_IN_PLACE = {operator.iadd, operator.isub, operator.imul, operator.itruediv}


def writes_in_place(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether an operation overwrites its (first) argument."""
    if module is not None:
        return bool(getattr(module, "inplace", False))
    if node.op == "call_method":
        return str(node.target).endswith("_")
    # whether a positional flag says so is not looked up: True among the arguments is enough
    flagged = bool(node.kwargs.get("inplace", False)) or any(a is True for a in node.args[1:])
    return node.target in _IN_PLACE or flagged


def _unknown(node: fx.Node, context: Context, words: str | None = None) -> BoundError:
    what = words or getattr(node.target, "__name__", str(node.target))
    return BoundError(
        f"{context.name}: the forward calls {what}, for which no bound is known: put it into a "
        "module of its own and register_bound(ThatModule, fn)"
    )


def _keeps_batch(node: fx.Node) -> bool:
    """Rearrangements that leave dimension 0 alone, whatever the sizes."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if name in ("contiguous", "clone"):
        return True
    if name == "flatten":
        start = node.kwargs.get("start_dim", node.args[1] if len(node.args) > 1 else 0)
        return isinstance(start, int) and start > 0
    return False


def _arithmetic(
    node: fx.Node, live: Live, constants: Callable[[Any], Any], context: Context
) -> tuple[Bound, str]:
    a, b = node.args
    target = node.target
    if live(a) and live(b):
        if target in _ADD | _SUB:
            if context.input_shape is None and a is not b:
                context.need_shape("whether a sum broadcasts depends on sizes")
            return Bound(1.0, "sum of the constants", slope=1.0), "sum"
        raise BoundError(
            f"{context.name}: a product or quotient of two functions of the input has no global "
            "constant; register_bound a module of its own if its factors are bounded"
        )
    other = constants(b if live(a) else a)
    complex_tensor = isinstance(other, Tensor) and other.is_complex()
    if not isinstance(other, (int, float, Tensor)) or isinstance(other, bool) or complex_tensor:
        raise _unknown(node, context)
    # float64 before anything else: torch takes a Python number to float32, |-128| to an int8
    value = torch.as_tensor(other, dtype=torch.float64)
    if value.numel() == 0:
        raise BoundError(f"{context.name}: a constant of shape {tuple(value.shape)} has no entry")
    if value.numel() > 1:
        shape = context.need_shape("whether a constant broadcasts depends on sizes")
        if tuple(torch.broadcast_shapes((1, *shape), value.shape)) != (1, *shape):
            raise BoundError(f"{context.name}: a constant of shape {tuple(value.shape)} repeats x")
    if target in _ADD | _SUB:
        pixels = math.prod(context.output_shape or (1,))
        size = float(value.detach().abs().amax()) * math.sqrt(pixels)
        return Bound(1.0, "shift", slope=2.0, offset=2.0 * size), "chain"
    if target in _DIV:
        if not live(a):
            raise BoundError(f"{context.name}: a quotient by the input has no global constant")
        value = 1.0 / value
    norm = value.abs().amax()
    slope = 4.0 * float(norm.detach())
    if not context.exact and isinstance(other, Tensor) and other.is_floating_point():
        return Bound(norm.to(other.dtype), "scale", slope=slope), "chain"  # it may be learned
    return Bound(float(norm) * (1.0 + 1e-15), "scale", slope=slope), "chain"
