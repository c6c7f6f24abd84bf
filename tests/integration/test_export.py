"""Compiled, exported and ONNX models compute what the model computes."""

from __future__ import annotations

import copy
import io
import shutil
import warnings

import pytest
import torch
from torch import nn

import lrmanifold as lrm

KINDS = ("low-rank", "folded", "dense", "adapter")


def network(kind: str, gradient="factors") -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, groups=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 16)
    )
    lrm.factorize(model, rank=3, gradient=gradient, keep_larger=True)
    if kind == "folded":
        lrm.fold(model)
    elif kind == "dense":
        lrm.densify(model)
    elif kind == "adapter":
        model.append(lrm.nn.LowRankAdapter(nn.Linear(16, 5), 2))
    return model


def batch(size=3):
    return torch.randn(size, 4, 4, 4)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcc") is None, reason="torch.compile needs a C compiler")
@pytest.mark.parametrize("gradient", ["factors", "probe"])
def test_compiled_without_a_graph_break_forward_and_backward(gradient):
    model = network("low-rank", gradient)
    compiled = torch.compile(model, fullgraph=True)
    x = batch()
    one, other = compiled(x), model(x)
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    grads = [torch.autograd.grad(y.square().sum(), list(model.parameters())) for y in (one, other)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gradient", ["factors", "probe"])
def test_the_graph_of_the_layers_has_no_break(gradient):
    """Tracing alone, forward and backward: no C compiler, a fraction of the time."""
    torch._dynamo.reset()
    model = network("low-rank", gradient)
    model.append(lrm.nn.LowRankAdapter(nn.Linear(16, 5), 2))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = batch()
    one, other = compiled(x), model(x)
    torch.testing.assert_close(one, other)
    wanted = [p for p in model.parameters() if p.requires_grad]
    grads = [torch.autograd.grad(y.square().sum(), wanted) for y in (one, other)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("tau", [0.0, 0.1, None])
def test_convex_potentials_compile_whole_and_export(tau):
    """For tau > 0 their norm takes an SVD, which looks at no value in a graph."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer, x = lrm.nn.ConvexPotential(16, 4, tau=tau), torch.randn(3, 16)
    with torch.no_grad():
        layer.layer.weight.copy_(layer.layer.manifold.random(*layer.layer.weight.shape))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    ys = [compiled(x), layer(x)]
    torch.testing.assert_close(*ys)
    grads = [torch.autograd.grad(y.square().sum(), list(layer.parameters())) for y in ys]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
    exported = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(exported.module()(x[:2]), layer(x[:2]))


def test_a_compiled_training_step_breaks_at_the_optimizer_and_is_compiled_once():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    width = (16, 24, 32)
    layers = [nn.Linear(width[i % 3], width[(i + 1) % 3]) for i in range(12)]
    model = lrm.factorize(nn.Sequential(*layers), rank=4)
    reference = copy.deepcopy(model)
    optimizers = [
        lrm.optim.CondLR(m.parameters(), lr=0.1, momentum=0.5) for m in (model, reference)
    ]
    compiled = torch.compile(optimizers[0].step, backend="eager")
    graphs = []
    for _ in range(5):
        x = torch.randn(8, 16)
        for m, step in ((model, compiled), (reference, optimizers[1].step)):
            m.zero_grad()
            m(x).square().mean().backward()
            step()
        graphs.append(torch._dynamo.utils.counters["stats"].get("unique_graphs", 0))
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(a, b)
    assert graphs[-1] <= 1
    assert sum(torch._dynamo.utils.counters["graph_break"].values()) <= 2


@pytest.mark.parametrize("kind", KINDS)
def test_torch_export(kind, tmp_path):
    model = network(kind).eval()
    size = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (batch(),), dynamic_shapes=({0: size},))
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    x = batch(7)
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "kind",
    [
        "low-rank",
        "folded",
        *(pytest.param(k, marks=pytest.mark.slow) for k in ("dense", "adapter")),
    ],
)
def test_onnx_through_onnxruntime(kind, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    model = network(kind).eval()
    path = tmp_path / "model.onnx"
    size = torch.export.Dim("batch", min=1, max=64)
    torch.onnx.export(
        model, (batch(),), path, dynamo=True, dynamic_shapes=({0: size},), verbose=False
    )
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    x = batch(7)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(x).detach(), rtol=1e-4, atol=1e-5)


def attention():
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)


ONNX_CASES = {
    "linear": lambda: (lrm.nn.LowRankLinear(8, 9, 2), torch.randn(2, 8)),
    "grouped Conv1d": lambda: (lrm.nn.LowRankConv1d(4, 8, 3, 2, groups=2), torch.randn(2, 4, 8)),
    "reflecting Conv2d": lambda: (
        lrm.nn.LowRankConv2d(4, 8, 3, 2, padding=1, padding_mode="reflect"),
        torch.randn(2, 4, 8, 8),
    ),
    "grouped ConvTranspose2d": lambda: (
        lrm.nn.LowRankConvTranspose2d(4, 8, 3, 2, groups=2),
        torch.randn(2, 4, 8, 8),
    ),
    "embedding": lambda: (lrm.nn.LowRankEmbedding(20, 8, 2), torch.randint(20, (2, 5))),
    "encoder": lambda: (
        lrm.factorize(attention(), rank=2, keep_larger=True),
        torch.randn(2, 5, 8),
    ),
    "weights of attention": lambda: (
        lrm.nn.LowRankMultiheadAttention(8, 2, 2),
        (torch.randn(5, 2, 8),) * 3,
    ),
    "adapter": lambda: (lrm.nn.LowRankAdapter(nn.Linear(8, 9), 2), torch.randn(2, 8)),
    "convex potential": lambda: (lrm.nn.ConvexPotential(8, 4), torch.randn(2, 8)),
}


@pytest.mark.parametrize("case", ONNX_CASES)
def test_onnx_by_torchscript_which_is_the_default_before_torch_2_9(case):
    """Every operator is known to it. To write the file it needs the package onnx."""
    model, x = ONNX_CASES[case]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            torch.onnx.export(
                model.eval(), x if isinstance(x, tuple) else (x,), io.BytesIO(), dynamo=False
            )
        except torch.onnx.OnnxExporterError as error:
            if "onnx is not installed" not in str(error):
                raise
