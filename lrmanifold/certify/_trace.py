"""A model as a graph of operations with known bounds; nothing of its forward is left out."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import geoopt
import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as torch_modules
from torch.nn.modules.lazy import LazyModuleMixin

from .._wrappers import unwrapped
from ..nn import Residual
from ..parameter import is_sharded
from ..robustness import evaluation_mode
from ._sizes import lengths
from .bounds import BoundError, Shape, find_bound, no_bound_words

HOOKS = ("_forward_hooks", "_forward_pre_hooks")
# how far apart two ways to compute one output may be, of its largest entry
_ROUGH = {torch.float64: 1e-9, torch.float32: 1e-2}
# of tensors that compute as torch's own do
_PLAIN = (Tensor.__torch_function__.__func__, nn.Parameter.__torch_function__)  # type: ignore[attr-defined]


class _Tracer(fx.Tracer):
    """Follows forwards down to the modules whose bound is known."""

    def __init__(self) -> None:
        super().__init__()
        self.where: list[str] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return find_bound(m) is not None or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        name = self.path_of_module(m)
        self.where.append(f"{name} ({type(m).__name__})")
        if type(m) is Residual and len(args) == 1 and not kwargs:
            # its forward compares shapes, which a trace cannot; the run on data below does
            found = args[0] + m.block(args[0])
        else:
            found = super().call_module(m, forward, args, kwargs)
        self.where.pop()
        return found


def trace(model: nn.Module) -> fx.GraphModule:
    """The graph of `model` in evaluation mode, or :class:`BoundError` that names the obstacle.

    Control flow that depends on the input, hooks, several inputs or outputs and functions without
    a bound all end here or in the evaluation: what cannot be followed is never skipped.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be an nn.Module, got {type(model).__name__}: the forward of a plain "
            "function cannot be followed"
        )
    refuse_hooks(model)
    # a known module alone would be traced into; inside a Sequential it is one node
    root = nn.Sequential(model) if find_bound(model) is not None else model
    tracer = _Tracer()
    try:
        with evaluation_mode(root):
            if type(root) is Residual:
                root = nn.Sequential(root)
            graph = tracer.trace(root)
    except BoundError:
        raise
    except Exception as error:
        where = tracer.where[-1] if tracer.where else f"the model ({type(model).__name__})"
        reason = str(error).split("\n")[0]
        raise BoundError(
            f"the forward of {where} cannot be followed ({reason}): take out control flow that "
            "depends on the input, or register_bound its type"
        ) from error
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    if len(inputs) != 1:
        raise BoundError(f"the model must have one input, its forward has {len(inputs)}")
    return fx.GraphModule(root, graph)


def refuse_hooks(model: nn.Module) -> None:
    """:class:`BoundError` where something beside the forwards of the types is called."""
    for name, module in model.named_modules():
        if unwrapped(module) is not module:
            raise BoundError(
                f"{name or 'the model'} ({type(module).__name__}) is a wrapper of torch.compile or "
                "for many processes, which is not followed: give the model inside, "
                f"model.{'_orig_mod' if '_orig_mod' in module._modules else 'module'}"
            )
        if "forward" in vars(module):
            raise BoundError(
                f"{name or 'the model'} ({type(module).__name__}) has its own forward, put "
                "on the object, which is not followed: define it in a class"
            )
        if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():  # type: ignore[misc]
            raise BoundError(
                f"{name or 'the model'} ({type(module).__name__}) has no weights yet: run a batch "
                "through the model first"
            )
        own_call = type(module).__call__ is not nn.Module.__call__
        own_call = own_call or "_call_impl" in vars(module)
        own_call = own_call or type(module)._call_impl is not nn.Module._call_impl
        if own_call and not isinstance(module, fx.GraphModule):
            raise BoundError(
                f"{name or 'the model'} ({type(module).__name__}) has its own __call__ or "
                "_call_impl, of which a part would be left out: put all that it does into forward"
            )
        if any(getattr(module, hooks) for hooks in HOOKS):
            raise BoundError(
                f"{name or 'the model'} ({type(module).__name__}) has forward hooks, which may "
                "change what it computes and cannot be followed: remove them (for weight_norm and "
                "spectral_norm use torch.nn.utils.parametrizations)"
            )
    if torch_modules._global_forward_hooks or torch_modules._global_forward_pre_hooks:
        raise BoundError("hooks for all modules are set, which may change forwards: remove them")


def float64_copy(model: nn.Module) -> nn.Module:
    """A copy with the same numbers in float64, to the bit.

    ``model.double()`` would not do: layers take the drift of a shorter dtype out of their weights,
    which changes the function that is to be certified.
    """
    named = [*model.named_parameters(), *model.named_buffers()]
    if sparse := [name for name, value in named if value.layout is not torch.strided]:
        raise BoundError(f"{', '.join(sparse)} must be dense: give the model weight.to_dense()")
    try:
        twin = copy.deepcopy(model)
    except RuntimeError as error:
        raise BoundError(
            f"the model cannot be copied ({str(error).splitlines()[0]}): take tensors with a "
            "gradient graph off its attributes"
        ) from error
    known: dict[int, Any] = {}
    for module in twin.modules():
        stores: tuple[dict[str, Any], ...] = (
            module._parameters,
            module._buffers,
            module.__dict__,
        )
        for store in stores:
            for key, value in list(store.items()):
                if isinstance(value, Tensor):
                    store[key] = _widened(key, value, known)
    theirs = {**dict(twin.named_parameters()), **dict(twin.named_buffers())}
    for name, value in named:
        copied = theirs.get(name)
        if copied is None or not torch.equal(copied, value.detach().to(copied)):
            raise BoundError(
                f"copying the model changes {name}: look for a __deepcopy__ of its own"
            )
    return twin


def gives_the_same(model: nn.Module, graph: fx.GraphModule, x: Tensor) -> bool:
    """Whether the model's own output is that of its graph in float64, as far as it can be known.

    What copying loses is seen by this. Only a model that is all in float32 or all in float64 is
    looked at: half precision need not be near to float64, and what torch has compiled would be
    compiled for it.
    """
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    kinds = {t.dtype for t in tensors}
    if len(kinds) != 1 or not kinds <= {*_ROUGH}:
        return True
    if any(getattr(m, "_compiled_call_impl", None) for m in model.modules()):
        return True
    device = next((p.device for p in graph.parameters()), x.device)
    with torch.no_grad(), evaluation_mode(model), evaluation_mode(graph):
        own = model(x.detach().to(tensors[0], copy=True))
        wide = graph(x.detach().to(device, torch.float64, copy=True))
    if not isinstance(own, Tensor) or own.shape != wide.shape:
        return False
    return bool(_close(wide, own.to(wide), _ROUGH[own.dtype]).all())


def random_samples(input_shape: Sequence[int]) -> Tensor:
    """Two samples, always the same."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(2, *input_shape, generator=generator, device="cpu")


def _widened(name: str, value: Tensor, known: dict[int, Any]) -> Tensor:
    if is_sharded(value):
        raise BoundError(f"{name} is sharded over processes: gather the model first")
    if value.is_meta or value.is_quantized or value.is_complex():
        raise BoundError(f"{name} must be a real tensor with values, got {value.dtype}")
    function = type(value).__torch_function__
    function = getattr(function, "__func__", function)
    if function not in _PLAIN or type(value).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        raise BoundError(
            f"{name} is a {type(value).__name__}, a tensor with arithmetic of its own, which a "
            "copy in float64 would lose: give the model plain tensors"
        )
    if not value.is_floating_point():
        return value
    if id(value) not in known:
        wide = value.detach().as_subclass(Tensor).double()
        if not bool(torch.isfinite(wide).all()):
            raise BoundError(f"{name} holds NaN or Inf")
        if isinstance(value, geoopt.ManifoldParameter):
            wide = geoopt.ManifoldParameter(wide, manifold=value.manifold, requires_grad=False)
        elif isinstance(value, nn.Parameter):
            wide = nn.Parameter(wide, requires_grad=False)
        known[id(value)] = (value, wide)  # the value too: its id must not be given again
    return known[id(value)][1]


class Recorder(fx.Interpreter):
    """Runs a graph and keeps something of each value."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.shapes: dict[str, Shape] = {}
        self.norms: dict[str, Tensor] = {}
        self.batch: int | None = None

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor) and value.is_floating_point():
            self.shapes[n.name] = tuple(value.shape)
            if value.ndim and value.shape[0] == self.batch and n.op != "get_attr":
                self.norms[n.name] = lengths(value.reshape(len(value), -1))
        return value


class Trial:
    """Runs of the graph on two random samples: its shapes, and whether the model does the same."""

    def __init__(self, graph: fx.GraphModule, model: nn.Module, input_shape: Sequence[int]) -> None:
        self.graph, self.model, self.size = graph, model, tuple(input_shape)
        if not self.size or not all(type(n) is int and n > 0 for n in self.size):
            raise ValueError(
                f"input_shape must be positive integers without the batch, got {self.size}"
            )
        tensors = [*model.parameters(), *model.buffers()]
        none = torch.zeros((), dtype=torch.float64, device="cpu")
        like = next((p for p in tensors if p.is_floating_point()), none)
        self.x = random_samples(self.size).to(like)
        self.recorder = Recorder(graph)
        self.recorder.batch = 2
        self.output: Any = None
        self.failure: Exception | None = None
        with torch.no_grad(), evaluation_mode(model), evaluation_mode(graph):
            try:
                self.output = self.recorder.run(self.x.clone())
            except Exception as error:
                # told later: a module without a bound is the better message
                self.failure = error

    @property
    def shapes(self) -> dict[str, Shape]:
        """Shapes without the batch, of all values that have one."""
        found = self.recorder.shapes.items()
        return {name: shape[1:] for name, shape in found if shape and shape[0] == 2}

    def check(self, live: set[str]) -> None:
        """The graph gives what the model gives, and each sample what it gives alone."""
        if self.failure is not None:
            reason = str(self.failure).splitlines()[0]
            raise BoundError(f"input_shape {self.size} does not fit: {reason}") from self.failure
        for node in self.graph.graph.nodes:
            shape = self.recorder.shapes.get(node.name)
            wrong = shape is not None and (not shape or shape[0] != 2)
            if wrong and node.name in live and node.op != "output":
                raise BoundError(f"{node.name}: the first dimension is no longer the batch")
        self._compare(self.x, self.output)
        for x in (16.0 * self.x, 3.0 - 6.0 * self.x):
            # what a forward does to larger or negative values only, a trace may not have seen
            with torch.no_grad(), evaluation_mode(self.graph):
                z = self.graph(x.clone())
            if bool(torch.isfinite(z).all()):
                self._compare(x, z)

    def _compare(self, x: Tensor, z: Any) -> None:
        with torch.no_grad(), evaluation_mode(self.model):
            whole = self.model(x.clone())
            try:
                alone = self.model(x[1:].clone())
            except RuntimeError as error:
                raise BoundError(
                    f"the model takes two samples and not one ({str(error).splitlines()[0]}): its "
                    "samples do not stay apart"
                ) from error
        if not isinstance(z, Tensor) or not isinstance(whole, Tensor):
            raise BoundError(f"the model must give one tensor, got {type(whole).__name__}")
        if whole.ndim == 0 or alone.shape != (1, *whole.shape[1:]):
            raise BoundError(
                f"the model gives shape {tuple(whole.shape)} for two samples and "
                f"{tuple(alone.shape)} for one: its samples do not stay apart"
            )
        rough = _ROUGH.get(x.dtype, 1e-2)
        for found, words in (
            (z, "its traced graph"),
            (torch.cat((whole[:1], alone)), "one sample alone"),
        ):
            same = found.shape == whole.shape
            if not same or not bool(_close(found, whole, rough).all()):
                raise BoundError(
                    f"the model does not give the same as {words}: its forward is random, mixes "
                    "samples or does what a trace does not see"
                )


def _close(a: Tensor, b: Tensor, rough: float) -> Tensor:
    """Where two outputs are alike, to the size of the largest finite entry."""
    finite = torch.where(torch.isfinite(b), b.abs(), 0.0)
    near = (a - b).abs() <= rough * (finite.amax() if b.numel() else 0.0)
    return near | (a == b) | (a.isnan() & b.isnan())


def live_nodes(graph: fx.GraphModule) -> set[str]:
    """Names of the values that depend on the input."""
    live: set[str] = set()
    for node in graph.graph.nodes:
        if node.op == "placeholder" or any(n.name in live for n in node.all_input_nodes):
            live.add(node.name)
    return live


def no_bound(module: nn.Module, name: str) -> BoundError:
    """The error for a module that nothing is known of."""
    return BoundError(no_bound_words(module, name))
