"""The runner: what passes, what fails, exit codes, and what is stored."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from theory import claims
from theory.__main__ import main
from theory.core import Claim, Control, Evidence, Source, identity, inequality, not_met
from theory.report import write_json
from theory.runner import Settings, select, verify, verify_control


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
    assert r"x \le 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv",
    [
        ("--only", "nothing/*"),
        ("--trials", "0"),
        ("--seed", "-1"),
        ("--dtype", "float16"),
        ("--device", "nonsense"),
    ],
)
def test_senseless_arguments_exit_with_2(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(*argv)
    assert stopped.value.code == 2
    assert argv[1] in capsys.readouterr().err


def test_a_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich", None)
    with pytest.raises(SystemExit) as stopped:
        run()
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

    monkeypatch.setattr("theory.report.os.replace", fails)
    with pytest.raises(OSError, match="disk full"):
        write_json(path, Settings(), [], [])
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


# -- the claims of the project


def test_select_takes_globs_and_last_names():
    known = claims()
    assert {c.id.split("/")[0] for c in select(known, "geometry/*")} == {"geometry"}
    assert [c.id for c in select(known, "curvature")] == ["geometry/curvature"]
    assert select(known, None) == list(known)


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
