"""The table and the picture of the adapters; what was not run is named, not left out."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .methods import FULL, METHODS
from .runner import RANKS, SEEDS, STEPS, WIDTH, Runs, ranks


def at_best(runs: Runs, method: str, rank: int) -> dict[int, dict[str, Any]]:
    """Rows at the best rate of the validation part, by seed."""
    known = runs.losses(method, rank)
    if not known:
        return {}
    lr = min(known, key=lambda rate: known[rate])
    key = (method, rank, lr)
    return {row["seed"]: row for row in runs.rows if (row["method"], row["rank"], row["lr"]) == key}


def table(runs: Runs) -> Iterator[str]:
    """Lines of Markdown, by rank and in each by test loss."""
    yield "| adapter | rank (trained) | lr | test loss | to LoRA, AdamW | stable rank | ms |"
    yield "|---|---|---|---|---|---|---|"
    for rank in (0, *RANKS):
        lora = at_best(runs, "LoRA, AdamW", rank)
        lines = []
        for method in METHODS:
            if rank not in ranks(method):
                continue
            found = at_best(runs, method, rank)
            if not found:
                lines.append((float("inf"), f"| {method} | {rank} | | not run | | | |"))
                continue
            losses = [row["test"] for row in found.values()]
            mean = statistics.fmean(losses)
            spread = f"\u00a0±\u00a0{statistics.stdev(losses):.4f}" if losses[1:] else ", one seed"
            if 1 < len(losses) < len(SEEDS):
                spread += f", {len(losses)} seeds"
            pairs = [found[s]["test"] / lora[s]["test"] - 1 for s in found.keys() & lora.keys()]
            ratio = f"{statistics.fmean(pairs):+.1%}" if pairs else ""
            known = runs.losses(method, rank)
            lr = found[0]["lr"]
            # A best rate at an end of its grid: the search was stopped before its end.
            star = "" if min(known) < lr < max(known) else "\\*"
            ranked = statistics.fmean(row["stable_rank"] for row in found.values())
            ms = statistics.median(row["step_ms"] for row in found.values())
            size = f"{rank or 'whole'}\u00a0({found[0]['trained']:,})"
            line = (
                f"| {method} | {size} | {lr:g}{star} | {mean:.4f}{spread} | {ratio} "
                f"| {ranked:.1f} | {ms:.0f} |"
            )
            lines.append((mean, line))
        yield from (line for _, line in sorted(lines))


def write(runs: Runs) -> None:
    """The page of Markdown and the picture."""
    row = runs.rows[-1]
    text = [
        "# Adapters on a small character model",
        "",
        f"A transformer of width {WIDTH} and two blocks, trained on the Python reference, then "
        f"adapted to the source code of argparse in {STEPS} steps of 512 characters; before, its "
        f"loss on the new text is {row['before']:.3f}. Adapters on all eight linear layers of the "
        "blocks, all else frozen. Rates are searched on a grid of factor 2 by the loss of seed 0 "
        "on the validation part, and extended until the best is not at an end. The table shows the "
        f"loss on the test part, which chose nothing, over {len(SEEDS)} seeds of batches and "
        "starts. *To LoRA, AdamW*: mean over the same seeds. *Stable rank*: of what the adapter "
        "adds to a weight, ‖ΔW‖²_F/‖ΔW‖²₂, mean over layers. *ms*: processor time of a step, all "
        "of it, with another process beside it. A star: the search was stopped at an end of its "
        f"grid. One thread of {row['processor']}, torch {row['torch']}.",
        "",
        *table(runs),
        "",
    ]
    runs.path.with_suffix(".md").write_text("\n".join(text), encoding="utf-8")
    print("\n".join(text))
    picture(runs, runs.path.with_suffix(".png"))


def picture(runs: Runs, path: Path) -> None:
    """Test losses of all seeds, a row a method and a panel a rank."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = [method for method in METHODS if method != FULL]
    figure, axes = plt.subplots(1, len(RANKS), figsize=(10, 4), sharey=True, layout="constrained")
    whole = [row["test"] for row in at_best(runs, FULL, 0).values()]
    for ax, rank in zip(axes, RANKS, strict=True):
        for y, method in enumerate(names):
            losses = [row["test"] for row in at_best(runs, method, rank).values()]
            ax.plot(losses, [y] * len(losses), "o", color=f"C{y % 10}", alpha=0.6)
        if whole:
            ax.axvline(statistics.fmean(whole), color="black", linestyle=":")
        ax.set(title=f"rank {rank}", xlabel="test loss (dotted: all weights)")
        ax.grid(alpha=0.3)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=110)
    plt.close(figure)
