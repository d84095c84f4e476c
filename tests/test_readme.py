"""The Python of README.md, run as it stands there."""
import os
import re
import shutil
from pathlib import Path

import pytest
from house import ROOT

BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S | re.M)
SIMULATE, MEASURE, COUNT = BLOCKS[:3] if len(BLOCKS) > 2 else ("", "", "")


def lines(text):
    return [line for line in text.splitlines() if line.strip() and not line.startswith(("import ", "from "))]


def run(text, folder, monkeypatch):
    "What the names of a block hold after it ran in a folder."
    import matplotlib

    matplotlib.use("Agg")
    monkeypatch.chdir(folder)
    names = {}
    exec(compile(text, "README.md", "exec"), names)
    return names


def test_readme_has_five_lines_for_each():
    assert all(1 <= len(lines(block)) <= 5 for block in (SIMULATE, MEASURE, COUNT)), BLOCKS


def test_five_lines_simulate_a_wall(tmp_path, monkeypatch):
    names = run(SIMULATE, tmp_path, monkeypatch)
    image, table = names["image"], names["columns"].table
    assert image.data.std() > 0 and image.fov[0] > 2
    assert {"y_nm", "x_nm", "element", "disp_pm"} <= set(table)
    assert [p for p in tmp_path.iterdir() if p.suffix == ".tif"], "the image is saved"


def test_five_lines_measure_a_real_image(tmp_path, monkeypatch):
    folder = os.environ.get("MICROGEN_TEST_DATA")
    if not folder:
        pytest.skip("MICROGEN_TEST_DATA names no folder of real micrographs")
    (name,) = re.findall(r'read\("([^"]+)"', MEASURE)
    shutil.copy(Path(folder) / "stem" / name, tmp_path)
    found = run(MEASURE, tmp_path, monkeypatch)["found"]
    assert len(found.columns) > 100 and found.columns.y_nm.notna().all()
    assert (tmp_path / "measured" / "columns.csv").stat().st_size > 1000


def test_five_lines_count_a_sample(tmp_path, monkeypatch):
    from microgen.sem.preset import Scene
    from microgen.sem.scene import simulate_scene

    for k, name in enumerate(re.findall(r'"(\w+\.tif)"', COUNT)):
        scene = Scene(size=320, pixel_size=0.5 + 0.2 * k, median_nm=6.0, gsd=1.35, n=150, probe_nm=0.6, electrons=150.0)
        simulate_scene(scene, k).image.save(tmp_path / name)
    sample = run(COUNT.replace('ecsa=', 'n=300, ecsa='), tmp_path, monkeypatch)["sample"]  # fewer injections than a user's
    assert len(sample.table) == 2 and sample.fit is not None and sample.ecsa.unit == "m²/g"
    assert (tmp_path / "counted" / "ecsa.json").exists()
