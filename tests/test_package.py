"""The package: one version, files that a well-kept project has, a wheel that works by itself."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import lrmanifold

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def project() -> dict:
    return tomllib.loads(text("pyproject.toml"))


# -- one version


def test_the_version_has_one_place_and_the_others_follow():
    assert "version" in project()["project"]["dynamic"]
    assert project()["tool"]["hatch"]["version"]["path"] == "lrmanifold/__init__.py"
    found = re.findall(r'^__version__ = "(.*)"$', text("lrmanifold/__init__.py"), re.M)
    assert found == [lrmanifold.__version__]
    assert f"\nversion: {found[0]}\n" in text("CITATION.cff")
    assert f"version {found[0]}" in text("README.md")
    for path in (ROOT / "docs").glob("*.md"):
        assert f"version {found[0]}" not in path.read_text(encoding="utf-8"), path


def test_the_changelog_keeps_its_form():
    heads = re.findall(r"^## \[(.*?)\]", text("CHANGELOG.md"), re.M)
    assert heads[0] == "Unreleased"
    assert heads[1] == lrmanifold.__version__
    kinds = set(re.findall(r"^### (.*)$", text("CHANGELOG.md"), re.M))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


# -- what a project has


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"])
def test_links_to_files_of_the_repository_lead_somewhere(name):
    for target in re.findall(r"\]\((?!http)(.*?)\)", text(name)):
        assert (ROOT / target).exists(), target


def test_what_contributors_are_told_to_run_exists():
    make = text("Makefile")
    for target in re.findall(r"`?make ((?:[a-z-]+ ?)+)", text("CONTRIBUTING.md")):
        for word in target.split():
            if word in ("sure",):
                continue
            assert re.search(rf"^{word}:", make, re.M), word
    for name in ("_files.py", "_sealed.py", "nn/plan.py", "retractions.py"):
        assert name in text("CONTRIBUTING.md")
        assert (ROOT / "lrmanifold" / name).exists()


def yaml_of(path: Path) -> dict:
    return pytest.importorskip("yaml").safe_load(path.read_text(encoding="utf-8"))


def test_workflows_test_the_floor_and_the_newest_on_every_python():
    ci = yaml_of(ROOT / ".github" / "workflows" / "ci.yml")
    matrix = ci["jobs"]["test"]["strategy"]["matrix"]
    supported = [
        word.rsplit(" ", 1)[1]
        for word in project()["project"]["classifiers"]
        if re.search(r":: 3\.\d+$", word)
    ]
    assert matrix["python"] == supported
    floor = next(d for d in project()["project"]["dependencies"] if d.startswith("torch"))
    assert matrix["torch"] == [f"torch=={floor.removeprefix('torch>=')}.0", "torch"]
    assert project()["project"]["requires-python"] == f">={supported[0]}"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_have_few_rights_and_run_what_exists(path):
    workflow = yaml_of(path)
    assert workflow["permissions"] == {"contents": "read"}
    for name, job in workflow["jobs"].items():
        rights = job.get("permissions", {})
        assert rights in ({}, {"id-token": "write"}), name
        for step in job["steps"]:
            if "uses" in step:
                assert "@" in step["uses"]
            for target in re.findall(r"make ((?:[a-z-]+ ?)+)", step.get("run", "")):
                for word in target.split():
                    assert re.search(rf"^{word}:", text("Makefile"), re.M), word


def test_releases_are_published_without_a_token():
    release = yaml_of(ROOT / ".github" / "workflows" / "release.yml")
    publish = release["jobs"]["publish"]
    assert publish["permissions"] == {"id-token": "write"}
    assert "secrets." not in text(".github/workflows/release.yml")
    assert publish["needs"] == "build"


@pytest.mark.parametrize(
    "path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml")), ids=lambda p: p.name
)
def test_issue_templates_have_what_github_needs(path):
    form = yaml_of(path)
    assert {"name", "description", "body"} <= form.keys()
    ids = [part["id"] for part in form["body"]]
    assert len(ids) == len(set(ids))
    assert all(part["attributes"]["label"] for part in form["body"])


# -- the wheel


def run(*command: object, **options) -> str:
    done = subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, check=False, **options
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    pytest.importorskip("build")
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", out, ROOT)
    assert len(list(out.iterdir())) == 2  # and the wheel came from the sdist
    return next(out.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_holds_the_library_and_nothing_else(wheel):
    assert wheel.name == f"lrmanifold-{lrmanifold.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(n for n in names if n.endswith("METADATA"))).decode()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"lrmanifold", f"lrmanifold-{lrmanifold.__version__}.dist-info"}
    assert "lrmanifold/py.typed" in names
    own = {str(p.relative_to(ROOT)) for p in (ROOT / "lrmanifold").rglob("*.py")}
    assert own == {name for name in names if name.endswith(".py")}
    assert f"\nVersion: {lrmanifold.__version__}\n" in metadata
    assert wheel.stat().st_size < 2e6
    assert next(wheel.parent.glob("*.tar.gz")).stat().st_size < 4e6


@pytest.mark.slow
def test_the_wheel_works_in_an_empty_environment(wheel, tmp_path):
    """An environment of its own; the dependencies are those of the tests, by a path."""
    pytest.importorskip("typer")
    pytest.importorskip("sklearn")
    home = tmp_path / "env"
    run(sys.executable, "-m", "venv", home)
    scripts = home / ("Scripts" if os.name == "nt" else "bin")
    python = scripts / "python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    # a plain path: the .pth files in it, an editable install among them, are not read
    Path(site, "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", wheel)
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    options = {"cwd": tmp_path, "env": {**clean, "OMP_NUM_THREADS": "1"}}
    where = run(python, "-c", "import lrmanifold; print(lrmanifold.__file__)", **options)
    assert Path(where.strip()).is_relative_to(home)
    command = scripts / "lrmanifold"
    assert run(command, "--version", **options) == f"lrmanifold {lrmanifold.__version__}\n"
    modules = (
        "import pkgutil, importlib, lrmanifold\n"
        "for m in pkgutil.walk_packages(lrmanifold.__path__, 'lrmanifold.'):\n"
        "    try:\n"
        "        importlib.import_module(m.name)\n"
        "    except ModuleNotFoundError as error:  # of an extra that is not installed\n"
        "        if m.name != 'lrmanifold.interop.peft' or error.name != 'peft': raise\n"
    )
    run(python, "-c", modules, **options)
    trained = run(command, "train", "--epochs", 1, "--out", "run", **options)
    assert "clean accuracy" in trained
    assert "NOT a bound" in run(command, "report", "run", **options)


def test_a_name_that_lives_further_in_is_named_with_its_room():
    for name, place in (("CondLR", "optim"), ("pgd", "robustness"), ("LowRankLinear", "nn")):
        with pytest.raises(AttributeError, match=rf"'{name}'; it is lrmanifold\.{place}\.{name}$"):
            getattr(lrmanifold, name)
    with pytest.raises(AttributeError, match=r"has no attribute 'nonsense'$"):
        lrmanifold.nonsense  # noqa: B018
    from lrmanifold import interop  # submodules are still found

    assert interop


def test_the_import_leaves_the_compiler_of_torch_alone():
    """It takes as long as torch itself, and most who import never compile."""
    code = (
        "import sys, torch, geoopt\n"
        "before = 'torch._dynamo' in sys.modules\n"
        "import lrmanifold, lrmanifold.cli\n"
        "assert before or 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_no_private_name_crosses_from_one_room_to_another():
    """Neither a private module of another room nor a private name out of one."""
    for path in (ROOT / "lrmanifold").glob("*/**/*.py"):
        for line in path.read_text(encoding="utf-8").splitlines():
            if found := re.match(r"\s*from \.\.+([a-z_.]+) import (.*)", line):
                module, names = found.groups()
                there = module.split(".")[1:] + re.split(r"[ (,]+", names)
                assert not [n for n in there if n.startswith("_")], f"{path.name}: {line}"
