"""Random damage to every kind of file that the library writes; none of it may load silently.

``python tests/fuzz/corruption.py --count 300 --seed 0`` prints a table: how often a damaged file
was refused by the named error, raised something else, or loaded without a word.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import lrmanifold as lrm
from lrmanifold import checkpoint
from lrmanifold.experiments import runs
from lrmanifold.experiments.data import Dataset
from lrmanifold.experiments.methods import Method
from lrmanifold.experiments.models import build
from lrmanifold.experiments.training import Normalized, Settings, fit


def few_images() -> Dataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(20, 1, 4, 4, generator=generator)
    y = (x.mean((1, 2, 3)) > 0.5).long()
    return Dataset("few", x, y, x[:10], y[:10], 2, ("dark", "light"), (0.5,), (0.3,))


def network() -> nn.Module:
    layers = nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(24, 12), nn.ReLU()
    return lrm.factorize(nn.Sequential(*layers, nn.Linear(12, 2)), rank=2, exclude="5")


def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = network()
    optimizer = lrm.optim.CondLRAdam(model.parameters(), lr=0.01)
    for x in few_images().train_x.split(10):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return model, optimizer


def save_checkpoint(path: Path) -> None:
    model, optimizer = trained()
    extra = {"step": 2, "note": "words", "order": torch.arange(40), "rates": [0.1, 0.2, 0.3]}
    checkpoint.save(path, model, optimizer, extra=extra)


def load_checkpoint(path: Path) -> None:
    model = network()
    checkpoint.load(path, model, lrm.optim.CondLRAdam(model.parameters(), lr=0.3))


def save_tensors(path: Path) -> None:
    checkpoint.save(path, trained()[0])


def load_tensors(path: Path) -> None:
    checkpoint.load(path, network())


def run(path: Path) -> None:
    """Starts a training, or takes up the one that the file holds."""
    data, settings = few_images(), Settings(epochs=2, batch_size=10, momentum=0.5)
    torch.manual_seed(2)
    model = Normalized(network(), data)
    optimizer = lrm.optim.CondLR(model.parameters(), settings.lr, momentum=settings.momentum)
    fit(model, optimizer, data, settings, checkpoint=path)


def save_model(path: Path) -> None:
    data = few_images()
    model = Normalized(lrm.factorize(build("mlp", data), rank=2, exclude="fc3"), data)
    method = Method("CondLR", "condlr", 0.1)
    runs.save_model(path, model, architecture="mlp", method=method, data=data)


def save_results(path: Path) -> None:
    history = {"loss": [0.5, 0.25], "cond": [1.1, 1.1], "spectra": {"fc1": [[1.0, 0.9]] * 3}}
    results = {
        "format": runs.FORMAT,
        "settings": {"epochs": 2, "lr": 0.1, "rank": {"fc1": 5}, "method": "CondLR"},
        "versions": runs.versions(),
        "history": history,
        "accuracy": {"clean": 0.925, "fgsm": {"0.05": 0.875, "0.1": 0.5}},
    }
    getattr(runs, "write_results", runs.write_json)(path, results)


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of file: its name, what writes and reads it, and the error that damage must raise."""

    name: str
    save: Callable[[Path], None]
    load: Callable[[Path], object]
    error: type[Exception]


KINDS = {
    kind.name: kind
    for kind in (
        Kind("checkpoint.pt", save_checkpoint, load_checkpoint, checkpoint.CheckpointError),
        Kind("checkpoint.safetensors", save_tensors, load_tensors, checkpoint.CheckpointError),
        Kind("run.pt", run, run, checkpoint.CheckpointError),
        Kind("model.pt", save_model, runs.load_model, runs.RunError),
        Kind("results.json", save_results, lambda p: runs.load_results(p.parent), runs.RunError),
    )
}


def flip_a_bit(data: bytearray, rng: random.Random) -> None:
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def change_a_byte(data: bytearray, rng: random.Random) -> None:
    data[rng.randrange(len(data))] = rng.randrange(256)


def change_a_digit(data: bytearray, rng: random.Random) -> None:
    """What turns a number of a text into another number."""
    places = [i for i, byte in enumerate(data) if chr(byte).isdigit()]
    data[rng.choice(places)] = rng.choice(b"0123456789")


def blank_a_block(data: bytearray, rng: random.Random) -> None:
    start, size = rng.randrange(len(data)), rng.randint(1, 64)
    data[start : start + size] = bytes(len(data[start : start + size]))


def scramble_a_block(data: bytearray, rng: random.Random) -> None:
    start, size = rng.randrange(len(data)), rng.randint(1, 512)
    data[start : start + size] = rng.randbytes(len(data[start : start + size]))


def swap_two_blocks(data: bytearray, rng: random.Random) -> None:
    size = rng.randint(1, 64)
    a, b = sorted(rng.sample(range(len(data) - size), 2))
    if b - a >= size:
        data[a : a + size], data[b : b + size] = data[b : b + size], data[a : a + size]


def drop_a_block(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(data))
    del data[start : start + rng.randint(1, 64)]


def double_a_block(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(data))
    data[start:start] = data[start : start + rng.randint(1, 64)]


def cut_the_end(data: bytearray, rng: random.Random) -> None:
    del data[rng.randrange(len(data)) :]


def append(data: bytearray, rng: random.Random) -> None:
    data += rng.choice((b"\0", b"\n", b" ", rng.randbytes(rng.randint(1, 64))))


DAMAGES = (
    flip_a_bit, change_a_byte, change_a_digit, blank_a_block, scramble_a_block,
    swap_two_blocks, drop_a_block, double_a_block, cut_the_end, append,
)  # fmt: skip


def damaged(whole: bytes, rng: random.Random) -> tuple[str, bytes]:
    """One damage in words, and the damaged bytes, never equal to the whole ones."""
    while True:
        damage, data = rng.choice(DAMAGES), bytearray(whole)
        damage(data, rng)
        if data != whole:
            return damage.__name__, bytes(data)


def attack(kind: Kind, count: int, seed: int) -> tuple[Counter[str], list[str]]:
    """How many of `count` damaged files were "refused", "loaded", or raised something "else"."""
    rng, found, notes = random.Random(f"{kind.name} {seed}"), Counter[str](), list[str]()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / kind.name
        kind.save(path)
        whole = path.read_bytes()
        kind.load(path)  # whole files load, or refusals would mean nothing
        for _ in range(count):
            words, data = damaged(whole, rng)
            path.write_bytes(data)
            try:
                kind.load(path)
            except kind.error:
                found["refused"] += 1
            except Exception as error:
                found["else"] += 1
                notes.append(f"{words}: {type(error).__name__}: {error}"[:200])
            else:
                found["loaded"] += 1
                notes.append(f"{words}: loaded")
    return found, notes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=300, help="damages to each kind of file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbose", action="store_true", help="each damage that was not refused")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'file':24}{'damaged':>9}{'refused':>9}{'other error':>13}{'loaded silently':>17}")
    for kind in KINDS.values():
        found, notes = attack(kind, args.count, args.seed)
        counts = f"{found['refused']:9}{found['else']:13}{found['loaded']:17}"
        print(f"{kind.name:24}{args.count:9}{counts}")
        if args.verbose:
            print("".join(f"    {note}\n" for note in notes), end="")


if __name__ == "__main__":
    main()
