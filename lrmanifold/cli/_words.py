"""What the command line's words mean; every error is one sentence with what would be right."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..experiments import adversarial
from ..experiments.adversarial import Adversarial
from ..experiments.methods import Method
from ..nn.plan import make_plan

OPTIMIZERS = {"condlr": "sgd", "adam": "adam"}
KINDS = ("condlr", "dense", "factors", "svd")


def check_word(option: str, word: str, known: Iterable[str]) -> None:
    """Refuse a word that is none of those known."""
    if word not in known:
        raise ValueError(f"{option} must be one of {', '.join(known)}, got {word!r}")


def parse_path(option: str, text: str) -> Path:
    """A path; an empty word, as of a variable that is not set, would be the present folder."""
    if not text.strip():
        raise ValueError(f"{option} must be a path, got {text!r}")
    return Path(text)


def parse_rank(text: str) -> int | float | dict[str, int | float]:
    """ "32" to 32, "0.2" to 0.2, "conv1=4,fc1=0.5" to a dict."""
    if "=" not in text:
        return _rank_number(text, text)
    found: dict[str, int | float] = {}
    for part in text.split(","):
        name, _, value = (piece.strip() for piece in part.partition("="))
        if not name or name in found:
            raise ValueError(f"{_RANK_WORDS}, got {text!r}")
        found[name] = _rank_number(value, text)
    return found


_RANK_WORDS = 'rank must be a number ("32"), a share ("0.2") or for each layer ("conv1=4,fc1=100")'


def _rank_number(value: str, text: str) -> int | float:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(value)
    raise ValueError(f"{_RANK_WORDS}, got {text!r}")


def parse_method(kind: str, tau: str | None) -> Method:
    """The method of `--method` and `--tau`."""
    check_word("method", kind, KINDS)
    if kind != "condlr":
        if tau is not None:
            raise ValueError(f"tau belongs to method condlr, got it with method {kind}")
        return Method(kind, kind)
    if tau == "none":
        return Method("CondLR without bound", kind, None)
    try:
        bound = float("0.1" if tau is None else tau)
    except ValueError:
        bound = float("nan")
    if not 0 <= bound < float("inf"):
        raise ValueError(f'tau must be a finite number >= 0, or "none", got {tau!r}')
    return Method(f"CondLR tau={bound:g}", kind, bound)


def parse_optimizer(word: str | None, certified: bool) -> str:
    """What experiments call the optimizer of `--optimizer`."""
    if word is None:
        word = "adam" if certified else "condlr"
    check_word("optimizer", word, OPTIMIZERS)
    if certified and word != "adam":
        raise ValueError(f"optimizer must be adam with certified, got {word!r}")
    return OPTIMIZERS[word]


def parse_layers(
    how: Method,
    network: nn.Module,
    rank: str | None,
    exclude: list[str] | None,
    *,
    compression: float | None = None,
    keep_larger: bool = False,
) -> tuple[Any, tuple[str, ...] | None]:
    """Ranks and dense layers, after a check that at least one layer becomes low-rank.

    A compression, and shares with `exclude`, are turned into the ranks of the layers by name.
    """
    if how.kind == "dense":
        if rank is not None or exclude is not None or compression is not None or keep_larger:
            raise ValueError("method dense takes no rank, compression, exclude or keep-larger")
        return None, None
    if rank is not None and compression is not None:
        raise ValueError("give --rank or --compression, not both: each chooses the ranks")
    ranks = parse_rank("0.2" if rank is None else rank)
    named = isinstance(ranks, dict)
    if exclude is None and not named:
        last = [name for name, m in network.named_modules() if isinstance(m, nn.Linear)][-1]
        dense_layers: tuple[str, ...] | None = (last,)
    else:
        dense_layers = None if exclude in (None, ["none"]) else tuple(exclude or ())
    # a share would leave the output layer dense, too, whatever --exclude says
    include = None if exclude is None else "*"
    chosen: dict[str, Any] = {"include": include, "exclude": dense_layers}
    if compression is not None:
        plan = make_plan(network, compression=compression, keep_larger=keep_larger, **chosen)
        check_some_layer(plan, f"of compression {compression}")
    else:
        plan = make_plan(network, rank=ranks, keep_larger=named or keep_larger, **chosen)
        check_some_layer(plan, ranks)
    if compression is not None or (include and not isinstance(ranks, int)):
        return {d.name: d.rank for d in plan.decisions if d.rank is not None}, dense_layers
    return ranks, dense_layers


def check_some_layer(plan: Any, rank: object) -> None:
    """Refuse ranks at which the network would stay dense."""
    if all(decision.rank is None for decision in plan.decisions):
        reasons = "; ".join(f"{d.name} {d.reason}" for d in plan.decisions)
        raise ValueError(f"no layer becomes low-rank with rank {rank}: {reasons}")


def parse_device(text: str) -> torch.device:
    """A device that exists."""
    try:
        device = torch.device(text)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu, cuda or cuda:N, got {text!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {text} does not exist: {torch.cuda.device_count()} GPUs found")
    return device


def parse_strengths(text: str) -> tuple[float, ...]:
    """ "0.02,0.04" to (0.02, 0.04)."""
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or not all(0 < eps < float("inf") for eps in found):
        raise ValueError(f'eps must be positive numbers, as "0.02,0.04", got {text!r}')
    check_apart(found, 4)
    return found


def check_apart(radii: Sequence[float], digits: int) -> None:
    """Refuse radii that results would keep under one name, so that one would be lost."""
    names: dict[str, float] = {}
    for eps in radii:
        other = names.setdefault(f"{eps:.{digits}g}", eps)
        if other != eps:
            raise ValueError(
                f"eps must be numbers that differ in {digits} digits, got {other} and {eps}"
            )


def check_reach(radii: Sequence[float], norm: str, image_shape: Sequence[int]) -> None:
    """Refuse radii within which every image is as near as every other: 8 is meant to be 8/255."""
    widest = math.sqrt(math.prod(image_shape)) if norm == "l2" else 1.0
    if radii and (eps := max(radii)) > widest:
        raise ValueError(
            f"eps must be at most {widest:.4g} ({norm}), as pixels are in 0..1, got {eps:g}: is "
            f"{eps:g}/255 = {eps / 255:.4g} meant?"
        )


def parse_adversarial(
    word: str | None, eps: list[str] | None, certified: bool
) -> Adversarial | None:
    """ "linf-trades" and its radius; None without the option."""
    if word is None:
        return None
    if certified:
        raise ValueError("adversarial and certified are two ways to train: give one of them")
    norm, _, kind = word.partition("-")
    known = [
        n + ("" if k == "pgd" else f"-{k}") for n in adversarial.NORMS for k in adversarial.KINDS
    ]
    check_word("adversarial", word, known)
    radii = parse_strengths(",".join(eps)) if eps else ()
    if len(radii) != 1:
        raise ValueError(f"adversarial needs one radius, as --eps 0.3, got {len(radii)}")
    return Adversarial(radii[0], norm, kind or "pgd")


def run_name(data: str, model: str, how: Method, seed: int) -> str:
    """Of the default folder."""
    tau = "" if how.kind != "condlr" else f"-tau{'none' if how.tau is None else f'{how.tau:g}'}"
    return f"{data}-{model}-{how.kind}{tau}-seed{seed}"
