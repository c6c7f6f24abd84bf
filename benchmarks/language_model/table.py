"""The table and the picture of what was run; what was not run is named, not left out."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .._record import FOLDER, conditions
from .methods import METHODS, OTHERS, WIDTH
from .runner import RATIOS, SEEDS, STEPS, Runs, ratios

PAGE, PICTURE = FOLDER / "language_model.md", FOLDER / "language_model.png"


def best(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The row of seed 0 with the smallest validation loss at full length."""
    full = [r for r in rows if r["seed"] == 0 and r["steps"] == STEPS]
    return min(full, key=lambda r: r["validation"], default=None)


def window(rows: list[dict[str, Any]]) -> tuple[list[float], bool]:
    """Rates within 2 % of the best validation loss, and whether both ends of the grid are worse."""
    full = {r["lr"]: r["validation"] for r in rows if r["seed"] == 0 and r["steps"] == STEPS}
    limit = 1.02 * min(full.values())
    inside = sorted(lr for lr, loss in full.items() if loss <= limit)
    return inside, min(full) < inside[0] and max(full) > inside[-1]


def table(runs: Runs) -> Iterator[str]:
    """Lines of Markdown."""
    yield ("| method | r/d (weights) | lr (window) | test loss | to AdamW | ms | at equal time |")
    yield "|---|---|---|---|---|---|---|"
    groups = {
        (m, ratio): [r for r in runs.rows if (r["method"], r["ratio"]) == (m, ratio)]
        for m in METHODS
        for ratio in ratios(m)
    }
    dense = _losses(groups["dense AdamW", 1.0])
    for (method, ratio), rows in groups.items():
        row, share = best(rows), "1" if ratio == 1 else f"1/{1 / ratio:.0f}"
        if row is None:
            yield f"| {method} | {share} | | not run | | | |"
            continue
        found = _losses(rows)
        losses = list(found.values())
        mean = statistics.fmean(losses)
        both = sorted(found.keys() & dense.keys())
        ours, its = (statistics.fmean(x[seed] for seed in both) for x in (found, dense))
        spread = f"\u00a0±\u00a0{statistics.stdev(losses):.3f}" if len(losses) > 1 else ", one seed"
        inside, closed = window(rows)
        # A best rate at an end of its grid: the search was stopped before its end.
        grid = [r["lr"] for r in rows if r["seed"] == 0 and r["steps"] == STEPS]
        lr = f"{row['lr']:g}" + ("" if min(grid) < row["lr"] < max(grid) else "\\*")
        factor = f" ({'' if closed else '≥'}{inside[-1] / inside[0]:.0f})"
        short = [r for r in rows if r["steps"] != STEPS and r["lr"] == row["lr"]]
        equal = f"{short[0]['test']:.3f} ({short[0]['steps']})" if short else ""
        if method == "dense AdamW":
            equal = f"{found[0]:.3f} ({STEPS})"
        time = statistics.median(r["step_ms"] for r in rows)
        yield (
            f"| {method} | {share}\u00a0({row['weights']:.0%}) | {lr}{factor} | {mean:.3f}{spread} "
            f"| {ours / its - 1:+.1%} | {time:.0f} | {equal} |"
        )


def _losses(rows: list[dict[str, Any]]) -> dict[int, float]:
    """Test losses at the best rate, by seed."""
    row = best(rows)
    if row is None:
        return {}
    return {r["seed"]: r["test"] for r in rows if r["lr"] == row["lr"] and r["steps"] == STEPS}


def _spikes(runs: Runs) -> str:
    """How many spikes the runs at the best rates had, in words."""
    count = 0
    for method in METHODS:
        for ratio in ratios(method):
            rows = [r for r in runs.rows if (r["method"], r["ratio"]) == (method, ratio)]
            row = best(rows)
            at_best = [r for r in rows if row and r["lr"] == row["lr"] and r["steps"] == STEPS]
            count += sum(r["spikes"] for r in at_best)
    return str(count) if count else "no"


def write(runs: Runs) -> None:
    """The page of Markdown and the picture."""
    had = conditions()
    text = [
        "# Pre-training of a character model",
        "",
        f"Width {WIDTH}, two blocks, {STEPS} steps of 512 characters, warm-up and cosine, "
        f"{len(SEEDS)} seeds where nothing else is said. Rates of the blocks' matrices are "
        "searched on a grid of factor 2 by the loss of seed 0 on the validation part, and extended "
        f"until the best is not at an end; all else takes AdamW at {OTHERS:g} in every method. The "
        "table shows the loss on the test part, which chose nothing. *Window*: largest over "
        "smallest rate whose validation loss is within 2 % of the best. "
        "A star: the search was stopped at an end of its grid. *To AdamW*: to dense "
        "AdamW, on the seeds that both have. *ms*: processor time of a step, passes included. *At "
        "equal time*: loss of seed 0 after as many steps (in parentheses) as fit into the "
        f"processor time of dense AdamW's {STEPS}. *Weights*: of the blocks' matrices. At the best "
        f"rates {_spikes(runs)} training losses were spikes (more than five robust standard "
        f"deviations above the 50 before). One thread of {had['processor']}, torch "
        f"{had['versions']['torch']}.",
        "",
        *table(runs),
        "",
    ]
    PAGE.write_text("\n".join(text), encoding="utf-8")
    print("\n".join(text))
    picture(runs, PICTURE)


def picture(runs: Runs, path: Path) -> None:
    """Validation loss over the rate divided by the best one: the windows of the rates."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(RATIOS), figsize=(10, 4), sharey=True, layout="constrained")
    for ax, ratio in zip(axes, RATIOS, strict=True):
        for k, method in enumerate(METHODS):
            share = ratio if ratio in ratios(method) else 1.0
            rows = [
                r
                for r in runs.rows
                if (r["method"], r["ratio"], r["seed"], r["steps"]) == (method, share, 0, STEPS)
            ]
            row = best(rows)
            if row is None:
                continue
            points = sorted((r["lr"] / row["lr"], r["validation"]) for r in rows)
            ax.plot(*zip(*points, strict=True), "o-", color=f"C{k}", label=method)
        ax.set(xscale="log", xlabel="rate / best rate", title=f"r/d = 1/{1 / ratio:.0f}")
        ax.set_xscale("log", base=2)
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("validation loss")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
