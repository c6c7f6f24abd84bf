"""The report's tables as plain lists of strings; HTML and Markdown print the same ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .groups import Group, Row
from .published import Figure
from .statistics import Comparison, columns


@dataclass
class TableText:
    """A heading, rows of cells, and a line below."""

    title: str
    head: list[str]
    rows: list[list[str]] = field(default_factory=list)
    note: str = ""


def percent(group: Group, *path: str, digits: int = 1) -> str:
    """Mean ± standard deviation in %; a dash where nothing was measured."""
    mean = group.mean(*path)
    if mean is None:
        return "–"
    text = f"{100 * mean:.{digits}f}"
    if len(group.values(*path)) > 1:
        text += f" ± {100 * group.spread(*path):.{digits}f}"
    return text


def accuracy(title: str, groups: Sequence[Group], note: str = "") -> TableText:
    """Clean and robust accuracy of every method, with what it keeps."""
    names: dict[str, tuple[str, ...]] = {}
    for group in groups:
        names |= dict(columns(group))
    table = TableText(title, ["method", "seeds", "kept", *names], note=note)
    for group in groups:
        kept = group.mean("parameters", "folded_share")
        cells = [group.label, str(len(group.rows)), "–" if kept is None else f"{100 * kept:.0f} %"]
        table.rows.append(cells + [percent(group, *path) for path in names.values()])
    return table


def cost(title: str, groups: Sequence[Group]) -> TableText:
    """What is trained, stored and multiplied; conditioning, calibration, time and rate."""
    head = [
        "method", "rate", "trained", "kept", "multiply-adds", "largest cond", "ECE", "s/epoch"
    ]  # fmt: skip
    table = TableText(title, head)
    full = max((g.mean("multiply_adds") or 0 for g in groups), default=0) or 1
    for group in groups:
        row = group.head
        tuned = row["tuning"]
        rate = f"{row['lr']:g}" + ("" if tuned["tuned"] else " (not tuned)")
        rate += " (edge)" if tuned.get("at_edge") else ""
        conds = [layer["cond"] for layer in row["layers"].values() if layer["cond"] is not None]
        seconds = [s for r in group.rows for s in r["epoch_seconds"]]
        table.rows.append(
            [
                group.label,
                rate,
                f"{100 * row['parameters']['trained_share']:.1f} %",
                f"{100 * row['parameters']['folded_share']:.1f} %",
                f"{100 * row['multiply_adds'] / full:.1f} %",
                f"{max(conds):.3g}" if conds else "–",
                percent(group, "clean", "ece"),
                f"{sum(seconds) / len(seconds):.2g}",
            ]
        )
    table.note = (
        "trained: parameters in training; kept: with the cores folded, as for inference; "
        "multiply-adds of one forward pass; largest cond: of a layer's weight as a matrix, dense "
        "last layer included, first seed; (edge): the best rate was the first or last of the grid. "
        "Seconds were measured on a busy machine."
    )
    return table


def layers(title: str, groups: Sequence[Group]) -> TableText:
    """cond of every layer, first seed."""
    names = list(dict.fromkeys(name for g in groups for name in g.head["layers"]))
    names = [n for n in names if any("." not in n and n in g.head["layers"] for g in groups)]
    table = TableText(title, ["method", *names])
    for group in groups:
        found = group.head["layers"]
        cells = []
        for name in names:
            layer = found.get(name)
            known = layer is not None and layer["cond"] is not None
            cells.append(f"{layer['cond']:.3g} (r {layer['rank']})" if known else "–")
        table.rows.append([group.label, *cells])
    return table


def comparisons(title: str, chosen: Group, found: Sequence[Comparison]) -> TableText:
    """Differences to every rival with the paired t-test, a row each rival."""
    names = list(dict.fromkeys(c.column for c in found))
    table = TableText(title, [f"{chosen.label} minus", *names])
    for rival in dict.fromkeys(c.rival for c in found):
        own = {c.column: c for c in found if c.rival == rival}
        cells = []
        for name in names:
            c = own.get(name)
            mark = {"better": " ▲", "worse": " ▼", "undecided": ""}[c.decided] if c else ""
            cells.append(f"{c.difference:+.1f} ({c.wins}/{c.seeds}){mark}" if c else "–")
        table.rows.append([rival, *cells])
    table.note = (
        "Mean difference in points over the seeds, and in how many of them it is positive. ▲ "
        "better and ▼ worse: paired t-test over the seeds, p < 0.05, each comparison by itself. A "
        "sign test cannot reach 0.05 with fewer than six seeds."
    )
    return table


def masking(title: str, groups: Sequence[Group]) -> TableText:
    """The checks for gradient masking."""
    shown = [g for g in groups if g.head.get("masking")]
    table = TableText(title, ["method"])
    if not shown:
        return table
    counts = list(shown[0].head["masking"]["by_steps"])
    head = [f"{n} steps" for n in counts]
    table.head += ["one step (FGSM)", *head, "unlimited", "noise", "verdict"]
    for group in shown:
        m = group.head["masking"]
        failed = [
            text
            for key, text in (
                ("levels_off", "does not level off"),
                ("iterative_is_stronger", "one step beats twenty"),
                ("unlimited_success", "survives an unlimited attack"),
            )
            if not m[key]
        ]
        values = [m["one_step"], *m["by_steps"].values(), m["unlimited"], m["noise"]]
        cells = [f"{100 * v:.0f}" for v in values]
        table.rows.append([group.label, *cells, "; ".join(failed) or "passes"])
    m = shown[0].head["masking"]
    table.note = (
        f"Accuracy in % on {m['images']} images, first seed: PGD (ℓ∞ {m['eps']:g}) with more and "
        "more steps; ℓ∞ 1, where every image is allowed; uniform noise of the attack's size."
    )
    return table


def independent(title: str, groups: Sequence[Group]) -> TableText:
    """foolbox: median distances."""
    shown = [g for g in groups if g.head.get("foolbox")]
    table = TableText(title, ["method"])
    kinds = {"deepfool_l2": "DeepFool", "boundary_l2": "boundary attack"}
    kinds = {k: v for k, v in kinds.items() if any(k in g.head["foolbox"] for g in shown)}
    for name in kinds.values():
        table.head += [f"{name}: median ℓ2", f"{name}: accuracy at ℓ2 1"]
    for group in shown:
        cells = []
        for kind in kinds:
            found = group.head["foolbox"].get(kind)
            cells += (
                [f"{found['median_distance']:.2f}", f"{100 * found['accuracy']['1']:.0f}"]
                if found
                else ["–", "–"]
            )
        table.rows.append([group.label, *cells])
    table.note = (
        "By foolbox, first seed: DeepFool follows gradients, the boundary attack sees decisions "
        "only. A median distance that is much larger for DeepFool would show masked gradients."
    )
    return table


def condition(title: str, groups: Sequence[Group]) -> TableText:
    """Measured local condition numbers and the corrected bound."""
    shown = [g for g in groups if g.head.get("condition")]
    head = [
        "method", "network, median", "network, 90 %", "tail, median", "bound, median",
        "measured / bound, largest", "plain product violated",
    ]  # fmt: skip
    table = TableText(title, head)
    for group in shown:
        c = group.head["condition"]
        cells = [f"{c['network']['median']:.3g}", f"{c['network']['q90']:.3g}"]
        if "bound" in c:
            cells += [
                f"{c['tail']['median']:.3g}",
                f"{c['bound']['median']:.3g}",
                f"{c['ratio']['max']:.2g}",
                f"{100 * c['plain_product_violated']:.0f} %",
            ]
        table.rows.append([group.label, *cells, *["–"] * (6 - len(cells))])
    table.note = (
        "Local condition number ‖J‖ ‖x‖ / ‖f(x)‖ of the whole network at test images; then for the "
        "part that the corrected bound of mathematics 6 covers (the linear layers after the last "
        "convolution, with their biases): measured, the bound Π κ([W b])/cosθ · Π cond(σ), and how "
        "often the product without the cosines is not even a bound."
    )
    return table


def beside(
    title: str,
    strengths: Sequence[str],
    lines: Sequence[Figure],
    groups: Sequence[Group],
    note: str,
) -> TableText:
    """Published figures, and ours below each where there is one."""
    table = TableText(title, ["method", "saved", *strengths], note=note)
    for line in lines:
        cells = [f"{value:.1f}" for value in line.accuracy]
        table.rows.append([f"{line.method} (published)", line.saved, *cells])
        for ours in groups:
            if ours.label not in line.ours:
                continue
            attack = "fgsm_unclipped" if ours.head.get("fgsm_unclipped") else "fgsm"
            cells = [percent(ours, "clean", "accuracy")]
            cells += [percent(ours, attack, eps) for eps in strengths[1:]]
            saved = 100 * (1 - (ours.mean("parameters", "folded_share") or 1.0))
            epochs = ours.head["training"]["epochs"]
            name = f"{ours.label} (ours, {epochs} epochs)"
            table.rows.append([name, f"{saved:.0f} %", *cells])
    return table


def failed(rows: Sequence[Row]) -> list[str]:
    """A sentence for each run that diverged."""
    return [f"{r['experiment']}: {r['name']}, seed {r['seed']}: {r['failed']}" for r in rows]
