"""State dicts of adapters: whole or not at all, of every rank and dtype, ΔW to rounding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from moved_adapters import moved
from torch import nn

import lrmanifold as lrm
from lrmanifold.nn import LowRankAdapter

DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])


def adapted(rank: int, dtype=torch.float32, **options) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 7)).to(dtype)
    return lrm.nn.adapt(model, rank, include="1", **options)


def one_adapter(rank: int, dtype=torch.float32, **options) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 7)).to(dtype)
    model[1] = LowRankAdapter(model[1], rank, **options)
    return model


def change_of(model: nn.Module) -> lrm.nn.Change:
    return next(m for m in model.modules() if isinstance(m, lrm.nn.Change))


def values(model: nn.Module) -> dict:
    return {k: v.detach().as_subclass(torch.Tensor).clone() for k, v in model.state_dict().items()}


@given(
    ranks=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    dtypes=st.tuples(DTYPES, DTYPES),
    tau=st.sampled_from([None, 0.0, 0.1, 2.0]),
    make=st.sampled_from([adapted, one_adapter]),
    trained=st.booleans(),
)
def test_an_adapter_of_another_rank_and_dtype_brings_its_change(
    ranks, dtypes, tau, make, trained, device
):
    source = moved(make(ranks[0], dtypes[0], tau=tau).to(device))
    model = make(ranks[1], dtypes[1], tau=tau).to(device)
    model.load_state_dict(
        lrm.nn.trained_state_dict(source) if trained else source.state_dict(), strict=not trained
    )
    mine, its = change_of(model), change_of(source)
    assert mine.rank == mine.start.shape[1] == ranks[0]
    assert mine.update.weight.dtype == mine.start.dtype == dtypes[1]
    eps = max(torch.finfo(dtype).eps for dtype in (*dtypes, torch.float32))
    size = float(torch.linalg.matrix_norm(its.delta().double()))
    error = torch.linalg.matrix_norm(mine.delta().double() - its.delta().double())
    assert float(error) <= 30 * eps * (size + 1)


@given(ranks=st.tuples(st.integers(1, 7), st.integers(1, 7)), dtypes=st.tuples(DTYPES, DTYPES))
def test_a_change_whose_rank_has_changed_is_converted(ranks, dtypes, device):
    model = adapted(ranks[0], dtypes[0], tau=None, alpha=3).to(device)
    change = change_of(model)
    M, W = change.update.manifold, change.update.weight
    with torch.no_grad():  # as a scheduler of ranks does: the start keeps its own
        M.set_rank_(ranks[1])
        X = M.random(*M.point_shape, dtype=torch.float64, device=device)
        lrm.parameter.replace_data(W, X.to(W.dtype))
    before = change.delta().double()
    model.to(dtypes[1])
    assert change.start.shape[1] == ranks[0]
    assert change.rank == ranks[1]
    assert change.start.dtype == W.dtype == dtypes[1]
    eps = max(torch.finfo(dtype).eps for dtype in (*dtypes, torch.float32))
    error = torch.linalg.matrix_norm(change.delta().double() - before)
    assert float(error) <= 60 * eps * (1 + float(torch.linalg.matrix_norm(before)))


def test_a_rank_scheduler_leaves_a_model_that_can_be_converted():
    model = adapted(2, tau=None, gradient="probe")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = lrm.optim.CondLR(trained, lr=0.1)
    scheduler = lrm.optim.RankScheduler(model, optimizer, tol=0.0, max_rank=5)
    x = torch.randn(8, 6)
    model(x).square().mean().backward()
    optimizer.step()
    scheduler.step()
    assert change_of(model).rank != change_of(model).start.shape[1]
    y = model(x)
    torch.testing.assert_close(model.double()(x.double()).float(), y)
    assert {v.dtype for v in model.state_dict().values()} == {torch.float64}


@pytest.fixture
def swapping():
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@torch.no_grad()  # torch does not swap a parameter of which a graph is alive
@pytest.mark.parametrize("optimizer_before", [True, False])
def test_where_torch_swaps_parameters_adapters_are_converted_and_loaded(
    optimizer_before, swapping, device
):
    model = nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 7)).to(device)
    before = torch.optim.SGD(model.parameters(), lr=0.1) if optimizer_before else None
    model = moved(lrm.nn.adapt(model, 2, include="1")).to(device)
    x = torch.randn(4, 6, device=device)
    y = model(x)
    torch.testing.assert_close(model.double()(x.double()).float(), y)
    W = change_of(model).update.weight
    assert W.manifold is change_of(model).update.manifold
    other = adapted(3).to(device)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(x), y)
    assert before is None or before.param_groups[0]["params"][0] is model[0].weight


WRONG = {
    "update off its manifold": ("update.weight", lambda v: 1.5 * v, "not a point of"),
    "update of no rank": ("update.weight", lambda v: v[:, :1], "its shape must be"),
    "start of no rank": ("start", lambda v: v[:-1], r"start must have shape \(7 \+ r \+ 9, r\)"),
    "scale": ("_extra_state", lambda v: v + float("inf"), "must be a finite number, the scale"),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("make", [adapted, one_adapter])
@pytest.mark.parametrize("whole", [True, False])
def test_a_change_is_loaded_whole_or_not_at_all(wrong, rank, make, whole):
    source = moved(make(rank))
    key, spoil, words = WRONG[wrong]
    state = values(source) if whole else lrm.nn.trained_state_dict(source)
    keys = [k for k in state if k.endswith(key)]
    if make is one_adapter and wrong == "scale":
        assert not keys
        return
    model = moved(make(2))
    before = values(model)
    with pytest.raises(RuntimeError, match=words):
        model.load_state_dict({**state, keys[0]: spoil(state[keys[0]])}, strict=whole)
    for name, value in values(model).items():
        if "changes" in name or (name.startswith("1.") and make is one_adapter):
            assert torch.equal(value, before[name]), name


def test_a_buffer_named_scale_of_the_dense_layer_is_its_own():
    dense = nn.Linear(6, 5)
    dense.register_buffer("scale", torch.tensor(3.0))
    adapter = LowRankAdapter(dense, 2)
    state = {**adapter.state_dict(), "scale": torch.tensor(4.0)}
    adapter.load_state_dict(state)
    assert float(adapter.scale) == 4.0
    assert adapter.change_scale == 1.0
