"""Models with something odd about them, through every conversion and back.

Each model is a small network whose weights have rank 2, so that a conversion at rank 2 without a
bound changes no output, with one to three oddities: pruned, normalised, parametrized, tied, hooked,
quantized, complex, scripted, compiled, on the meta device, and so on. What a conversion may do:

right
    the outputs are as before, what was tied is tied, gradients flow, the state dict loads, and
    every layer that stayed dense is named;
refused
    TypeError, ValueError or GeometryError, with the model as it was.

Anything else is a finding: `different` (another function, without a word), `idle` (a new layer that
nothing uses), `untied`, `unnamed`, `damaged` (refused, but changed) or `internal` (another error).

``python tests/fuzz/converter_zoo.py [COUNT] [SEED]`` prints the figures and the findings.
"""

from __future__ import annotations

import collections
import copy
import random
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import lrmanifold as lrm
from lrmanifold.nn import LowRankAdapter, LowRankLayer, LowRankLinear

WIDTH = 12


def of_rank_2(layer: nn.Module) -> nn.Module:
    """The layer with a weight of rank 2 (in each group)."""
    weight: Any = layer.weight
    groups = getattr(layer, "groups", 1)
    m, n = weight.shape[0] // groups, weight[0].numel()
    with torch.no_grad():
        matrices = torch.randn(groups, m, 2).double() @ torch.randn(groups, 2, n).double()
        weight.copy_(matrices.reshape(weight.shape) / n**0.5)
    return layer


class Image(nn.Module):
    """(B, width) to (B, channels, 4, ...), for the convolutions."""

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (3, 2, 2))


def linear() -> nn.Module:
    return of_rank_2(nn.Linear(WIDTH, WIDTH, dtype=torch.float64))


def convolution() -> nn.Module:
    kernel = of_rank_2(nn.Conv2d(3, 3, 2, padding="same", dtype=torch.float64))
    return nn.Sequential(Image(), kernel, nn.Flatten())


def grouped() -> nn.Module:
    kernel = of_rank_2(nn.Conv1d(6, 6, 1, groups=2, dtype=torch.float64))
    return nn.Sequential(nn.Unflatten(1, (6, 2)), kernel, nn.Flatten())


def network(generator: random.Random) -> nn.Sequential:
    """Three to five layers, a tanh after each."""
    parts: list[nn.Module] = []
    for _ in range(generator.randint(3, 5)):
        parts += [generator.choice([linear, linear, convolution, grouped])(), nn.Tanh()]
    return nn.Sequential(*parts)


def whole(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> list[Any]:
    """Layers of these kinds that still have a real weight and a bias of their own."""
    found = [m for m in model.modules() if type(m) in kinds]
    found = [m for m in found if m._parameters.get("weight") is not None]
    return [m for m in found if m.weight.dtype == torch.float64 and "bias" in m._parameters]


class Subclass(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Reader(nn.Module):
    """Uses the weight of a layer and never calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = linear()

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.inner.weight, self.inner.bias)


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = linear()
        self.order = [self.inner]

    def forward(self, x: Tensor) -> Tensor:
        return self.order[0](x)


def scale_by_buffer(layer: nn.Module) -> None:
    layer.register_buffer("factor", torch.tensor(1.5, dtype=torch.float64))
    layer.register_forward_hook(lambda m, args, out: out * m.factor)


def scale_by_attribute(layer: nn.Module) -> None:
    layer.boost = 0.5
    layer.register_forward_pre_hook(lambda m, args: (args[0] * m.boost,))


def scale_by_parameter(layer: nn.Module) -> None:
    layer.gain = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))
    layer.register_forward_pre_hook(lambda m, args: (args[0] * m.gain,))


def scale_by_weight(layer: nn.Module) -> None:
    layer.register_forward_hook(lambda m, args, out: out / (1 + m.weight.detach().norm()))


def replace_forward(layer: nn.Module) -> None:
    forward = layer.forward
    layer.forward = lambda x: forward(x) + 1  # type: ignore[method-assign]


def on_one(change: Callable[[Any], Any]) -> Callable[[nn.Module, random.Random], Any]:
    """An oddity of one layer that has no other yet."""

    def apply(model: nn.Module, generator: random.Random) -> None:
        if free := whole(model, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            change(generator.choice(free))

    return apply


def on_two(change: Callable[[Any, Any], Any]) -> Callable[[nn.Module, random.Random], Any]:
    def apply(model: nn.Module, generator: random.Random) -> None:
        if len(free := whole(model, (nn.Linear,))) > 1:
            change(*generator.sample(free, 2))

    return apply


def put(make: Callable[[], nn.Module]) -> Callable[[nn.Module, random.Random], Any]:
    """An oddity that is another module in the row."""

    def apply(model: Any, generator: random.Random) -> None:
        model.insert(2 * generator.randint(0, 1), make())

    return apply


def tie_weight(a: Any, b: Any) -> None:
    b.weight = a.weight


def tie_bias(a: Any, b: Any) -> None:
    b.bias = a.bias


def share_weight(a: Any, b: Any) -> None:
    b.weight = nn.Parameter(a.weight.data)


def share_bias(a: Any, b: Any) -> None:
    b.bias = nn.Parameter(a.bias.data)


def complex_weight() -> nn.Module:
    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(WIDTH, WIDTH, dtype=torch.complex128)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.to(torch.complex128)).real

    return Complex()


def quantized() -> nn.Module:
    class Quantized(nn.Module):
        """Integers and a scale, as weight-only quantization keeps them."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(WIDTH, WIDTH, bias=False)
            levels = torch.randint(-9, 9, (WIDTH, WIDTH), dtype=torch.int8)
            self.inner.weight = nn.Parameter(levels, requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.inner.weight.to(x.dtype).mT / 30

    return Quantized()


def dynamically_quantized() -> nn.Module:
    class Dynamic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            row = nn.Sequential(nn.Linear(WIDTH, WIDTH))
            self.inner = torch.ao.quantization.quantize_dynamic(row, {nn.Linear})

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.float()).double()

    return Dynamic()


def lower(layer: Any) -> None:
    layer.requires_grad_(False)


ODDITIES: dict[str, Callable[[nn.Module, random.Random], Any]] = {
    "pruned weight": on_one(lambda m: prune.random_unstructured(m, "weight", 0.3)),
    "pruned bias": on_one(lambda m: prune.random_unstructured(m, "bias", 0.3)),
    "old weight norm": on_one(nn.utils.weight_norm),
    "old spectral norm": on_one(nn.utils.spectral_norm),
    "weight norm": on_one(parametrizations.weight_norm),
    "spectral norm": on_one(parametrizations.spectral_norm),
    "orthogonal": on_one(parametrizations.orthogonal),
    "parametrized bias": on_one(
        lambda m: parametrize.register_parametrization(m, "bias", nn.Tanh())
    ),
    "tied weights": on_two(tie_weight),
    "tied biases": on_two(tie_bias),
    "weights of one storage": on_two(share_weight),
    "biases of one storage": on_two(share_bias),
    "hook with a buffer": on_one(scale_by_buffer),
    "hook with an attribute": on_one(scale_by_attribute),
    "hook with a parameter": on_one(scale_by_parameter),
    "hook that reads the weight": on_one(scale_by_weight),
    "replaced forward": on_one(replace_forward),
    "compiled in place": on_one(lambda m: m.compile(backend="eager")),
    "compiled": put(lambda: torch.compile(linear(), backend="eager")),
    "scripted": put(lambda: torch.jit.script(linear())),
    "traced": put(lambda: torch.jit.trace(linear(), torch.randn(2, WIDTH).double())),
    "subclass": put(lambda: of_rank_2(Subclass(WIDTH, WIDTH, dtype=torch.float64))),
    "weight read by another": put(Reader),
    "held in a list": put(Holder),
    "complex": put(complex_weight),
    "int8": put(quantized),
    "dynamically quantized": put(dynamically_quantized),
    "frozen": on_one(lower),
    "low-rank": put(lambda: LowRankLinear.from_dense(linear(), 2, tau=None)),
    "adapter": put(lambda: LowRankAdapter(linear(), 2)),
    "LSTM": put(lambda: Recurrent()),
}


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.LSTM(WIDTH, WIDTH, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[0]


def adapt(model: nn.Module) -> nn.Module:
    """Adapters for all dense linear layers of the row."""
    for name, child in list(model.named_children()):
        if isinstance(child, nn.Linear):
            setattr(model, name, LowRankAdapter(child, 2))
    return model


def factorize(model: nn.Module) -> nn.Module:
    plans: list[Any] = []
    dense = {name for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    low = lrm.factorize(model, rank=2, tau=None, keep_larger=True, summary=plans.append)
    stayed = {n for n, m in low.named_modules() if n in dense and not isinstance(m, LowRankLayer)}
    named = {d.name for d in plans[0].decisions if d.reason}
    if stayed - named - {n for n in stayed if "parametrizations" in n}:
        raise UnnamedError(f"{sorted(stayed - named)} stayed dense without a reason")
    return low


CONVERSIONS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "factorize": factorize,
    "factorize, densify": lambda m: lrm.densify(factorize(m)),
    "factorize, fold": lambda m: lrm.fold(factorize(m)),
    "fold": lrm.fold,
    "densify": lrm.densify,
    "report": lambda m: (lrm.report(m), m)[1],
    "adapt": adapt,
    "adapt, densify": lambda m: lrm.densify(adapt(m)),
}


class UnnamedError(Exception):
    """A layer stayed dense and the plan does not say why."""


@dataclass(frozen=True)
class Outcome:
    kind: str
    conversion: str
    oddities: tuple[str, ...]
    told: str

    def __str__(self) -> str:
        return f"{self.kind:<10}{self.conversion} of {', '.join(self.oddities)}: {self.told}"


def tied_names(model: nn.Module) -> set[frozenset[tuple[int, str]]]:
    """Which biases are one memory, by the place of their layers in the row."""
    groups: dict[int, set[tuple[int, str]]] = collections.defaultdict(set)
    for i, module in enumerate(m for m in model.modules() if "bias" in m._parameters):
        bias = module._parameters["bias"]
        if bias is not None:
            groups[bias.data_ptr()].add((i, "bias"))
    return {frozenset(g) for g in groups.values() if len(g) > 1}


def state_of(model: nn.Module) -> dict[str, Any]:
    return {k: v.clone() for k, v in model.state_dict().items() if isinstance(v, Tensor)}


def convert(model: nn.Module, conversion: str, oddities: tuple[str, ...], meta: bool) -> Outcome:
    """One model through one conversion."""

    def outcome(kind: str, told: str = "") -> Outcome:
        return Outcome(kind, conversion, oddities, told)

    torch._dynamo.reset()
    model.eval()
    x = torch.randn(3, WIDTH, dtype=torch.float64)
    if meta:
        model, x = model.to("meta"), x.to("meta")
    expected = model(x).detach()
    before, grads = state_of(model), [p.requires_grad for p in model.parameters()]
    modules, ties = [id(m) for m in model.modules()], tied_names(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            new = CONVERSIONS[conversion](model)
    except UnnamedError as error:
        return outcome("unnamed", str(error))
    except (TypeError, ValueError, lrm.GeometryError) as error:
        if conversion.startswith("adapt"):  # layer by layer: those before are adapted, and right
            same = _close(model(x), expected, meta)
        else:
            now = state_of(model)
            same = modules == [id(m) for m in model.modules()] and now.keys() == before.keys()
            same = same and grads == [p.requires_grad for p in model.parameters()]
            same = same and (meta or all(torch.equal(now[k], before[k]) for k in before))
            same = same and _close(model(x), expected, meta)
        return outcome("refused" if same else "damaged", f"{type(error).__name__}: {error}"[:150])
    except Exception as error:
        return outcome("internal", f"{type(error).__name__}: {error}"[:150])
    try:
        if not _close(new(x), expected, meta):
            return outcome("different", f"by {float((new(x) - expected).abs().max()):.1e}")
        if not meta and not ties <= _closure(tied_names(new), ties):
            return outcome("untied", f"{len(ties)} ties before, {len(tied_names(new))} after")
        if any(p.requires_grad for p in new.parameters()):
            new(x).sum().backward()
            idle = [n for n, m in new.named_modules() if _is_idle(m)]
            if idle and "dynamically quantized" not in oddities:  # no gradient passes that
                return outcome("idle", f"no gradient reaches {idle}")
        if not meta:
            new.load_state_dict(copy.deepcopy(new.state_dict()))
            if not _close(new(x), expected, meta):
                return outcome("different", "after loading its own state")
    except Exception as error:
        return outcome("internal", f"afterwards {type(error).__name__}: {error}"[:150])
    return outcome("right")


def _is_idle(module: nn.Module) -> bool:
    low_rank = isinstance(module, LowRankLayer) and module.weight.requires_grad
    return low_rank and module.weight.grad is None


def _close(y: Tensor, expected: Tensor, meta: bool) -> bool:
    return y.shape == expected.shape if meta else torch.allclose(y, expected, rtol=0, atol=1e-6)


def _closure(now: set[frozenset], before: set[frozenset]) -> set[frozenset]:
    """All of `before`, if as many biases share memory as did."""
    sizes = sorted(map(len, now)), sorted(map(len, before))
    return before if sizes[0] == sizes[1] else now


def cases(count: int, seed: int) -> list[tuple[int, str, tuple[str, ...], bool]]:
    """(seed of the model, conversion, oddities, whether on meta), each oddity in turn."""
    generator = random.Random(seed)
    names = list(ODDITIES)
    found = []
    for i in range(count):
        more = generator.sample(names, generator.randint(0, 2))
        oddities = tuple(dict.fromkeys([names[i % len(names)], *more]))
        conversion = list(CONVERSIONS)[(i // len(names)) % len(CONVERSIONS)]
        odd = {"compiled", "traced", "dynamically quantized", "scripted", "compiled in place"}
        meta = generator.random() < 0.15 and not odd & set(oddities) and conversion != "report"
        found.append((generator.randrange(2**31), conversion, oddities, meta))
    return found


def run(count: int, seed: int) -> list[Outcome]:
    """Outcomes of so many models, seeded."""
    outcomes = []
    for number, conversion, oddities, meta in cases(count, seed):
        torch.manual_seed(number)
        generator = random.Random(number)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = network(generator)
            for name in oddities:
                ODDITIES[name](model, generator)
            outcomes.append(convert(model, conversion, oddities, meta))
    return outcomes


if __name__ == "__main__":
    count, seed = (int(a) for a in [*sys.argv[1:], *["496", "0"][len(sys.argv) - 1 :]])
    outcomes = run(count, seed)
    print(*(o for o in outcomes if o.kind not in ("right", "refused")), sep="\n")
    print(f"{count} models, seed {seed}: {dict(collections.Counter(o.kind for o in outcomes))}")
