"""A parameter that lost its manifold, or was written off it, never trains in silence."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import geoopt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds
from torch import Tensor, nn

import lrmanifold as lrm
from lrmanifold import GeometryError
from lrmanifold.nn import LowRankConv2d, LowRankLinear
from lrmanifold.optim import CondLR


def layer_and_optimizer(device="cpu", dtype=torch.float32, steps: int = 3, tau=0.5):
    layer = LowRankLinear(7, 9, 3, tau=tau, device=device, dtype=dtype)
    optimizer = CondLR(layer.named_parameters(), lr=0.05, momentum=0.5)
    for _ in range(steps):
        step(layer, optimizer)
    return layer, optimizer


def step(layer: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for p in layer.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()


def expect_refusal(layer: nn.Module, optimizer, match: str = "weight") -> None:
    """The step raises, names the weight, and raises again; nothing has moved."""
    before = [p.detach().clone() for p in layer.parameters()]
    for _ in range(2):
        with pytest.raises(GeometryError, match=match):
            step(layer, optimizer)
    for p, x in zip(layer.parameters(), before, strict=True):
        assert torch.equal(p.detach().nan_to_num(7.0), x.nan_to_num(7.0))


# -- a lost manifold


def delete_attribute(layer, optimizer):
    del layer.weight.manifold


def replace_by_euclidean(layer, optimizer):
    layer.weight.manifold = geoopt.Euclidean()


def replace_by_none(layer, optimizer):
    layer.weight.manifold = None


def replace_by_stiefel(layer, optimizer):
    layer.weight.manifold = lrm.Stiefel()


def replace_by_another_size(layer, optimizer):
    layer.weight.manifold = lrm.WellConditioned(9, 7, 2, tau=0.5)


def forget_the_bound(layer, optimizer):
    layer.weight.manifold = lrm.FixedRank(9, 7, 3)


def plain_parameter_in_the_group(layer, optimizer):
    params = optimizer.param_groups[0]["params"]
    params[0] = layer._parameters["weight"] = nn.Parameter(layer.weight.detach().clone())


def forget_the_class(layer, optimizer):
    layer.weight.__class__ = nn.Parameter
    del layer.weight.manifold


def swap_with_a_plain_parameter(layer, optimizer):
    torch.utils.swap_tensors(layer.weight, nn.Parameter(layer.weight.detach().clone()))


def append_to_the_group(layer, optimizer):
    optimizer.param_groups[0]["params"].append(nn.Parameter(torch.zeros(3)))


def remove_from_the_group(layer, optimizer):
    del optimizer.param_groups[0]["params"][0]


def add_a_group_by_hand(layer, optimizer):
    group = {**optimizer.param_groups[0], "params": [nn.Parameter(torch.zeros(3))]}
    optimizer.param_groups.append(group)


LOSSES = [
    delete_attribute,
    replace_by_euclidean,
    replace_by_none,
    replace_by_stiefel,
    replace_by_another_size,
    forget_the_bound,
    plain_parameter_in_the_group,
    forget_the_class,
    swap_with_a_plain_parameter,
]
EDITS = [append_to_the_group, remove_from_the_group, add_a_group_by_hand]


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("lose", LOSSES)
def test_a_lost_manifold_raises(device, lose: Callable, steps):
    layer, optimizer = layer_and_optimizer(device, steps=steps)
    lose(layer, optimizer)
    expect_refusal(layer, optimizer, "'weight' was on WellConditioned and now is")


@pytest.mark.parametrize("edit", EDITS)
def test_groups_edited_by_hand_raise(edit: Callable):
    layer, optimizer = layer_and_optimizer()
    edit(layer, optimizer)
    expect_refusal(layer, optimizer, "add_param_group")


# geoopt and torch refuse to copy what the other losses leave behind.
@pytest.mark.parametrize(
    "lose", [replace_by_euclidean, replace_by_none, replace_by_stiefel, forget_the_bound]
)
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "load_state_dict"])
def test_a_loss_before_a_copy_is_still_noticed(lose: Callable, how):
    layer, optimizer = layer_and_optimizer()
    lose(layer, optimizer)
    if how == "deepcopy":
        layer, optimizer = copy.deepcopy((layer, optimizer))
    elif how == "pickle":
        layer, optimizer = pickle.loads(pickle.dumps((layer, optimizer)))
    else:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    expect_refusal(layer, optimizer, "'weight' was on WellConditioned and now is")


def test_a_loss_is_noticed_without_a_gradient():
    layer, optimizer = layer_and_optimizer()
    del layer.weight.manifold
    layer.weight.grad = None
    with pytest.raises(GeometryError, match="its manifold was lost"):
        optimizer.step()


def test_a_manifold_given_later_is_taken_up():
    M = lrm.WellConditioned(9, 7, 3, tau=0.5)
    p = nn.Parameter(M.random().as_subclass(Tensor).clone())
    optimizer = CondLR([p], lr=0.05)
    p.manifold = M
    p.grad = torch.ones_like(p)
    for _ in range(3):
        optimizer.step()
    assert M.check_point_on_manifold(p.detach(), atol=1e-5)
    del p.manifold
    with pytest.raises(GeometryError):
        optimizer.step()


def test_the_same_manifold_in_another_object_is_accepted():
    layer, optimizer = layer_and_optimizer()
    layer.weight.manifold = copy.deepcopy(layer.manifold)
    step(layer, optimizer)


# -- writes off the manifold


def times_two(p):
    p.copy_(2.0 * p)


def noise(p):
    p.add_(0.3 * torch.randn_like(p))


def zero(p):
    p.zero_()


def zero_core(p):
    p.manifold.unpack(p).S.zero_()


def ill_conditioned_core(p):
    S = p.manifold.unpack(p).S
    S.copy_(torch.diag(torch.linspace(0.1, 1.0, 3)))


def not_a_number(p):
    p[0, 0] = float("nan")


def wrong_shape(p):
    p.data = torch.ones(5, 3, dtype=p.dtype, device=p.device)


def another_rank(p):
    M = lrm.WellConditioned(9, 7, 2, tau=0.5)
    p.data = M.random(dtype=p.dtype, device=p.device).as_subclass(Tensor)


def gaussian_storage(p):
    p.data = torch.randn_like(p)


def through_data(write: Callable) -> Callable:
    """The same write where torch does not count it."""

    def hidden(p):
        with torch.no_grad():
            view = p.data
            view.manifold = p.manifold
            write(view)

    hidden.__name__ = f"{write.__name__}, through .data"
    return hidden


COUNTED = [times_two, noise, zero, zero_core, ill_conditioned_core, not_a_number]
OTHER_STORAGE = [wrong_shape, another_rank, gaussian_storage]
WRITES = [*COUNTED, *OTHER_STORAGE, *(through_data(w) for w in COUNTED)]


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("write", WRITES, ids=lambda w: w.__name__)
def test_writes_off_the_manifold_raise(device, write: Callable, steps):
    layer, optimizer = layer_and_optimizer(device, steps=steps)
    if device.type != "cpu" and "through" in write.__name__:
        pytest.skip("uncounted writes into the same storage go unseen on an accelerator")
    layer.weight.grad = None
    with torch.no_grad():
        write(layer.weight)
    expect_refusal(layer, optimizer, "weight.*(not on its manifold|was on)")


def test_every_point_of_a_batch_is_looked_at(device):
    layer = LowRankConv2d(6, 9, 3, 2, groups=3, device=device)
    optimizer = CondLR(layer.named_parameters(), lr=0.05)
    step(layer, optimizer)
    with torch.no_grad():
        layer.weight[2, 0] += 0.5
    expect_refusal(layer, optimizer)


def test_points_of_other_manifolds_are_looked_at():
    frame = geoopt.ManifoldParameter(
        lrm.Stiefel().random(6, 2).as_subclass(Tensor), manifold=geoopt.EuclideanStiefel()
    )
    optimizer = CondLR([frame], lr=0.1)
    frame.grad = torch.ones_like(frame)
    optimizer.step()
    frame.data.mul_(3.0)
    with pytest.raises(GeometryError, match=r"0 of group 0 \(shape \(6, 2\)\) is not on its"):
        optimizer.step()


def test_a_model_in_the_place_of_its_parameters_is_refused():
    with pytest.raises(TypeError, match=r"params must be parameters, got a module.*parameters\(\)"):
        CondLR(torch.nn.Sequential(lrm.nn.LowRankLinear(8, 6, 3)), lr=0.1)


def test_a_step_that_loses_rank_says_so_in_words_of_the_weight():
    layer = lrm.nn.LowRankLinear(8, 6, 3, tau=0.1)
    optimizer = CondLR(layer.parameters(), lr=1e12)
    layer(torch.ones(2, 8)).square().sum().backward()
    with pytest.raises(FloatingPointError, match="so long that the weight loses rank") as caught:
        optimizer.step()
    assert "A must" not in str(caught.value)


def test_labels_say_what_a_parameter_is():
    model = torch.nn.Sequential(lrm.nn.LowRankLinear(8, 6, 3, tau=0.1))
    for params, label in (
        (model.parameters(), r"parameter 0 of group 0 \(6 x 8, rank 3\)"),
        (model.named_parameters(), "'0.weight'"),
        (lrm.optim.param_groups(model), "'0.weight'"),
    ):
        optimizer = CondLR(params, lr=0.1)
        model(torch.ones(2, 8)).sum().backward()
        model[0].weight.data.mul_(3.0)
        with pytest.raises(GeometryError, match=f"{label} is not on its manifold"):
            optimizer.step()
        model[0].weight.data.div_(3.0)


def test_a_weight_of_nan_is_named_and_not_sent_to_a_projection():
    model = torch.nn.Sequential(lrm.nn.LowRankLinear(8, 6, 3, tau=0.1))
    optimizer = CondLR(model.named_parameters(), lr=0.1)
    model(torch.ones(2, 8)).sum().backward()
    model[0].weight.data[0, 0] = torch.nan
    with pytest.raises(GeometryError, match=r"'0.weight' is .* NaN or Inf.* checkpoint") as caught:
        optimizer.step()
    assert "projx" not in str(caught.value)


def test_writing_back_a_point_of_the_manifold_goes_on():
    layer, optimizer = layer_and_optimizer()
    with torch.no_grad():
        noise(layer.weight)
        with pytest.raises(GeometryError, match=r"p.data.copy_\(p.manifold.projx\(p\)\)"):
            step(layer, optimizer)
        layer.weight.copy_(layer.manifold.projx(layer.weight))
    step(layer, optimizer)
    assert layer.manifold.check_point_on_manifold(layer.weight.detach(), atol=1e-5)


@given(size=st.sampled_from([1e-7, 1e-5, 1e-3, 5e-3]), hidden=st.booleans(), seed=seeds)
def test_rounding_is_repaired_without_changing_the_matrix(size, hidden, seed):
    torch.manual_seed(seed)
    layer, optimizer = layer_and_optimizer(dtype=torch.float64, tau=None)
    M = layer.manifold
    target = layer.weight.data if hidden else layer.weight
    with torch.no_grad():
        target.add_(size * torch.randn_like(target))
    W = M.to_dense(layer.weight.detach())
    optimizer.param_groups[0]["lr"] = 0.0
    step(layer, optimizer)
    assert float(M.drift(layer.weight.detach())) <= 1e-10
    # Not even a large rounding is passed on: at rate 0 the matrix is what it was.
    torch.testing.assert_close(M.to_dense(layer.weight.detach()), W, rtol=0.0, atol=2e-6)


def test_vectors_written_by_vector_to_parameters_are_looked_at():
    layer, optimizer = layer_and_optimizer()
    vector = nn.utils.parameters_to_vector(layer.parameters()).detach()
    assert vector.numel() == sum(p.numel() for p in layer.parameters())
    nn.utils.vector_to_parameters(vector, layer.parameters())
    step(layer, optimizer)
    nn.utils.vector_to_parameters(1.5 * vector, layer.parameters())
    expect_refusal(layer, optimizer)


def test_swapping_in_an_average_and_training_on_raises():
    layer, optimizer = layer_and_optimizer()
    other = LowRankLinear(7, 9, 3, tau=0.5)
    live = [p.detach().clone() for p in layer.parameters()]
    for p, q in zip(layer.parameters(), other.parameters(), strict=True):
        p.data.copy_(0.5 * (p.data + q.data))
    expect_refusal(layer, optimizer)
    for p, x in zip(layer.parameters(), live, strict=True):
        p.data.copy_(x)
    step(layer, optimizer)


def test_own_steps_are_not_taken_for_foreign_writes(monkeypatch):
    layer, optimizer = layer_and_optimizer(steps=1)
    calls = []
    check = type(layer.manifold).check_point_on_manifold
    monkeypatch.setattr(
        type(layer.manifold),
        "check_point_on_manifold",
        lambda self, *a, **k: calls.append(1) or check(self, *a, **k),
    )
    for _ in range(50):
        step(layer, optimizer)
    assert not calls
    optimizer.zero_grad(set_to_none=False)
    layer(torch.randn(2, 7)).sum().backward()
    layer.state_dict()
    copy.deepcopy(layer)
    optimizer.step()
    assert not calls
