"""What a run is shown and stored as: tables, JSON, CSV, LaTeX, pictures."""

from __future__ import annotations

import csv
import io
import math
import platform
from collections.abc import Iterable, Sequence
from typing import Any

from .core import Claim
from .mutation import Mutation
from .outputs import to_json
from .runner import ControlVerdict, Settings, Verdict
from .statistics import ENOUGH

#: Printed after every run, so that nobody takes the table for more than it is.
NOT_COVERED = (
    "Not covered by any claim: rounding of a whole flow in float32, train-mode batch\n"
    "norm, softmax, and the condition number of low-rank convolutions as operators.\n"
    "See theory/README.md."
)

KINDS = (
    "max: largest measured/bound (1: attained); for an identity (=) deviation/rounding\n"
    "tolerance, for an order (t^p) deviation of a slope/what is allowed. sharp: the\n"
    "ratio at the extremal example, to be in [0.99, 1]. n: independent problems; * marks\n"
    f"fewer than {ENOUGH}. rate<=: 95 % bound on the rate of violations among such problems."
)
_MARK = {"inequality": "", "identity": "=", "order": "t^p"}
_TAG = {"ours": "ours", "published": "publ", "classical": "std "}


def _short(x: float) -> str:
    if math.isnan(x):
        return "-"
    if x == 0.0 or 1e-3 <= abs(x) < 1e3:
        return f"{x:.3f}"
    return f"{x:.0e}"


def _verdict(v: Verdict) -> str:
    return "holds" if v.passed else ("nothing" if not v.met else "FAILS")


def _table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int | None = None
) -> list[str]:
    """Columns as wide as they need to be; the first `left` ones flush left, and the last one."""
    left = 2 if left is None else left
    widths = [max(len(row[k]) for row in [header, *rows]) for k in range(len(header))]
    last = len(header) - 1

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.ljust(width) if k < left or k == last else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return " ".join(cells).rstrip()

    return [line(header), "-" * len(line(header)), *(line(row) for row in rows)]


def claims_table(verdicts: Sequence[Verdict]) -> str:
    """One line a claim, 80 columns: id, source, kind, ratios, problems, violation rate, verdict."""
    # With a search its ratio takes the place of the extremal example's, to stay within 80 columns.
    searched = any(not math.isnan(v.searched) for v in verdicts)
    header = ["claim", "source", "max", "search" if searched else "sharp", "n ", "rate<=", ""]
    rows = [
        [
            v.id,
            f"{_TAG[v.tag]} {_MARK[v.kind]}",
            _short(v.ratio[2]),
            _short(v.searched if searched else v.attained),
            f"{v.independent}{' ' if v.independent >= ENOUGH else '*'}",
            f"{v.violation_bound:.3f}",
            _verdict(v),
        ]
        for v in verdicts
    ]
    return "\n".join(_table(header, rows))


def controls_table(verdicts: Sequence[ControlVerdict]) -> str:
    """claim, what is wrong, samples rejected of those met, verdict."""
    lines = []
    for v in verdicts:
        verdict = "rejected" if v.passed else ("BROKEN" if v.errors else "ACCEPTED")
        lines.append(f"{v.id:<42} {v.rejected:>3} of {v.met:<3} {verdict}")
        lines.append(f"    {v.name}")
    return "\n".join(["Controls: wrong on purpose, to be rejected", *lines])


def mutations_table(found: Sequence[Mutation]) -> str:
    """claim, constant, its value, and what rejected 0.9 of it."""
    rows = [[m.id, m.constant, f"{m.value:.4g}", _fate(m)] for m in found]
    return "\n".join(_table(["claim", "constant", "value", "0.9 of it"], rows))


def _fate(m: Mutation) -> str:
    if m.error:
        return "BROKEN"
    if m.rejected_by:
        return "rejected"
    if m.declaration_holds:
        return f"loose: {m.loose:g}"
    return "ACCEPTED" if m.loose is None else f"NOT {m.loose:g}"


def failures(verdicts: Sequence[Verdict | ControlVerdict | Mutation]) -> list[str]:
    """A few lines for everything that went wrong."""
    lines = []
    for v in verdicts:
        if v.passed:
            continue
        if isinstance(v, Mutation):
            what = v.error or (
                "no sample rejects 0.9 of it: add an extremal example, or declare it loose"
                if v.loose is None
                else f"it is declared loose with the factor {v.loose:g}, which is not what it has"
            )
            lines.append(f"{v.id}, constant {v.constant}: {what}")
            continue
        found = v.failures if isinstance(v, Verdict) else v.errors
        name = v.id if isinstance(v, Verdict) else f"{v.id}, control {v.name!r}"
        if not found and isinstance(v, Verdict):
            lines.append(f"{name}: no sample met the hypotheses, so nothing was verified")
        elif not found:
            lines.append(f"{name}: accepted on all {v.met} samples")
        lines.extend(f"{name}: {line}" for line in found[:3])
        if len(found) > 3:
            lines.append(f"{name}: and {len(found) - 3} more")
    return lines


COLUMNS = (
    "id", "source", "kind", "met", "skipped", "problems", "ratio_min", "ratio_mean", "ratio_max",
    "sharp", "search", "violation_rate_bound", "holds", "seconds",
)  # fmt: skip


def _values(v: Verdict) -> list[Any]:
    return [
        v.id, v.tag, v.kind, v.met, v.skipped, v.independent, *v.ratio, v.attained, v.searched,
        v.violation_bound, v.passed, round(v.seconds, 2),
    ]  # fmt: skip


def as_csv(verdicts: Sequence[Verdict]) -> str:
    """All numbers of all claims, a header line first; an empty field where there is none."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for v in verdicts:
        writer.writerow("" if isinstance(x, float) and math.isnan(x) else x for x in _values(v))
    return out.getvalue()


def as_latex(verdicts: Sequence[Verdict]) -> str:
    """A ``tabular`` (booktabs) with the numbers of the table."""
    lines = [
        r"\begin{tabular}{llrrrrr}",
        r"\toprule",
        r"claim & source & \multicolumn{3}{c}{ratio min / mean / max} & problems & rate $\le$ \\",
        r"\midrule",
    ]
    for v in verdicts:
        cells = [v.id.replace("_", r"\_"), v.tag, *map(_latex, v.ratio), str(v.independent)]
        lines.append(" & ".join([*cells, f"{v.violation_bound:.3f}"]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _latex(x: float) -> str:
    text = _short(x)
    mantissa, e, power = text.partition("e")
    return rf"${mantissa}\cdot10^{{{int(power)}}}$" if e else text.replace("-", "--")


def versions() -> dict[str, str]:
    from importlib import metadata

    found = {"python": platform.python_version()}
    for name in ("lrmanifold", "torch", "geoopt", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found


def as_json(
    settings: Settings,
    verdicts: Sequence[Verdict],
    controls: Sequence[ControlVerdict],
    mutations: Sequence[Mutation] = (),
) -> str:
    """Everything the run found, with the worst sample of every claim."""
    everything: Iterable[Any] = [*verdicts, *controls, *mutations]
    content = {
        "versions": versions(),
        "device": str(settings.device),
        "dtype": str(settings.dtype).removeprefix("torch."),
        "seed": settings.seed,
        "trials": settings.trials,
        "search": settings.search,
        "passed": all(v.passed for v in everything),
        "claims": [
            {**vars(v), "passed": v.passed, "violation_rate_bound": v.violation_bound}
            for v in verdicts
        ],
        "controls": [{**vars(v), "passed": v.passed} for v in controls],
        "mutations": [{**vars(m), "passed": m.passed} for m in mutations],
        "not_covered": NOT_COVERED,
    }
    return to_json(content)


def figure_name(claim: Claim) -> str:
    """File name of the claim's picture, ``<group>-<name>.png``."""
    return f"{claim.id.replace('/', '-')}.png"


def as_png(claim: Claim, settings: Settings) -> bytes:
    """The claim's picture."""
    if claim.figure is None:
        raise ValueError(f"{claim.id} has no figure")
    out = io.BytesIO()
    claim.figure(settings.dtype, settings.device).savefig(out, dpi=150, format="png")
    return out.getvalue()
