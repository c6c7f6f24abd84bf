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
from odd_models import ODDITIES, WIDTH, network
from torch import Tensor, nn

import lrmanifold as lrm
from lrmanifold.nn import LowRankAdapter, LowRankLayer


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
        # torch leaves that weight on the CPU until its layer is called, which a reader never does
        meta = meta and not {"old weight norm", "weight read by another"} <= set(oddities)
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
