"""Tables and pictures of what has been measured so far."""

from __future__ import annotations

import collections
import statistics
from pathlib import Path
from typing import Any

from . import gpu
from .plan import decided, setting

_CIFAR = "CIFAR-10 (re-encoded as JPEG), l2 radius 36/255"
TITLES = {
    "mnist0.3-long": "MNIST, l2 radius 0.3, 60 epochs",
    "mnist0.3": "MNIST, l2 radius 0.3, all methods for 10 epochs",
    "mnist0.3-width": "MNIST, l2 radius 0.3, other sizes",
    "mnist1.58": "MNIST, l2 radius 1.58",
    "fashion0.25": "Fashion-MNIST, l2 radius 0.25, 10 epochs",
    "fashion1.0": "Fashion-MNIST, l2 radius 1.0, 10 epochs",
    "cifar36": _CIFAR,
    "cifar36-long": f"{_CIFAR}, 30 epochs",
    "cifar36-longer": f"{_CIFAR}, 80 epochs with α held; LiResNet for about the same minutes",
    "cifar36-larger": f"{_CIFAR}, up to a million numbers, 60 epochs with α held",
    "cifar36-free": f"{_CIFAR}, 100 epochs, α free: the norms ran away",
    "cifar36-gpu": f"{_CIFAR}, potential layers on every level; beside it LiResNet",
    "cifar36-larger-gpu": f"{_CIFAR}, the same up to a million numbers",
    "mnist1.58-gpu": "MNIST, l2 radius 1.58",
}
Key = tuple[str, str, tuple[int, ...], int, tuple[Any, ...]]


def _key(result: dict[str, Any]) -> Key:
    run = result["run"]
    return (
        run["group"], run["method"], tuple(run["widths"]), run["rank"],
        (run["epochs"], run["lr"], run["head"], run["kind"], run["eps_train"]),
    )  # fmt: skip


def grouped(results: list[dict[str, Any]]) -> dict[Key, list[dict[str, Any]]]:
    """Runs on the test images that differ by their seed only."""
    found: dict[Key, list[dict[str, Any]]] = collections.defaultdict(list)
    best = _choices(results)
    for result in results:
        run = result["run"]
        chosen = best.get((CHOSEN_BY.get(run["group"], ""), run["method"]), run)
        # runs from before a grid was widened stay in the folder, not in the tables
        wanted = all(setting(run, name) == v for name, v in decided(run, chosen).items())
        if not run["choice"] and not result.get("diverged") and wanted:
            found[_key(result)].append(result)
    return dict(found)


# Tables whose rows follow a choice on validation images, and whose choice it is.
CHOSEN_BY = {
    "mnist0.3": "mnist0.3", "mnist0.3-width": "mnist0.3",
    "fashion0.25": "fashion0.25", "fashion1.0": "fashion1.0",
}  # fmt: skip


def _choices(results: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    """The settings with the best verified accuracy on validation images, of a table's method."""
    best: dict[tuple[str, str], dict[str, Any]] = {}
    for result in results:
        run = result["run"]
        key = (run["group"], run["method"])
        if not run["choice"] or result.get("diverged"):
            continue
        if key not in best or result["verified"] > best[key]["verified"]:
            best[key] = result
    return {key: result["run"] for key, result in best.items()}


def _cell(values: list[float], scale: float = 100.0) -> str:
    mean = scale * statistics.fmean(values)
    if len(values) == 1:
        return f"{mean:.2f}"
    return f"{mean:.2f} ± {scale * statistics.stdev(values):.2f}"


def _minutes(result: dict[str, Any]) -> float:
    return result.get("processor_minutes", result["minutes"])


def _shape(run: dict[str, Any]) -> str:
    network, widths, rank = run["network"], run["widths"], run["rank"]
    if network == "folds":
        return f"pixels, {len(widths)} potential layers rank {rank}"
    if network == "potential":
        return f"{widths[0]} rank {2 * rank}, {len(widths) - 1} potential layers rank {rank}"
    if network == "liresnet":
        return "64 channels, 4 residual convolutions, 5 dense residuals of 256"
    start = "patches " if network == "tree" else ""
    end = f" rank {rank}" if rank else ""
    if run.get("folds"):
        end += f", potential layers rank {', '.join(map(str, run['folds']))}"
    return start + "-".join(map(str, widths)) + end


def _epochs(runs: list[dict[str, Any]]) -> str:
    """How many were made, where it is not what was asked for."""
    made = sorted(r.get("epochs", r["run"]["epochs"]) for r in runs)
    return f"{made[0]}" if made[0] == made[-1] else f"{made[0]} to {made[-1]}"


def machine(runs: list[dict[str, Any]]) -> str:
    """Where the rows of a table were measured."""
    names = set()
    for r in runs:
        there = r.get("conditions", {})
        if r.get("device") == "cuda":
            cores = f", {there['cores']} cores" if "cores" in there else ""
            names.add(
                f"{there.get('gpu', 'a GPU')}{cores}; minutes by the clock, with other processes "
                "on the GPU"
            )
        else:
            names.add("one core; minutes of the processor")
    if len(names) > 1:
        raise ValueError(f"a table has rows of several machines: {sorted(names)}")
    return f"Machine: {names.pop()}."


def rows(group: str, results: list[dict[str, Any]]) -> list[list[str]]:
    """The lines of one table, the best verified accuracy first."""
    found = []
    for (name, method, *_), runs in grouped(results).items():
        if name != group:
            continue
        shape = _shape(runs[0]["run"])
        verified = [r["verified"] for r in runs]
        for r in runs:
            if not r["verified"] <= r["attacked"] <= r["clean"]:
                raise ValueError(
                    f"a row of {name} is not verified <= attacked <= clean: {r['run']}"
                )
        line = [
            method, shape, _epochs(runs), f"{runs[0]['stored']:,}", f"{runs[0]['deployed']:,}",
            _cell([r["clean"] for r in runs]), _cell(verified),
            _cell([r["attacked"] for r in runs]),
            f"{statistics.fmean(r['local']['median'] for r in runs):.2f}",
            f"{statistics.fmean(_minutes(r) for r in runs):.1f}", str(len(runs)),
        ]  # fmt: skip
        found.append((statistics.fmean(verified), line))
    return [line for _, line in sorted(found, key=lambda pair: -pair[0])]


HEADS = (
    "method", "hidden layers", "epochs", "stored", "deployed", "clean %", "verified %",
    "under PGD %", "L / local", "minutes", "seeds",
)  # fmt: skip


# What others report for the same question, from their papers; nothing of it was run here.
PUBLISHED = {
    "mnist0.3-long": "GloRo, 166,000 numbers: 95.7",
    "mnist1.58": "GloRo, 1,970,000 numbers: 62.8",
    "cifar36-longer": "LiResNet small, 800,000 numbers: 50.8; nets of 1,570,000 numbers: 58 to 63",
}


def _in_short(results: list[dict[str, Any]]) -> list[str]:
    """The best row of each table in a sentence: what may be quoted."""
    lines = []
    for group in TITLES:
        mine = [runs for key, runs in grouped(results).items() if key[0] == group]
        mine = [runs for runs in mine if runs[0]["run"]["method"].startswith("low rank")]
        if not mine or "-width" in group or group == "cifar36-free":
            continue
        # most seeds first: a single lucky run is no headline
        best = max(mine, key=lambda r: (len(r) > 1, statistics.fmean(x["verified"] for x in r)))
        seeds = f"{len(best)} seeds" if len(best) > 1 else "one seed"
        text = (
            f"- {TITLES[group]}: **{_cell([r['verified'] for r in best])} % verified**, "
            f"{_cell([r['clean'] for r in best])} % clean, {best[0]['stored']:,} numbers "
            f"({best[0]['deployed']:,} deployed), {seeds}."
        )
        if best[0].get("device") == "cuda":
            text += " On a GPU."
        published = next((PUBLISHED[g] for g in PUBLISHED if group in (g, gpu.TWINS.get(g))), "")
        text += f" Published: {published}." if published else ""
        lines.append(text)
    return lines


WRONG_BOUNDS = """
| wrong bound | factor too small | caught by |
|---|---|---|
| norm of the kernel's matrix for a convolution | more than 2.5 | `test_the_norm_of_the_kernel_in_place_of_the_map_is_caught`; `test_the_norm_of_the_matrix_is_no_bound_of_the_map` |
| overlap of pooling windows forgotten | 3 | `test_a_forgotten_overlap_of_pooling_windows_is_caught`; `test_maximum_pooling_counts_overlaps` |
| α from the mean of squares of a truncated core | 1.41 | `test_alpha_from_the_mean_of_squares_of_a_truncated_core_is_caught` |
"""  # noqa: E501


def _what_holds(results: list[dict[str, Any]]) -> list[str]:
    """What the rows say together: the order, how loose the bound is, wrong bounds."""
    tested = [r for runs in grouped(results).values() for r in runs]
    if not tested:
        return []
    medians = sorted(r["local"]["median"] for r in tested)
    loosest = max(tested, key=lambda r: r["local"]["median"])["run"]
    least = min(r["local"]["smallest"] for r in tested)
    broken = sum(not r["verified"] <= r["attacked"] <= r["clean"] for r in tested)
    gap = statistics.fmean(100 * (r["attacked"] - r["verified"]) for r in tested)
    return [
        "",
        "## What the rows say together",
        "",
        f"verified <= under PGD <= clean on {len(tested) - broken} of {len(tested)} runs; the "
        "table is refused otherwise, and so is a run in which the attack moves a certified image. "
        f"Between proof and attack lie {gap:.1f} points on average.",
        "",
        f"What limits the bound: L over the local constant is {medians[0]:.2f} to "
        f"{medians[-1]:.2f} (medians of 64 test images; never below {least:.3f}, as it must be). "
        f"The loosest is {NAMES[loosest['method']]} after {loosest['epochs']} epochs. The product "
        "assumes that one input is stretched most by every layer. It is attained where each "
        "Jacobian is an isometry (orthogonal layers with MaxMin, potential layers with as many "
        "rows as rank); a low-rank layer of an MLP projects, and the next one need not look where "
        "the last one stretched.",
        "",
        "Bounds that are wrong on purpose, in `tests/certify`, each run against the attack that is "
        "used here:",
        WRONG_BOUNDS.rstrip(),
    ]


def markdown(results: list[dict[str, Any]]) -> str:
    """All tables."""
    lines = [
        "# Verified accuracy",
        "",
        "Written by `python -m benchmarks.certified table`. Rates and the size of the head were "
        "chosen on a tenth of the training images, with the same number of tries for every "
        "method, and rates at the end of a grid followed further; nothing was chosen on test "
        "images. *Verified*: the share of test "
        "images that are right and proved to stay right within the radius, in float64, rounding "
        "included. *Under PGD*: accuracy under an l2 attack (30 steps on the margin, from the "
        "image) with the same radius, on all test images. *L / local*: the proved constant over "
        "the norm of the Jacobian, median of 64 test images. *Stored*: numbers of the trained "
        "network; *deployed*: with cores folded in, or dense where that is smaller: sizes are "
        "compared by it, as a full-rank weight is stored with its core and two frames, three "
        "times the numbers of the matrix that it is. Mean ± standard deviation over seeds. "
        "Minutes of training: processor time of one core (older runs: by the clock), or minutes "
        "of a GPU; tables of one question on two machines are never put together.",
    ]
    if short := _in_short(results):
        lines += ["", "## In short (low rank)", "", *short]
    groups = [g for g in TITLES if any(key[0] == g for key in grouped(results))]
    for group in groups:
        mine = [r for key, runs in grouped(results).items() if key[0] == group for r in runs]
        where = " (GPU)" if mine[0].get("device") == "cuda" else ""
        lines += ["", f"## {TITLES[group]}{where}", "", machine(mine), ""]
        lines += ["| " + " | ".join(HEADS) + " |"]
        lines += ["|" + "---|" * len(HEADS)]
        lines += ["| " + " | ".join(line) + " |" for line in rows(group, results)]
    lines += _what_holds(results)
    choices = [r for r in results if r["run"]["choice"] and not r.get("diverged")]
    if choices:
        lines += ["", "## How rates were chosen (validation images)", ""]
        lines += [
            "| table | method | epochs | lr | head | loss | trained for | clean % | verified % |"
        ]
        lines += ["|" + "---|" * 9]
        for r in sorted(choices, key=lambda r: (r["run"]["group"], r["run"]["method"])):
            run = r["run"]
            lines.append(
                f"| {run['group']} | {run['method']} | {run['epochs']} | {run['lr']:g} | "
                f"{run['head']:g} | {run['kind']} | {run['eps_train']:.3g} | "
                f"{100 * r['clean']:.2f} | {100 * r['verified']:.2f} |"
            )
    return "\n".join(lines) + "\n"


COLOURS = {
    "low rank": "#0b5fa5", "low rank tau 0.1": "#6fa8dc", "orthogonal": "#b45f06",
    "dense": "#555555", "factors": "#999999", "truncated": "#cc0000",
}  # fmt: skip


NAMES = {
    "low rank": "low rank, τ = 0", "low rank tau 0.1": "low rank, τ = 0.1",
    "orthogonal": "orthogonal, full rank", "dense": "dense", "factors": "two factors A Bᵀ",
    "truncated": "dense, then truncated", "LiResNet": "LiResNet, rebuilt",
}  # fmt: skip
MARKERS = {
    "low rank": "o", "low rank tau 0.1": "v", "orthogonal": "s", "dense": "D", "factors": "^",
    "truncated": "X",
}  # fmt: skip


def _over_size(found: dict[Key, list[dict[str, Any]]], plt: Any, folder: Path) -> None:
    """Verified accuracy of each method at each size; bars only where seeds differ."""
    figure, axis = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    sizes: set[int] = set()
    shown = ("mnist0.3", "mnist0.3-width")
    for method, colour in COLOURS.items():
        chosen = [runs for key, runs in found.items() if key[0] in shown and key[1] == method]
        chosen.sort(key=lambda runs: runs[0]["deployed"])
        at = [runs[0]["deployed"] / 1000 for runs in chosen]
        shares = [[100 * r["verified"] for r in runs] for runs in chosen]
        means = [statistics.fmean(values) for values in shares]
        style: dict[str, Any] = {"color": colour, "marker": MARKERS[method], "markersize": 5.5}
        style["linestyle"] = "-" if len(at) > 1 else "none"
        if at:
            axis.plot(at, means, label=f"{NAMES[method]}, 10 epochs", **style)
            _bars(axis, at, shares, colour)
            sizes |= set(map(round, at))
    for key, runs in found.items():
        if key[0] == "mnist0.3-long":
            values = [100 * r["verified"] for r in runs]
            at = [runs[0]["deployed"] / 1000]
            axis.plot(
                at, [statistics.fmean(values)], "*", markersize=13, color=COLOURS["low rank"],
                label=f"{NAMES['low rank']}, 60 epochs",
            )  # fmt: skip
            _bars(axis, at, [values], COLOURS["low rank"])
            sizes.add(round(at[0]))
    axis.set_xscale("log")
    # a few round numbers: the sizes themselves lie too close together
    if sizes:
        low, high = 0.85 * min(sizes), 1.15 * max(sizes)
        axis.set_xlim(low, high)
        axis.set_xticks([t for t in (40, 50, 60, 80, 100, 120, 150, 200, 250, 300, 400)
                         if low <= t <= high])  # fmt: skip
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_locator(plt.NullLocator())
    axis.set_xlabel("numbers of the deployed network, thousands")
    axis.set_ylabel("verified accuracy at l2 radius 0.3, %")
    axis.set_title("MNIST: what is proved, over the size of the network")
    axis.legend(frameon=False, fontsize=8)
    axis.grid(alpha=0.3)
    figure.savefig(folder / "verified_over_size.png", dpi=160)
    plt.close(figure)


def _bars(axis: Any, at: list[float], shares: list[list[float]], colour: str) -> None:
    """One standard deviation up and down, where there is one."""
    several = [(x, v) for x, v in zip(at, shares, strict=True) if len(v) > 1]
    if several:
        axis.errorbar(
            [x for x, _ in several], [statistics.fmean(v) for _, v in several],
            [statistics.stdev(v) for _, v in several],
            fmt="none", ecolor=colour, capsize=3, elinewidth=1.2,
        )  # fmt: skip


def pictures(results: list[dict[str, Any]], folder: Path) -> None:
    """Verified accuracy over deployed numbers, and over the radius."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = grouped(results)
    _over_size(found, plt, folder)

    figure, axis = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for method in COLOURS:
        for key, runs in found.items():
            if key[0] != "mnist0.3" or key[1] != method:
                continue
            radii = [float(e) for e in runs[0]["curve"]]
            means = [100 * statistics.fmean(r["curve"][e] for r in runs) for e in runs[0]["curve"]]
            axis.plot(radii, means, color=COLOURS[method], label=NAMES[method])
    axis.set_xlabel("l2 radius")
    axis.set_ylabel("verified accuracy, %")
    axis.set_title("MNIST, trained for 0.3: verified accuracy over the radius")
    axis.grid(alpha=0.3)
    if axis.lines:
        axis.legend(frameon=False, fontsize=8)
    figure.savefig(folder / "verified_over_radius.png", dpi=160)
    plt.close(figure)


def write(results: list[dict[str, Any]], folder: Path) -> None:
    """``report.md`` and the pictures, beside the results."""
    text = markdown(results)
    (folder / "report.md").write_text(text)
    if grouped(results):
        pictures(results, folder)
    print(text)
