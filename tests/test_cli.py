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
