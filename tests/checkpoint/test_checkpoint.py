"""Checkpoints: what is saved comes back to the bit, what does not fit is named, nothing by half."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path

import geoopt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lrmanifold as lrm
from lrmanifold import checkpoint
from lrmanifold._files import write_atomically
from lrmanifold.checkpoint import CheckpointError, _file, _save

FORMATS = ["model.pt", "model.safetensors"]


@pytest.fixture(params=FORMATS)
def path(request, tmp_path):
    if request.param.endswith(".safetensors"):
        pytest.importorskip("safetensors")
    return tmp_path / request.param


def dense_model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, groups=2), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 12), nn.ReLU()
    )


def model(rank: int = 2, tau: float | None = 0.1, dtype=torch.float32) -> nn.Module:
    return lrm.factorize(dense_model().to(dtype), rank=rank, tau=tau)


def train(network: nn.Module, optimizer, steps: int) -> None:
    generator = torch.Generator().manual_seed(5)
    dtype = network[0].weight.dtype
    for _ in range(steps):
        x = torch.randn(6, 4, 4, 4, generator=generator, dtype=dtype)
        optimizer.zero_grad()
        network(x).square().mean().backward()
        optimizer.step()


def snapshot(network: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in network.state_dict().items()}


def assert_equal(network: nn.Module, saved: dict[str, torch.Tensor]) -> None:
    state = network.state_dict()
    assert state.keys() == saved.keys()
    for key, value in saved.items():
        assert torch.equal(state[key], value), key


def assert_whole(layer: lrm.nn.LowRankLayer) -> None:
    assert isinstance(layer.weight, geoopt.ManifoldParameter)
    assert layer.weight.manifold is layer.manifold
    tol = 5e-2 if layer.weight.element_size() == 2 else 1e-4
    assert layer.manifold.check_point_on_manifold(layer.weight.detach(), atol=tol, rtol=tol)


# -- what is saved comes back


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_models_come_back_to_the_bit(path, dtype):
    source, other = model(dtype=dtype), model(dtype=dtype)
    checkpoint.save(path, source)
    loaded = checkpoint.load(path, other)
    assert loaded == checkpoint.Loaded(None, (), (), ())
    assert_equal(other, snapshot(source))
    assert_whole(other[0])
    assert_whole(other[3])


@given(
    rank=st.integers(1, 8),
    other_rank=st.integers(1, 8),
    tau=st.one_of(st.none(), st.floats(0, 3)),
    kind=st.sampled_from(FORMATS),
)
def test_any_rank_and_bound_comes_back(tmp_path_factory, rank, other_rank, tau, kind):
    if kind.endswith(".safetensors"):
        pytest.importorskip("safetensors")
    path = tmp_path_factory.mktemp("any") / kind
    source = lrm.nn.LowRankLinear(9, 8, rank, tau=tau)
    other = lrm.nn.LowRankLinear(9, 8, other_rank, tau=tau)
    checkpoint.save(path, source)
    checkpoint.load(path, other)
    assert other.rank == rank
    assert_equal(other, snapshot(source))


@pytest.mark.parametrize("kind", [lrm.optim.CondLR, lrm.optim.CondLRAdam, lrm.optim.CondLRMuon])
def test_training_goes_on_to_the_bit(tmp_path, kind):
    path = tmp_path / "run.pt"
    options = {"momentum": 0.5} if kind is lrm.optim.CondLR else {}
    source = model()
    optimizer = kind(source.parameters(), lr=0.05, **options)
    train(source, optimizer, 3)
    checkpoint.save(path, source, optimizer, extra={"step": 3, "order": torch.arange(3)})
    train(source, optimizer, 4)

    other = model(rank=1)
    again = kind(other.parameters(), lr=0.3, **options)
    extra = checkpoint.load(path, other, again).extra
    assert extra["step"] == 3
    assert torch.equal(extra["order"], torch.arange(3))
    train(other, again, 4)
    assert_equal(other, snapshot(source))


def test_others_read_our_files_and_we_read_theirs(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    source, other = model(), model()
    checkpoint.save(tmp_path / "ours.safetensors", source)
    other.load_state_dict(safetensors.load_file(tmp_path / "ours.safetensors"))
    assert_equal(other, snapshot(source))
    checkpoint.save(tmp_path / "ours.pt", source)
    plain = torch.load(tmp_path / "ours.pt", weights_only=True)["model"]
    assert all(type(value) is torch.Tensor for value in plain.values())

    safetensors.save_file(source.state_dict(), tmp_path / "theirs.safetensors")
    safetensors.save_model(source, str(tmp_path / "model.safetensors"))
    torch.save(source.state_dict(), tmp_path / "theirs.pt")
    for name in ("theirs.safetensors", "model.safetensors", "theirs.pt"):
        other = model()
        checkpoint.load(tmp_path / name, other)
        assert_equal(other, snapshot(source))
        assert_whole(other[3])
    missing, unexpected = safetensors.load_model(other, str(tmp_path / "model.safetensors"))
    assert not missing
    assert not unexpected
    assert_whole(other[3])


def test_tied_weights_are_written_once_and_stay_tied(path):
    def tied():
        layers = [lrm.nn.LowRankLinear(8, 8, 2) for _ in range(2)]
        layers[1].weight = layers[0].weight
        return nn.Sequential(*layers)

    source, other = tied(), tied()
    checkpoint.save(path, source)
    checkpoint.load(path, other)
    assert other[0].weight is other[1].weight
    assert_equal(other, snapshot(source))
    assert set(_file.read(path)["aliases"]) == {"1.weight"}


# -- from dense


def test_a_dense_checkpoint_loads_into_its_factorized_twin_by_svd_on_request(path):
    dense = dense_model()
    checkpoint.save(path, dense)
    expected = lrm.factorize(copy.deepcopy(dense), rank=2, tau=0.1)
    twin = lrm.factorize(dense_model(), rank=2, tau=0.1, init="random")
    before = snapshot(twin)
    with pytest.raises(CheckpointError, match=r"'3\.weight' is a dense weight.*dense='svd'"):
        checkpoint.load(path, twin)
    assert_equal(twin, before)
    assert checkpoint.load(path, twin, dense="svd").from_dense == ("0.weight", "3.weight")
    assert_equal(twin, snapshot(expected))
    assert_whole(twin[0])


def test_a_dense_weight_that_has_no_low_rank_neighbour_is_named(path):
    dense = dense_model()
    nn.init.zeros_(dense[3].weight)
    checkpoint.save(path, dense)
    twin = lrm.factorize(dense_model(), rank=2, init="random")
    before = snapshot(twin)
    with pytest.raises(CheckpointError, match=r"'3\.weight' cannot be factorized: W must not be z"):
        checkpoint.load(path, twin, dense="svd")
    assert_equal(twin, before)


def test_a_low_rank_checkpoint_for_a_dense_model_says_what_to_do(path):
    checkpoint.save(path, model())
    with pytest.raises(CheckpointError, match=r"rank 2 of 12 x 32\): factorize the model before"):
        checkpoint.load(path, dense_model())


# -- what does not fit, and what is damaged


def spoiled(network: nn.Module, change) -> nn.Module:
    """A stand-in with an edited state dict."""
    state = snapshot(network)
    change(state)
    holder = nn.Module()
    holder.state_dict = lambda: state  # type: ignore[method-assign]
    return holder


PROBLEMS = {
    "off the manifold": (
        lambda s: s["3.weight"].add_(0.3),
        r"'3\.weight' is not a point.*not orth",
    ),
    "not finite": (lambda s: s["0.weight"].mul_(float("nan")), r"'0\.weight' is not.*NaN"),
    "wrong shape": (
        lambda s: s.update({"3.weight": torch.zeros(3, 4)}),
        r"'3\.weight' is not.*shape must be \(12 \+ r \+ 32, r\).*got \(3, 4\)",
    ),
    "wrong bias": (
        lambda s: s.update({"3.bias": torch.zeros(5)}),
        r"'3\.bias' must have shape \(12,\), got \(5,\)",
    ),
    "missing": (lambda s: s.pop("1.running_mean"), r"'1\.running_mean' is missing in the file"),
    "unexpected": (
        lambda s: s.update({"9.weight": torch.zeros(5)}),
        r"'9\.weight' is in the file, but not in the model",
    ),
    "integers": (
        lambda s: s.update({"3.weight": s["3.weight"].long()}),
        r"'3\.weight' is not.*dtype must be a floating",
    ),
}


@pytest.mark.parametrize("problem", list(PROBLEMS))
def test_a_mismatch_is_named_and_changes_nothing(path, problem, monkeypatch):
    change, words = PROBLEMS[problem]
    with monkeypatch.context() as patch:
        patch.setattr(_save, "_check_values", lambda *_: None)  # it would not be written
        checkpoint.save(path, spoiled(model(), change))
    other = model(rank=1)
    before = snapshot(other)
    with pytest.raises(CheckpointError, match=words):
        checkpoint.load(path, other)
    assert_equal(other, before)
    assert other[3].rank == 1


def test_all_mismatches_are_listed_and_strict_may_be_switched_off(path):
    def change(state):
        state.pop("1.running_mean")
        state["new"] = torch.zeros(1)

    source = model()
    checkpoint.save(path, spoiled(source, change))
    with pytest.raises(CheckpointError, match=r"(?s)'1\.running_mean' is missing.*'new' is in the"):
        checkpoint.load(path, model())
    other = model()
    loaded = checkpoint.load(path, other, strict=False)
    assert loaded.missing == ("1.running_mean",)
    assert loaded.unexpected == ("new",)
    assert torch.equal(other[3].weight, source[3].weight)


def test_a_flipped_bit_is_found_and_the_key_named(path):
    source = model()
    checkpoint.save(path, source)
    data = bytearray(path.read_bytes())
    inside = data.find(source[3].weight.detach().numpy().tobytes())
    assert inside > 0
    data[inside + 30] ^= 1  # a low bit of a mantissa: still a point of the manifold
    path.write_bytes(data)
    other = model()
    before = snapshot(other)
    with pytest.raises(CheckpointError, match=r"the values of '3\.weight' are not those"):
        checkpoint.load(path, other)
    assert_equal(other, before)


@given(cut=st.floats(0, 0.999), kind=st.sampled_from(FORMATS))
def test_a_file_cut_anywhere_is_refused(tmp_path_factory, cut, kind):
    if kind.endswith(".safetensors"):
        pytest.importorskip("safetensors")
    path = tmp_path_factory.mktemp("cut") / kind
    checkpoint.save(path, model())
    data = path.read_bytes()
    path.write_bytes(data[: int(cut * len(data))])
    with pytest.raises(CheckpointError, match="is damaged"):
        checkpoint.load(path, model())


def test_files_that_are_something_else_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"none\.pt: no such file"):
        checkpoint.load(tmp_path / "none.pt", model())
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="must hold a dict, got list"):
        checkpoint.load(tmp_path / "list.pt", model())
    torch.save({"a": 1}, tmp_path / "words.pt")
    with pytest.raises(CheckpointError, match="nor a state dict: 'a' must be a tensor, got int"):
        checkpoint.load(tmp_path / "words.pt", model())
    torch.save(model(), tmp_path / "code.pt")
    with pytest.raises(CheckpointError, match=r"holds more than tensors.*a whole model"):
        checkpoint.load(tmp_path / "code.pt", model())


def test_an_optimizer_that_does_not_fit_changes_nothing(tmp_path):
    source = model()
    optimizer = lrm.optim.CondLR(source.parameters(), lr=0.1, momentum=0.5)
    train(source, optimizer, 1)
    checkpoint.save(tmp_path / "a.pt", source, optimizer)
    other = model(rank=1)
    before = snapshot(other)
    fewer = lrm.optim.CondLR([other[3].weight], lr=0.1)
    with pytest.raises(CheckpointError, match=r"must have groups of \[1\] parameters, got \[6\]"):
        checkpoint.load(tmp_path / "a.pt", other, fewer)
    assert_equal(other, before)
    checkpoint.save(tmp_path / "b.pt", source)
    with pytest.raises(CheckpointError, match="the file holds no optimizer"):
        checkpoint.load(tmp_path / "b.pt", other, fewer)

    dense = dense_model()
    sgd = torch.optim.SGD(dense.parameters(), lr=0.1, momentum=0.9)
    train(dense, sgd, 1)
    checkpoint.save(tmp_path / "dense.pt", dense, sgd)
    mine = lrm.optim.CondLR(other.parameters(), lr=0.1, momentum=0.5)
    with pytest.raises(CheckpointError, match=r"'momentum_buffer' of '3\.weight' must have shape"):
        checkpoint.load(tmp_path / "dense.pt", other, mine, dense="svd")
    assert_equal(other, before)


def test_what_could_not_be_read_again_is_not_written(tmp_path):
    for extra in ({"f": len}, [nn.ReLU()], {"a": {"b": {1, 2}}}, {("a", (1, Path())): 1}):
        with pytest.raises(CheckpointError, match="to be read without running code, got"):
            checkpoint.save(tmp_path / "a.pt", model(), extra=extra)
    with pytest.raises(ValueError, match=r"optimizer must be None for a\.safetensors"):
        checkpoint.save(
            tmp_path / "a.safetensors", model(), torch.optim.SGD([torch.zeros(1)], lr=0.1)
        )
    with pytest.raises(CheckpointError, match=r"'weight' has no values"):
        checkpoint.save(tmp_path / "a.pt", nn.Linear(2, 2, device="meta"))
    assert not list(tmp_path.iterdir())


def test_a_schedule_with_milestones_goes_on_from_a_file(tmp_path):
    def schedule():
        return torch.optim.lr_scheduler.MultiStepLR(torch.optim.SGD([torch.zeros(1)], 1.0), [1, 3])

    checkpoint.save(tmp_path / "a.pt", nn.Linear(2, 2), extra=schedule().state_dict())
    again = schedule()
    again.load_state_dict(checkpoint.peek(tmp_path / "a.pt"))
    assert [*again.milestones.elements()] == [1, 3]  # what its step(epoch) asks for


# -- versions


def test_newer_versions_are_refused_and_older_ones_migrated(tmp_path, monkeypatch):
    path, source = tmp_path / "a.pt", model()
    checkpoint.save(path, source)
    monkeypatch.setattr(_file, "VERSION", 5)

    def renamed(payload):
        payload["model"] = {k.replace("3.", "4."): v for k, v in payload["model"].items()}
        payload["checksums"] = {}
        return payload

    monkeypatch.setitem(_file.MIGRATIONS, 3, renamed)
    monkeypatch.setitem(_file.MIGRATIONS, 4, lambda payload: {**payload, "extra": "seen"})
    payload = _file.read(path)
    assert payload["version"] == 5
    assert payload["extra"] == "seen"
    assert "4.weight" in payload["model"]
    monkeypatch.undo()
    raw = torch.load(path, weights_only=True)
    for version, words in ((99, "has version 99, this library reads up to 3"), ("x", "version mu")):
        torch.save({**raw, "version": version}, path)
        with pytest.raises(CheckpointError, match=words):
            checkpoint.load(path, source)


def test_a_hook_brings_ones_own_changes(path):
    source = model()
    checkpoint.save(path, nn.ModuleDict({"old": source}))

    def migrate(payload):
        state = payload["model"]
        payload["model"] = {key.removeprefix("old."): value for key, value in state.items()}
        return payload

    other = model()
    checkpoint.load(path, other, migrate=migrate)
    assert_equal(other, snapshot(source))
    with pytest.raises(TypeError, match="migrate must return the payload"):
        checkpoint.load(path, other, migrate=lambda payload: None)


# -- whole or not at all


def test_a_failing_writer_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    write_atomically(path, b"old")

    def fail(*args):
        raise OSError("no space left")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(f"os.{name}", fail)
            with pytest.raises(OSError, match="no space left"):
                write_atomically(path, b"new")
        assert path.read_bytes() == b"old"
        assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_the_header_is_what_it_says(tmp_path):
    safetensors = pytest.importorskip("safetensors")
    checkpoint.save(tmp_path / "a.safetensors", model())
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        header = json.loads(file.metadata()["lrmanifold"])
    assert header["version"] == checkpoint.VERSION
    assert header["geometry"]["3.weight"] == {
        **{"m": 12, "n": 32, "rank": 2, "tau": 0.1, "centre": "metric"},
        **{"gradient": "factors", "retraction": "factored"},
    }
    buffer = io.BytesIO()
    torch.save(1, buffer)  # a file of another kind under this name
    (tmp_path / "a.safetensors").write_bytes(buffer.getvalue())
    with pytest.raises(CheckpointError, match="is damaged, or no safetensors file"):
        checkpoint.load(tmp_path / "a.safetensors", model())
