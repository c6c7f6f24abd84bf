"""The page: which tables and pictures, in which order, as HTML and as Markdown."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lrmanifold.experiments.runs import write_atomically

from . import figures, published, tables
from .claim import frontier_claim
from .groups import Group, Row, failures, gather, validated
from .notes import LIMITS
from .statistics import compare
from .tables import TableText

HERE = Path(__file__).parent
TITLES = {
    "digits": "Digits: every method",
    "mnist": "MNIST, LeNet5, ranks 4/10/100",
    "fashion": "Fashion-MNIST, LeNet5, ranks 4/10/100",
    "mnist-50": "MNIST, LeNet5, ranks 10/25/250",
    "fashion-50": "Fashion-MNIST, LeNet5, ranks 10/25/250",
    "mnist-half-rate": "MNIST at half the tuned rates",
    "fashion-50-rates": "Fashion-MNIST, ranks 10/25/250, lower rates",
    "digits-ranks": "Digits: ranks and τ",
    "digits-decay": "Digits: weight decay",
    "mnist-rivals": "MNIST: further rivals",
    "fashion-rivals": "Fashion-MNIST: further rivals",
    "cifar-cpu": "CIFAR-10, VGG16, four epochs on a CPU",
    "cifar-vgg16": "CIFAR-10, VGG16",
    "cifar-wrn16-4": "CIFAR-10, WideResNet-16-4",
    "cifar-vit": "CIFAR-10, ViT",
}
# Settings that make a curve to look at.
FRONTIER = 8
# Strength of the pictures that show one; 0.06 elsewhere.
STRENGTHS = {"digits": "0.1", "cifar10": "0.004"}


@dataclass
class Picture:
    """A PNG with what it shows; the name is that of its file."""

    name: str
    caption: str
    png: bytes

    @property
    def source(self) -> str:
        """For an HTML page of one file."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode()


@dataclass
class Section:
    """A part of the page: a heading, a sentence or two, tables, pictures."""

    title: str
    text: str = ""
    parts: list[Any] = field(default_factory=list)

    def add(self, part: TableText | Picture | None) -> None:
        """Append what there is; tables without rows are left out."""
        if part is not None and not (isinstance(part, TableText) and not part.rows):
            self.parts.append(part)


def picture(name: str, caption: str, figure: Any) -> Picture | None:
    """A figure as a picture; None stays None."""
    if figure is None:
        return None
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return Picture(name, caption, buffer.getvalue())


def sections(rows: Sequence[Row]) -> list[Section]:
    """Everything that the rows have something to say about."""
    gathered = gather(rows)
    by_data: dict[str, list[Group]] = {}
    for groups in gathered.values():
        for group in groups:
            by_data.setdefault(group.head["training"]["data"], []).append(group)
    found = [_frontiers(by_data)]
    for name, groups in gathered.items():
        if not name.startswith("frontier"):
            found.append(_experiment(name, groups))
    found.append(_frontier_settings(gathered))
    found.append(_published(gathered))
    return [section for section in found if section.parts]


def _frontiers(by_data: dict[str, list[Group]]) -> Section:
    section = Section(
        "The frontier: clean against robust",
        "Each point is one setting (mean over its seeds); a line joins the settings of a family "
        "that no other one of it beats in both. Low-rank families count only where at least 65 % "
        "of the parameters are saved for inference.",
    )
    for data, groups in by_data.items():
        if len(groups) < FRONTIER:
            continue
        eps = STRENGTHS.get(data, "0.06")
        section.add(picture(f"frontier-{data}", f"{data}", figures.frontier(data, groups, eps=eps)))
        section.add(frontier_claim(data, groups, eps))
    return section


def _experiment(name: str, groups: list[Group]) -> Section:
    section = Section(TITLES.get(name, name), _summary(groups))
    section.add(tables.accuracy("Accuracy (%)", groups, _sizes(groups)))
    main = [g for g in groups if len(g.head.get("fgsm", {})) > 1]
    if any(g.name == "dense SGD" for g in groups) and len(groups) <= 20:
        shown = _few(main)
        section.add(
            picture(
                f"{name}-curves",
                "Accuracy against strength, bands of one standard deviation; below, the difference "
                "to dense SGD.",
                figures.curves(shown, "dense SGD"),
            )
        )
    chosen = validated(groups, lambda g: g.head["method"]["kind"] == "condlr" and len(g.rows) > 1)
    if chosen is not None:
        rivals = [g for g in groups if g is not chosen]
        title = f"Paired by seed: {chosen.label}, the CondLR variant best in validation"
        section.add(tables.comparisons(title, chosen, compare(chosen, rivals)))
    section.add(tables.cost("Size, cost, calibration", groups))
    if len(groups) <= 20:
        section.add(tables.layers("Condition number of each layer (first seed)", groups))
        section.add(
            picture(
                f"{name}-cond",
                "Largest condition number of a low-rank layer over training.",
                figures.conditioning(groups),
            )
        )
        for i, group in enumerate(_spectral(groups)):
            caption = f"Singular values over training: {group.label}."
            section.add(picture(f"{name}-spectra-{i + 1}", caption, figures.spectra(group)))
    else:
        attack, eps = "pgd", STRENGTHS.get(groups[0].head["training"]["data"], "0.06")
        section.add(
            picture(
                f"{name}-compression",
                "Accuracy against the parameters kept.",
                figures.compression(groups, eps, attack),
            )
        )
    section.add(tables.condition("Condition number of the network and its bound", groups))
    section.add(tables.masking("Would gradient masking show?", groups))
    section.add(tables.independent("An independent suite", groups))
    return section


def _summary(groups: Sequence[Group]) -> str:
    row = groups[0].head
    t, seeds = row["training"], sorted({s for g in groups for s in g.seeds})
    text = f"{t['model']} on {t['data']}, {t['epochs']} epochs, batch {t['batch_size']}, cosine."
    tuned = next((g.head["tuning"] for g in groups if g.head["tuning"]["tuned"]), None)
    if tuned is not None:
        text += (
            f" Rate tuned for each method: {tuned['runs']} rates, {tuned['epochs']} epoch(s) of "
            f"{tuned['images']:,} images each, one seed, by the {tuned['criterion']}."
        )
    text += f" Seeds {', '.join(map(str, seeds))}. {row.get('note') or ''}"
    return text.strip()


def _sizes(groups: Sequence[Group]) -> str:
    asked = groups[0].head["attacks"]
    return (
        f"Mean ± standard deviation over the seeds. FGSM on all test images; PGD with "
        f"{asked['steps']} steps and {asked['restarts']} restarts and transfer (PGD images of the "
        f"dense SGD network of the same start) on the first {asked['images']}."
    )


def _few(groups: Sequence[Group], most: int = 7) -> list[Group]:
    """Colours and line styles tell seven curves apart: the best known rivals go first."""
    order = (
        "dense SGD", "dense AdamW", "dense, SVD-truncated", "A Bᵀ", "DLRT", "CondLR τ=0",
        "CondLR τ=0.1", "CondLRAdam τ=0.1", "CondLR τ=0.5",
    )  # fmt: skip
    rank = {name: i for i, name in enumerate(order)}
    first = sorted(groups, key=lambda g: rank.get(g.name, len(order)))[:most]
    return [g for g in groups if g in first]


def _spectral(groups: Sequence[Group]) -> list[Group]:
    wanted = ("A Bᵀ", "CondLR τ=0.5")
    return [g for name in wanted for g in groups if g.name == name and g.head.get("spectra")]


def _frontier_settings(gathered: dict[str, list[Group]]) -> Section:
    section = Section(
        "All settings of the frontier",
        "Rates here are hyper-parameters of the curve, not tuned on validation; choosing a point "
        "from these tables is choosing on the test images.",
    )
    for name, groups in gathered.items():
        if name.startswith("frontier"):
            section.add(tables.accuracy(name, groups))
    return section


def _published(gathered: dict[str, list[Group]]) -> Section:
    section = Section("Published figures beside ours")
    for name, data in (("mnist", "mnist"), ("fashion", "fashion-mnist")):
        groups = [
            g
            for key in gathered
            if key.split("-")[0] == name
            for g in gathered[key]
        ]  # fmt: skip
        if groups:
            lines = published.LENET[data]
            title = f"{data}: clean, FGSM 0.03 and 0.06"
            strengths = published.LENET_STRENGTHS
            section.add(tables.beside(title, strengths, lines, groups, published.LENET_NOTE))
    groups = [g for key in gathered if key.startswith("cifar") for g in gathered[key]]
    lines = published.CIFAR_FGSM
    note = published.CIFAR_NOTE
    if not groups:
        note += " No run of ours is in the table: it needs a GPU (cifar_gpu.sh)."
    title = "CIFAR-10, VGG16, FGSM scaled and unclipped"
    section.add(tables.beside(title, published.CIFAR_STRENGTHS, lines, groups, note))
    return section


def render(rows: Sequence[Row], folder: Path) -> tuple[Path, Path]:
    """Write ``report.html``, ``report.md`` and the pictures; returns the first two."""
    import jinja2

    found = sections(rows)
    where: list[dict[str, Any]] = []
    for row in rows:
        c = row["conditions"]
        kept = {k: c[k] for k in ("commit", "processor", "gpu", "python", "versions")}
        if kept not in where:
            where.append(kept)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=jinja2.select_autoescape(["html.j2", "j2.html"], default=False),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    context = {
        "sections": found,
        "limits": LIMITS,
        "runs": len(rows),
        "where": where,
        "failed": tables.failed(failures(rows)),
        "hours": sum(sum(r.get("epoch_seconds", [])) for r in rows) / 3600,
    }
    for section in found:
        for part in section.parts:
            if isinstance(part, Picture):
                write_atomically(folder / "figures" / f"{part.name}.png", part.png)
    paths = (folder / "report.html", folder / "report.md")
    for path in paths:
        template = environment.get_template(f"template.{path.suffix[1:]}.j2")
        write_atomically(path, template.render(context).encode())
    return paths
