"""The console script: what it prints, what it writes, and its one-line errors."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("sklearn")

from typer.testing import CliRunner

from lrmanifold import cli
from lrmanifold._sealed import write_torch
from lrmanifold.cli._commands import app
from lrmanifold.cli._words import parse_rank
from lrmanifold.experiments import data, runs
from lrmanifold.experiments import demo as demos
from lrmanifold.report import report

PNG = b"\x89PNG\r\n\x1a\n"
QUICK = ("--epochs", "1", "--batch-size", "512")


def invoke(*args: object):
    return CliRunner().invoke(app, [str(a) for a in args])


def strict_json(path: Path) -> dict:
    def refuse(word: str):
        raise AssertionError(f"{word} is not JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder, output) of one short training."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    result = invoke("train", *QUICK, "--rank", "fc1=5,fc2=0.1", "--tau", 0.5, "--out", folder)
    assert result.exit_code == 0, result.output
    return folder, result.output


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """(folder, output) of a short demo, on a part of the images."""
    folder = tmp_path_factory.mktemp("runs") / "demo"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demos, "load", lambda name: few_digits())
        result = invoke("demo", "--epochs", 2, "--seeds", 2, "--seed", 5, "--out", folder)
    assert result.exit_code == 0, result.output
    return folder, result.output


def few_digits() -> data.Dataset:
    whole = data.load("digits")
    part = {"train_x": whole.train_x[:640], "train_y": whole.train_y[:640]}
    part |= {"test_x": whole.test_x[:50], "test_y": whole.test_y[:50]}
    return dataclasses.replace(whole, **part)


# -------------------------------------------------------------------------------------- train


@pytest.mark.parametrize(
    ("words", "epochs"), [((), 60), (("--optimizer", "adam"), 10), (("--epochs", 7), 7)]
)
def test_by_default_sgd_sees_the_few_digits_often(words, epochs, monkeypatch, tmp_path):
    """Ten epochs of them are 120 steps: 73 to 83 % clean in place of 96.9."""
    seen = []
    monkeypatch.setattr("lrmanifold.cli._commands.run", lambda job, force: seen.append(job))
    assert invoke("train", *words, "--out", tmp_path / "run").exit_code == 0
    assert seen[0].settings.epochs == epochs


def test_train_writes_results_model_and_pictures(trained):
    folder, _ = trained
    files = {p.name for p in folder.iterdir()}
    assert files == {"results.json", "model.pt", "accuracy.png", "spectra.png"}
    for name in ("accuracy.png", "spectra.png"):
        assert (folder / name).read_bytes().startswith(PNG)


def test_results_hold_settings_versions_history_and_accuracies(trained):
    results = strict_json(trained[0] / "results.json")
    assert results["format"] == runs.FORMAT
    assert results["settings"] == {
        "epochs": 1, "batch_size": 512, "lr": 0.1, "momentum": 0.3, "seed": 0, "data": "digits",
        "model": "mlp", "method": {"name": "CondLR tau=0.5", "kind": "condlr", "tau": 0.5},
        "rank": {"fc1": 5, "fc2": 0.1}, "exclude": None, "device": "cpu",
        "eps": [0.05, 0.1, 0.15],
    }  # fmt: skip
    assert results["versions"]["torch"] == torch.__version__
    assert set(results["versions"]) == {"lrmanifold", "torch", "geoopt", "numpy", "python"}
    assert [len(s) for s in results["history"]["spectra"]["network.fc1"]] == [5, 5]
    assert len(results["history"]["loss"]) == 1
    assert [layer["rank"] for layer in results["report"]["layers"]] == [5, 26, 10]
    assert 0 <= results["accuracy"]["clean"] <= 1
    assert list(results["accuracy"]["fgsm"]) == ["0.05", "0.1", "0.15"]
    assert results["data"]["test_images"] == 355


def test_train_prints_report_and_accuracy(trained):
    folder, output = trained
    assert re.search(r"fc1 +Linear +256 x 64 +5 ", output)
    assert "NOT a bound" in output
    accuracy = strict_json(folder / "results.json")["accuracy"]
    assert f"clean accuracy {100 * accuracy['clean']:.2f} %; under FGSM (linf) 0.05:" in output


def test_saved_model_is_the_trained_one(trained):
    folder, _ = trained
    model = runs.load_model(folder)
    assert not model.training
    digits = data.load("digits")
    with torch.no_grad():
        right = (model(digits.test_x).argmax(1) == digits.test_y).double().mean().item()
    assert right == strict_json(folder / "results.json")["accuracy"]["clean"]
    found = report(model.network)
    assert [(layer.rank, layer.tau) for layer in found.layers] == [(5, 0.5), (26, 0.5), (10, None)]
    assert found.to_dict() == strict_json(folder / "results.json")["report"]


def test_report_prints_the_table_of_a_run(trained):
    folder, output = trained
    for path in (folder, folder / "model.pt"):
        result = invoke("report", path)
        assert result.exit_code == 0
        assert result.output in output


@pytest.mark.parametrize("method", ["dense", "factors", "svd", "condlr"])
def test_every_method_trains_and_comes_back(method, tmp_path):
    rank = () if method == "dense" else ("--rank", 8)
    tau = ("--tau", "none") if method == "condlr" else ()
    result = invoke("train", *QUICK, "--method", method, *rank, *tau, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    found = report(runs.load_model(tmp_path).network)
    assert (found.trained_parameters == 85_002) == (method in ("dense", "svd"))
    if method == "svd":
        assert [layer.rank for layer in found.layers] == [8, 8, 10]


def test_last_layer_stays_dense_unless_told(tmp_path):
    invoke("train", *QUICK, "--rank", 4, "--out", tmp_path / "a")
    invoke("train", *QUICK, "--rank", 4, "--exclude", "none", "--out", tmp_path / "b")
    kinds = [
        [layer.low_rank for layer in report(runs.load_model(tmp_path / name).network).layers]
        for name in "ab"
    ]
    assert kinds == [[True, True, False], [True, True, True]]


@pytest.mark.parametrize("words", [("--rank", 0.2), ("--rank", "fc*=0.2"), ("--compression", 0.5)])
@pytest.mark.parametrize(
    ("dense", "low"), [("none", ["fc1", "fc2", "fc3"]), ("fc1", ["fc2", "fc3"])]
)
def test_only_what_exclude_names_stays_dense(words, dense, low, monkeypatch, tmp_path):
    """A share leaves the output layer dense by itself, where nobody says which layers are."""
    seen = []
    monkeypatch.setattr("lrmanifold.cli._commands.run", lambda job, force: seen.append(job))
    result = invoke("train", *words, "--exclude", dense, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert list(seen[0].ranks) == low


def test_same_seed_gives_the_same_network(trained, tmp_path):
    args = ("--rank", "fc1=5,fc2=0.1", "--tau", 0.5)
    invoke("train", *QUICK, *args, "--out", tmp_path / "same")
    invoke("train", *QUICK, *args, "--seed", 1, "--out", tmp_path / "other")
    first, same, other = (
        runs.load_model(folder).state_dict()
        for folder in (trained[0], tmp_path / "same", tmp_path / "other")
    )
    assert all(torch.equal(first[k], same[k]) for k in first)
    assert not torch.equal(first["network.fc1.weight"], other["network.fc1.weight"])


def test_default_folder_is_named_after_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert invoke("train", *QUICK, "--rank", 4, "--tau", 0).exit_code == 0
    assert (tmp_path / "runs" / "digits-mlp-condlr-tau0-seed0" / "results.json").is_file()


def test_lenet5_on_mnist(tmp_path, data_dir, monkeypatch):
    """The command of the README on a few of the images; layers named by hand become low-rank."""
    whole = data.load("mnist", data_dir)
    few = {"train_x": whole.train_x[:96], "train_y": whole.train_y[:96]}
    few |= {"test_x": whole.test_x[:40], "test_y": whole.test_y[:40]}
    part = dataclasses.replace(whole, **few)
    monkeypatch.setattr("lrmanifold.cli._commands.load", lambda name, root: part)
    args = ("--data", "mnist", "--model", "lenet5", "--rank", "conv1=10,conv2=10,fc1=100")
    result = invoke("train", *args, "--epochs", 1, "--batch-size", 48, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    model = runs.load_model(tmp_path)
    ranks = [(layer.kind, layer.rank) for layer in report(model.network).layers]
    conv = "LowRankConv2d"  # conv1 gets larger by it, but it was asked for
    assert ranks == [(conv, 10), (conv, 10), ("LowRankLinear", 100), ("Linear", 10)]
    assert model(part.test_x).shape == (40, 10)
    assert list(strict_json(tmp_path / "results.json")["accuracy"]["fgsm"]) == [
        "0.02", "0.04", "0.06",
    ]  # fmt: skip


# --------------------------------------------------------------------------------------- demo


def test_demo_prints_one_table_with_a_row_for_each_method(demo):
    _, output = demo
    rows = [line for line in output.splitlines() if "±" in line and "%" in line]
    names = [line.split("  ")[1].strip() for line in rows]
    assert names == [
        "dense", "dense, SVD-truncated", "plain low rank (A Bᵀ)",
        "CondLR tau=0", "CondLR tau=0.1", "CondLR tau=0.5",
    ]  # fmt: skip
    assert all(line.count("±") == 7 for line in rows)
    assert "50 test images: one is 2.00 points" in " ".join(output.split())
    assert "seeds 5, 6" in output


def test_demo_writes_results_and_pictures(demo):
    folder, output = demo
    results = strict_json(folder / "results.json")
    assert results["settings"]["seeds"] == [5, 6]
    assert results["settings"]["epochs"] == 2
    assert len(results["methods"]) == 6
    shown = [line for line in output.splitlines() if "±" in line and "%" in line]
    for method, line in zip(results["methods"], shown, strict=True):
        assert len(method["clean"]) == 2
        assert set(method["fgsm"]) == set(method["pgd"]) == {
            f"{eps:g}" for eps in demos.Demo.strengths
        }  # fmt: skip
        for runs_of in (method["clean"], *method["fgsm"].values(), *method["pgd"].values()):
            assert all(0 <= a <= 1 for a in runs_of)
        assert f"{50 * sum(method['clean']):.1f}" in line
        # many steps are stronger than one
        for eps in method["pgd"]:
            assert sum(method["pgd"][eps]) <= sum(method["fgsm"][eps]) + 1e-9
    conds = {m["name"]: m["largest_cond"] for m in results["methods"]}
    for tau in (0, 0.1, 0.5):
        assert conds[f"CondLR tau={tau:g}"] <= (1 + tau) * (1 + 1e-5)
    assert conds["dense"] > conds["plain low rank (A Bᵀ)"] > 1.5
    for name in ("accuracy.png", "spectra.png"):
        assert (folder / name).read_bytes().startswith(PNG)
    assert report(runs.load_model(folder).network).layers[0].tau == 0.1


def test_the_demos_network_can_be_certified(demo):
    folder, _ = demo
    result = invoke("certify", folder, "--eps", 0.1, "--no-attack")
    assert result.exit_code == 0, result.output
    assert "0.1" in result.output


def test_demo_shows_a_method_that_diverges(tmp_path, monkeypatch):
    monkeypatch.setattr(demos, "load", lambda name: few_digits())
    result = invoke("demo", "--epochs", 1, "--seeds", 1, "--lr", 1e18, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    methods = {m["kind"]: m for m in strict_json(tmp_path / "results.json")["methods"]}
    assert methods["dense"]["diverged_seeds"] == methods["svd"]["diverged_seeds"] == [0]
    assert methods["dense"]["largest_cond"] is None
    assert "diverged: seed 0" in " ".join(result.output.split())


def test_options_of_training_reach_the_run_and_its_results(tmp_path):
    words = "--optimizer adam --weight-decay 0.01 --label-smoothing 0.1 --compression 0.6"
    result = invoke("train", *QUICK, *words.split(), "--out", tmp_path / "a")
    assert result.exit_code == 0, result.output
    found = strict_json(tmp_path / "a" / "results.json")
    settings = found["settings"]
    assert settings["optimizer"] == "adam"
    assert settings["lr"] == 0.01
    assert (settings["weight_decay"], settings["label_smoothing"]) == (0.01, 0.1)
    assert found["weights_kept"] <= 0.4
    ranks = {layer["name"]: layer["rank"] for layer in found["report"]["layers"]}
    assert settings["rank"] == {name: ranks[name] for name in ("fc1", "fc2")}
    other = invoke("train", *QUICK, "--rank", 64, "--keep-larger", "--out", tmp_path / "b")
    assert other.exit_code == 0, other.output
    larger = strict_json(tmp_path / "b" / "results.json")
    assert larger["settings"]["keep_larger"] is True
    assert [layer["rank"] for layer in larger["report"]["layers"]][:2] == [64, 64]
    assert larger["settings"]["lr"] == 0.1


def test_the_report_is_printed_as_json_and_wide(trained):
    found = report(runs.load_model(trained[0]).network)
    text = invoke("report", trained[0], "--json").output
    assert json.loads(text) == found.to_dict()
    assert "sigma_max" in invoke("report", trained[0], "--wide").output
    assert "sigma_max" not in invoke("report", trained[0]).output


def test_data_that_is_not_there_names_the_option(tmp_path, monkeypatch):
    monkeypatch.delenv("LRMANIFOLD_DATA", raising=False)
    result = invoke("train", "--data", "mnist")
    assert result.exit_code == 2
    assert "--root DIR" in result.output


# -------------------------------------------------------------------------------------- errors

WRONG = {
    "--rank abc": "rank must be a number",
    "--rank fc1=": "rank must be a number",
    "--rank fc1=3,fc1=4": "rank must be a number",
    "--rank 0": "rank must be an integer >= 1, got 0",
    "--rank 1.5": "rank as a share of min(m, n) must be in (0, 1], got 1.5",
    "--rank 300": "no layer becomes low-rank with rank 300: fc1 would not get smaller",
    "--rank fc9=3": "'fc9' matches no layer; there are ['fc1', 'fc2', 'fc3']",
    "--tau -1": "tau must be a finite number >= 0",
    "--tau nan": "tau must be a finite number >= 0",
    "--tau much": "tau must be a finite number >= 0",
    "--method svd --tau 0.1": "tau belongs to method condlr",
    "--method magic": "method must be one of condlr, dense, factors, svd, got 'magic'",
    "--method dense --rank 3": "method dense takes no rank",
    "--method dense --keep-larger": "method dense takes no rank, compression, exclude or keep",
    "--rank 3 --compression 0.5": "give --rank or --compression, not both",
    "--compression 1": "compression must be a finite number in (0, 1), got 1.0",
    "--compression 0.999": "compression=0.999 cannot be reached",
    "--optimizer adamw": "optimizer must be one of condlr, adam, got 'adamw'",
    "--weight-decay -1": "weight_decay must be a finite number >= 0, got -1.0",
    "--label-smoothing 1": "label_smoothing must be a finite number in [0, 1), got 1.0",
    "--data digit": "data must be one of digits, mnist, fashion-mnist, cifar10, got 'digit'",
    "--model lenet": "model must be one of mlp, mlp-maxmin, lenet5, plain, got 'lenet'",
    "--model lenet5": "lenet5 needs images of at least 16 x 16",
    "--data mnist --root nowhere": "root (--root) is no folder: nowhere",
    "--root .": "digits ships with scikit-learn: root must be None",
    "--epochs 0": "epochs must be an integer >= 1, got 0",
    "--lr 0": "lr must be a finite number > 0, got 0.0",
    "--lr inf": "lr must be a finite number > 0, got inf",
    "--lr nan": "lr must be a finite number > 0, got nan",
    "--batch-size -1": "batch_size must be an integer >= 1, got -1",
    "--seed 1180591620717411303424": "seed must be an integer in -9223372036854775808..18446744073",
    "--momentum 1": "momentum must be a finite number in [0, 1), got 1.0",
    "--optimizer adam --momentum 0.9": "momentum belongs to optimizer condlr, got 0.9 with adam",
    "--device toaster": "device must be cpu, cuda or cuda:N, got 'toaster'",
    "--device cuda:99": "device cuda:99 does not exist",
    "--eps 0.1,x": "eps must be positive numbers",
    "--eps 0.12341,0.12342": "eps must be numbers that differ in 4 digits, got 0.12341",
    "--out file": "out must be a folder, got the file file",
}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_arguments_are_one_line_and_exit_code_2(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    result = invoke("train", *words.split())
    assert result.exit_code == 2
    assert result.output.startswith("error: ")
    assert WRONG[words] in result.output
    assert result.output.count("\n") == 1
    assert os.listdir(tmp_path) == ["file"]  # nothing was made


def test_divergence_is_one_line_and_writes_no_results(tmp_path):
    result = invoke("train", *QUICK, "--method", "dense", "--lr", "1e18", "--out", tmp_path)
    assert result.exit_code == 2
    assert "error: the training loss is not finite" in result.output
    assert "Traceback" not in result.output
    assert not list(tmp_path.iterdir())


def test_main_makes_one_line_of_typers_own_errors(capsys):
    for words in (["train", "--epochs", "x"], ["train", "--what"], ["bake"], ["report"]):
        assert cli.main(words) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("\n") == 1


def test_main_returns_the_exit_code_of_a_command(trained, capsys):
    assert cli.main(["report", str(trained[0])]) == 0
    assert "256 x 64" in capsys.readouterr().out
    assert cli.main(["report", "nowhere"]) == 2
    assert capsys.readouterr().err.startswith("error: nowhere: no such file")
    assert cli.main([]) == 0
    assert "demo" in capsys.readouterr().out


@pytest.mark.parametrize("module", ["typer", "rich"])
def test_main_without_typer_or_rich_says_what_to_install(module, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, module, None)
    ours = [f"lrmanifold.cli.{name}" for name in ("_commands", "_failures", "_output", "_train")]
    for name in [n for n in sys.modules if n.startswith(f"{module}.") or n in ours]:
        monkeypatch.delitem(sys.modules, name)
    assert cli.main(["demo"]) == 2
    err = capsys.readouterr().err
    assert re.fullmatch(rf"error: .* needs {module}\S*, .*pip install 'lrmanifold\[demo\]'\n", err)


def test_rank_words():
    assert parse_rank("32") == 32
    assert isinstance(parse_rank("32"), int)
    assert parse_rank("0.2") == 0.2
    assert parse_rank("conv1=4, conv2=10,fc1=0.5") == {"conv1": 4, "conv2": 10, "fc1": 0.5}


# --------------------------------------------------------------------------------------- files


def test_damaged_foreign_and_missing_models_are_refused(trained, tmp_path):
    whole = (trained[0] / "model.pt").read_bytes()
    cases = {
        "cut.pt": whole[: len(whole) // 2],
        "text.pt": b"hello",
        "empty.pt": b"",
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(runs.RunError, match=f"{name}: is damaged"):
            runs.load_model(tmp_path / name)
    torch.save({"a": torch.ones(2)}, tmp_path / "foreign.pt")
    with pytest.raises(runs.RunError, match="is not a model that `lrmanifold train` wrote"):
        runs.load_model(tmp_path / "foreign.pt")
    with pytest.raises(runs.RunError, match="no such file"):
        runs.load_model(tmp_path)


def test_model_with_a_weight_off_its_manifold_is_refused(trained, tmp_path):
    saved = torch.load(trained[0] / "model.pt", weights_only=True)
    saved["state"]["network.fc1.weight"] *= 2
    write_torch(tmp_path / "model.pt", saved)
    with pytest.raises(runs.RunError, match="does not fit together"):
        runs.load_model(tmp_path)


def test_interrupted_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    runs.write_json(path, {"a": 1})

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        runs.write_json(path, {"a": 2})
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]
    assert strict_json(path) == {"a": 1}


def test_json_has_no_nan(tmp_path):
    runs.write_json(tmp_path / "x.json", {"a": [float("nan"), 1.0], "b": (float("inf"),)})
    assert strict_json(tmp_path / "x.json") == {"a": [None, 1.0], "b": [None]}


@pytest.mark.parametrize("command", ["train", "report", "certify", "demo"])
def test_flags_are_shown_without_a_value(command):
    lines = invoke(command, "--help").output.splitlines()
    flags = ("--force", "--json", "--wide", "--keep-larger", "--certified", "--attack")
    shown = [line for line in lines if any(f"{flag} " in line for flag in flags)]
    assert shown
    assert not any("bool" in line.lower() for line in shown)


@pytest.mark.parametrize(
    ("words", "most"),
    [
        ("--eps 8", "1 (linf)"),
        ("--eps 9 --certified", "8 (l2)"),
        ("--eps 8 --adversarial linf", "1 (linf)"),
        ("--eps 9 --adversarial l2", "8 (l2)"),
    ],
)
def test_radii_beyond_the_range_of_pixels_are_refused(words, most, tmp_path):
    result = invoke("train", *words.split(), "--out", tmp_path)
    assert result.exit_code == 2
    assert f"eps must be at most {most}, as pixels are in 0..1" in result.stderr
    assert f"is {words.split()[1]}/255 = 0.03" in result.stderr


def test_warnings_are_one_line(capsys, monkeypatch, trained):
    def odd(*args, **options):
        warnings.warn("this is odd\nand long", stacklevel=2)
        return report(torch.nn.Linear(3, 3))

    monkeypatch.setattr("lrmanifold.cli._commands.make_report", odd)
    assert cli.main(["report", str(trained[0])]) == 0
    assert capsys.readouterr().err == "warning: this is odd and long\n"
