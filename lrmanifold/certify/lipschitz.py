"""Lipschitz constants of whole networks: a sound report, and a bound to train with."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from .._arguments import shown
from ..robustness import evaluation_mode
from . import _elementwise, _pooling  # noqa: F401  (their bounds enter the registry)
from ._digest import digest
from ._linear_maps import (
    NORMS,
    can_scale,
    dense_head,
    head_error,
    is_head,
    linear_bound,
    norm_scale,
)
from ._operations import SUMS, operation, rearranges, shape_nodes, writes_in_place
from ._sizes import SMALLEST, lengths
from ._trace import (
    Trial,
    float64_copy,
    gives_the_same,
    live_nodes,
    no_bound,
    random_samples,
    refuse_hooks,
    trace,
)
from .bounds import Bound, BoundError, Context, computes_as, find_bound, module_bound

_UP = 1.0 + 1e-14


@dataclass(frozen=True)
class Row:
    """One operation of a network.

    Attributes
    ----------
    name, kind : str
        Qualified name of the module (or of the traced call) and its type.
    bound : float
        Its own Lipschitz constant at most; of a batch norm that was folded into the layer before
        it, the quotient of the pair's bound and that layer's own.
    total : float
        From the input of the network to here.
    how : str
    map_cond : float or None
        Condition number of a linear map on its row space, where it is known.
    jump : float
        Of a function that jumps, as torch's Softplus does where it becomes the identity: by how
        much at most, in one entry. `bound` is for everything else.
    """

    name: str
    kind: str
    bound: float
    total: float
    how: str
    map_cond: float | None = None
    jump: float = 0.0


@dataclass
class Evaluation:
    """Bounds of all values of a graph; `total` from the input, `local` of the operation alone."""

    total: dict[str, Any]
    local: dict[str, Bound]
    rows: list[Row]


class LipschitzBound:
    """The differentiable bound of a network, for training; its certificate is :func:`lipschitz`.

    The forward is followed once, at construction; a later :meth:`evaluate` sees the weights as they
    then are. A change of the module tree needs a new one, and so does one of a buffer of which the
    forward computes something before it meets the input: that is a constant here. Numbers are in
    the model's dtype and not rounded upwards, and norms of dense weights come from a few power
    iterations: a certificate is computed anew and in float64. On an accelerator the host does not
    look whether bounds are finite, nor wait for those of dense layers, potential layers and
    low-rank ones with τ = 0: such a step can be captured (:mod:`lrmanifold.experiments.replay`).

    Parameters
    ----------
    model : nn.Module
        As for :func:`lipschitz`. Batch norms count with their running statistics.
    input_shape : sequence of int, optional
        Without the batch.

    Raises
    ------
    BoundError
        Where the model holds something without a bound.
    """

    def __init__(self, model: nn.Module, input_shape: Sequence[int] | None = None) -> None:
        self.model = model
        self.graph = trace(model)
        trial = None if input_shape is None else Trial(self.graph, model, input_shape)
        self.shapes = {} if trial is None else trial.shapes
        self.input_shape = None if input_shape is None else tuple(input_shape)
        self._memory: dict[str, Tensor] = {}
        self._live, self._static = live_nodes(self.graph), shape_nodes(self.graph)
        self._modules = dict(self.graph.named_modules())
        self.output = next(n for n in self.graph.graph.nodes if n.op == "output").args[0]
        if not self._is_live(self.output):
            raise BoundError("the model must give one tensor that depends on its input")
        self.walk(exact=False)
        if trial is not None:
            trial.check(self._live)

    def forget(self) -> None:
        """Drop the warm starts of power iterations: the next evaluation depends on weights only."""
        self._memory.clear()

    def head(self) -> nn.Module | None:
        """The linear layer that gives the logits, or None if something comes after it."""
        node = self.output
        module = self._modules[str(node.target)] if node.op == "call_module" else None
        return module if module is not None and is_head(module) else None

    def evaluate(self) -> tuple[Any, Any, Tensor | None]:
        """(total, body, head weight): the bound of the network, of it without its last linear
        layer, and that layer's weight (classes, n); without such a layer (total, total, None)."""
        walked = self.walk(exact=False)
        total, head = walked.total[self.output.name], self.head()
        if head is None:
            return total, total, None
        with evaluation_mode(self.model):  # a parametrized weight may be another one in training
            W = dense_head(head)
        return total, walked.total[self.output.all_input_nodes[0].name], W

    def walk(self, *, exact: bool) -> Evaluation:
        """The bounds of every value, in the order of the forward."""
        found = Evaluation({}, {}, [])
        with evaluation_mode(self.model):
            for node in self.graph.graph.nodes:
                if node.op == "placeholder":
                    found.total[node.name] = 1.0
                elif node.op != "output" and self._is_live(node):
                    self._visit(node, found, exact)
        return found

    def _visit(self, node: fx.Node, found: Evaluation, exact: bool) -> None:
        sources = [n for n in node.all_input_nodes if self._is_live(n)]
        used = [n for n in node.all_input_nodes if n.name in self._static]
        context = Context(
            exact,
            str(node.target) if node.op == "call_module" else node.name,
            self.shapes.get(sources[0].name) if sources else None,
            self.shapes.get(node.name),
            self._memory,
        )
        module = self._modules[str(node.target)] if node.op == "call_module" else None
        if module is not None:
            if find_bound(module) is None:
                raise no_bound(module, context.name)
            if len(sources) != 1 or len(node.args) != 1 or node.kwargs:
                raise BoundError(f"{context.name}: a module with one input is needed here")
            bound, join = module_bound(module, context), "chain"
        else:
            if used and not rearranges(node):
                raise BoundError(f"{context.name}: computes with the shape of its input")
            bound, join = operation(node, self._is_live, self._constant, context)
        if exact:
            # a float: a number in float32 would round the whole product to itself
            bound = replace(bound, norm=_number(bound.norm))
            if not 0.0 <= float(bound.norm) < math.inf:
                raise BoundError(f"{context.name}: its bound must be finite, got {bound.norm}")
        pairs = zip(repeated(node, sources), self.stretches(node, sources), strict=True)
        totals = [found.total[n.name] * stretch for n, stretch in pairs]
        total = self._total(bound, join, totals)
        if module is not None and computes_as(module, NORMS):
            total = self._folded(node, sources[0], found, context, total)
        if exact:
            total = float(total) * _UP
            if bound.norm > 0 and any(t > 0 for t in totals):
                total = max(total, SMALLEST)  # a product below it would be rounded down, or to 0
        self._refuse_in_place(node, module)
        found.total[node.name], found.local[node.name] = total, bound
        if not exact:
            return
        kind = (
            type(module).__name__
            if module is not None
            else str(getattr(node.target, "__name__", node.target))
        )
        before = [_number(found.total[n.name]) for n in sources]
        value = _number(total)
        own = value / before[0] if len(before) == 1 and before[0] > 0 else _number(bound.norm)
        own = _number(bound.norm) if abs(own - _number(bound.norm)) < 1e-12 * own else own
        found.rows.append(
            Row(context.name, kind, own, value, bound.how, bound.map_cond, bound.jump)
        )

    def _refuse_in_place(self, node: fx.Node, module: nn.Module | None) -> None:
        """What is overwritten must not be read elsewhere: there it would be another value."""
        if not writes_in_place(node, module):
            return
        source = node.all_input_nodes[0]
        while source.name in self._live:
            if len(source.users) > 1:
                name = node.target if module is not None else node.name
                raise BoundError(
                    f"{name} overwrites a value that is used elsewhere too, so what the others "
                    "read depends on the order: use the form that is not in place"
                )
            if source.op == "placeholder":
                return
            # a view, or a module that may have returned one, shares its memory
            source = source.all_input_nodes[0]

    def stretches(self, node: fx.Node, sources: list[fx.Node]) -> list[float]:
        """Of each live argument: √ of the number of copies that broadcasting makes of it."""
        found = []
        out = self.shapes.get(node.name)
        adds = node.op != "call_module" and node.target in SUMS  # a module may be named "add"
        for source in repeated(node, sources):
            own = self.shapes.get(source.name)
            if not adds or own is None or out is None or own == out:
                found.append(1.0)
                continue
            if len(own) != len(out):
                raise BoundError(
                    f"{node.name}: adds shapes {own} and {out}, without the batch: the shorter one "
                    "would meet the batch; give it as many dimensions"
                )
            found.append(math.sqrt(math.prod(out) / math.prod(own)) * _UP)
        return found

    def _total(self, bound: Bound, join: str, totals: list[Any]) -> Any:
        if join == "sum":
            return bound.norm * sum(totals)
        if join == "cat":
            if any(isinstance(t, Tensor) for t in totals):
                return bound.norm * functools.reduce(_hypot, totals)
            return bound.norm * math.hypot(*totals)
        return bound.norm * totals[0]

    def _folded(
        self, node: fx.Node, before: fx.Node, found: Evaluation, context: Context, total: Any
    ) -> Any:
        """A batch norm after a linear map is a scale of that map's outputs: one norm for both."""
        layer = self._modules[str(before.target)] if before.op == "call_module" else None
        if layer is None or not can_scale(layer):
            return total
        shape = self.shapes.get(before.name)
        if is_head(layer) and (shape is None or len(shape) != 1):
            return total  # the norm's channels may be another dimension than the layer's outputs
        scale = norm_scale(self._modules[str(node.target)], context)
        source = before.all_input_nodes[0]
        inner = Context(
            context.exact,
            f"{before.target} with its batch norm",
            self.shapes.get(source.name),
            shape,
            self._memory,
        )
        pair = linear_bound(layer, inner, scale).norm * found.total[source.name]
        if not context.exact and isinstance(total, Tensor) and total.device.type != "cpu":
            return torch.minimum(total, pair)  # an accelerator is not waited for
        return pair if _number(pair) < _number(total) else total

    def _is_live(self, value: Any) -> bool:
        known = isinstance(value, fx.Node)
        return known and value.name in self._live and value.name not in self._static

    def _constant(self, value: Any) -> Any:
        """The value of an argument that does not depend on the input."""
        if not isinstance(value, fx.Node):
            return value
        if value.op != "get_attr":
            raise BoundError(f"{value.name}: a constant that is computed in the forward; store it")
        found: Any = self.graph
        for part in str(value.target).split("."):
            found = getattr(found, part)
        return found


def repeated(node: fx.Node, sources: list[fx.Node]) -> list[fx.Node]:
    """The live arguments as often as they occur: x + x is two."""
    flat: list[fx.Node] = []

    def collect(value: Any) -> None:
        if isinstance(value, fx.Node):
            if value in sources:
                flat.append(value)
        elif isinstance(value, (list, tuple)):
            for part in value:
                collect(part)

    collect(list(node.args))
    collect(list(node.kwargs.values()))
    return flat


def _hypot(a: Any, b: Any) -> Tensor:
    """√(a² + b²) of numbers whose squares would underflow or overflow; one at least is a tensor."""
    like = a if isinstance(a, Tensor) else b
    return torch.hypot(torch.as_tensor(a).to(like), torch.as_tensor(b).to(like))


def _number(value: Any) -> float:
    # as_tensor would round a float to torch's default dtype
    return float(value.detach()) if isinstance(value, Tensor) else float(value)


class LipschitzReport:
    """What :func:`lipschitz` found; prints as a table.

    Attributes
    ----------
    total : float
        Upper bound of the l2 Lipschitz constant of the network, rounding included; but for the
        jumps of rows that have one, for which :func:`radius` makes room.
    body : float
        The same without the last linear layer; `total` if the network does not end in one.
    rows : list of Row
    """

    def __init__(self, network: LipschitzBound, walked: Evaluation, of: str) -> None:
        self.network, self.walked, self.digest = network, walked, of
        self.rows = walked.rows
        self.total = float(walked.total[network.output.name])
        self.head = network.head()
        last = network.output.all_input_nodes
        self.body = float(walked.total[last[0].name]) if self.head is not None else self.total

    def head_gaps(self) -> Tensor | None:
        """‖w_y - w_j‖ for all pairs of classes, (classes, classes) float64, rounded upwards."""
        if self.head is None:
            return None
        # a parametrized weight may be another one in training
        with torch.no_grad(), evaluation_mode(self.network.model):
            W, error = dense_head(self.head).double(), head_error(self.head)
            gaps = torch.stack([lengths(W - row) for row in W])
            return gaps * (1.0 + 4.0 * (W.shape[1] + 8) * 2.0**-53) + 2.0 * error

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and words."""
        rows = [dict(vars(row)) for row in self.rows]
        return {"total": self.total, "body": self.body, "rows": rows}

    def __str__(self) -> str:
        heads = ("module", "type", "bound", "so far", "map cond", "how")
        lines = [
            (
                row.name,
                row.kind,
                f"{row.bound:.6g}",
                f"{row.total:.6g}",
                "-" if row.map_cond is None else f"{row.map_cond:.4g}",
                row.how,
            )
            for row in self.rows
        ]
        widths = [max(len(line[i]) for line in [heads, *lines]) for i in range(len(heads))]
        right = (False, False, True, True, True, False)

        def text(line: Sequence[str]) -> str:
            cells = zip(line, widths, right, strict=True)
            return "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in cells).rstrip()

        rule = "-" * (sum(widths) + 2 * len(widths) - 2)
        last = f"l2 Lipschitz constant <= {self.total:.6g}"
        if self.head is not None:
            last += f" (<= {self.body:.6g} before the last layer)"
        if jumps := [row.name for row in self.rows if row.jump]:
            last += f", but for the jumps of {', '.join(jumps)}"
        return "\n".join([text(heads), rule, *map(text, lines), rule, last])

    __repr__ = __str__


def lipschitz(
    model: nn.Module, input_shape: Sequence[int] | None = None, *, norm: str = "l2"
) -> LipschitzReport:
    """A proved upper bound of a network's l2 Lipschitz constant, with how it was obtained.

    In evaluation mode, of the function that the stored numbers define in exact arithmetic: the
    weights are taken to float64 without change, every norm is rounded upwards, and frames count
    with their measured defect. Products along a chain, sums at residual additions, batch norms
    folded into the layer before them. The forward is followed by ``torch.fx``; what it does
    outside of known modules and functions is an error, never skipped. It is not tight: the local
    constant of a trained network is usually smaller, as different inputs stretch different layers.

    Parameters
    ----------
    model : nn.Module
        One input (B, *input_shape), one output (B, ...).
    input_shape : sequence of int, optional
        Without the batch, as (1, 28, 28). Bounds of padded convolutions are smaller with it, some
        modules need it, and the traced graph and its copy in float64 are compared with the model
        on random samples. Without it a forward that asks for the type of its input is not seen.
    norm : {"l2"}

    Returns
    -------
    LipschitzReport

    Raises
    ------
    BoundError
        Where something has no bound: names the module and the way out.
    """
    if norm != "l2":
        raise ValueError(f"norm must be 'l2', got {norm!r}: no other norm is offered")
    if input_shape is not None and not isinstance(input_shape, Sequence):
        raise TypeError(
            "input_shape must be the shape of one sample, without the batch, such as (3, 32, 32), "
            f"got {shown(input_shape)}"
        )
    if isinstance(model, nn.Module):
        refuse_hooks(model)  # of pruned layers no copy can be made
    twin = float64_copy(model) if isinstance(model, nn.Module) else model
    network = LipschitzBound(twin, input_shape)
    if input_shape is not None and not gives_the_same(
        model, network.graph, random_samples(input_shape)
    ):
        raise BoundError(
            "a copy of the model in float64 does not give what the model gives: its forward "
            "depends on the dtype, or on something that copy.deepcopy does not copy"
        )
    with torch.no_grad():
        walked = network.walk(exact=True)
    value = float(walked.total[network.output.name])
    if not math.isfinite(value):
        raise BoundError(f"the product of the bounds overflows: {value}")
    return LipschitzReport(network, walked, digest(model))
