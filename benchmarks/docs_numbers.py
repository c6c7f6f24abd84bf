"""Numbers of README and docs: measured once, written from one file, checked by a test.

``python -m benchmarks.docs_numbers measure`` runs the demo and writes
``results/docs_numbers.json``; README's example is measured by ``benchmarks.readme_example``.
``write`` puts the numbers between the marks ``<!-- numbers: NAME -->`` and ``<!-- end -->`` of the
pages, and draws the picture; ``check`` (the default) fails where a page says something else.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from ._record import FOLDER, record
from .certified.gpu import TWINS, preferred
from .report.results import Results, read

ROOT = FOLDER.parents[1]
PAGES = ("README.md", "docs/index.md", "docs/how-to-choose.md", "docs/in-practice.md")
MARKED = re.compile(r"(<!-- numbers: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def measure() -> None:
    """Run the demo; write its results."""
    from lrmanifold.experiments import demo

    torch.set_num_threads(1)
    found = demo.run(demo.Demo()).to_dict()
    for method in found["methods"]:
        fc2 = method["spectra"].get("fc2", [])
        method["spectra"] = {"fc2": [[round(v, 4) for v in values] for values in fc2]}
    record("docs_numbers", {"demo": found})


def results() -> dict[str, Any]:
    """What was measured."""
    return json.loads((FOLDER / "docs_numbers.json").read_text(encoding="utf-8"))["results"]


def cell(values: list[float], digits: int = 1) -> str:
    """Mean ± standard deviation in percent, which does not break over lines."""
    mean = 100 * statistics.fmean(values)
    if len(values) == 1:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {100 * statistics.stdev(values):.{digits}f}".replace(" ", "\u00a0")


MNIST, DIGITS = "mnist-searched", "digits-searched"  # of the plans for each that with most trials
# Where a table has several networks of a method: the one that was chosen on validation images.
NETWORKS = {"mnist1.58": "folds", "mnist1.58-gpu": "folds"}
SHOWN = ("dense", "orthogonal", "factors", "low rank")


def certified(group: str) -> dict[str, list[dict[str, Any]]]:
    """Runs on the test images by method: of one table, in the order of their files.

    Of the group or of its twin of the GPU, never of both; see `preferred`.
    """
    found = {name: _runs(name) for name in {group, TWINS.get(group, group)}}
    counts = {(name, m): len(r) for name, runs in found.items() for m, r in runs.items()}
    return found[preferred(group, counts, SHOWN)]


def _runs(group: str) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted((FOLDER / "certified").glob(f"{group}_test_*.json")):
        one = json.loads(path.read_text(encoding="utf-8"))
        network = NETWORKS.get(group, one["run"]["network"])
        if not one.get("diverged") and one["run"]["network"] == network:
            found.setdefault(one["run"]["method"], []).append(one)
    return found


def _methods() -> dict[str, dict[str, Any]]:
    return {m["name"]: m for m in results()["demo"]["methods"]}


def demo_table() -> list[str]:
    """The demo's table, without the columns of weak attacks."""
    heads = ("", "lr, decay", "kept", "clean", "FGSM 0.1", "PGD 0.05", "PGD 0.1", "largest cond")
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for name, m in _methods().items():
        cond = f"{m['largest_cond']:.3g}"
        cells = (m["clean"], m["fgsm"]["0.1"], m["pgd"]["0.05"], m["pgd"]["0.1"])
        lines.append(
            f"| {name} | {m['lr']:g}, {m['weight_decay']:g} | {100 * m['inference_kept']:.0f} % | "
            + " | ".join(map(cell, cells))
            + f" | {float(cond):,g} |"
        )
    return lines


def snippet() -> list[str]:
    """The example beside its dense twin, from ``results/readme_example.json``."""
    text = (FOLDER / "readme_example.json").read_text(encoding="utf-8")
    found = json.loads(text)["results"]
    heads = "| | parameters | clean | PGD 0.05 | PGD 0.1 |"
    seeds = len(found["example"]["accuracy"]["0.0"])
    words = f"Accuracy in %, {seeds} seeds, both tuned on held-out images:"
    lines = [words, "", heads, "|---|---|---|---|---|"]
    dense = found["dense twin"]["chosen"]["optimizer"]
    for name, side in (
        ("this example", "example"),
        (f"dense, by {dense} at its own rate and decay", "dense twin"),
    ):
        cells = " | ".join(map(cell, found[side]["accuracy"].values()))
        lines.append(f"| {name} | {found[side]['parameters']:,} | {cells} |")
    return lines


def picture() -> Any:
    """The first picture: free and bounded singular values, and what is proved."""
    from lrmanifold.viz import MARKERS, PALETTE, new_figure

    figure, (left, middle, right) = new_figure(3, width=3.7, height=3.5)
    for axis, name, title in (
        (left, "plain low rank (A Bᵀ)", "A Bᵀ by SGD"),
        (middle, "CondLR tau=0.1", "CondLR, τ = 0.1"),
    ):
        spectrum = torch.tensor(_methods()[name]["spectra"]["fc2"])
        steps = range(len(spectrum))
        axis.fill_between(
            steps, spectrum.amin(1), spectrum.amax(1), color=PALETTE[1], alpha=0.2, lw=0
        )
        axis.semilogy(steps, spectrum, color=PALETTE[1], lw=0.6)
        cond = float(spectrum[-1].amax() / spectrum[-1].amin())
        axis.set(title=f"{title}: cond {cond:.3g}", xlabel="epoch", xlim=(0, len(spectrum) - 1))
    left.set_ylabel("32 singular values of a layer")
    low, high = (f(a.get_ylim()[k] for a in (left, middle)) for k, f in ((0, min), (1, max)))
    for axis in (left, middle):
        axis.set_ylim(low, high)
    shown = {"low rank": "CondLR, τ = 0", "dense": "dense", "factors": "A Bᵀ"}
    for k, (method, label) in enumerate(shown.items()):
        runs = certified("mnist0.3").get(method, [])
        radii = [float(eps) for eps in runs[0]["curve"]]
        curves = 100 * torch.tensor([list(run["curve"].values()) for run in runs])
        right.plot(
            radii, curves.mean(0), MARKERS[k], ls="-", markevery=5, color=PALETTE[(1, 0, 2)[k]],
            label=label,
        )  # fmt: skip
    right.set(title="Proved safe, MNIST, equal size", xlabel="l2 radius", ylabel="test images, %")
    right.legend()
    return figure


def bullets() -> list[str]:
    """What README and the first page of the docs begin with."""
    proved = certified("mnist0.3-long")["low rank"]
    verified = 100 * statistics.fmean(run["verified"] for run in proved)
    mnist, digits = (
        {name: f"{value:.0f} %" for name, value in attacked(plan).items()}
        for plan in (MNIST, DIGITS)
    )
    ours, dense, free = "CondLRAdam τ=0", "dense AdamW", "A Bᵀ AdamW"
    seeds, images = len(_table(MNIST).seeds), _table(MNIST).plan.attack.images
    text = f"""- **Proved.** {verified:.1f} % of MNIST's test images are proved safe against every
  change of l2 norm up to 0.3. The network stores {proved[0]["stored"]:,} numbers.
- **Small, not fragile.** At a third of the weights, {mnist[ours]} of MNIST survive the worst of
  five attacks (linf 0.1, {images:,} images, {seeds} seeds), dense {mnist[dense]}. On digits
  {digits[ours]}, dense {digits[dense]}, A Bᵀ {digits[free]}.
- **Two lines.** `factorize` your model; take `CondLR` for SGD, `CondLRAdam` for AdamW."""
    return text.splitlines()


def _mean(values: list[float]) -> str:
    return f"{100 * statistics.fmean(values):.1f}"


def _proved(group: str, method: str) -> str:
    runs = certified(group).get(method, [])
    return _mean([run["verified"] for run in runs]) if runs else "–"


def attacked(plan: str) -> dict[str, float]:
    """Worst case of each family of a plan, in %, as on its page."""
    found = _table(plan)
    return {g.family.name: 100 * g.mean(*found.column("worst")) for g in found.main()}


def _table(plan: str) -> Results:
    found = read(FOLDER / "robustness" / plan)
    assert found is not None, f"{plan} has no page"
    return found


def table() -> list[str]:
    """README's table: what was run, each method beside the others, and what others published."""
    rows = {}
    for plan, words in (
        (DIGITS, "digits, attacked"),
        (MNIST, "MNIST, attacked"),
        ("fashion-mnist", "Fashion-MNIST, at 0.03"),
    ):
        worst = attacked(plan)
        families = ("dense AdamW", "orthogonal, full rank", "A Bᵀ AdamW", "CondLRAdam τ=0")
        rows[words] = [*(f"{worst[n]:.1f}" if n in worst else "–" for n in families), "–"]
    for group, words, published in (
        ("mnist0.3", "MNIST, proved at 0.3", "–"),
        ("mnist0.3-long", "the same, longer", "95.7 (GloRo, 166k)"),
        ("mnist1.58", "MNIST, proved at 1.58", "62.8 (GloRo, 1,970k)"),
        ("cifar36-longer", "CIFAR-10, proved at 36/255", "50.8 (LiResNet, 800k)"),
        ("cifar36-larger", "the same, larger", "58 to 63 (1,570k)"),
    ):
        if len(certified(group).get("low rank", [])) < 2:
            continue  # one seed is no row
        cells = [_proved(group, m) for m in ("dense", "orthogonal", "factors", "low rank")]
        stored = certified(group)["low rank"][0]["stored"]
        rows[words] = [*cells[:3], f"{cells[3]} ({round(stored / 1000)}k)", published]
    heads = (
        "accuracy in % (stored numbers)", "dense", "orthogonal", "A Bᵀ", "CondLR, τ = 0",
        "published",
    )  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return lines + [f"| {words} | " + " | ".join(cells) + " |" for words, cells in rows.items()]


def times() -> list[str]:
    """The two commands, from ``results/first_minutes.json``."""
    found = json.loads((FOLDER / "first_minutes.json").read_text(encoding="utf-8"))
    return [
        f"On two cores: set-up {found['setup_s']} s ({found['download_mb']} MB), demo "
        f"{found['demo_s']} s, tests {found['test_min']} minutes.",
    ]


def _speed(name: str) -> dict[str, Any]:
    text = (FOLDER / f"speed_{name}.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)["results"]
    return found


def inference() -> list[str]:
    """Size and time of a trained network in its forms, from ``results/speed_inference.json``."""
    found = _speed("inference")
    rows, width = found["rows"], found["width"]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    heads = "".join(f" ms, {case} | / dense |" for case in cases)
    lines = [
        f"| {found['layers']} layers {width} x {width}, rank {found['rank']:.0%}, "
        f"CPU threads: {found['threads']} | MB |{heads}",
        "|---|---|" + "---|---|" * len(cases),
    ]
    for name in dict.fromkeys(row["network"] for row in rows):
        mine = [row for row in rows if row["network"] == name]
        cells = "".join(f" {row['ms']:.2f} | {row['ratio']['median']:.2f} |" for row in mine)
        lines.append(f"| {name} | {mine[0]['mb']:.1f} |{cells}")
    return lines


def replicas() -> list[str]:
    """What ``distribute=True`` costs or saves, from ``results/speed_replicas.json``."""
    found = _speed("replicas")
    rows, size = found["rows"], found["size"]
    ratios = [(row["case"], row["ratio"]["median"]) for row in rows if row["way"] != "all"]
    words = ", ".join(f"{ratio:.2f} at {case}" for case, ratio in ratios)
    return [
        f"On {found['processes']} gloo processes of one machine, {found['layers']} layers of "
        f"{size} x {size}, a step takes so many",
        f"times as long as where both make all: {words} (`python -m benchmarks.speed.replicas`).",
    ]


WRITERS = {
    "bullets": bullets,
    "demo": demo_table,
    "inference": inference,
    "replicas": replicas,
    "results": table,
    "snippet": snippet,
    "times": times,
}


def rewritten(text: str) -> str:
    """The page with its numbers put in anew."""
    return MARKED.sub(lambda m: m[1] + "\n".join(["", *WRITERS[m[2]](), ""]) + "\n" + m[3], text)


def main(command: str = "check") -> int:
    """Measure, write or check; the exit status."""
    if command == "measure":
        measure()
        return 0
    stale = []
    for page in PAGES:
        path = Path(ROOT, page)
        text = path.read_text(encoding="utf-8")
        if rewritten(text) != text:
            stale.append(page)
            if command == "write":
                path.write_text(rewritten(text), encoding="utf-8")
    if command == "write":
        picture().savefig(ROOT / "docs" / "_static" / "readme.png", dpi=110)
    for page in stale:
        print(f"{page}: {'written' if command == 'write' else 'other numbers than measured'}")
    return int(bool(stale) and command != "write")


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
