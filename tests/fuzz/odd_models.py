"""Small networks of rank 2, and what may be odd about them, for the fuzz of the converters."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from lrmanifold.nn import LowRankAdapter, LowRankLinear

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
    "transposed convolution": put(lambda: transposed()),
    "attention": put(lambda: Attends()),
    "attention with a hook inside": put(lambda: Attends(hooked=True)),
    "attention that shares a weight": put(lambda: Attends(shared=True)),
    "attention of another": put(lambda: nn.Sequential(Attends(), Watches())),
    "encoder layer": put(lambda: Encodes()),
}


def transposed() -> nn.Module:
    kernel = of_rank_2(nn.ConvTranspose2d(3, 3, 3, padding=1, dtype=torch.float64))
    return nn.Sequential(Image(), kernel, nn.Flatten())


def attention_of_rank_2() -> nn.MultiheadAttention:
    inner = nn.MultiheadAttention(WIDTH, 2, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        for weight in (*inner.in_proj_weight.chunk(3), inner.out_proj.weight):
            weight.copy_(torch.randn(WIDTH, 2).double() @ torch.randn(2, WIDTH).double() / 4)
        nn.init.normal_(inner.in_proj_bias)
    return inner


class Attends(nn.Module):
    """The rows of the batch as one sequence."""

    def __init__(self, *, hooked: bool = False, shared: bool = False) -> None:
        super().__init__()
        self.inner = attention_of_rank_2()
        if hooked:  # never runs: torch does not call it
            self.inner.out_proj.register_forward_hook(lambda m, args, out: 2 * out)
        if shared:
            self.again = attention_of_rank_2()
            self.again.in_proj_weight = self.inner.in_proj_weight

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.inner(x, x, x, need_weights=False)[0]
        return x if not hasattr(self, "again") else self.again(x, x, x)[0]


class Watches(nn.Module):
    """An attention whose weights are read, not only its output."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = attention_of_rank_2()

    def forward(self, x: Tensor) -> Tensor:
        scale = 1 + self.inner.in_proj_weight.detach().norm()
        y, weights = self.inner(x[None], x[None], x[None], average_attn_weights=False)
        return x + y[0] / scale + weights.square().mean()


class Encodes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.TransformerEncoderLayer(
            WIDTH, 2, WIDTH, dropout=0.0, batch_first=True, dtype=torch.float64
        )
        self.inner.self_attn = attention_of_rank_2()
        of_rank_2(self.inner.linear1), of_rank_2(self.inner.linear2)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x[None])[0]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.LSTM(WIDTH, WIDTH, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[0]
