"""README's example and its dense twin, each with the settings that suit it best.

``OMP_NUM_THREADS=1 python -m benchmarks.readme_example AdamW`` tries one optimizer (``SGD`` is the
other), without a word it chooses and tests; both write ``results/readme_example.json``, and trials
that stand there are not run again. ``python -m benchmarks.docs_numbers write`` then puts the
numbers into README, and a test asks that README's code has the settings that were chosen. The twin
is the same code without the line that factorizes.

Variants are the example with each optimizer and each τ, and the twin with each optimizer. The
variants of an optimizer share one grid, and it is extended where the best value of any of them lies
at its edge. SGD was tried earlier and less evenly: at τ = 0.1 and for the twin alone, each with a
grid extended by itself, 12 and 25 settings; its τ = 0 is not tried.

All have the same score: the mean of the clean accuracy and that under PGD with linf radius 0.1,
over five folds of the 1,500 training images, one seed each. A fold is held out, the other four are
trained on. A run that diverges scores 0. Example and twin each take the variant of the highest
score. The 297 test images, those of docs/quickstart.md, are the same in all runs and take no part
in the choice. They are seen once by each choice: five new seeds of its setting.
"""

from __future__ import annotations

import hashlib
import json
import re
import statistics
import sys
from typing import Any

import torch

from ._record import FOLDER, record

ROOT = FOLDER.parents[1]
OPTIMIZERS = {
    "SGD": "CondLR(model.parameters(), lr=0, momentum=0.9, weight_decay=0)",
    "AdamW": "CondLRAdam(model.parameters(), lr=0, weight_decay=0)",
}
# Rates and decays to begin with.
GRIDS = {
    "SGD": ([0.025, 0.05, 0.1], [0.001, 0.003, 0.01]),
    "AdamW": ([0.002, 0.004, 0.008], [0.1, 0.3, 1.0]),
}
TWIN, TAUS = "dense twin", {"tau=0.1": "0.1", "tau=0.0": "0.0"}
CHOICE_SEEDS, TEST_SEEDS = range(100, 105), range(5)
STRENGTHS = ("0.0", "0.05", "0.1")
FACTORIZE = r"^model = lrm\.factorize.*\n"
TRAINING = 1500


def example() -> str:
    """README's example."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    if found is None:
        raise ValueError("README.md has no python block")
    return found[1]


def replaced(code: str, pattern: str, new: str) -> str:
    """The code with the one place that fits the pattern changed."""
    code, count = re.subn(pattern, new, code, flags=re.MULTILINE)
    if count != 1:
        raise ValueError(f"README's example has {pattern!r} {count} times, and once is needed")
    return code


def sides() -> dict[str, str]:
    """The example and its dense twin, without what they print."""
    code = replaced(example(), r"^print\(lrm\.report\(model\)\)\n", "")
    code = replaced(code, r"^print\(\*\(.*\n", "")
    return {
        "example": replaced(code, ", summary=print", ""),
        "dense twin": replaced(code, FACTORIZE, ""),
    }


def split() -> tuple[torch.Tensor, torch.Tensor]:
    """Training and test images by number, as in docs/quickstart.md."""
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    return order[:TRAINING], order[TRAINING:]


def run(
    code: str, lr: float, decay: float, seed: int, train: torch.Tensor, test: torch.Tensor
) -> tuple[dict[str, float], int]:
    """Accuracies by strength, 0 if it diverges, and the number of parameters."""
    code = replaced(code, r"\blr=[\d.]+", f"lr={lr}")
    code = replaced(code, r"\bweight_decay=[\d.]+", f"weight_decay={decay}")
    code = replaced(code, r"^order = .*\n", "")
    code = replaced(code, r"^train, test = .*\n", "torch.manual_seed(SEED)\n")
    code = replaced(code, r"\btorch\.randperm\(1500\)", f"torch.randperm({len(train)})")
    names: dict[str, Any] = {"train": train, "test": test, "SEED": seed}
    try:
        exec(compile(code, "<README's example>", "exec"), names)
        found = {str(eps): accuracy for eps, accuracy in names["attacked"].items()}
    except ValueError as error:
        if "has its training diverged?" not in str(error):
            raise
        found = dict.fromkeys(STRENGTHS, 0.0)
    return found, sum(p.numel() for p in names["model"].parameters())


def trial(code: str, lr: float, decay: float) -> dict[str, Any]:
    """One setting on the folds of the training images."""
    parts = split()[0].chunk(len(CHOICE_SEEDS))
    clean, attacked = [], []
    for k, seed in enumerate(CHOICE_SEEDS):
        train = torch.cat([part for j, part in enumerate(parts) if j != k])
        found, _ = run(code, lr, decay, seed, train, parts[k])
        clean.append(found["0.0"])
        attacked.append(found["0.1"])
    score = statistics.fmean(clean + attacked)
    return {"lr": lr, "weight_decay": decay, "score": score, "clean": clean, "PGD 0.1": attacked}


def variants(optimizer: str) -> dict[str, str]:
    """The example by τ, and its twin, with this optimizer; rate and decay are put in later."""
    line = "optimizer = lrm.optim." + OPTIMIZERS[optimizer]
    codes = {
        side: replaced(code, r"^optimizer = lrm\.optim\..*$", line)
        for side, code in sides().items()
    }
    found = {
        name: replaced(codes["example"], r"\btau=[\d.]+", f"tau={tau}")
        for name, tau in TAUS.items()
    }
    return {**found, TWIN: codes[TWIN]}


Trials = dict[str, dict[str, list[dict[str, Any]]]]


def digest() -> str:
    """Of the example's code but for optimizer, rate, decay and τ: other code, other numbers."""
    return hashlib.sha256(variants("SGD")["tau=0.1"].encode()).hexdigest()[:12]


def stored() -> dict[str, Any]:
    """The results so far, of this very code; nothing where there are none."""
    path = FOLDER / "readme_example.json"
    if path.is_file():
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["results"]
        if found["code"] == digest():
            return found
    return {"code": digest(), "trials": {}}


def best(tried: list[dict[str, Any]]) -> dict[str, Any]:
    """The trial of the highest score."""
    return max(tried, key=lambda t: t["score"])


def explore(optimizer: str) -> None:
    """Try all variants of an optimizer on one grid, until the best of each lies inside."""
    rates, decays = (list(values) for values in GRIDS[optimizer])
    while True:
        codes, results = variants(optimizer), stored()
        tried = results["trials"].setdefault(optimizer, {})
        for pair in [(lr, decay) for lr in rates for decay in decays]:
            for name, code in codes.items():
                done = tried.setdefault(name, [])
                if pair not in [(t["lr"], t["weight_decay"]) for t in done]:
                    done.append(trial(code, *pair))
                    print(f"{optimizer}, {name}: {pair}: {done[-1]['score']:.4f}", flush=True)
                    done.sort(key=lambda t: (t["lr"], t["weight_decay"]))
                    record("readme_example", results)
        tops = [best(tried[name]) for name in codes]
        if any(t["lr"] == rates[-1] for t in tops):
            rates.append(2 * rates[-1])
        elif any(t["lr"] == rates[0] for t in tops):
            rates.insert(0, rates[0] / 2)
        elif any(t["weight_decay"] == decays[-1] for t in tops):
            decays.append(round(10 * decays[-2], 6))  # 0.001, 0.003, 0.01, 0.03, ...
        elif any(t["weight_decay"] == decays[0] for t in tops):
            decays.insert(0, round(decays[1] / 10, 6))
        else:
            return


def choices(trials: Trials) -> dict[str, dict[str, Any]]:
    """What each side takes: optimizer, name of the variant, rate, decay, score."""
    found: dict[str, list[dict[str, Any]]] = {"example": [], TWIN: []}
    for optimizer, tried in trials.items():
        for name, done in tried.items():
            top = best(done)
            keep = {key: top[key] for key in ("lr", "weight_decay", "score")}
            side = TWIN if name == TWIN else "example"
            found[side].append({"optimizer": optimizer, "variant": name, **keep})
    return {side: best(tops) for side, tops in found.items()}


def measure(chosen: dict[str, Any]) -> dict[str, Any]:
    """Accuracies of a choice on the test images."""
    train, test = split()
    code = variants(chosen["optimizer"])[chosen["variant"]]
    accuracy: dict[str, list[float]] = {eps: [] for eps in STRENGTHS}
    for seed in TEST_SEEDS:
        found, size = run(code, chosen["lr"], chosen["weight_decay"], seed, train, test)
        for eps in STRENGTHS:
            accuracy[eps].append(found[eps])
    return {"parameters": size, "accuracy": accuracy, "chosen": chosen}


def main(*optimizers: str) -> None:
    """Try the optimizers named, or choose, test and write."""
    torch.set_num_threads(1)
    for optimizer in optimizers:
        explore(optimizer)
    if not optimizers:
        results = stored()
        for side, chosen in choices(results["trials"]).items():
            if results.get(side, {}).get("chosen") != chosen:
                results[side] = measure(chosen)
            means = {e: statistics.fmean(a) for e, a in results[side]["accuracy"].items()}
            print(f"{side}: {chosen}: test {means}")
        print(record("readme_example", results))


if __name__ == "__main__":
    main(*sys.argv[1:])
