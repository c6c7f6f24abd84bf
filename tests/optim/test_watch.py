"""Training that goes wrong is not silent: foreign optimizers, skipped steps, weights off course."""

import warnings

import geoopt
import pytest
import torch
from torch import nn

import lrmanifold as lrm


def low_rank(device):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 5))
    return lrm.factorize(model, rank=4, tau=0.1, exclude="2").to(device)


def step(model, optimizer, device, scale=1.0):
    optimizer.zero_grad()
    (scale * model(torch.randn(8, 20, device=device)).square().mean()).backward()
    optimizer.step()


def test_a_foreign_optimizer_is_warned_of_once(device):
    model = low_rank(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with pytest.warns(UserWarning, match="AdamW moved 1 low-rank weights"):
        step(model, optimizer, device)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, optimizer, device)


@pytest.mark.parametrize(
    "make",
    [
        lambda m: lrm.optim.CondLR(m.parameters(), lr=0.01),
        lambda m: lrm.optim.CondLRAdam(m.parameters(), lr=0.01),
        lambda m: geoopt.optim.RiemannianSGD(m.parameters(), lr=0.01),
        lambda m: geoopt.optim.RiemannianAdam(m.parameters(), lr=0.01),
        lambda m: torch.optim.SGD(m[2].parameters(), lr=0.01),
        lambda m: torch.optim.SGD(m.parameters(), lr=0.0),
    ],
)
def test_optimizers_that_keep_or_leave_alone_the_weights_are_not_warned_of(make, device):
    model = low_rank(device)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, make(model), device)


def test_checkpoints_refuse_what_a_foreign_optimizer_left(tmp_path, device):
    model = low_rank(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with pytest.warns(UserWarning, match="leave their manifold"):
        step(model, optimizer, device)
    for _ in range(49):
        step(model, optimizer, device)
    with pytest.raises(lrm.checkpoint.CheckpointError, match="manifold"):
        lrm.checkpoint.save(tmp_path / "model.pt", model)
    assert not (tmp_path / "model.pt").exists()


def test_warnings_point_to_the_line_of_the_user_also_with_a_scheduler(device):
    model = low_rank(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    with pytest.warns(UserWarning, match="AdamW moved") as caught:
        step(model, optimizer, device)
    assert caught[0].filename == __file__


def test_skipped_steps_are_warned_of_with_their_number(device):
    model = low_rank(device)
    optimizer = lrm.optim.CondLR(model.parameters(), lr=0.01)
    said = []
    for i in range(40):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            step(model, optimizer, device, scale=float("nan"))
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize()
        said += [(i, str(w.message)) for w in found]
    assert all("left out" in text for _, text in said)
    if torch.device(device).type == "cpu":
        assert [(i, f"left out {i + 1} of" in text) for i, text in said] == [(0, True), (9, True)]
    else:
        assert said
    assert lrm.monitor(model, optimizer).measure()["skipped_steps"] == 40


def test_one_bad_step_counts_once_however_many_parameters_it_had(device):
    model = low_rank(device)
    optimizer = lrm.optim.CondLR(model.parameters(), lr=0.01)
    assert optimizer.skipped_steps == 0
    step(model, optimizer, device)

    def train():
        step(model, optimizer, device, scale=float("nan"))
        for _ in range(40):  # an accelerator is not waited for
            step(model, optimizer, device)

    with pytest.warns(UserWarning, match=r"zero_grad\(\) missing"):
        train()
    assert optimizer.skipped_steps == 1
    for p in model.parameters():
        p.grad = torch.full_like(p, torch.nan if p is model[2].bias else 0.0)
    optimizer.step()
    assert optimizer.skipped_steps == 2
    assert [int(s["skipped"]) for s in optimizer.state.values()] == [1, 1, 1, 2]


def test_finite_steps_are_not_warned_of(device):
    model = low_rank(device)
    optimizer = lrm.optim.CondLR(model.parameters(), lr=0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(40):
            step(model, optimizer, device)


@pytest.mark.parametrize(("drift", "repaired"), [(0.09, True), (0.11, False)])
def test_small_drifts_are_repaired_and_larger_ones_refused(drift, repaired, device):
    model = low_rank(device)
    optimizer = lrm.optim.CondLR(model.parameters(), lr=0.01)
    with torch.no_grad():
        model[0].weight[:20] *= (1 + drift) ** 0.5
    if repaired:
        step(model, optimizer, device)
        assert lrm.report(model).layers[0].drift < 1e-5
    else:
        with pytest.raises(lrm.GeometryError, match="not orthonormal"):
            step(model, optimizer, device)
