"A run from data to card: what is judged, what the card says and shows, real images in their own style, several processes."

import json
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("fastai")

from house import ROOT
from PIL import Image

from microgen.core import InputError, ReadError
from microgen.data.build import build
from microgen.data.files import list_images
from microgen.gan.pix2pix import Pix2Pix
from microgen.io.files import read
from microgen.kinds.walls.recipe import Recipe
from microgen.kinds.walls.walls import Walls
from microgen.models.pix2pix import Pix2PixModel, RouterModel
from microgen.models.sample import sample_run
from microgen.models.train import train_model
from microgen.train.hub import load_model


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return build(
        Recipe(n=30, size=64, pixel_size=0.03, preset="good", seed=6),
        tmp_path_factory.mktemp("data") / "walls",
        workers=1,
    )


MODELS = {"film": Pix2PixModel, "router": RouterModel}


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    "One run of each kind, of few steps."
    folder = tmp_path_factory.mktemp("runs")
    for name, model in MODELS.items():
        train_model(model(epochs=2, bs=8, judged=3), data, folder / name, progress=False)
    return folder


@pytest.mark.parametrize("model", ["film", "router"])
def test_the_card_says_what_was_measured(runs, data, model):
    card = (runs / model / "model/README.md").read_text()
    assert "None was measured" not in card
    rows = re.findall(r"^\| (?!metric|-)(.+?) \| (\S+) \| (\S+ to \S+) \| (\d+) \|$", card, re.M)
    names = [r[0] for r in rows]
    assert names[:2] == ["SSIM, generated without noise", "SSIM, generated with noise"]
    measures = Walls().measures.values()
    asked = [name for name in names[2:] if not name.endswith("; true images")]
    assert set(asked) <= set(measures) and bool(asked) == bool(measures)
    assert {r[3] for r in rows[:2]} == {"3"}
    assert {r[3] for r in rows} <= {"2", "3"}  # an image may show no column of a rim
    for line in (
        "**Structure**: YMnO3",
        "**Scan preset**: good",
        "**Seed**: 6",
        "e/Å²",
        "**Pixel size**: 0.03 nm",
    ):
        assert line in card, line
    assert "best by ssim" in card


@pytest.mark.parametrize("model", ["film", "router"])
def test_the_example_of_the_card_runs(runs, model):
    folder = runs / model / "model"
    (example,) = re.findall(
        r"^```python\n(.*?)^```", (folder / "README.md").read_text(), re.S | re.M
    )
    assert example.count("maps, label = ...") == 1
    text = example.replace("FOLDER or USER/NAME", str(folder)).replace(
        "maps, label = ...", "maps, label = torch.zeros(4, 64, 64), 0"
    )
    names = {"torch": torch}
    exec(compile(text, "README.md", "exec"), names)
    assert names["images"].shape == (4, 1, 64, 64)


@pytest.mark.parametrize("model", ["film", "router"])
def test_the_card_shows_the_last_preview(runs, model):
    previews = sorted((runs / model / "previews").glob("*.png"))
    steps = len(pd.read_csv(runs / model / "history.csv").g_l1.dropna())
    shown = (runs / model / "model/example.png").read_bytes()
    assert shown == previews[-1].read_bytes()
    assert int(previews[-1].stem) == steps > 1, "the last step is drawn"
    assert (
        np.array(Image.open(previews[0])).shape == np.array(Image.open(previews[-1])).shape
        and shown != previews[0].read_bytes()
    )


def test_a_finished_run_is_not_judged_again(runs, data, monkeypatch):
    before = (runs / "film/model/facts.json").read_text()
    monkeypatch.setattr(Pix2PixModel, "judge", lambda *a, **k: pytest.fail("judged again"))
    model = Pix2PixModel(epochs=2, bs=8, judged=3)
    learn = train_model(model, data, runs / "film", progress=False)
    assert learn.model.facts["metrics"] == json.loads(before)["metrics"]
    assert (runs / "film/model/facts.json").read_text() == before


def test_more_epochs_are_judged_again(runs, data, tmp_path):
    shutil.copytree(runs / "film", tmp_path / "film")
    model = Pix2PixModel(epochs=3, bs=8, judged=2)
    train_model(model, data, tmp_path / "film", progress=False)
    facts = json.loads((tmp_path / "film/model/facts.json").read_text())
    n_images = max(row["n"] for row in facts["metrics"])  # fewer where one does not show a measure
    assert n_images == 2 and str(facts["epochs"]).startswith("3")


def test_a_stopped_run_says_so_on_its_card(data, tmp_path):
    model = Pix2PixModel(epochs=5, bs=8, max_hours=1e-9)
    learn = train_model(model, data, tmp_path / "run", progress=False)
    card = (tmp_path / "run/model/README.md").read_text()
    assert learn.stopped and "0 of 5, then stopped" in card and "None was measured" in card


def test_a_damaged_file_of_settings_is_named(runs, tmp_path):
    shutil.copytree(runs / "film/model", tmp_path / "model")
    (tmp_path / "model/config.json").write_text('{"in_ch": 4, ')
    for load in (load_model, Pix2Pix.from_pretrained):
        with pytest.raises(ReadError, match="config.json") as error:
            load(tmp_path / "model")
        assert "Hub" not in str(error.value) and "\n" not in str(error.value)


def test_drawn_in_the_style_of_real_images(data, tmp_path):
    real = tmp_path / "real"
    for k, path in enumerate(
        list_images(
            build(
                Recipe(walls=("UP",), n=4, size=64, pixel_size=0.03, preset="poor", seed=9),
                tmp_path / "poor",
                workers=1,
            )
        ).image
    ):
        read(path).save(real / f"{k}.tif")
    model = Pix2PixModel(real=real, epochs=1, bs=8, judged=0)
    train_model(model, data, tmp_path / "run", progress=False)
    pictures = {}
    for domain in ("simulated", "real"):
        out = sample_run(
            tmp_path / "run",
            walls="typeC",
            n=2,
            out=tmp_path / f"drawn_{domain}",
            seed=3,
            domain=domain,
            progress=False,
        )
        listed = list_images(out)
        assert (
            set(listed.domain) == {domain}
            and json.loads((out / "recipe.json").read_text())["generated"]["domain"] == domain
        )
        pictures[domain] = np.stack([read(p).data for p in listed.image])
        assert (pd.read_parquet(listed.table[0]).site == "R").any()
    assert not np.array_equal(*pictures.values())
    with pytest.raises(InputError, match="domain"):
        sample_run(
            tmp_path / "run", walls="typeC", n=1, out=tmp_path / "x", domain="mine", progress=False
        )


def test_what_only_pairs_have_is_refused_with_real_images(data, tmp_path):
    for asked in ({"group": "seed"}, {"properties": ("dose_e_A2",)}):
        with pytest.raises(InputError, match=next(iter(asked))):
            images = list_images(data).image[0].parent
            model = Pix2PixModel(real=images, epochs=1, **asked)
            train_model(model, data, tmp_path / "run", progress=False)


def test_a_specimen_is_not_on_both_sides(data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    table = pd.read_csv(tmp_path / "data/metadata.csv")
    table.assign(specimen=["ABCDE"[i % 5] for i in range(len(table))]).drop(columns="split").to_csv(
        tmp_path / "data/metadata.csv", index=False
    )
    model = Pix2PixModel(epochs=1, bs=4, group="specimen", judged=0)
    learn = train_model(model, tmp_path / "data", tmp_path / "run", progress=False)
    of = learn.dls.train.pixels.listed.specimen.to_numpy()
    sides = [set(of[list(part.dataset.items)]) for part in learn.dls.loaders[:2]]
    assert not sides[0] & sides[1] and sides[0] | sides[1] == set("ABCDE")


WORKER = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, {root!r})
torch.set_num_threads(1)
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="tcp://127.0.0.1:{port}", rank=rank, world_size=2)
import microgen.models.pix2pix as pix2pix, microgen.models.run as facts
import microgen.models.train as entry, microgen.train.run as run
def noted(module, name, argument):
    write = getattr(module, name)
    def one(*args, **kw):
        with open({log!r}, "a") as f: f.write(f"{{rank}} {{args[argument].name}}\\n")
        return write(*args, **kw)
    setattr(module, name, one)
noted(pix2pix, "write_csv", 0); noted(run, "save_model", 1); noted(entry, "write_facts", 0)
model = pix2pix.RouterModel(epochs=1, bs=8, judged=2)
entry.train_model(model, {data!r}, {out!r}, progress=False)
dist.destroy_process_group()
"""


def test_one_of_several_processes_writes(data, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    text = WORKER.format(
        root=str(ROOT),
        port=port,
        log=str(tmp_path / "log"),
        data=str(data),
        out=str(tmp_path / "run"),
    )
    both = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", text, str(r)],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
        )
        for r in (0, 1)
    ]
    for p in both:
        _, err = p.communicate(timeout=300)
        assert p.returncode == 0, err.decode()[-2000:]
    assert sorted(Path(tmp_path / "log").read_text().split("\n")) == [
        "",
        "0 experts.csv",
        "0 model",
        "0 model",
    ], "weights once, then facts and card"
    assert "SSIM" in (tmp_path / "run/model/README.md").read_text()
