"""The runner: what passes, what fails, exit codes, and what is stored."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import theory
from theory import catalogue, claims
from theory.__main__ import main
from theory.core import Claim, Control, Evidence, Extremal, Source, identity, inequality, not_met
from theory.mutation import constants, measured_looseness, mutate
from theory.outputs import write
from theory.report import as_csv, as_json, as_latex, claims_table
from theory.runner import Settings, select, verify, verify_control
from theory.sampling import Draw
from theory.statistics import violation_bound
from theory.text import to_text


def drawn(seed, dtype, device):
    generator = torch.Generator().manual_seed(seed)
    return {"x": torch.rand((), generator=generator, dtype=dtype).to(device)}


def below(bound):
    return lambda sample: inequality(sample["x"], bound)


def half_of_the_time(sample):
    return not_met("x > 1/2") if sample["x"] > 0.5 else inequality(sample["x"], 0.5)


def never(sample):
    return not_met("never")


def broken(sample):
    raise RuntimeError("no SVD today")


below_1 = below(1.0)


def claim(check=below_1, controls=(), **more) -> Claim:
    return Claim(
        id=more.pop("id", "group/name"),
        title="x is below its bound",
        statement=r"x \le 1",
        hypotheses=("x drawn from [0, 1)",),
        source=Source("classical", "here"),
        sample=drawn,
        check=check,
        controls=tuple(controls),
        trials=20,
        float32="exact",
        **more,
    )


wrong = Control("bound 0.1", below(0.1))
accepted = Control("bound 2", below(2.0))


# -- verdicts


def test_a_claim_that_holds_on_all_samples_passes():
    found = verify(claim(), Settings())
    assert found.passed
    assert (found.met, found.skipped, found.independent) == (20, 0, 20)
    assert 0.0 <= found.ratio[0] <= found.ratio[1] <= found.ratio[2] < 1.0


def test_one_contradicting_sample_fails_the_claim_and_names_its_seed():
    found = verify(claim(below(0.9)), Settings())
    assert not found.passed
    assert found.failures[0].startswith("seed ")


def test_unmet_hypotheses_are_skipped_and_counted():
    found = verify(claim(half_of_the_time), Settings())
    assert found.passed
    assert found.met + found.skipped == 20
    assert found.skipped > 0


def test_a_claim_without_a_met_sample_fails():
    found = verify(claim(never), Settings())
    assert not found.passed
    assert (found.met, found.skipped, found.failures) == (0, 20, ())


def test_a_claim_that_cannot_be_computed_fails():
    found = verify(claim(broken), Settings())
    assert not found.passed
    assert "no SVD today" in found.failures[0]


def test_all_ratios_of_a_sample_enter_the_statistics():
    def check(sample):
        return Evidence(1.0, 1.0, True, independent=3, ratios=(0.2, 0.4, 0.9))

    found = verify(claim(check), Settings(trials=2))
    assert found.ratio == pytest.approx((0.2, 0.5, 0.9))
    assert found.independent == 6


def test_a_sample_that_fails_counts_with_all_of_its_problems():
    """One verdict on a batch says nothing of how many in it violate: at most all of them."""

    def check(sample):
        return Evidence(float(sample["x"]), 0.5, bool(sample["x"] <= 0.5), independent=8)

    found = verify(claim(check), Settings())
    failed = len(found.failures)
    assert 0 < failed < 20
    assert (found.violations, found.independent) == (8 * failed, 160)
    assert found.violation_bound == violation_bound(8 * failed, 160)


def test_a_seed_is_one_problem_whatever_the_default_dtype_is():
    def numbers():
        draw = Draw(3, torch.float64, torch.device("cpu"))
        return draw.uniform(), draw.integer(1, 100), draw.cond(), draw.normal(2).tolist()

    before = numbers()
    torch.set_default_dtype(torch.float64)
    try:
        assert numbers() == before
    finally:
        torch.set_default_dtype(torch.float32)


def test_runs_are_deterministic_and_seeds_differ():
    once, again, other = (verify(claim(), Settings(seed=s)) for s in (3, 3, 4))
    assert dataclasses.replace(once, seconds=0.0) == dataclasses.replace(again, seconds=0.0)
    assert once.ratio != other.ratio


def test_a_control_counts_as_rejected_if_one_sample_rejects_it():
    found = verify_control(claim(), wrong, Settings())
    assert found.passed
    assert 0 < found.rejected <= found.met == 16


@pytest.mark.parametrize(
    "control", [accepted, Control("never met", never), Control("broken", broken)]
)
def test_a_control_that_is_accepted_never_met_or_broken_fails(control):
    assert not verify_control(claim(), control, Settings()).passed


def test_evidence_of_zero_against_zero_is_no_violation():
    assert inequality(0.0, 0.0).ratio == 0.0
    assert inequality(1.0, 0.0).ratio == float("inf")
    assert not identity(2.0, tolerance=1.0).holds


def test_nan_never_holds():
    assert not inequality(float("nan"), 1.0).holds
    assert not inequality(0.0, float("nan")).holds


# -- the command line


def run(*argv, **options) -> int:
    return main([str(a) for a in argv], claims=options.get("claims", [claim(controls=[wrong])]))


def test_exit_code_0_and_a_table_if_all_claims_hold(capsys):
    assert run() == 0
    out = capsys.readouterr().out
    assert "group/name" in out
    assert "holds" in out
    assert "Not covered" in out


@pytest.mark.parametrize("check", [below(0.1), never, broken])
def test_exit_code_1_if_a_claim_fails(check, capsys):
    assert run(claims=[claim(), claim(check, id="group/bad")]) == 1
    assert "group/bad" in capsys.readouterr().out


def test_controls_alone_decide_the_exit_code_of_a_run_of_controls():
    assert run("--controls", claims=[claim(broken, controls=[wrong])]) == 0
    assert run("--controls", claims=[claim(controls=[wrong, accepted])]) == 1


def test_float32_states_the_tolerance_rules(capsys):
    assert run("--dtype", "float32") == 0
    assert "group/name: exact" in capsys.readouterr().out


def test_list_states_the_claim_without_running_it(capsys):
    assert run("--list", claims=[claim(broken)]) == 0
    assert "x <= 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv",
    [
        ("--only", "nothing/*"),
        ("--trials", "0"),
        ("--seed", "-1"),
        ("--dtype", "float16"),
        ("--device", "nonsense"),
        ("--search", "-1"),
        ("--jobs", "0"),
        ("--replay", "group/name"),
        ("--replay", "nothing:3"),
        ("--seed", "99999999999999999999"),
        ("--replay", "name:99999999999999999999999"),
        ("--replay", "name:" + 5000 * "9"),
        ("--device", "meta"),
        ("--device", "nowhere"),
        ("--csv", ".", "--controls"),
        ("--latex", ".", "--mutate"),
        ("--search", "4", "--controls"),
        ("--trials", "4", "--mutate"),
        ("--trials", "4", "--replay", "name:3"),
        ("--plots", ".", "--list"),
        ("--nonsense", "--nonsense"),
    ],
)
def test_senseless_arguments_exit_with_2(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(*argv)
    assert stopped.value.code == 2
    said = capsys.readouterr()
    assert argv[0] in said.err if len(argv) > 2 else argv[1] in said.err
    assert said.out == ""
    assert len(said.err.splitlines()) == 1


def test_a_missing_extra_is_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit) as stopped:
        run("--plots", tmp_path)
    assert stopped.value.code == 2
    assert "lrmanifold[demo]" in capsys.readouterr().err


def test_json_holds_the_run_and_replaces_the_file_at_once(tmp_path):
    path = tmp_path / "deep" / "run.json"
    assert run("--json", path, "--seed", 5, "--trials", 7) == 0
    assert run("--json", path, "--seed", 5, "--trials", 7) == 0
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["seed"] == 5
    assert content["dtype"] == "float64"
    assert content["device"] == "cpu"
    assert content["passed"] is True
    assert torch.__version__.startswith(content["versions"]["torch"].split("+")[0])
    assert content["claims"][0]["met"] == 7
    assert [p.name for p in path.parent.iterdir()] == ["run.json"]


def test_json_has_neither_nan_nor_half_written_files(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    assert run("--json", path, claims=[claim(never)]) == 1
    before = path.read_text(encoding="utf-8")
    assert "NaN" not in before

    def fails(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("theory.outputs.os.replace", fails)
    with pytest.raises(OSError, match="disk full"):
        write(path, as_json(Settings(), [], []).encode())
    assert path.read_text(encoding="utf-8") == before
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


def test_pictures_are_saved_under_the_name_of_the_claim(tmp_path):
    from matplotlib.figure import Figure

    drawing = claim(figure=lambda dtype, device: Figure())
    assert run("--plots", tmp_path, claims=[drawing, claim(id="group/without")]) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["group-name.png"]


def test_python_m_theory_runs():
    root = Path(__file__).resolve().parents[2]
    argv = [sys.executable, "-m", "theory", "--only", "sin-theta", "--trials", "3"]
    done = subprocess.run(argv, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "geometry/sin-theta" in done.stdout


def test_the_worst_sample_is_stored_and_replayed(tmp_path, capsys):
    path = tmp_path / "run.json"
    assert run("--json", path) == 0
    worst = json.loads(path.read_text(encoding="utf-8"))["claims"][0]["worst"]
    capsys.readouterr()
    assert run("--replay", f"name:{worst['seed']}") == 0
    again = json.loads(capsys.readouterr().out)
    assert again["ratio"] == worst["ratio"]
    assert run("--replay", f"name:{worst['seed']}", claims=[claim(below(0.1))]) == 1


def test_tables_for_papers(tmp_path):
    csv, latex = tmp_path / "run.csv", tmp_path / "run.tex"
    assert run("--csv", csv, "--latex", latex) == 0
    header, row = csv.read_text(encoding="utf-8").splitlines()
    assert header.startswith("id,source,kind")
    assert row.startswith("group/name,classical,inequality,20,0,20")
    assert latex.read_text(encoding="utf-8").count("tabular") == 2
    assert as_csv([]) == header + "\n"
    assert "group" not in as_latex([])


def test_the_table_fits_80_columns():
    verdicts = [
        verify(claim(id="geometry/normal-component-other-point"), Settings(search=s))
        for s in (0, 3)
    ]
    for shown in (verdicts, verdicts[:1]):
        assert max(map(len, claims_table(shown).splitlines())) <= 80


# -- extremal examples, mutations, search


def one(seed, dtype, device):
    return {"x": torch.ones((), dtype=dtype)}


def sharp(sample, *, constant=1.0):
    return inequality(sample["x"], constant)


def test_a_constant_that_is_too_large_is_found_at_the_extremal_example():
    found = verify(claim(sharp, extremal=(Extremal(one),)), Settings())
    assert found.passed
    assert found.attained == 1.0
    loose = verify(claim(below(1.5), extremal=(Extremal(one),)), Settings())
    assert not loose.passed
    assert "constant is too large" in loose.failures[-1]


def test_every_constant_is_scaled_and_must_be_noticed():
    known = claim(sharp, extremal=(Extremal(one),))
    assert constants(known) == {"constant": 1.0}
    assert mutate(known, "constant", Settings()).passed

    def loose(sample, *, constant=2.0, orders={"a": 1.0}):  # noqa: B006
        return inequality(sample["x"], constant * orders["a"])

    known = claim(loose)
    assert set(constants(known)) == {"constant", "orders[a]"}
    assert not mutate(known, "constant", Settings()).passed
    factor = measured_looseness(known, "constant", Settings())
    assert 0.4 < factor < 0.5
    assert mutate(claim(loose, loose={"constant": factor}), "constant", Settings()).passed
    # Declared looser than it is: 0.9 of the declared factor is not rejected.
    assert not mutate(claim(loose, loose={"constant": 0.9}), "constant", Settings()).passed
    assert not mutate(claim(loose, loose={"constant": 0.0}), "constant", Settings()).passed


def test_runs_of_mutations_decide_the_exit_code(capsys):
    assert run("--mutate", claims=[claim(sharp, extremal=(Extremal(one),))]) == 0
    assert run("--mutate", claims=[claim(sharp)]) in (0, 1)
    assert "constant" in capsys.readouterr().out


def test_search_finds_what_sampling_does_not():
    """A peak at one point of a square: a violation on a share of 10^-4 of the samples."""

    def two(seed, dtype, device):
        draw = Draw(seed, dtype, device)
        return {"x": draw.uniform(), "z": draw.normal(2)}

    def peak(sample):
        x, z = sample["x"], sample["z"]
        return inequality(1.03 - abs(x - 0.3) - 0.1 * float((z - 1.0).norm()), 1.0)

    known = dataclasses.replace(claim(peak), sample=two)
    assert verify(known, Settings()).passed
    found = verify(known, Settings(search=400))
    assert not found.passed
    assert found.searched > 1.0
    assert found.searched > found.ratio[2]
    again = verify(known, Settings(search=400))
    assert again.searched == found.searched


def test_a_seed_of_the_search_that_breaks_is_no_pass():
    """The samples that a search starts from are as good as all others; moved ones may be none."""

    def check(sample):
        if sample["x"] < 0.2:
            raise RuntimeError("no SVD today")
        return inequality(sample["x"], 1.0)

    def two(seed, dtype, device):
        return {"x": Draw(seed, dtype, device).uniform()}

    known = dataclasses.replace(claim(check), sample=two)
    first = next(s for s in range(999) if all(two(100_000 * s + k, None, None)["x"] > 0.2
                                              for k in range(6)))  # fmt: skip
    assert verify(known, Settings(seed=first, trials=6)).passed
    found = verify(known, Settings(seed=first, trials=6, search=200))
    assert not found.passed
    assert re.search(r"search from seed \d+: RuntimeError: no SVD today", found.failures[-1])


def test_verify_takes_a_claim_of_ones_own_and_one_of_the_collection():
    found = theory.verify(claim(), trials=30, seed=2)
    assert found.passed
    assert found.met == 30
    assert "group/name" in str(found)
    assert theory.verify("sin-theta", trials=3).id == "geometry/sin-theta"
    with pytest.raises(ValueError, match="trials must be at least 1"):
        theory.verify(claim(), trials=0)
    with pytest.raises(ValueError, match="must be a Claim or the id"):
        theory.verify("no-such-claim")


def test_the_template_holds_and_its_control_is_rejected():
    from theory.template import CLAIM

    found = theory.verify(CLAIM, trials=40, search=40)
    assert found.passed
    assert verify_control(CLAIM, CLAIM.controls[0], Settings()).passed
    assert mutate(CLAIM, "constant", Settings()).passed


# -- coverage


@pytest.mark.parametrize("n", [1, 9, 60, 500])
def test_the_violation_bound_without_violations_is_known(n):
    assert violation_bound(0, n) == pytest.approx(1 - 0.05 ** (1 / n), rel=1e-9)


@pytest.mark.parametrize(("k", "n"), [(1, 20), (3, 50), (20, 50), (49, 50)])
def test_the_violation_bound_is_that_of_the_beta_distribution(k, n):
    stats = pytest.importorskip("scipy.stats")
    assert violation_bound(k, n) == pytest.approx(stats.beta.ppf(0.95, k + 1, n - k), rel=1e-8)
    assert violation_bound(n, n) == 1.0
    with pytest.raises(ValueError, match="violations"):
        violation_bound(n + 1, n)


# -- the claims of the project


def test_the_list_needs_no_torch_and_says_what_the_claims_say():
    """Statements are read from the source: they must be those of the imported claims."""
    known = {c.id: c for c in claims()}
    entries = catalogue.entries()
    assert [e.id for e in entries] == list(known)
    for e in entries:
        c = known[e.id]
        assert (e.title, e.statement, e.hypotheses) == (c.title, c.statement, c.hypotheses)
        assert (e.tag, e.reference) == (c.source.tag, c.source.reference)
    root = Path(__file__).resolve().parents[2]
    code = (
        "import sys, theory.__main__ as m; m.main(['--list']); "
        "assert 'torch' not in sys.modules and 'geoopt' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "\\" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


@pytest.mark.parametrize(
    ("latex", "text"),
    [
        (r"\|X\|\le\frac{a}{b+c}", "‖X‖ <= a/(b+c)"),
        (r"\sqrt{1+\tau}\,\sigma_{r+1}^2", "sqrt(1+τ) σ_r+1²"),
        (r"U^\top\dot V\in\mathbb{R}^{m}", "Uᵀ V̇ ∈ R^m"),
    ],
)
def test_latex_becomes_text(latex, text):
    assert to_text(latex).replace(" ", "") == text.replace(" ", "")


def test_several_processes_give_what_one_gives(tmp_path):
    one_path, two_path = tmp_path / "1.json", tmp_path / "2.json"
    options = ["--only", "geometry/[st]*", "--trials", "3"]
    assert main([*options, "--jobs", "1", "--json", str(one_path)]) == 0
    assert main([*options, "--jobs", "2", "--json", str(two_path)]) == 0
    alone, together = (json.loads(p.read_text("utf-8"))["claims"] for p in (one_path, two_path))
    for a, b in zip(alone, together, strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}


LONG = ("conditioning/stability", "conditioning/stability-linear")  # 36 s for three constants


def assert_every_constant_is_looked_at(group, chosen):
    for known in filter(chosen, catalogue.load(group)):
        for name in constants(known):
            found = mutate(known, name, Settings())
            assert found.passed, found


@pytest.mark.parametrize("group", ["conditioning", "networks", "geometry", "certification"])
def test_every_constant_is_looked_at(group):
    assert_every_constant_is_looked_at(group, lambda known: known.id not in LONG)


@pytest.mark.slow
def test_every_constant_that_takes_long_is_looked_at():
    assert_every_constant_is_looked_at("conditioning", lambda known: known.id in LONG)


@pytest.mark.slow
@pytest.mark.parametrize("group", ["approximation", "training", "integrators"])
def test_every_constant_of_the_flows_is_looked_at(group):
    assert_every_constant_is_looked_at(group, lambda known: True)


def test_select_takes_globs_and_last_names():
    known = claims()
    assert {c.id.split("/")[0] for c in select(known, "geometry/*")} == {"geometry"}
    assert [c.id for c in select(known, "curvature")] == ["geometry/curvature"]
    assert select(known, None) == list(known)


def test_no_private_name_is_imported_from_another_folder():
    """Names of one's own folder come with one dot; all others must be public."""
    for path in Path(theory.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level != 1:
                names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
                private = [n for n in names if n.startswith("_") and not n.endswith("__")]
                assert not private, f"{path}, line {node.lineno}: {private}"


def test_files_that_are_cited_exist():
    root = Path(theory.__file__).parent
    for path in root.rglob("*.py"):
        for name in re.findall(r"``([\w/]+\.(?:py|png|json))``", path.read_text("utf-8")):
            places = (root.parent / name, root / name, path.parent / name)
            assert any(place.exists() for place in places), f"{path} cites {name}"


def test_the_readme_says_sharp_where_an_extremal_example_shows_it():
    """Rows of its tables, | `claim`, ... | what it says | sharp? |, of every claim once."""
    readme = (Path(theory.__file__).parent / "README.md").read_text("utf-8")
    rows = re.findall(
        r"^\| (`[^|]*`) \| [^\n]* \| ([^|\n]*) \|$", readme.partition("## Open")[0], re.M
    )
    said = {name: sharp for names, sharp in rows for name in re.findall(r"`([\w-]+)`", names)}
    for known in claims():
        sharp = said[known.id.split("/")[1]]
        assert bool(known.extremal) or not sharp.startswith("yes"), (known.id, sharp)
        assert not known.extremal or not re.match(r"no|–|identity$|order$", sharp), (
            known.id,
            sharp,
        )


def test_ids_are_unique():
    ids = [c.id for c in claims()]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("found", claims(), ids=lambda c: c.id)
def test_every_claim_is_stated_sourced_and_has_a_control(found):
    assert found.id.count("/") == 1
    assert found.title
    assert found.statement
    assert found.hypotheses
    assert found.source.tag in ("published", "classical", "ours")
    assert found.source.reference
    assert found.controls
    assert found.trials >= 1
    assert found.float32
