"""README's example and its dense twin, each with the learning rate and decay that suit it best.

``OMP_NUM_THREADS=1 python -m benchmarks.readme_example`` chooses, tests, and writes
``results/readme_example.json``; ``python -m benchmarks.docs_numbers write`` then puts the numbers
into README, and a test asks that README's code has the rate and decay that were chosen. The twin
is the same code without the line that factorizes.

Both sides have the same grid, extended where the best value lies at its edge, and the same score:
the mean of the clean accuracy and that under PGD with linf radius 0.1, over five folds of the 1,500
training images, one seed each. A fold is held out, the other four are trained on. A run that
diverges scores 0. The 297 test images, those of docs/quickstart.md, are the same in all runs and
take no part in the choice. They are seen once by each side: five new seeds of the chosen setting.
"""

from __future__ import annotations

import re
import statistics
import time
from typing import Any

import torch

from ._record import FOLDER, record

ROOT = FOLDER.parents[1]
RATES, DECAYS = (0.025, 0.05, 0.1), (0.001, 0.003, 0.01)
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


def choose(side: str, code: str) -> dict[str, Any]:
    """All trials of one side, and the best setting, inside its grid."""
    rates, decays = list(RATES), list(DECAYS)
    tries: dict[tuple[float, float], dict[str, Any]] = {}
    while True:
        for pair in [(lr, decay) for lr in rates for decay in decays]:
            if pair not in tries:
                tries[pair] = trial(code, *pair)
                score = tries[pair]["score"]
                print(f"{side}: lr {pair[0]:g} decay {pair[1]:g}: {score:.4f}", flush=True)
        lr, decay = best = max(tries, key=lambda pair: tries[pair]["score"])
        if lr == rates[-1]:
            rates.append(2 * lr)
        elif lr == rates[0]:
            rates.insert(0, lr / 2)
        elif decay == decays[-1]:
            decays.append(round(10 * decays[-2], 6))  # 0.001, 0.003, 0.01, 0.03, ...
        elif decay == decays[0]:
            decays.insert(0, round(decays[1] / 10, 6))
        else:
            return {
                "lr": lr,
                "weight_decay": decay,
                "score": tries[best]["score"],
                "tries": [tries[pair] for pair in sorted(tries)],
            }


def measure(side: str, code: str) -> dict[str, Any]:
    """The choice of one side and, after it, accuracies on the test images."""
    chosen = choose(side, code)
    train, test = split()
    accuracy: dict[str, list[float]] = {eps: [] for eps in STRENGTHS}
    for seed in TEST_SEEDS:
        found, size = run(code, chosen["lr"], chosen["weight_decay"], seed, train, test)
        for eps in STRENGTHS:
            accuracy[eps].append(found[eps])
    means = {eps: round(statistics.fmean(values), 4) for eps, values in accuracy.items()}
    print(f"{side}: lr {chosen['lr']:g} decay {chosen['weight_decay']:g}: test {means}")
    return {"parameters": size, "accuracy": accuracy, "chosen": chosen}


def main() -> None:
    """Choose, test and write."""
    torch.set_num_threads(1)
    start = time.process_time()
    found = {side: measure(side, code) for side, code in sides().items()}
    print(record("readme_example", {**found, "seconds": round(time.process_time() - start)}))


if __name__ == "__main__":
    main()
