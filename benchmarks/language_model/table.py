"""The table and the picture of what was run; what was not run is named, not left out."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

from .._record import conditions
from .methods import METHODS, OTHERS
from .runner import RATIOS, SEEDS, Runs, equal_time_steps


def share(ratio: float) -> str:
    """3/8 for 0.375."""
    return "1" if ratio == 1 else str(Fraction(ratio).limit_denominator(64))


def window(losses: dict[float, float]) -> tuple[list[float], bool]:
    """Rates within 2 % of the best validation loss, and whether both ends of the grid are worse."""
    limit = 1.02 * min(losses.values())
    inside = sorted(lr for lr, loss in losses.items() if loss <= limit)
    return inside, min(losses) < inside[0] and max(losses) > inside[-1]


def table(runs: Runs) -> Iterator[str]:
    """Lines of Markdown."""
    yield ("| method | r/d (weights) | lr (window) | test loss | to AdamW | ms | at equal time |")
    yield "|---|---|---|---|---|---|---|"
    dense, missing = at_best(runs, "dense AdamW", 1.0), []
    for method in METHODS:
        for ratio in sorted(runs.ratios(method), reverse=True):
            found = at_best(runs, method, ratio)
            if not found or not dense:
                missing.append(f"{method} at {share(ratio)}")
                continue
            losses = [row["test"] for row in found.values()]
            both = sorted(found.keys() & dense.keys())
            ours, its = (statistics.fmean(x[seed]["test"] for seed in both) for x in (found, dense))
            count = "" if len(losses) == len(SEEDS) else f", {len(losses)} seeds"
            spread = f"\u00a0±\u00a0{statistics.stdev(losses):.3f}{count}" if losses[1:] else ""
            validation = runs.losses(method, ratio)
            inside, closed = window(validation)
            # A best rate at an end of its grid: the search was stopped before its end.
            lr = found[0]["lr"]
            star = "" if min(validation) < lr < max(validation) else "\\*"
            factor = f"({'' if closed else '≥'}{inside[-1] / inside[0]:.0f})"
            equal = ""
            steps = equal_time_steps(runs, method, ratio)
            if row := runs.find((method, ratio, lr, 0, steps)):
                equal = f"{row['test']:.3f} ({steps})"
            yield (
                f"| {method} | {share(ratio)}\u00a0({found[0]['weights']:.0%}) "
                f"| {lr:g}{star} {factor} | {statistics.fmean(losses):.3f}"
                f"{spread or ', one seed'} | {ours / its - 1:+.1%} "
                f"| {runs.step_ms(method, ratio):.0f} | {equal} |"
            )
    if missing:
        yield from ("", f"Not run: {', '.join(missing)}.")


def at_best(runs: Runs, method: str, ratio: float) -> dict[int, dict[str, Any]]:
    """Rows at full length and the best rate of the validation part, by seed."""
    known = runs.losses(method, ratio)
    if not known:
        return {}
    lr = min(known, key=lambda rate: known[rate])
    rows = runs.case(method, ratio)
    return {r["seed"]: r for r in rows if r["lr"] == lr and r["steps"] == runs.steps}


def _spikes(runs: Runs) -> str:
    """How many spikes the runs at the best rates had, in words."""
    cases = [(m, ratio) for m in METHODS for ratio in runs.ratios(m)]
    count = sum(row["spikes"] for case in cases for row in at_best(runs, *case).values())
    return str(count) if count else "no"


def write(runs: Runs) -> None:
    """The page of Markdown and the picture."""
    had = conditions()
    processor, torch = had["processor"], had["versions"]["torch"]
    if runs.rows and all("torch" in row for row in runs.rows):
        processor, torch = runs.rows[-1]["processor"], runs.rows[-1]["torch"]
    text = [
        "# Pre-training of a character model",
        "",
        f"Width {runs.width}, two blocks, {runs.steps} steps of 512 characters, warm-up and "
        f"cosine, {len(SEEDS)} seeds where nothing else is said. Rates of the blocks' matrices are "
        "searched on a grid of factor 2 by the loss of seed 0 on the validation part, and extended "
        f"until the best is not at an end; all else takes AdamW at {OTHERS:g} in every method. The "
        "table shows the loss on the test part, which chose nothing. *Window*: largest over "
        "smallest rate whose validation loss is within 2 % of the best. "
        "A star: the search was stopped at an end of its grid. *To AdamW*: to dense "
        "AdamW, on the seeds that both have. *ms*: processor time of a step, passes included. *At "
        "equal time*: loss of seed 0 after as many steps (in parentheses) as fit into the "
        f"processor time of dense AdamW's {runs.steps}. *Weights*: of the blocks' matrices. At the "
        f"best rates {_spikes(runs)} training losses were spikes (more than five robust standard "
        f"deviations above the 50 before). One thread a run, {processor}, torch {torch}.",
        "",
        *table(runs),
        "",
    ]
    runs.path.with_suffix(".md").write_text("\n".join(text), encoding="utf-8")
    print("\n".join(text))
    picture(runs, runs.path.with_suffix(".png"))


def picture(runs: Runs, path: Path) -> None:
    """Validation loss over the rate divided by the best one: the windows of the rates."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    have = {row["ratio"] for row in runs.rows}
    shares = [ratio for ratio in RATIOS if ratio in have][:2] or RATIOS[:1]
    figure, axes = plt.subplots(
        1, len(shares), figsize=(10, 4), sharey=True, squeeze=False, layout="constrained"
    )
    for ax, ratio in zip(axes[0], shares, strict=True):
        for k, method in enumerate(METHODS):
            losses = runs.losses(method, 1.0 if METHODS[method].weights == "dense" else ratio)
            if not losses:
                continue
            best = min(losses, key=lambda rate: losses[rate])
            points = sorted((lr / best, loss) for lr, loss in losses.items())
            ax.plot(*zip(*points, strict=True), "o-", color=f"C{k}", label=method)
        ax.set(xscale="log", xlabel="rate / best rate", title=f"r/d = {share(ratio)}")
        ax.set_xscale("log", base=2)
        ax.set_xlim(1 / 12, 12)
        ax.grid(alpha=0.3)
    axes[0, 0].set_ylabel("validation loss")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
