"""Damage, bombs and what is of the wrong kind: refused by name, nothing loaded or overwritten."""

from __future__ import annotations

import enum
import json
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from torch import nn

import lrmanifold as lrm
from lrmanifold import _sealed, checkpoint
from lrmanifold._files import write_atomically
from lrmanifold._sealed import SealError, check_seal, read_torch, set_seal, write_torch
from lrmanifold.checkpoint import CheckpointError
from lrmanifold.experiments import runs


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# -- seals


def test_every_flipped_byte_of_a_sealed_file_is_found(tmp_path):
    write_torch(tmp_path / "a.pt", {"x": torch.arange(3)})
    runs.write_results(tmp_path / "results.json", {"format": runs.FORMAT, "a": 1.25})
    whole = (tmp_path / "a.pt").read_bytes()
    assert torch.equal(read_torch(tmp_path / "a.pt")[0]["x"], torch.arange(3))
    for i in (*range(0, len(whole) - 100, 3), *range(len(whole) - 100, len(whole))):
        damaged = bytearray(whole)
        damaged[i] ^= 1 << (i % 8)
        (tmp_path / "b.pt").write_bytes(damaged)
        try:
            assert not read_torch(tmp_path / "b.pt")[1]  # its mark is damaged: known as unsealed
            assert i >= len(whole) - len(_sealed.BLANK)
        except SealError:
            pass
    whole = (tmp_path / "results.json").read_bytes()
    assert runs.load_results(tmp_path) == {"format": runs.FORMAT, "a": 1.25}
    for i in range(len(whole)):
        damaged = bytearray(whole)
        damaged[i] ^= 1 << (i % 8)
        (tmp_path / "results.json").write_bytes(damaged)
        with pytest.raises(runs.RunError):
            runs.load_results(tmp_path)


def test_a_seal_is_the_digest_of_the_file_with_zeros_in_its_place():
    data = b"one " + _sealed.BLANK.encode() + b" two"
    sealed = bytes(set_seal(data))
    digits = sealed[20:84].decode()
    assert digits == _sealed.hashlib.sha256(data).hexdigest()
    assert check_seal(sealed)
    assert not check_seal(b"no seal")
    with pytest.raises(SealError, match="exactly one blank seal"):
        set_seal(b"none")


def test_other_programs_read_sealed_files_as_before(tmp_path):
    source = nn.Linear(3, 2)
    checkpoint.save(tmp_path / "a.pt", source)
    assert torch.equal(torch.load(tmp_path / "a.pt")["model"]["weight"], source.weight)
    mapped = torch.load(tmp_path / "a.pt", mmap=True)["model"]["weight"]
    assert torch.equal(mapped, source.weight)
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        assert archive.testzip() is None
        assert archive.comment.startswith(b"lrmanifold-seal:")
    packing = pytest.importorskip("safetensors.torch")
    checkpoint.save(tmp_path / "a.safetensors", source)
    assert torch.equal(packing.load_file(tmp_path / "a.safetensors")["weight"], source.weight)


def test_files_without_a_seal_are_checked_by_the_sums_of_their_archive(tmp_path):
    source = nn.Linear(40, 30)
    torch.save(source.state_dict(), tmp_path / "theirs.pt")
    checkpoint.load(tmp_path / "theirs.pt", nn.Linear(40, 30))
    data = bytearray((tmp_path / "theirs.pt").read_bytes())
    data[data.find(source.weight.detach().numpy().tobytes()) + 9] ^= 1
    (tmp_path / "theirs.pt").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"is damaged: the bytes of .*data/0 are not those"):
        checkpoint.load(tmp_path / "theirs.pt", nn.Linear(40, 30))


# -- bombs


def test_compressed_archives_are_refused_before_they_unpack(tmp_path):
    torch.save({"x": torch.zeros(1_000_000)}, tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as source,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for member in source.infolist():
            bomb.writestr(member.filename, source.read(member))
    assert (tmp_path / "bomb.pt").stat().st_size < 40_000
    with pytest.raises(CheckpointError, match="holds compressed data"):
        checkpoint.load(tmp_path / "bomb.pt", nn.Linear(1, 1))
    with pytest.raises(runs.RunError, match="holds compressed data"):
        runs.load_model(tmp_path / "bomb.pt")


def test_a_view_that_claims_a_huge_size_is_refused(tmp_path):
    checkpoint.save(tmp_path / "a.pt", nn.Linear(1, 1))
    raw = torch.load(tmp_path / "a.pt")
    raw["model"]["weight"] = torch.zeros(1).expand(2**30, 2**10)
    write_torch(tmp_path / "a.pt", raw)
    with pytest.raises(CheckpointError, match="'weight' are not those that were saved"):
        checkpoint.load(tmp_path / "a.pt", nn.Linear(1, 1))


def test_a_model_file_that_asks_for_a_huge_network_is_refused(tmp_path):
    size = {"name": "x", "image_shape": [3, 10**6, 10**4], "classes": 10}
    recipe = {"architecture": "mlp", "kind": "dense", "tau": None, "ranks": {}}
    data = {**size, "mean": [0.5], "std": [0.5]}
    saved = {"format": runs.FORMAT, "recipe": {**recipe, "data": data}}
    write_torch(tmp_path / "model.pt", {**saved, "state": {"w": torch.zeros(9)}})
    with pytest.raises(runs.RunError, match=r"does not fit together .9 stored numbers"):
        runs.load_model(tmp_path)


def test_json_that_is_nested_too_deep_is_refused(tmp_path):
    (tmp_path / "results.json").write_text("[" * 100_000)
    with pytest.raises(runs.RunError, match="cannot be read"):
        runs.load_results(tmp_path)


# -- what cannot be written, what is of the wrong kind

HEADERS = {
    "a list": ([1], "must be a JSON object, got list"),
    "a number": (3, "must be a JSON object, got int"),
    "a word": ("x", "must be a JSON object, got str"),
    "no version": ({"format": "lrmanifold checkpoint"}, "version must be an integer"),
    "geometry": ({"geometry": {"weight": 3}}, "the geometry of 'weight' must be a dict, got 3"),
    "aliases": ({"aliases": {"b": ["weight"]}}, r"\['weight'\], shared by 'b', is missing"),
    "checksums": ({"checksums": 5}, "'checksums' must be a dict, got 5"),
    "a checksum": ({"checksums": {"weight": "x"}}, "the values of 'weight' are not those"),
    "a tensor that is not there": ({"checksums": {"v": 1}}, "the tensor 'v' is missing"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_safetensors_metadata_of_the_wrong_kind_is_a_named_error(tmp_path, case):
    packing = pytest.importorskip("safetensors.torch")
    header, words = HEADERS[case]
    if isinstance(header, dict) and "format" not in header:
        parts = {"aliases": {}, "geometry": {}, "checksums": {}}
        header = {"format": "lrmanifold checkpoint", "version": 2, **parts, **header}
    for text in (json.dumps(header), "not json", "[" * 100_000):
        path, metadata = tmp_path / "a.safetensors", {"lrmanifold": text}
        packing.save_file({"weight": torch.ones(1, 1), "bias": torch.ones(1)}, path, metadata)
        expected = words if text == json.dumps(header) else "is damaged, or no safetensors file"
        with pytest.raises(CheckpointError, match=expected):
            checkpoint.load(path, nn.Linear(1, 1))


def odd_models() -> dict[str, tuple[nn.Module, str]]:
    def holding(value, persistent=True):
        module = nn.Linear(2, 2)
        module.register_buffer("odd", value, persistent=persistent)
        return module

    off = lrm.nn.LowRankLinear(6, 5, 2)
    with torch.no_grad():
        off.weight.data[0] += 1
    nan_weight = lrm.nn.LowRankLinear(6, 5, 2)
    nan_weight.weight.data[0] = torch.nan
    nan_bias, inf_bias, nan_buffer = nn.Linear(2, 2), nn.Linear(2, 2), nn.BatchNorm1d(2)
    with torch.no_grad():
        nan_bias.bias[0] = torch.nan
        inf_bias.bias[0] = torch.inf
        nan_buffer.running_var[1] = torch.nan
    quantized = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
    eye = torch.eye(3)
    return {
        "sparse": (holding(eye.to_sparse()), "'odd' must be a dense tensor, got layout torch.spa"),
        "csr": (holding(eye.to_sparse_csr()), "'odd' must be a dense tensor, got layout torch.sp"),
        "quantized": (holding(quantized), "'odd' must be a dense tensor, got the quantized type"),
        "meta": (holding(torch.ones(2, device="meta")), "'odd' has no values: it is on the meta"),
        "lazy": (nn.LazyLinear(3), "'weight' has no values yet: run the model once"),
        "off": (off, "'weight' is not a point of"),
        "NaN weight": (nan_weight, "'weight' holds NaN$"),  # no projection helps
        "NaN bias": (nan_bias, "'bias' holds NaN"),
        "Inf bias": (inf_bias, "'bias' holds Inf"),
        "NaN buffer": (nan_buffer, "'running_var' holds NaN"),
    }


@pytest.mark.parametrize("case", odd_models())
@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_what_could_not_be_loaded_again_is_refused_by_name(tmp_path, case, name):
    pytest.importorskip("safetensors")
    model, words = odd_models()[case]
    write_atomically(tmp_path / name, b"the good file of before")
    with pytest.raises(CheckpointError, match=words):
        checkpoint.save(tmp_path / name, model)
    assert (tmp_path / name).read_bytes() == b"the good file of before"
    if case in ("NaN bias", "Inf bias", "NaN buffer"):
        torch.save(model.state_dict(), tmp_path / "theirs.pt")
        other = type(model)(*(2,) * (2 - isinstance(model, nn.BatchNorm1d)))
        before = {k: v.clone() for k, v in other.state_dict().items()}
        with pytest.raises(CheckpointError, match=words):
            checkpoint.load(tmp_path / "theirs.pt", other)
        assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())


def test_odd_tensors_that_have_values_are_kept(tmp_path):
    module = nn.Linear(2, 2)
    module.register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1))
    module.register_buffer("conjugate", torch.randn(3, dtype=torch.complex64).conj())
    module.register_buffer("view", torch.arange(12.0).reshape(3, 4).T)
    module.register_buffer("empty", torch.zeros(0, 3))
    module.register_buffer("small", torch.ones(3).to(torch.float8_e4m3fn))
    module.register_buffer("sparse", torch.eye(2).to_sparse(), persistent=False)
    checkpoint.save(tmp_path / "a.pt", module)
    other = nn.Linear(2, 2)
    for name, value in module.named_buffers():
        other.register_buffer(name, torch.zeros_like(value), persistent=name != "sparse")
    checkpoint.load(tmp_path / "a.pt", other)
    for key, value in module.state_dict().items():
        found = other.state_dict()[key]
        assert found.dtype == value.dtype
        wide = torch.complex64 if value.is_complex() else torch.float32
        assert torch.equal(found.to(wide), value.resolve_conj().to(wide)), key


def test_extra_must_be_readable_without_code_in_keys_and_values(tmp_path):
    class Key(enum.Enum):
        A = 1

    pair = namedtuple("Pair", "a b")
    for extra, words in (
        ({Key.A: 1}, r"the key <Key\.A: 1> of extra must be"),
        ({"p": pair(1, 2)}, r"extra\['p'\] must be a tensor.*got Pair"),
        ([torch.eye(2).to_sparse()], r"extra\[0\] must be a dense tensor"),
    ):
        with pytest.raises(CheckpointError, match=words):
            checkpoint.save(tmp_path / "a.pt", nn.Linear(1, 1), extra=extra)
    extra = {"size": torch.Size([2]), 3: (1, [2.0, None]), (1, "a"): b"x"}
    checkpoint.save(tmp_path / "a.pt", nn.Linear(1, 1), extra=extra)
    assert checkpoint.load(tmp_path / "a.pt", nn.Linear(1, 1)).extra == extra
    assert checkpoint.peek(tmp_path / "a.pt") == extra


def test_an_optimizer_that_refuses_its_state_leaves_the_model_as_it_was(tmp_path):
    source, other = lrm.nn.LowRankLinear(6, 5, 3), lrm.nn.LowRankLinear(6, 5, 2)
    optimizer = lrm.optim.CondLR(source.parameters(), lr=0.1)
    checkpoint.save(tmp_path / "a.pt", source, optimizer)

    class Refusing(lrm.optim.CondLR):
        def load_state_dict(self, state):
            raise ValueError("not mine")

    before = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"a\.pt: does not fit: not mine"):
        checkpoint.load(tmp_path / "a.pt", other, Refusing(other.parameters(), lr=0.1))
    assert other.rank == 2
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"model": {"w": torch.ones(1)}}, "model must be a torch.nn.Module, got "),
        ({"model": nn.Linear}, "model must be a torch.nn.Module, got the class Linear"),
        ({"path": 3}, "path must be a path"),
        ({"path": b"a.pt"}, "path must be a path"),
        ({"path": ""}, "path must be a path.*names something"),
        ({"path": "a\0b"}, "path must be a path.*names something"),
        ({"optimizer": {"state": {}}}, "optimizer must be a torch.optim.Optimizer"),
        ({"dense": "yes"}, "dense must be 'refuse' or 'svd', got 'yes'"),
        ({"dense": True}, "dense must be 'refuse' or 'svd', got True"),
        ({"strict": "no"}, "strict must be True or False, got 'no'"),
        ({"migrate": 3}, "migrate must be a function from payload to payload, got 3"),
    ],
)
def test_wrong_arguments_are_named(tmp_path, arguments, words):
    whole = {"path": tmp_path / "a.pt", "model": nn.Linear(1, 1), "optimizer": None, **arguments}
    with pytest.raises((TypeError, ValueError), match=words):
        checkpoint.load(**whole)
    if arguments.keys() <= {"path", "model", "optimizer"}:
        with pytest.raises((TypeError, ValueError), match=words):
            checkpoint.save(**whole)
    assert not names(tmp_path)
