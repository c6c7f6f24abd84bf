"""Pictures say what the numbers say, and leave matplotlib as they found it."""

from __future__ import annotations

import importlib
import sys

import numpy as np
import pytest

from lrmanifold import viz
from lrmanifold.experiments.training import History

matplotlib = pytest.importorskip("matplotlib")

SPECTRA = {
    "fc1": [[2.0, 1.5, 1.0], [3.0, 2.5, 2.0]],
    "fc2": [[1.0, 1.0, 1.0], [1.1, 1.05, 1.0]],
}
RESULTS = {
    "dense": {0.0: 0.98, 0.1: 0.5, 0.05: 0.8},
    "CondLR": {0.0: [0.97, 0.99], 0.05: [0.85, 0.87], 0.1: [0.6, 0.7]},
}


def lines_by_label(axis) -> dict:
    return {line.get_label(): line for line in axis.get_lines()}


def test_spectra_draws_a_panel_for_each_layer():
    history = History(spectra=SPECTRA)
    figure = viz.spectra(history, tau={"fc2": 0.1})
    assert [a.get_title().splitlines()[0] for a in figure.axes] == ["fc1", "fc2"]
    assert figure.axes[0].get_title().splitlines()[1] == "cond 1.5 at the end"
    assert all(a.get_yscale() == "log" for a in figure.axes)
    assert all(a.get_xlabel() == "epoch" for a in figure.axes)
    assert figure.axes[0].get_ylabel() == "singular value"
    # three singular values; where tau is known, its bound as well
    assert [len(a.get_lines()) for a in figure.axes] == [3, 4]
    drawn = sorted(tuple(line.get_ydata()) for line in figure.axes[0].get_lines())
    assert drawn == [(1.0, 2.0), (1.5, 2.5), (2.0, 3.0)]
    assert any(np.allclose(line.get_ydata(), [1.1, 1.1]) for line in figure.axes[1].get_lines())
    assert {t.get_text() for t in figure.legends[0].get_texts()} == {
        "largest", "smallest", "(1 + τ) × smallest",
    }  # fmt: skip


def test_spectra_on_given_axes():
    from matplotlib.figure import Figure

    own = Figure()
    axes = own.subplots(1, 2)
    assert viz.spectra(SPECTRA, ax=axes) is own
    with pytest.raises(ValueError, match="ax must hold 2 Axes, one a panel, got 1"):
        viz.spectra(SPECTRA, ax=axes[0])


@pytest.mark.parametrize("bad", [[[1.0, -1.0]], [[1.0, float("nan")]], [1.0], [[0.0]], []])
def test_spectra_refuses_what_is_no_spectrum(bad):
    with pytest.raises(ValueError, match="'fc' must be positive"):
        viz.spectra({"fc": bad})


def test_spectra_without_low_rank_layers():
    with pytest.raises(ValueError, match="no low-rank layer"):
        viz.spectra(History())


def test_accuracy_curves_are_means_in_percent_sorted_by_strength():
    figure = viz.accuracy_curves(RESULTS, title="FGSM")
    axis = figure.axes[0]
    lines = lines_by_label(axis)
    np.testing.assert_allclose(lines["dense"].get_xdata(), [0, 0.05, 0.1])
    np.testing.assert_allclose(lines["dense"].get_ydata(), [98, 80, 50])
    np.testing.assert_allclose(lines["CondLR"].get_ydata(), [98, 86, 65])
    assert len(axis.collections) == 1  # one band: the dense curve is a single run
    band = axis.collections[0].get_paths()[0].vertices[:, 1]
    assert band.max() == pytest.approx(98 + np.std([97, 99], ddof=1))
    assert (axis.get_ylim(), axis.get_title()) == ((0, 100), "FGSM")
    assert "%" in axis.get_ylabel()
    assert "ε" in axis.get_xlabel()


def test_curves_differ_in_colour_marker_and_line():
    many = {f"method {i}": {0.0: 0.9, 0.1: 0.5} for i in range(7)}
    lines = viz.accuracy_curves(many).axes[0].get_lines()
    for look in ("get_color", "get_marker"):
        assert len({getattr(line, look)() for line in lines}) == 7
    # dash patterns, which get_linestyle reports as "--" for all
    assert len({str(line._unscaled_dash_pattern) for line in lines}) == 7


def test_a_method_looks_the_same_in_all_panels_and_in_the_legend():
    """It may be missing in some: places in the first panel would mix up the others."""
    run = {0.0: 0.9, 0.1: 0.5}
    figure = viz.accuracy_panels({"half": {"a": run, "b": run}, "tenth": {"b": run, "c": run}})
    (legend,) = figure.legends
    named = zip(legend.get_texts(), legend.get_lines(), strict=True)
    looks = {text.get_text(): (line.get_color(), line.get_marker()) for text, line in named}
    assert list(looks) == ["a", "b", "c"]
    assert len(set(looks.values())) == 3
    for axis in figure.axes:
        for name, line in lines_by_label(axis).items():
            assert (line.get_color(), line.get_marker()) == looks[name]
    with pytest.raises(ValueError, match="relative_to must be one of"):
        viz.accuracy_panels({"half": {"a": run}, "tenth": {"b": run}}, relative_to="a")


def test_differences_are_taken_run_by_run():
    runs = {"a": {0.1: [0.5, 0.7]}, "b": {0.1: [0.6, 0.8]}}
    axis = viz.accuracy_curves(runs, relative_to="a").axes[0]
    np.testing.assert_allclose(lines_by_label(axis)["b"].get_ydata(), [10])
    # both runs gain 10 points: no spread, though the accuracies themselves spread
    bands = [c.get_paths()[0].vertices[:, 1] for c in axis.collections]
    assert all(np.ptp(v) < 1e-9 for v in bands)
    with pytest.raises(ValueError, match="relative_to must be one of"):
        viz.accuracy_curves(runs, relative_to="c")


def test_unequal_numbers_of_runs_are_compared_by_their_means():
    runs = {"a": {0.1: [0.5, 0.7]}, "b": {0.1: [0.9]}}
    axis = viz.accuracy_curves(runs, relative_to="a").axes[0]
    np.testing.assert_allclose(lines_by_label(axis)["b"].get_ydata(), [30])


@pytest.mark.parametrize("bad", [{}, {"a": {}}, {"a": {0.1: 60.0}}, {"a": {0.1: []}}])
def test_accuracy_curves_refuse_what_is_no_accuracy(bad):
    with pytest.raises(ValueError, match="must"):
        viz.accuracy_curves(bad)


def test_panels_share_axes_and_legend():
    figure = viz.accuracy_panels({"FGSM": RESULTS, "PGD": RESULTS}, relative_to="dense")
    assert [a.get_title() for a in figure.axes] == ["FGSM", "PGD"]
    assert figure.axes[0].get_ylabel() == "accuracy minus dense's (points)"
    assert len(figure.legends) == 1
    assert all(a.get_legend() is None for a in figure.axes)


def test_pictures_are_drawn_and_global_settings_stay(tmp_path):
    matplotlib.rcParams["font.size"] = 7.5
    before = dict(matplotlib.rcParams)
    for i, figure in enumerate((viz.spectra(SPECTRA, tau=0.1), viz.accuracy_curves(RESULTS))):
        path = tmp_path / f"{i}.png"
        figure.savefig(path)
        assert path.stat().st_size > 5_000
    assert dict(matplotlib.rcParams) == before
    matplotlib.rcParams["font.size"] = 10.0


def test_no_figure_is_registered_with_pyplot():
    """Such a figure would have to be closed, and may want a screen."""
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    viz.accuracy_panels({"FGSM": RESULTS})
    viz.spectra(SPECTRA)
    assert plt.get_fignums() == before


def test_module_needs_no_matplotlib_to_be_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    importlib.reload(viz)


def test_missing_matplotlib_is_said_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for picture in (viz.spectra, viz.accuracy_curves, viz.accuracy_panels):
        with pytest.raises(ImportError, match=r"pip install 'lrmanifold\[demo\]'"):
            picture({})


def test_slider_shows_still_pictures_where_nothing_can_slide():
    figures = viz.slider(lambda v: viz.new_figure()[0], 0.0, 1.0, still=(0.1, 0.5))
    assert len(figures) == 2
    with pytest.raises(ValueError, match="high must be a finite number > 1"):
        viz.slider(lambda v: None, 1.0, 1.0, still=())


def test_slider_slides_in_a_notebook(monkeypatch):
    """With a kernel and ipywidgets there is one control, and no still picture."""
    widgets = pytest.importorskip("ipywidgets")
    ipython = pytest.importorskip("IPython")
    made = []
    monkeypatch.delenv("LRMANIFOLD_STILL", raising=False)
    monkeypatch.setattr(ipython, "get_ipython", lambda: object())
    monkeypatch.setattr(widgets, "interact", lambda f, **controls: made.append(controls))
    assert viz.slider(lambda v: None, 0.0, 2.0, still=(0.5,), name="τ") == []
    (control,) = made[0].values()
    assert (control.min, control.max, control.value, control.description) == (0.0, 2.0, 0.5, "τ")
