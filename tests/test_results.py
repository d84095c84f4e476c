"""What a user sees of results: every one has a short line, a table with a picture, show and save."""

import inspect
import subprocess
import sys
from functools import cache

import matplotlib
import numpy as np
import pandas as pd
import pytest
from house import ROOT, rooms

import microgen
from microgen.core import InputError, Result

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def of_scene():
    return microgen.sample("near", truth=True)


@cache
def moved():
    columns = microgen.columns("YMnO3", fov=(3, 3), thickness=5)
    return microgen.displace(columns, microgen.wall("typeC", fov=(3, 3)))


@cache
def scanned():
    ideal = microgen.haadf(moved(), pixel_size=0.025)
    return microgen.acquire(ideal, "good", rng=0, table=moved().table)


def curve():
    return microgen.DetectionCurve(4.0, 0.2, 0.98, np.diag([0.01, 0.05, 0.5]))


@cache
def fitted():
    d = 6 * np.exp(0.3 * np.random.default_rng(0).standard_normal(300))
    return microgen.fit_sizes(d, curve(), families=("lognormal",))


@cache
def area():
    return microgen.ecsa(fitted(), "m2_g=30, density=21.45")


@cache
def detected():
    scene = microgen.Scene(size=200, pixel_size=0.8, median_nm=8.0, n=30)
    return microgen.detect(microgen.simulate_scene(scene, 0).image)


@cache
def calibrated():
    return microgen.calibrate(detected().micrograph, n=250, rng=0, workers=1)


def counted():
    from microgen.count.sample import Sample

    table = pd.DataFrame({"file": ["a.tif"], "error": ["it is no image"], "folder": [""]})
    return Sample("counted", table, fitted(), area(), "")


EXAMPLES = {
    "Micrograph": lambda: microgen.sample("wall"),
    "Columns": moved,
    "Domain": lambda: microgen.wall("UP"),
    "Wall": lambda: microgen.wall("typeC"),
    "Vortex": lambda: microgen.wall("vortex"),
    "Network": lambda: microgen.wall("network"),
    "Sum": lambda: microgen.stem.field.Sum((microgen.wall("vortex"), microgen.wall("typeC"))),
    "Acquired": scanned,
    "Measurement": lambda: microgen.measure(scanned().image, "YMnO3"),
    "SceneImage": of_scene,
    "Detection": detected,
    "DetectionCurve": curve,
    "Calibration": calibrated,
    "SizeFit": fitted,
    "Ecsa": area,
    "EcsaRatio": lambda: microgen.compare_ecsa(area(), area()),
    "Sample": counted,
}


def result_classes():
    "All classes of results, of every module."
    for room in rooms():
        __import__(room.module)
    found, todo = {}, [Result]
    while todo:
        for one in todo.pop().__subclasses__():
            todo.append(one)
            if (
                one.__module__.startswith("microgen.") and one.__name__ != "Field"
            ):  # has no instance
                found[one.__name__] = one
    return found


def test_every_class_of_results_is_tried_here():
    assert set(result_classes()) == set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_result_is_seen_at_a_glance(name, tmp_path):
    result = EXAMPLES[name]()
    assert type(result).__name__ == name
    assert len(repr(result)) <= 300 and "\n" not in repr(result), repr(result)
    plt.close("all")
    html = result._repr_html_()
    assert not plt.get_fignums(), "the picture's figure is closed"
    assert html.count("data:image/png;base64,") == 1 and html.count("<tr>") >= 1
    assert len(html) < 400_000
    assert hasattr(result.show(), "figure")
    plt.close("all")
    file = result.save(tmp_path / "result.png")
    assert plt.imread(file).shape[1] > 200 and not plt.get_fignums()
    with pytest.raises(InputError, match="saved as"):
        result.save(tmp_path / "result.xlsx")
    if result.table_name:
        assert len(pd.read_csv(result.save(tmp_path / "result.csv")))
    assert {p.name for p in tmp_path.iterdir()} <= {"result.png", "result.csv"}


def test_a_figure_is_saved_with_300_dots_per_inch(tmp_path):
    ax = microgen.sample("wall").show()
    ax.figure.savefig(tmp_path / "figure.png")
    assert plt.imread(tmp_path / "figure.png").shape[:2] == (900, 900)


def test_settings_say_what_was_changed():
    for name in ("typical", "poor"):
        assert len(repr(microgen.scan.settings.preset(name))) < 700
    assert repr(microgen.Scene(n=3)) == "Scene(n=3)"
    assert repr(microgen.Detector()) == "Detector()"


def test_names_at_the_top_are_called_and_misspelt():
    assert {"structures", "walls", "presets", "show_columns", "sample"} <= set(microgen.__all__)
    assert callable(microgen.doctor) and callable(microgen.tour) and callable(microgen.count)
    assert microgen.count.detect.detect is microgen.detect
    with pytest.raises(AttributeError, match="Did you mean 'measure'"):
        microgen.mesure
    assert microgen.__doc__.count("microgen.") > 5
    assert inspect.ismodule(microgen.tour) and not hasattr(microgen, "_nothing")


def test_a_module_is_callable_however_it_was_imported():
    code = "from microgen.tour import tour\nimport microgen\nprint(callable(microgen.tour))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr


def test_a_notebook_shows_figures_after_a_result_has_shown_itself():
    nbclient = pytest.importorskip("nbclient")
    from nbformat.v4 import new_code_cell, new_notebook

    result = "import microgen\nmicrogen.sample('near', truth=True)"
    figure = "microgen.show(microgen.sample('near'));"
    notebook = new_notebook(cells=[new_code_cell(result), new_code_cell(figure)])
    nbclient.NotebookClient(notebook, kernel_name="python3").execute()
    first, second = (cell.outputs for cell in notebook.cells)
    assert "<table" in first[0].data["text/html"]
    assert any("image/png" in output.get("data", {}) for output in second), second
