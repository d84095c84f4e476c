"""README.md run as it stands there: its Python, and its commands with small numbers."""

import os
import re
import shlex
import subprocess
import sys

import pandas as pd
import pytest
from house import ROOT

BLOCKS = re.findall(
    r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S | re.M
)
SIMULATE, MEASURE, COUNT = BLOCKS[:3] if len(BLOCKS) > 2 else ("", "", "")


def lines(text):
    return [
        line
        for line in text.splitlines()
        if line.strip() and not line.startswith(("import ", "from "))
    ]


def run(text, folder, monkeypatch):
    "What the names of a block hold after it ran in an empty folder, word for word."
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


def test_five_lines_measure_an_image(tmp_path, monkeypatch):
    found = run(MEASURE, tmp_path, monkeypatch)["found"]
    (wall,) = found.walls.itertuples()
    assert len(found.columns) > 100 and wall.x_se_nm < 0.1
    assert (tmp_path / "measured" / "columns.csv").stat().st_size > 1000


def test_five_lines_count_a_sample(tmp_path, monkeypatch):
    fewer = COUNT.replace("ecsa=", "n=300, ecsa=")  # fewer injections than a user's
    assert fewer != COUNT
    sample = run(fewer, tmp_path, monkeypatch)["sample"]
    assert len(sample.table) == 2 and sample.fit is not None and sample.ecsa.unit == "m²/g"
    assert abs(sample.fit.law.median_nm / 6 - 1) < 0.1, "the median of the law that was simulated"
    assert (tmp_path / "counted" / "ecsa.json").exists()


def commands(small=True):
    "The commands of README's block that generates walls, with small numbers."
    (block,) = [
        b
        for b in re.findall(
            r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S | re.M
        )
        if "train pix2pix" in b
    ]
    for option, few in (("n", 12), ("epochs", 1)) if small else ():
        block = re.sub(rf"(--{option}) \d+", rf"\1 {few}", block)
    return [shlex.split(line) for line in block.splitlines() if line.strip()]


def brightness(folder):
    "Mean intensity of each image of a dataset."
    from microgen.io.files import read

    names = pd.read_csv(folder / "metadata.csv").file_name
    return pd.Series([read(folder / name).data.mean() for name in names])


def test_four_commands_generate_walls(tmp_path):
    "Each of README's commands runs in a shell's way, one after the other, in a folder of its own."
    resource = pytest.importorskip("resource")  # of POSIX
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    lines, said, seconds = commands(), [], 0.0
    assert len(lines) == 4 and all(words[0] == "microgen" for words in lines)
    for words in lines:
        code = "from microgen.cli import main; main()"
        before = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
        done = subprocess.run(
            [sys.executable, "-c", code, *words[1:]],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            timeout=600,
        )
        seconds += sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - before
        assert done.returncode == 0 and "Traceback" not in done.stderr, (words, done.stderr[-1000:])
        said.append(done.stdout)
    assert seconds < 100, f"the commands took {seconds:.0f} s of processor time"
    assert "base64" not in said[3] and said[3].strip().endswith("report.html")
    labels = pd.read_csv(tmp_path / "generated/metadata.csv").label
    assert "typeC" in set(labels), "walls of type C are generated"
    trained = pd.read_csv(tmp_path / "walls/metadata.csv").label
    assert set(labels) == set(trained), "like is compared with like"
    assert "a network that scales each image by itself" in said[3]
    spread = {name: brightness(tmp_path / name).std() for name in ("walls", "generated")}
    assert 0.5 < spread["generated"] / spread["walls"] < 2, "as bright, and as unlike, as the walls"
    assert (tmp_path / "compared/report.html").exists() and "SSIM" in (
        tmp_path / "run/model/README.md"
    ).read_text()


def test_the_commands_compare_like_with_like():
    "The generated walls are those of the training, and not too few."
    simulate, _, sample, compare = [dict(zip(w, w[1:])) for w in commands(small=False)]
    import inspect

    from microgen.cli import simulate as command

    trained = simulate.get("--walls", inspect.signature(command).parameters["walls"].default)
    assert set(sample["--walls"].split(",")) == set(trained.split(",")) and int(sample["--n"]) >= 48
    assert compare["compare"] == simulate["--out"]
