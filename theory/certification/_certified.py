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
    columns = n * KERNEL**2 if kind == "conv" else n
    r = draw.integer(1, min(m, columns))
    # at τ = 0 the core is a multiple of an orthogonal matrix, and its norm is found another way
    tau = 0.0 if kind == "potential" else draw.choose(None, 0.0, 1.0)
    cond = {None: 10.0, 0.0: 1.0, 1.0: 2.0}[tau]
    core = draw.core(draw.spectrum(r, draw.cond(1.0, cond), draw.log_uniform(0.3, 2.0)))
    found = {
        "kind": kind,
        "tau": tau,
        "act": draw.choose("relu", "tanh", "leaky", "maxmin", "none"),
        "U": draw.give(draw.frame(m, r)),
        "S": draw.give(core),
        "V": draw.give(draw.frame(columns, r)),
        "bias": draw.give(0.3 * draw.normal(m)),
    }
    if kind == "norm":
        found["scale"] = draw.give(draw.normal(m))
        found["var"] = draw.give(0.2 + draw.shares(m))
    return found


def network(sample: Sample) -> nn.Module:
    """Of the library's layers, as a user would build it."""
    x, modules = sample["x"], []
    made: dict[str, Any] = {"dtype": x.dtype, "device": x.device}
    for given in sample["layers"]:
        (m, r), n, kind = given["U"].shape, len(given["V"]), given["kind"]
        made["tau"] = given["tau"]
        act = ACTIVATIONS[given["act"]][0]()
        layer: Any
        block: list[nn.Module]
        if kind == "conv":
            layer = lrm.nn.LowRankConv2d(n // KERNEL**2, m, KERNEL, r, padding=1, **made)
            block = [layer, act, nn.MaxPool2d(2), nn.Flatten()]
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
            kernel = (U @ S @ V.mT).reshape(len(U), KERNEL, KERNEL, -1).movedim(-1, 1)
            z = F.conv2d(x, kernel, bias, padding=1)
            z = z.movedim(1, -1)  # MaxMin pairs channels
            z = (maxmin(z) if given["act"] == "maxmin" else act(z)).movedim(-1, 1)
            x = F.max_pool2d(z, 2).flatten(1)
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
        layers.append(draw_layer(draw, kind, n, m))
        n = m * (SIDE // 2) ** 2 if kind == "conv" else m
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
    weight = torch.cat((u + 0.5 * w, u - 0.5 * w), 1).mT
    return {**found, "head": (draw.give(weight), draw.give(torch.tensor([1.0, 0.0])))}


def contested(seed: int, dtype: torch.dtype, device: torch.device, *, third: bool = True) -> Sample:
    """Two classes meet at the radius; a third, steeper and far below, lifts the network's bound."""
    draw, u, w, found = _chain(seed, dtype, device)
    weight, bias = torch.cat((u, -u, 5.0 * w), 1).mT, torch.tensor([0.0, 0.0, -500.0])
    classes = 3 if third else 2
    return {**found, "head": (draw.give(weight[:classes]), draw.give(bias[:classes]))}
