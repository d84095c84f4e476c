"Datasets: killed and resumed, on any number of workers, on a cluster, on a full disk."
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from microgen.cli import app
from microgen.core import Micrograph, MicrogenError
from microgen.data.build import build, read_recipe
from microgen.data.item import Simulated, paths, write_item
from microgen.data.particles import ParticleRecipe
from microgen.data.walls import Recipe
from microgen.io import read

RECIPES = [Recipe(n=12, size=48, pixel_size=0.03, seed=5),
           ParticleRecipe(("gold_on_carbon", "carbon_black", "haadf"), n=12, size=96, seed=5, settings={"bar": "random"})]


def contents(folder):
    files = [p for p in Path(folder).rglob("*") if p.suffix in (".tif", ".parquet", ".csv")]
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module", params=RECIPES, ids=lambda r: r.kind)
def recipe(request):
    "Each kind of dataset in turn."
    return request.param


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    "The dataset as an uninterrupted run on one worker writes it."
    return build(recipe, tmp_path_factory.mktemp("whole") / "set", workers=1)


@pytest.fixture(scope="module")
def walls(tmp_path_factory):
    return build(RECIPES[0], tmp_path_factory.mktemp("walls") / "set", workers=1)


@pytest.fixture(scope="module")
def particles(tmp_path_factory):
    return build(RECIPES[1], tmp_path_factory.mktemp("particles") / "set", workers=1)


@pytest.mark.parametrize("workers", [2, 8])
def test_any_number_of_workers_writes_the_same_bytes(recipe, whole, tmp_path, workers):
    assert contents(build(recipe, tmp_path / "set", workers=workers)) == contents(whole)


def test_a_dask_cluster_writes_the_same_bytes(recipe, whole, tmp_path):
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, host="127.0.0.1") as cluster:
        assert contents(build(recipe, tmp_path / "set", scheduler=cluster.scheduler_address)) == contents(whole)


def start(recipe, out):
    name = type(recipe).__name__
    code = (f"from microgen.data.build import build; from {type(recipe).__module__} import {name}; "
            f"build({recipe!r}, {str(out)!r}, workers=1)")
    return subprocess.Popen([sys.executable, "-c", code], start_new_session=True)


def test_killed_at_any_moment_it_goes_on_and_makes_nothing_twice(recipe, whole, tmp_path):
    out, rng, kept = tmp_path / "set", np.random.default_rng(0), {}
    for made in (1, 4, 8):
        run = start(recipe, out)
        while run.poll() is None and len(list(out.glob("images/*/*.tif"))) < made: time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.1))
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        for path, stamp in kept.items(): assert path.stat().st_mtime_ns == stamp, f"{path.name} was made twice"
        kept |= {path: path.stat().st_mtime_ns for path in out.glob("images/*/*.tif")}
    assert 0 < len(kept) < recipe.n or (out / "metadata.csv").exists()
    build(recipe, out, workers=1)
    for path, stamp in kept.items(): assert path.stat().st_mtime_ns == stamp, f"{path.name} was made twice"
    assert contents(out) == contents(whole)
    assert not list(out.rglob("*.tmp*")), "a temporary file was left behind"


def test_two_processes_do_not_write_one_folder(recipe, tmp_path):
    from filelock import FileLock

    (tmp_path / "set").mkdir()
    with FileLock(tmp_path / "set" / ".lock"):
        with pytest.raises(MicrogenError, match="Another process"): build(recipe, tmp_path / "set", workers=1)


def test_a_full_disk_is_one_sentence_and_the_run_goes_on_later(recipe, whole, tmp_path, monkeypatch):
    import microgen.data.item as room

    calls, real = [], room.write_tiff

    def full(*args, **kwargs):
        calls.append(args)
        if len(calls) > 3: raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(room, "write_tiff", full)
    with pytest.raises(MicrogenError, match="No space left on device.*same command goes on"):
        build(recipe, tmp_path / "set", workers=1)
    monkeypatch.undo()
    assert contents(build(recipe, tmp_path / "set", workers=1)) == contents(whole)


def test_too_little_room_is_said_before_the_first_image(recipe, tmp_path, monkeypatch):
    import microgen.data.build as room

    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(MicrogenError, match="GB free"): build(recipe, tmp_path / "set", workers=1)
    assert not list((tmp_path / "set").glob("images/*/*"))


def test_metadata_holds_what_a_learner_needs(walls):
    table = pd.read_csv(walls / "metadata.csv")
    needed = ["file_name", "split", "label", "phi_left", "phi_right", "normal_deg", "width_nm", "thickness_nm", "dose",
              "preset", "pixel_size_nm", "seed", "sha256"]
    assert [name for name in needed if name not in table] == []
    assert table.label.value_counts().nunique() == 1


def test_metadata_of_particles_count_what_is_there_and_what_is_seen(particles):
    table = pd.read_csv(particles / "metadata.csv")
    needed = ["file_name", "split", "label", "particles", "in_mask", "visible", "median_nm", "gsd", "density_um2",
              "pixel_size_nm", "preset", "seed", "sha256"]
    assert [name for name in needed if name not in table] == []
    assert table.label.value_counts().to_dict() == {"gold_on_carbon": 4, "carbon_black": 4, "haadf": 4}
    assert (table.visible <= table.in_mask).all() and (table.in_mask <= table.particles).all()
    assert table.visible.sum() > 20 and (table.visible < table.particles).any()


def test_the_metadata_say_how_and_from_what(recipe, whole):
    for row in pd.read_csv(whole / "metadata.csv").itertuples():
        assert hashlib.sha256((whole / row.file_name).read_bytes()).hexdigest() == row.sha256
    held = json.loads((whole / "recipe.json").read_text())
    assert {"kind", "command", "versions", "seed", "recipe"} <= set(held) and held["kind"] == recipe.kind
    assert read_recipe(whole) == recipe


def test_a_folder_of_walls_without_kind_is_read_and_gone_on_with(walls, tmp_path):
    "As earlier versions wrote it."
    out = shutil.copytree(walls, tmp_path / "set")
    held = json.loads((out / "recipe.json").read_text())
    del held["kind"]
    (out / "recipe.json").write_text(json.dumps(held))
    (out / "images/00/000003.tif").unlink()
    assert read_recipe(out) == RECIPES[0] and contents(build(RECIPES[0], out, workers=1)) == contents(walls)


def test_tables_hold_every_column_of_the_image(walls):
    table = pd.read_parquet(paths(walls, 3)[2])
    assert list(table) == ["y_nm", "x_nm", "element", "site", "disp_pm", "domain"]
    image = read(paths(walls, 3)[0])
    y, x = (table.loc[table.element == "Y", name] / 0.03 for name in ("y_nm", "x_nm"))
    at = image.data[y.round().astype(int).clip(0, 47), x.round().astype(int).clip(0, 47)]
    assert at.mean() > 2 * image.data.mean(), "the rare-earth columns of the table are not bright in the image"


def test_masks_and_tables_name_the_same_particles_in_the_same_places(particles):
    checked = 0
    for index in range(12):
        _, mask, table = paths(particles, index)
        mask, table = read(mask), pd.read_parquet(table)
        labels = mask.data.astype(int)
        assert (np.bincount(labels.ravel(), minlength=len(table) + 1)[1:] == table.area_px).all()
        whole = table[(table.visible > 0.99) & (table.area_px > 30)]
        for p in whole.itertuples():
            y, x = (np.mean(o) for o in np.nonzero(labels == p.id))
            assert np.hypot(y - p.y_nm / mask.pixel_size[0], x - p.x_nm / mask.pixel_size[1]) < 1
        checked += len(whole)
    assert checked > 10


def test_bright_particles_are_bright_where_the_mask_says(particles):
    table = pd.read_csv(particles / "metadata.csv").query("label == 'gold_on_carbon' and in_mask > 0")
    for name in table.file_name:
        image, mask = read(particles / name).data, read(particles / name.replace("images", "maps")).data
        assert image[mask > 0].mean() > 1.2 * np.median(image[mask == 0])


def test_more_than_65535_particles_get_a_32_bit_mask(tmp_path):
    labels = np.arange(400 * 400, dtype=np.int32).reshape(400, 400)
    item = Simulated(Micrograph(np.zeros((400, 400)), 1.), {"particle": labels}, pd.DataFrame({"id": []}), {})
    write_item(tmp_path, 0, item, 16)
    assert (read(paths(tmp_path, 0)[1]).data == labels).all()


def test_other_programs_open_images_and_masks(particles):
    "Pillow, which `datasets` and fastai open images with."
    from PIL import Image

    image, mask, _ = paths(particles, 0)
    for path in (image, mask):
        with Image.open(path) as opened: assert (np.asarray(opened) == read(path).data).all()


def test_the_folder_is_what_the_hub_calls_an_imagefolder(recipe, whole):
    table = pd.read_csv(whole / "metadata.csv")
    assert table.columns[0] == "file_name" and all((whole / name).is_file() for name in table.file_name)
    assert len(table) == recipe.n


# --- The command


def test_the_command_writes_the_particles_of_the_recipe(tmp_path):
    recipe = ParticleRecipe(("spheres", "small"), n=4, size=64, pixel_size=(1, 3), seed=3, shares=(1, 3), settings={"gsd": 1.5})
    words = "--preset spheres,small --n 4 --size 64 --pixel-size 1,3 --seed 3 --shares 1,3 --setting gsd=1.5 --workers 2"
    done = CliRunner().invoke(app, ["particles", "--out", str(tmp_path / "set"), *words.split()])
    assert done.exit_code == 0, done.output
    assert read_recipe(tmp_path / "set") == recipe
    assert contents(tmp_path / "set") == contents(build(recipe, tmp_path / "python", workers=1))
    assert pd.read_csv(tmp_path / "set" / "metadata.csv").label.value_counts().to_dict() == {"small": 3, "spheres": 1}


WRONG = {"--preset gold": "gold_on_carbon", "--preset ,": "no preset", "--setting gsd": "NAME=VALUE", "--setting gsd=": "NAME=VALUE",
         "--setting median=3": "median_nm", "--setting gsd=0.5": "gsd", "--setting gsd=NaN": "gsd", "--setting shape=[1]": "settings",
         "--setting size=64": "to the recipe itself", "--size 1024 --setting density_um2=1e6": "too many",
         "--pixel-size small": "--pixel-size", "--pixel-size 0": "pixel_size", "--shares 1,1": "shares", "--n 0": "at least one",
         "--size 8": "at least 32", "--seed -1": "seed", "--workers -1": "workers"}


@pytest.mark.parametrize("words, hint", WRONG.items())
def test_a_wrong_option_is_one_sentence_and_writes_nothing(tmp_path, words, hint):
    done = CliRunner().invoke(app, ["particles", "--out", str(tmp_path / "set"), "--n", "2", "--size", "64", *words.split()])
    assert done.exit_code == 1 and hint in done.output and len(done.output.strip().splitlines()) == 1, done.output
    assert not (tmp_path / "set").exists()
