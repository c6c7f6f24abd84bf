"""Adapters in checkpoints: of every rank, and a model that is as before after every error."""

from __future__ import annotations

import pytest
import torch
from moved_adapters import moved
from torch import nn

import lrmanifold as lrm
from lrmanifold import checkpoint
from lrmanifold.checkpoint import CheckpointError


def adapted(rank: int, **options) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 7))
    return lrm.nn.adapt(model, rank, include="1", **options)


def one_adapter(rank: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 9), lrm.nn.LowRankAdapter(nn.Linear(9, 7), rank))


def values(model: nn.Module) -> dict:
    return {k: v.detach().as_subclass(torch.Tensor).clone() for k, v in model.state_dict().items()}


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def optimizer_of(model: nn.Module) -> lrm.optim.CondLR:
    trained = [p for p in model.parameters() if p.requires_grad]
    return lrm.optim.CondLR(trained, lr=0.1, momentum=0.9)


def take_steps(model: nn.Module, optimizer, count: int) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        optimizer.zero_grad()
        x = torch.randn(8, 6, generator=generator).to(next(model.parameters()).device)
        model(x).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("make", [adapted, one_adapter])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("ranks", [(2, 5), (5, 2)])
def test_an_adapter_takes_the_rank_of_the_file(make, suffix, ranks, tmp_path, device):
    source, model = moved(make(ranks[0])).to(device), make(ranks[1]).to(device)
    checkpoint.save(tmp_path / f"a{suffix}", source)
    checkpoint.load(tmp_path / f"a{suffix}", model)
    x = torch.randn(4, 6, device=device)
    assert torch.equal(model(x), source(x))
    take_steps(model, optimizer_of(model), 2)


def test_training_goes_on_with_the_ranks_of_the_file(tmp_path, device):
    source, model = adapted(5, alpha=3).to(device), adapted(2).to(device)
    optimizer, other = optimizer_of(source), optimizer_of(model)
    take_steps(source, optimizer, 3)
    checkpoint.save(tmp_path / "a.pt", source, optimizer)
    checkpoint.load(tmp_path / "a.pt", model, other)
    for each, rule in ((source, optimizer), (model, other)):
        take_steps(each, rule, 3)
    assert_same(values(model), values(source))


def without_start(state: dict) -> dict:
    return {k: v for k, v in state.items() if not k.endswith("start")}


def with_inf_as_scale(state: dict) -> dict:
    return {
        k: v + float("inf") if k.endswith("_extra_state") else v.clone() for k, v in state.items()
    }


def with_another_start(state: dict) -> dict:
    return {k: v[:-1] if k.endswith("start") else v for k, v in state.items()}


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (without_start, r"1\.changes\.default\.start is missing, and update.weight means nothing"),
        (with_inf_as_scale, r"1\.changes\.default\._extra_state must be a finite number, the sc"),
        (with_another_start, r"1\.changes\.default\.start must have shape \(7 \+ r \+ 9, r\)"),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_half_an_adapter_is_named_and_nothing_is_loaded(spoil, words, strict, tmp_path):
    torch.save(spoil(values(adapted(2, alpha=3))), tmp_path / "a.pt")
    model = adapted(3, alpha=5)
    before = values(model)
    with pytest.raises(CheckpointError, match=words):
        checkpoint.load(tmp_path / "a.pt", model, strict=strict)
    assert_same(values(model), before)


@pytest.mark.parametrize("with_optimizer", [True, False])
def test_after_a_refusal_by_a_layer_the_model_is_as_before(with_optimizer, tmp_path, device):
    class Picky(nn.Linear):
        def _load_from_state_dict(self, *args):
            if args[0][args[1] + "weight"][0, 0] > 0:
                raise ValueError("too large")
            super()._load_from_state_dict(*args)

    def picky(rank: int, first: float) -> nn.Sequential:
        model = moved(adapted(rank, alpha=rank)).append(Picky(7, 2)).to(device)
        with torch.no_grad():
            model[2].weight[0, 0] = first
        return model

    source, model = picky(4, 1.0), picky(2, -1.0)
    rules = [optimizer_of(each) if with_optimizer else None for each in (source, model)]
    checkpoint.save(tmp_path / "a.pt", source, rules[0])
    before = values(model)
    with pytest.raises(CheckpointError, match="does not fit: too large"):
        checkpoint.load(tmp_path / "a.pt", model, rules[1])
    assert_same(values(model), before)
    assert model[1].changes["default"].rank == 2
    assert model[1].changes["default"].change_scale == 1.0


def test_the_scale_of_older_files_is_known(tmp_path):
    source, model = moved(adapted(2, alpha=6)), adapted(2)
    older = {k.replace("_extra_state", "scale"): v for k, v in values(source).items()}
    torch.save(older, tmp_path / "a.pt")
    checkpoint.load(tmp_path / "a.pt", model)
    x = torch.randn(4, 6)
    assert torch.equal(model(x), source(x))
