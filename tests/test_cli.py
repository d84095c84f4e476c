"The command line: short answers, sentences with options, warnings without source, everything that a training offers."

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from house import ROOT
from PIL import Image
from typer.testing import CliRunner

from microgen.cli import app
from microgen.core import Micrograph
from microgen.io.files import write_tiff

run = CliRunner().invoke


def go(*words):
    return run(app, [str(w) for w in words])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    "Two folders of noise, calibrated."
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name in ("a", "b"):
        for k in range(3):
            Micrograph(rng.normal(1, 0.1, (48, 48)), 0.05).save(folder / name / f"{k}.tif")
    return folder


def test_compare_prints_a_path_and_no_page(pictures, tmp_path):
    done = go("compare", pictures / "a", pictures / "b", "--out", tmp_path / "compared")
    assert done.exit_code == 0, done.output
    assert len(done.output) < 1000 and "base64" not in done.output and "Report(" not in done.output
    named = Path(done.output.strip().splitlines()[-1].removeprefix("The report is "))
    assert named == tmp_path / "compared/report.html" and "base64" in named.read_text()


def test_a_missing_pixel_size_names_the_option(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64)).astype("uint8")).save(
        tmp_path / "a.png"
    )
    failed = go("measure", tmp_path / "a.png", "--out", tmp_path / "out")
    assert (
        failed.exit_code == 1
        and failed.output.count("--pixel-size") == 1
        and "pixel_size=" not in failed.output
    ), failed.output


def test_two_pixel_sizes_name_the_option(pictures, tmp_path):
    for k in range(3):
        write_tiff(
            tmp_path / "c" / f"{k}.tif", np.random.default_rng(k).normal(1, 0.1, (48, 48)), 0.07
        )
    failed = go("compare", pictures / "a", tmp_path / "c", "--out", tmp_path / "out")
    assert (
        failed.exit_code == 1
        and "--pixel-size" in failed.output
        and "pixel_size=" not in failed.output
    ), failed.output


def test_warnings_are_sentences(tmp_path):
    "The program warns of nothing but in sentences: no file, no line number, no source."
    script = tmp_path / "warned.py"  # a command's help is read from its source
    script.write_text(
        "import sys, warnings\nimport microgen.cli as c\n\n@c.command\ndef warned():\n    'Warn.'\n    warnings.warn('one word')\n"
        "    warnings.warn('old', FutureWarning)\n\nsys.argv = ['microgen', 'warned']\nc.main()\n"
    )
    done = subprocess.run(
        [sys.executable, script],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=120,
    )
    assert done.stderr == "microgen: one word\n" and done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["pix2pix", "router"])
def test_training_offers_what_python_offers(name):
    "Every option of a model is one of the command line, with its comment and its default."
    import dataclasses

    from microgen.cli import comments_of, train_command
    from microgen.models.model import model_named

    model = model_named(name)
    offered = {parameter.name: parameter for parameter in train_command(model).params}
    comments = comments_of(model)
    for option in dataclasses.fields(model):
        assert offered[option.name].help.startswith(comments[option.name])
        if option.type in (int, float, str, bool):
            assert offered[option.name].default == option.default


def test_help_says_what_a_model_and_a_run_offer(tmp_path):
    listed = go("train", "--help")
    assert listed.exit_code == 0 and "pix2pix" in listed.output and "router" in listed.output
    asked = go("train", "router", "--help")
    assert asked.exit_code == 0 and "--explore" in asked.output and "--arch" not in asked.output
    nobody = go("train", "pix3pix")
    assert nobody.exit_code == 1 and "choose among pix2pix, router" in nobody.output
    nothing = go("sample", tmp_path / "nothing", "--n", 3)
    assert nothing.exit_code == 1 and "no model" in nothing.output


def test_partial_crystals_ask_for_the_option():
    import inspect

    from microgen.cli import simulate

    assert "partial" in inspect.signature(simulate).parameters


def test_options_reach_the_training(tmp_path):
    import json

    import pandas as pd

    made = go(
        "simulate",
        "--n",
        16,
        "--size",
        32,
        "--pixel-size",
        0.03,
        "--preset",
        "good",
        "--workers",
        1,
        "--out",
        tmp_path / "data",
    )
    assert made.exit_code == 0, made.output
    done = go(
        "train",
        "pix2pix",
        "--data",
        tmp_path / "data",
        "--epochs",
        2,
        "--bs",
        4,
        "--out",
        tmp_path / "run",
        "--best-by",
        "valid_loss",
        "--preview-every",
        3,
        "--bf16",
        "--properties",
        "dose_e_A2",
        "--contrast",
        0.1,
        "--gamma",
        0.1,
        "--weight",
        "adv=0.01",
    )
    assert done.exit_code == 0, done.output
    settings = json.loads((tmp_path / "run/config.json").read_text())["settings"]
    assert (
        settings["bf16"] is True
        and settings["weights"]["adv"] == 0.01
        and settings["contrast"] == settings["gamma"] == 0.1
    )
    assert settings["properties"] == ["dose_e_A2"] and settings["best_by"] == "valid_loss"
    assert (tmp_path / "run/previews/00000003.png").exists()
    best = json.loads((tmp_path / "run/result.json").read_text())["best"]
    history = pd.read_csv(tmp_path / "run/history.csv").valid_loss.dropna().to_numpy()
    assert best["metric"] == "valid_loss" and best["value"] == pytest.approx(history.min())
    drawn = go(
        "sample",
        tmp_path / "run",
        "--walls",
        "typeC",
        "--n",
        2,
        "--prop",
        "dose_e_A2=300000",
        "--out",
        tmp_path / "drawn",
    )
    assert drawn.exit_code == 0, drawn.output
    assert set(pd.read_csv(tmp_path / "drawn/metadata.csv").dose_e_A2) == {300000}
    strange = go(
        "sample",
        tmp_path / "run",
        "--walls",
        "typeC",
        "--n",
        2,
        "--domain",
        "real",
        "--out",
        tmp_path / "real",
    )
    assert strange.exit_code == 1 and "no real images" in strange.output
    unknown = go(
        "train",
        "pix2pix",
        "--data",
        tmp_path / "data",
        "--epochs",
        2,
        "--out",
        tmp_path / "other",
        "--best-by",
        "fid",
    )
    assert (
        unknown.exit_code == 1
        and "fid" in unknown.output
        and len(re.findall(r"\n", unknown.output.strip())) < 4
    )


def said(done):
    return " ".join(done.output.split())


def test_results_of_others_are_never_touched(pictures, tmp_path):
    "measure, compare, tour, sample and simulate refuse a folder that is not theirs before any work."
    mine = tmp_path / "mine"
    mine.mkdir()
    for name in ("columns.csv", "overlay.png", "report.html", "metadata.csv"):
        (mine / name).write_text("weeks of work", encoding="utf-8")
    for words in (
        ("measure", pictures / "a" / "0.tif"),
        ("compare", pictures / "a", pictures / "b"),
        ("simulate", "--n", 2, "--size", 32, "--pixel-size", 0.03, "--workers", 1),
        ("count", pictures / "a"),
        ("tour",),
    ):
        refused = go(*words, "--out", mine)
        assert refused.exit_code == 1 and "is not empty" in said(refused), refused.output
    assert {p.read_text(encoding="utf-8") for p in mine.iterdir()} == {"weeks of work"}
    assert len(list(mine.iterdir())) == 4


def test_a_second_measurement_replaces_its_own_and_no_other(tmp_path):
    import shutil

    from microgen.kinds.walls.recipe import Recipe, simulate

    recipe = Recipe(walls=("UP",), n=2, size=96, pixel_size=0.025, preset="good")
    for k in range(2):
        simulate(recipe, k).image.save(tmp_path / f"{k}.tif")
    out = tmp_path / "measured"
    assert go("measure", tmp_path / "0.tif", "--out", out).exit_code == 0
    first = (out / "columns.csv").read_bytes()
    other = go("measure", tmp_path / "1.tif", "--out", out)
    assert other.exit_code == 1 and "image is '0.tif' there and '1.tif' here" in said(other)
    assert (out / "columns.csv").read_bytes() == first
    shutil.copy(tmp_path / "1.tif", tmp_path / "0.tif")  # another image under the same name
    assert go("measure", tmp_path / "0.tif", "--out", out).exit_code == 1
    assert (out / "columns.csv").read_bytes() == first


def test_an_image_of_a_stack_is_named_on_the_command_line(tmp_path):
    import tifffile

    from microgen.kinds.walls.recipe import Recipe, simulate

    one = simulate(Recipe(walls=("UP",), n=1, size=96, pixel_size=0.025, preset="good"), 0).image
    tifffile.imwrite(tmp_path / "stack.tif", np.stack([one.data] * 3), photometric="minisblack")
    words = ("measure", tmp_path / "stack.tif", "--pixel-size", 0.025, "--out", tmp_path / "out")
    asked = go(*words)
    assert asked.exit_code == 1 and "--frame" in said(asked), asked.output
    assert go(*words, "--frame", 1).exit_code == 0
    too_large = go(*words, "--frame", 1, "--max-bytes", "10kB")
    assert too_large.exit_code == 1 and "--max-bytes" in said(too_large), too_large.output
    pm = go("measure", tmp_path / "stack.tif", "--frame", 0, "--pixel-size", 25)
    assert pm.exit_code == 1 and "give it in nm" in said(pm), pm.output


def test_a_small_dataset_can_be_trained_on_and_its_own_classes_are_sampled(tmp_path):
    "Eight images of three walls keep one to judge by; a training on two of three classes samples these two."
    import pandas as pd

    data, run = tmp_path / "data", tmp_path / "run"
    small = ("--size", 32, "--pixel-size", 0.03, "--preset", "good", "--workers", 1)
    assert go("simulate", "--n", 8, *small, "--out", data).exit_code == 0
    assert "valid" in set(pd.read_csv(data / "metadata.csv").split)
    words = ("--epochs", 1, "--bs", 2, "--config", "small", "--classes", "UP,DN", "--out", run)
    trained = go("train", "pix2pix", "--data", data, *words)
    assert trained.exit_code == 0, trained.output
    sampled = go("sample", run, "--n", 4, "--out", tmp_path / "sampled")
    assert sampled.exit_code == 0, sampled.output
    assert set(pd.read_csv(tmp_path / "sampled/metadata.csv").label) <= {"UP", "DN"}
    wrong = go("sample", run, "--domian", "real")
    assert wrong.exit_code == 2 and "did you mean --domain?" in said(wrong), wrong.output


def test_a_terminal_without_letters_of_other_languages(tmp_path):
    "Å and ² become question marks where the terminal has none; nothing stops."
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    for words in (["walls"], ["structures"], ["particles", "--help"]):
        done = subprocess.run(
            [sys.executable, "-m", "microgen", *words], env=env, capture_output=True, cwd=tmp_path
        )
        assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr


@pytest.mark.skipif(os.name != "posix", reason="a process group is killed")
def test_workers_end_with_a_command_that_is_killed(tmp_path):
    import signal
    import time

    words = ("particles", "--n", 400, "--size", 256, "--workers", 2, "--out", tmp_path / "set")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", "microgen", *map(str, words)]
    run = subprocess.Popen(line, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while len(list(tmp_path.glob("set/images/*/*.tif"))) < 3 and time.monotonic() < until:
        time.sleep(0.05)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    time.sleep(3)
    made = sorted(tmp_path.glob("set/images/*/*.tif"))
    time.sleep(3)
    assert len(made) >= 3 and sorted(tmp_path.glob("set/images/*/*.tif")) == made
