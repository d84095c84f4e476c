"""What a user does in the first minutes, in an environment without the dev extra: run by .ci/run with the newest and
with the lowest versions that the requirements allow, or by hand.

python tests/smoke/user_smoke.py FOLDER
"""

import csv
import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path(sys.argv[1] if len(sys.argv) > 1 else "smoke")
START = time.perf_counter()


def say(what):
    print(f"{time.perf_counter() - START:6.1f} s  {what}", flush=True)


def microgen(*words, code=0):
    "Run the command line; its output. A wrong exit code or a traceback fails."
    done = subprocess.run(
        [Path(sys.executable).with_name("microgen"), *map(str, words)],
        capture_output=True,
        text=True,
        cwd=FOLDER,
    )
    text = done.stdout + done.stderr
    assert done.returncode == code, (
        f"microgen {' '.join(map(str, words))} gives {done.returncode}, not {code}:\n{text}"
    )
    assert "Traceback" not in text, text
    return text


def every_help():
    "Every command answers --help; all in one process, as each loads the same."
    from typer.testing import CliRunner

    from microgen.cli import app

    commands = [command.callback.__name__ for command in app.registered_commands]
    for words in ([], *([name] for name in commands), ["train"], ["train", "pix2pix"], ["sample"]):
        asked = CliRunner().invoke(app, [*words, "--help"])
        assert asked.exit_code == 0 and "Usage" in asked.output, (words, asked.output)
    say(f"the help of {len(commands) + 3} commands")


def in_python():
    "Import, simulate, find the columns again."
    import numpy as np

    import microgen
    from microgen.stem.wall import displace

    say(f"microgen {microgen.__version__} from {Path(microgen.__file__).parent.parent.name}")
    columns = microgen.columns(microgen.load_structure("YMnO3"), fov=(3, 3))
    moved = displace(columns, microgen.wall("typeC", fov=(3, 3)))
    image = microgen.haadf(moved, pixel_size=0.02)
    assert (
        image.data.shape == (150, 150)
        and image.data.dtype == np.float32
        and np.isfinite(image.data).all()
    )
    noisy = microgen.acquire(image, "good", rng=0)
    inside = moved.table.query("element == 'Y' and 0.2 < y_nm < 2.8 and 0.2 < x_nm < 2.8")
    found = microgen.measure(noisy, "YMnO3").columns
    heavy = found[
        (found.element == "Y") & found.y_nm.between(0.2, 2.8) & found.x_nm.between(0.2, 2.8)
    ]
    assert abs(len(heavy) - len(inside)) <= 0.1 * len(inside), (
        f"{len(heavy)} Y columns found, {len(inside)} are there"
    )
    say(f"simulated {len(inside)} Y columns, found {len(heavy)}")
    return noisy


def on_the_command_line(image):
    "doctor, simulate, particles, measure, and two mistakes."
    text = microgen("doctor")
    assert "torch" in text and "shipped structures" in text
    assert "Everything works." in text, text  # parquet, readers, a simulation, a training
    say("doctor")
    microgen(
        "simulate",
        "--n",
        10,
        "--size",
        128,
        "--pixel-size",
        0.03,
        "--walls",
        "UP,DN",
        "--seed",
        1,
        "--workers",
        2,
        "--out",
        "data",
    )
    with open(FOLDER / "data" / "metadata.csv", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == 10 and {r["label"] for r in rows} == {"UP", "DN"}, rows
    assert all((FOLDER / "data" / r["file_name"]).exists() for r in rows)
    say("simulate")
    microgen(
        "particles",
        "--n",
        2,
        "--size",
        96,
        "--preset",
        "gold_on_carbon",
        "--workers",
        1,
        "--out",
        "grains",
    )
    assert (FOLDER / "grains" / "maps" / "00" / "000001.tif").exists() and (
        FOLDER / "grains" / "metadata.csv"
    ).exists()
    microgen("count", "grains/images/00", "--workers", 2, "--out", "counted")
    with open(FOLDER / "counted" / "summary.csv", encoding="utf-8") as f:
        assert all(int(float(r["n_particles"])) >= 0 and not r["error"] for r in csv.DictReader(f))
    say("particles and count")
    microgen(
        "train",
        "pix2pix",
        "--data",
        "data",
        "--size",
        64,
        "--bs",
        2,
        "--epochs",
        1,
        "--config",
        "small",
        "--out",
        "run",
    )
    microgen("sample", "run", "--walls", "typeC", "--n", 2, "--out", "drawn")
    assert (FOLDER / "drawn" / "images" / "00" / "000001.tif").exists()
    say("train and sample")
    image.save(FOLDER / "mine.tif")
    microgen("measure", "mine.tif", "--structure", "YMnO3", "--out", "measured")
    assert {"columns.csv", "walls.csv"} <= {p.name for p in (FOLDER / "measured").iterdir()}
    say("measure")
    assert "YMnO3" in microgen(
        "simulate", "--n", 1, "--structure", "Unobtainium", "--out", "no", code=1
    ), "the names that exist"
    assert not (FOLDER / "no" / "metadata.csv").exists()
    microgen("measure", "not-there.tif", "--pixel-size", 0.02, code=1)
    say("mistakes are one sentence")


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    every_help()
    on_the_command_line(in_python())
    say("done")
