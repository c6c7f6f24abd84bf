"""All tables at once: what was compared, by how many points, and did both searches come to rest?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lrmanifold import viz

from ..robustness.plan import Family
from .cells import table
from .picture import method, png
from .results import LEAST_SEEDS, Finding, Results, findings, strength

RIVALS = ("dense", "orthogonal, full rank", "truncated", "A Bᵀ", "no bound", "penalty")
HEAD = ("table, weights stored", "compared", "expected", "points", "holds", "at rest")
_LOOK = {"ahead": viz.PALETTE[1], "not decided": viz.PALETTE[7], "behind": viz.PALETTE[2]}


@dataclass(frozen=True)
class Line:
    """A hypothesis with what a reader needs to weigh it."""

    plan: str
    under_attack: bool  # so were all networks trained
    column: str  # "clean" or "worst 0.1"
    size: str  # weights stored by the smaller side
    finding: Finding
    families: tuple[Family, Family]
    at_rest: tuple[bool, bool]  # the search of either side

    @property
    def ours(self) -> Family:
        """The side that is CondLR or CondLRAdam with a bound; of two the first."""
        return self.families[not self.families[0].ours]

    @property
    def rival(self) -> str:
        """The kind of the other side."""
        return method(self.families[self.families[0].ours])

    @property
    def label(self) -> str:
        """In the picture: comparisons of a table differ by optimizer, τ, size or strength."""
        by = "" if self.ours.optimizer == "adam" else "SGD, "
        tau, eps = self.ours.method.tau, self.column.removeprefix("worst ")
        return f"{self.plan} ({by}τ={tau:g}, {self.size}), {eps}"

    @property
    def interval(self) -> tuple[float, float, float]:
        """Points that ours is ahead by, and the ends."""
        f = self.finding
        if self.families[0].ours:
            return f.difference, f.low, f.high
        return -f.difference, -f.high, -f.low


def lines(pages: Sequence[tuple[str, Results]]) -> list[Line]:
    """Of all hypotheses of all plans, in their order."""
    found = []
    for name, results in pages:
        stored = {g.family.name: g.done[0]["stored_share"] for g in results.main() if g.done}
        for finding in findings(results):
            one, other = (results.plan.family(f) for f in (finding.better, finding.than))
            hypothesis = finding.hypothesis
            eps = results.plan.attack.eps if hypothesis.eps is None else hypothesis.eps
            share = min((stored[f.name] for f in (one, other) if f.name in stored), default=None)
            found.append(
                Line(
                    plan=name,
                    under_attack=results.plan.adversarial is not None,
                    column="clean" if hypothesis.column == "clean" else f"worst {strength(eps)}",
                    size="–" if share is None else f"{100 * share:.0f} %",
                    finding=finding,
                    families=(one, other),
                    at_rest=(results.interior(one), results.interior(other)),
                )
            )
    return found


def row(line: Line) -> list[str]:
    """Of a table in Markdown under `HEAD`; what belongs together stays on one line."""
    f = line.finding
    interval = f" ({f.low:+.1f}\u00a0to\u00a0{f.high:+.1f})" if f.seeds > 1 else ""
    count = f"{f.seeds} seed{'' if f.seeds == 1 else 's'}"
    return [
        f"[{line.plan}]({line.plan}/report.md), {line.size}",
        f"{f.better} − {f.than}, {line.column}",
        f"> {f.hypothesis.margin:g}".replace("-", "−"),
        f"{f.difference:+.1f}{interval}".replace("-", "−"),
        count if f.seeds < LEAST_SEEDS else f"**{f.verdict}**",
        " / ".join("yes" if rest else "no" for rest in line.at_rest),
    ]


def drawn(found: Sequence[Line]) -> list[Line]:
    """The lines of the picture by rival: worst cases against a method that is not ours and that
    trained at all, of finished tables with five seeds or more; each comparison once."""
    shown: dict[tuple[str, ...], Line] = {}
    for line in found:
        f, (one, other) = line.finding, line.families
        against = one.ours != other.ours and not f.untrained
        finished = f.seeds >= max(LEAST_SEEDS, f.planned)
        if "worst" in line.column and against and finished:
            shown.setdefault((line.plan, line.column, *sorted((f.better, f.than))), line)
    last = len(RIVALS)
    order = {name: place for place, name in enumerate(RIVALS)}
    return sorted(shown.values(), key=lambda line: (order.get(line.rival, last), line.rival))


def picture(found: Sequence[Line]) -> bytes:
    """A PNG: by how many points ours is ahead in the worst case, with intervals."""
    shown = drawn(found)
    figure, axis = viz.new_figure(1, width=7.2, height=1.2 + 0.19 * (len(shown) + 10))
    place, places, names = 0.0, [], []
    for i, line in enumerate(shown):
        if i == 0 or line.rival != shown[i - 1].rival:
            place += 1.3
            axis.text(0.01, place, line.rival, transform=axis.get_yaxis_transform(), weight="bold")
        place += 1
        middle, low, high = line.interval
        color = _LOOK["ahead" if low > 0 else "behind" if high < 0 else "not decided"]
        axis.plot([low, high], [place, place], color=color, lw=1.6)
        axis.plot(middle, place, "o", color=color, mfc=color if all(line.at_rest) else "white")
        places.append(place)
        names.append(line.label)
    axis.axvline(0, color="black", lw=0.8)
    axis.set_yticks(places, names)
    axis.set_ylim(place + 1, 0.2)
    axis.set_xlabel("points ahead in the worst case")
    for name, color in _LOOK.items():
        axis.plot([], [], color=color, lw=1.6, label=name)
    axis.plot([], [], "o", color=_LOOK["not decided"], label="both searches at rest")
    viz.legend_below(figure, axis, columns=4)
    return png(figure)


PARTS = (
    ("as-they-are", "Trained on the images as they are", False),
    ("under-attack", "Trained on attacked images", True),
)


def index(pages: Sequence[tuple[str, Results]]) -> str:
    """The page of all tables."""
    found = lines(pages)
    parts = [
        "# Robustness of low-rank training",
        "Every table was planned before it was run: `plan.toml` beside it holds hypotheses, "
        "families, the search for settings and its budget. Written by "
        "`python -m benchmarks.report`. **All comparisons that were planned stand here, won or "
        "lost**: the first side minus the second in points of accuracy, whether that is more than "
        "was expected, and whether the search of either side came to rest (all neighbours of its "
        "best setting were tried). Where the rival's did not, a lead may be one of the search. "
        "Fewer than five seeds say neither yes nor no. "
        "Intervals hold together at 95 % within a table, not over this page; a later table "
        "may repeat an earlier one, which stays.",
        "The pictures have the worst cases of finished tables with five seeds or more, by rival: "
        "the table, the optimizer where it is not AdamW, τ, weights stored, strength.",
    ]
    for name, title, attacked in PARTS:
        own = [line for line in found if line.under_attack is attacked]
        if own:
            shown = f"![points ahead of each rival, with intervals]({name}.png)"
            parts += [f"## {title}", *[shown][: len(drawn(own))], table(HEAD, map(row, own))]
    parts += ["## Titles", "\n".join(f"- [{r.plan.title}]({n}/report.md)" for n, r in pages)]
    parts.append(
        "## Older tables\n\n[before.md](before.md): measured with weaker attacks and settings "
        "chosen on test images; what is wrong with each stands there."
    )
    return "\n\n".join(parts) + "\n"


def pictures(pages: Sequence[tuple[str, Results]]) -> dict[str, bytes]:
    """Those of the page, by name of the file; none where there is nothing to draw."""
    found = lines(pages)
    drawings = {}
    for name, _, attacked in PARTS:
        own = [line for line in found if line.under_attack is attacked]
        if drawn(own):
            drawings[f"{name}.png"] = picture(own)
    return drawings
