"""Small networks twice: of the library's layers, and in dense float64 algebra."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lrmanifold as lrm

from ..core import Sample
from ..sampling import Draw
from ._networks import maxmin

ACTIVATIONS: dict[str, Any] = {
    "relu": (nn.ReLU, torch.relu),
    "tanh": (nn.Tanh, torch.tanh),
    "leaky": (nn.LeakyReLU, lambda z: F.leaky_relu(z, 0.01)),
    "maxmin": (lrm.nn.MaxMin, maxmin),
    "none": (nn.Identity, lambda z: z),
}
SIDE, KERNEL = 6, 3


def draw_layer(draw: Draw, kind: str, n: int, m: int) -> dict[str, Any]:
    """A map from n to m numbers, or channels."""
    conv = kind == "conv"
    groups = 2 if conv and n % 2 == m % 2 == 0 and draw.choose(True, False) else 1
    rows, columns = m // groups, n // groups * (KERNEL**2 if conv else 1)
    r = draw.integer(1, min(rows, columns))
    # at τ = 0 the core is a multiple of an orthogonal matrix, and its norm is found another way
    tau = 0.0 if kind == "potential" else draw.choose(None, 0.0, 1.0)
    cond = {None: 10.0, 0.0: 1.0, 1.0: 2.0}[tau]

    def one_group() -> tuple[Tensor, Tensor, Tensor]:
        s = draw.spectrum(r, draw.cond(1.0, cond), draw.log_uniform(0.3, 2.0))
        return draw.frame(rows, r), draw.core(s), draw.frame(columns, r)

    factors = zip(*(one_group() for _ in range(groups)), strict=True)
    U, S, V = (draw.give(torch.stack(x) if groups > 1 else x[0]) for x in factors)
    found = {
        "kind": kind,
        "tau": tau,
        "act": draw.choose("relu", "tanh", "leaky", "maxmin", "none"),
        "U": U,
        "S": S,
        "V": V,
        "bias": draw.give(0.3 * draw.normal(m)),
    }
    if conv:
        mode = draw.choose("zeros", "circular")
        found["conv"] = {"stride": draw.integer(1, 2), "groups": groups, "padding_mode": mode}
        found["pool"] = draw.choose(True, False)
    if kind == "norm":
        found["scale"] = draw.give(draw.normal(m))
        found["var"] = draw.give(0.2 + draw.shares(m))
    return found


def network(sample: Sample) -> nn.Module:
    """Of the library's layers, as a user would build it."""
    x, modules = sample["x"], []
    made: dict[str, Any] = {"dtype": x.dtype, "device": x.device}
    for given in sample["layers"]:
        (m, r), n, kind = given["U"].shape[-2:], given["V"].shape[-2], given["kind"]
        made["tau"] = given["tau"]
        act = ACTIVATIONS[given["act"]][0]()
        layer: Any
        block: list[nn.Module]
        if kind == "conv":
            options, g = {**made, **given["conv"]}, given["conv"]["groups"]
            inputs = g * n // KERNEL**2
            layer = lrm.nn.LowRankConv2d(inputs, g * m, KERNEL, r, padding=1, **options)
            block = [layer, act, *([nn.MaxPool2d(2)] if given["pool"] else []), nn.Flatten()]
        elif kind == "potential":
            whole = lrm.nn.ConvexPotential(n, r, **made)
            layer, block = whole.layer, [whole]
        else:
            layer = lrm.nn.LowRankLinear(n, m, r, **made)
            block = [lrm.nn.Residual(layer, act)] if kind == "residual" else [layer, act]
        with torch.no_grad():
            point = lrm.FixedRank(m, n, r).pack(given["U"], given["S"], given["V"])
            layer.weight.copy_(point)
            layer.bias.copy_(given["bias"])
            if kind == "norm":
                norm: Any = nn.BatchNorm1d(m, dtype=x.dtype, device=x.device)
                norm.weight.copy_(given["scale"])
                norm.running_var.copy_(given["var"])
                block.insert(1, norm)
        modules += block
    weight, bias = sample["head"]
    head = nn.Linear(weight.shape[1], len(weight), dtype=x.dtype, device=x.device)
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(bias)
    return nn.Sequential(*modules, head).eval()


def forward(sample: Sample, x: Tensor) -> Tensor:
    """The same function of float64 inputs, without the library."""
    for given in sample["layers"]:
        U, S, V, bias = (given[key].double() for key in ("U", "S", "V", "bias"))
        act, kind = ACTIVATIONS[given["act"]][1], given["kind"]
        if kind == "conv":
            options = given["conv"]
            kernel = (U @ S @ V.mT).reshape(len(bias), KERNEL, KERNEL, -1).movedim(-1, 1)
            around = "circular" if options["padding_mode"] == "circular" else "constant"
            x = F.pad(x, (1, 1, 1, 1), around)
            z = F.conv2d(x, kernel, bias, options["stride"], groups=options["groups"])
            z = z.movedim(1, -1)  # MaxMin pairs channels
            z = (maxmin(z) if given["act"] == "maxmin" else act(z)).movedim(-1, 1)
            x = (F.max_pool2d(z, 2) if given["pool"] else z).flatten(1)
        elif kind == "potential":
            Q = U @ S @ V.mT * (len(S) ** 0.5 / S.norm())
            x = x - 2.0 * torch.relu(x @ Q.mT + bias) @ Q
        else:
            z = x @ (U @ S @ V.mT).mT + bias
            if kind == "norm":
                z = z * given["scale"].double() / (given["var"].double() + 1e-5).sqrt()
            x = x + act(z) if kind == "residual" else act(z)
    weight, bias = sample["head"]
    return x @ weight.double().mT + bias.double()


def random_network(seed: int, dtype: torch.dtype, device: torch.device, **fixed) -> Sample:
    """One to three layers of all kinds, three inputs, and where attacks and differences start."""
    draw = Draw(seed, dtype, device, **fixed)
    images = draw.choose(False, False, True)
    n = draw.integer(1, 2) if images else draw.integer(2, 6)
    shape = (n, SIDE, SIDE) if images else (n,)
    layers = []
    for k in range(draw.integer(1, 2 if images else 3)):
        kind = draw.choose("low", "residual", "potential", "norm")
        kind = "conv" if images and k == 0 else kind
        m = n if kind in ("residual", "potential") else draw.integer(2, 5)
        layers.append(layer := draw_layer(draw, kind, n, m))
        n = m
        if kind == "conv":
            side = SIDE // layer["conv"]["stride"]
            n = m * (side // 2 if layer["pool"] else side) ** 2
    classes = draw.integer(2, 4)
    head = draw.normal(classes, n) / n**0.5, 0.3 * draw.normal(classes)
    inputs = {
        "x": draw.normal(3, *shape),
        "step": draw.log_uniform(0.1, 10.0) * draw.normal(3, *shape),
        "starts": draw.normal(3, *shape),
    }
    return {
        "layers": layers,
        "head": tuple(map(draw.give, head)),
        **{key: draw.give(value) for key, value in inputs.items()},
    }


def _chain(
    seed: int, dtype: torch.dtype, device: torch.device
) -> tuple[Draw, Tensor, Tensor, Sample]:
    """Linear layers of rank 1 that pass their largest direction on, to the first unit vector
    returned; the second is orthogonal to it."""
    draw = Draw(seed, dtype, device)
    n = draw.integer(3, 5)
    units = [draw.frame(n, 1) for _ in range(4)]
    layers: list[dict[str, Any]] = [
        {
            "kind": "low", "tau": None, "act": "none", "U": draw.give(b), "V": draw.give(a),
            "S": draw.give(torch.tensor([[draw.uniform(0.5, 3.0)]])),
            "bias": draw.give(torch.zeros(n)),
        }
        for a, b in itertools.pairwise(units)
    ]  # fmt: skip
    sizes = torch.tensor([[0.3], [0.7], [2.0]], dtype=torch.float64)
    x = draw.give(sizes * units[0].mT)
    u = units[-1]
    w = torch.linalg.qr(torch.cat((u, draw.normal(n, 1)), 1)).Q[:, 1:]
    return draw, u, w, {"layers": layers, "x": x, "step": x, "starts": x.flip(0)}


def stretched(seed: int, dtype: torch.dtype, device: torch.device) -> Sample:
    """Every logit grows alike with the input: as fast as the bound, and no margin falls."""
    draw, u, w, found = _chain(seed, dtype, device)
    return {**found, "head": _rising(draw, u, w)}


def _rising(draw: Draw, u: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Two logits that grow alike along u; w, orthogonal to it, tells them apart."""
    weight = torch.cat((u + 0.5 * w, u - 0.5 * w), 1).mT
    return draw.give(weight), draw.give(torch.tensor([1.0, 0.0]))


def constant_image(seed: int, dtype: torch.dtype, device: torch.device) -> Sample:
    """A mean over patches of a circular image that is constant, alike in each group.

    At stride 1 every pixel counts in 9 patches, at stride 3 in one.
    """
    draw = Draw(seed, dtype, device)
    n, m, groups, stride = (
        draw.integer(1, 3),
        draw.integer(2, 4),
        1 + seed % 2,
        (1, 3)[seed // 2 % 2],
    )
    a, b = draw.frame(m, 1), draw.frame(n, 1)
    V = b.repeat(KERNEL**2, 1) / KERNEL  # the channels are last
    S = torch.tensor([[draw.uniform(0.5, 3.0)]], dtype=torch.float64)
    alike = (groups, 1, 1) if groups > 1 else (1, 1)
    layer = {
        "kind": "conv", "tau": None, "act": "none", "pool": False,
        "conv": {"stride": stride, "groups": groups, "padding_mode": "circular"},
        "U": draw.give(a.repeat(alike)), "S": draw.give(S.repeat(alike)),
        "V": draw.give(V.repeat(alike)), "bias": draw.give(torch.zeros(groups * m)),
    }  # fmt: skip
    image = b.repeat(groups, 1)[..., None].expand(-1, SIDE, SIDE)
    u = a.repeat(groups, 1).expand(-1, (SIDE // stride) ** 2).reshape(-1, 1)
    image, u = image / image.norm(), u / u.norm()
    w = torch.linalg.qr(torch.cat((u, draw.normal(len(u), 1)), 1)).Q[:, 1:]
    sizes = torch.tensor([0.3, 0.7, 2.0], dtype=torch.float64)[:, None, None, None]
    x = draw.give(sizes * image)
    return {"layers": [layer], "head": _rising(draw, u, w), "x": x, "step": x, "starts": x.flip(0)}


def contested(seed: int, dtype: torch.dtype, device: torch.device, *, third: bool = True) -> Sample:
    """Two classes meet at the radius; a third, steeper and far below, lifts the network's bound."""
    draw, u, w, found = _chain(seed, dtype, device)
    weight, bias = torch.cat((u, -u, 5.0 * w), 1).mT, torch.tensor([0.0, 0.0, -500.0])
    classes = 3 if third else 2
    return {**found, "head": (draw.give(weight[:classes]), draw.give(bias[:classes]))}
