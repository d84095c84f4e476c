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
from microgen.core import InputError, MicrogenError, Micrograph
from microgen.data.build import build, read_recipe
from microgen.data.item import Simulated, paths, write_item
from microgen.io.files import read
from microgen.kinds.particles.recipe import ParticleRecipe
from microgen.kinds.walls.recipe import Recipe

RECIPES = [
    Recipe(n=12, size=48, pixel_size=0.03, seed=5),
    ParticleRecipe(
        ("gold_on_carbon", "carbon_black", "haadf"),
        n=12,
        size=96,
        seed=5,
        settings={"bar": "random"},
    ),
]


def contents(folder):
    files = [p for p in Path(folder).rglob("*") if p.suffix in (".tif", ".parquet", ".csv")]
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files
    }


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
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=None, host="127.0.0.1"
    ) as cluster:
        assert contents(
            build(recipe, tmp_path / "set", scheduler=cluster.scheduler_address)
        ) == contents(whole)


def start(recipe, out):
    name = type(recipe).__name__
    code = (
        f"from microgen.data.build import build; from {type(recipe).__module__} import {name}; "
        f"build({recipe!r}, {str(out)!r}, workers=1)"
    )
    return subprocess.Popen([sys.executable, "-c", code], start_new_session=True)


def test_killed_at_any_moment_it_goes_on_and_makes_nothing_twice(recipe, whole, tmp_path):
    out, rng, kept = tmp_path / "set", np.random.default_rng(0), {}
    for made in (1, 4, 8):
        run = start(recipe, out)
        while run.poll() is None and len(list(out.glob("images/*/*.tif"))) < made:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.1))
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        for path, stamp in kept.items():
            assert path.stat().st_mtime_ns == stamp, f"{path.name} was made twice"
        kept |= {path: path.stat().st_mtime_ns for path in out.glob("images/*/*.tif")}
    assert 0 < len(kept) < recipe.n or (out / "metadata.csv").exists()
    build(recipe, out, workers=1)
    for path, stamp in kept.items():
        assert path.stat().st_mtime_ns == stamp, f"{path.name} was made twice"
    assert contents(out) == contents(whole)
    assert not list(out.rglob("*.tmp*")), "a temporary file was left behind"


def test_two_processes_do_not_write_one_folder(recipe, tmp_path):
    from filelock import FileLock

    (tmp_path / "set").mkdir()
    with FileLock(tmp_path / "set" / ".lock"):
        with pytest.raises(MicrogenError, match="Another process"):
            build(recipe, tmp_path / "set", workers=1)


def test_a_full_disk_is_one_sentence_and_the_run_goes_on_later(
    recipe, whole, tmp_path, monkeypatch
):
    import microgen.data.item as room

    calls, real = [], room.write_tiff

    def full(*args, **kwargs):
        calls.append(args)
        if len(calls) > 3:
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(room, "write_tiff", full)
    with pytest.raises(MicrogenError, match="No space left on device.*same command goes on"):
        build(recipe, tmp_path / "set", workers=1)
    monkeypatch.undo()
    assert contents(build(recipe, tmp_path / "set", workers=1)) == contents(whole)


def test_too_little_room_is_said_before_the_first_image(recipe, tmp_path, monkeypatch):
    import microgen.data.build as room

    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(MicrogenError, match="1 kB free"):
        build(recipe, tmp_path / "set", workers=1)
    assert not list(tmp_path.iterdir())


def test_metadata_holds_what_a_learner_needs(walls):
    table = pd.read_csv(walls / "metadata.csv")
    needed = [
        "file_name",
        "split",
        "label",
        "phi_left",
        "phi_right",
        "normal_deg",
        "width_nm",
        "thickness_nm",
        "dose_e_A2",
        "preset",
        "pixel_size_nm",
        "seed",
        "sha256",
    ]
    assert [name for name in needed if name not in table] == []
    assert table.label.value_counts().nunique() == 1


def test_metadata_of_particles_count_what_is_there_and_what_is_seen(particles):
    table = pd.read_csv(particles / "metadata.csv")
    needed = [
        "file_name",
        "split",
        "label",
        "particles",
        "in_mask",
        "visible",
        "median_nm",
        "gsd",
        "density_um2",
        "pixel_size_nm",
        "preset",
        "seed",
        "sha256",
    ]
    assert [name for name in needed if name not in table] == []
    assert table.label.value_counts().to_dict() == {
        "gold_on_carbon": 4,
        "carbon_black": 4,
        "haadf": 4,
    }
    assert (table.visible <= table.in_mask).all() and (table.in_mask <= table.particles).all()
    assert table.visible.sum() > 20 and (table.visible < table.particles).any()


def test_the_metadata_say_how_and_from_what(recipe, whole):
    for row in pd.read_csv(whole / "metadata.csv").itertuples():
        assert hashlib.sha256((whole / row.file_name).read_bytes()).hexdigest() == row.sha256
    held = json.loads((whole / "recipe.json").read_text())
    assert {"kind", "command", "versions", "seed", "recipe"} <= set(held) and held[
        "kind"
    ] == recipe.kind
    assert read_recipe(whole) == recipe


def test_a_folder_of_walls_without_kind_is_read_and_gone_on_with(walls, tmp_path):
    "As earlier versions wrote it."
    out = shutil.copytree(walls, tmp_path / "set")
    held = json.loads((out / "recipe.json").read_text())
    del held["kind"]
    (out / "recipe.json").write_text(json.dumps(held))
    (out / "images/00/000003.tif").unlink()
    assert read_recipe(out) == RECIPES[0] and contents(
        build(RECIPES[0], out, workers=1)
    ) == contents(walls)


def test_tables_hold_every_column_of_the_image(walls):
    table = pd.read_parquet(paths(walls, 3)[2])
    assert list(table) == ["y_nm", "x_nm", "element", "site", "disp_pm", "domain"]
    image = read(paths(walls, 3)[0])
    y, x = (table.loc[table.element == "Y", name] / 0.03 for name in ("y_nm", "x_nm"))
    at = image.data[y.round().astype(int).clip(0, 47), x.round().astype(int).clip(0, 47)]
    assert at.mean() > 2 * image.data.mean(), (
        "the rare-earth columns of the table are not bright in the image"
    )


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
    table = pd.read_csv(particles / "metadata.csv").query(
        "label == 'gold_on_carbon' and in_mask > 0"
    )
    for name in table.file_name:
        image, mask = (
            read(particles / name).data,
            read(particles / name.replace("images", "maps")).data,
        )
        assert image[mask > 0].mean() > 1.2 * np.median(image[mask == 0])


def test_more_than_65535_particles_get_a_32_bit_mask(tmp_path):
    labels = np.arange(400 * 400, dtype=np.int32).reshape(400, 400)
    item = Simulated(
        Micrograph(np.zeros((400, 400)), 1.0), {"particle": labels}, pd.DataFrame({"id": []}), {}
    )
    write_item(tmp_path, 0, item, 16)
    assert (read(paths(tmp_path, 0)[1]).data == labels).all()


def test_other_programs_open_images_and_masks(particles):
    "Pillow, which `datasets` and fastai open images with."
    from PIL import Image

    image, mask, _ = paths(particles, 0)
    for path in (image, mask):
        with Image.open(path) as opened:
            assert (np.asarray(opened) == read(path).data).all()


def test_the_folder_is_what_the_hub_calls_an_imagefolder(recipe, whole):
    table = pd.read_csv(whole / "metadata.csv")
    assert table.columns[0] == "file_name" and all(
        (whole / name).is_file() for name in table.file_name
    )
    assert len(table) == recipe.n


# --- Recipes that cannot be right: one sentence, and nothing is written

NAN, INF = float("nan"), float("inf")
BAD_WALLS = [
    ({"thickness_nm": (10, 5)}, "low not above high"),
    ({"thickness_nm": (5,)}, "pair"),
    ({"thickness_nm": (0, 5)}, "more than 0"),
    ({"thickness_nm": "thick"}, "thickness_nm is 'thick'"),
    ({"thickness_nm": (5, 5000)}, "at most 1000"),
    ({"rotation_deg": (1, -1)}, "low not above"),
    ({"defocus_nm": (NAN, 1)}, "finite"),
    ({"defocus_nm": (0, INF)}, "finite"),
    ({"roughness_nm": (-1, -0.5)}, "at least 0"),
    ({"n": 2.5}, "whole"),
    ({"n": "a"}, "whole"),
    ({"n": None}, "whole"),
    ({"size": 64.5}, "whole"),
    ({"seed": 1.5}, "whole"),
    ({"pixel_size": "x"}, "pixel_size is 'x'"),
    ({"pixel_size": (0.02, 0.03)}, "number"),
    ({"shares": ("a", "b", "c")}, "shares"),
    ({"shares": 3}, "shares"),
    ({"splits": None}, "splits"),
    ({"splits": (NAN, 1, 1)}, "splits"),
    ({"voltage_kV": "high"}, "voltage_kV"),
    ({"semiangle_mrad": 500}, "semiangle_mrad"),
    ({"walls": 3}, "no wall"),
    ({"pixel_size": 0.1}, "use at most 89 pm"),
    ({"pixel_size": 1e-5}, "too many for memory"),
    ({"pixel_size": 1e-9}, "too many for memory"),
    ({"pixel_size": 1e-9, "preset": "ideal"}, "too fine"),
    ({"size": 10**6}, "too many for memory"),
]
BAD_PARTICLES = [
    ({"n": 2.5}, "whole"),
    ({"size": "a"}, "whole"),
    ({"seed": None}, "whole"),
    ({"shares": ("a",)}, "shares"),
    ({"splits": "abc"}, "splits"),
    ({"pixel_size": "x"}, "pixel_size"),
    ({"pixel_size": (4, 2)}, "low not above high"),
    ({"pixel_size": NAN}, "pixel_size"),
    ({"presets": 3}, "no preset"),
]


@pytest.mark.parametrize(
    "kind, wrong, why",
    [(Recipe, *c) for c in BAD_WALLS] + [(ParticleRecipe, *c) for c in BAD_PARTICLES],
    ids=lambda o: repr(o)[:40],
)
def test_a_recipe_that_cannot_be_right_writes_nothing(kind, wrong, why, tmp_path):
    with pytest.raises(InputError, match=why) as error:
        build(kind(**{"n": 2, "size": 64} | wrong), tmp_path / "set", workers=1)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_the_command_refuses_a_reversed_range_and_writes_nothing(tmp_path):
    done = CliRunner().invoke(
        app, ["simulate", "--thickness", "10,5", "--n", "2", "--out", str(tmp_path / "set")]
    )
    assert (
        done.exit_code == 1
        and "low not above high" in done.output
        and len(done.output.strip().splitlines()) == 1
    ), done.output
    assert not list(tmp_path.iterdir())


def test_what_is_nearly_right_is_made_right():
    recipe = Recipe(
        thickness_nm=7.0,
        n=np.int64(2),
        shares=[1, 2, 3],
        rotation_deg=[-1, 1],
        structure=Path("YMnO3"),
    )
    assert (recipe.thickness_nm, recipe.rotation_deg, recipe.shares, recipe.structure) == (
        (7.0, 7.0),
        (-1.0, 1.0),
        (1.0, 2.0, 3.0),
        "YMnO3",
    )
    assert Recipe.from_dict(json.dumps(recipe.to_dict())) == recipe


def test_the_coarsest_pixel_is_that_of_the_crystal():
    "Two pixels per distance of the R columns: in InMnO3, with the smaller cell, fewer pm than in DyMnO3."
    limits = {}
    for name in ("InMnO3", "DyMnO3"):
        with pytest.raises(InputError, match="use at most") as error:
            Recipe(structure=name, pixel_size=0.2).rehearse()
        limits[name] = int(str(error.value).split("use at most ")[1].split(" pm")[0])
        Recipe(structure=name, pixel_size=1e-3 * (limits[name] - 1)).rehearse()
    assert limits["InMnO3"] < limits["DyMnO3"]


@pytest.mark.parametrize(
    "out, why",
    [
        ("/proc/x", "make room"),
        ("file.tif", "it is a file"),
        ("file.tif/x", "its folder is a file"),
    ],
)
def test_a_folder_that_cannot_be_made_is_one_sentence(out, why, tmp_path):
    (tmp_path / "file.tif").write_text("x")
    with pytest.raises(MicrogenError, match=why):
        build(RECIPES[0], tmp_path / out, workers=1)
    assert [p.name for p in tmp_path.iterdir()] == ["file.tif"]


# --- Crystals of one's own


@pytest.fixture
def cif(tmp_path):
    "A function that writes a CIF: the shipped YMnO3 with changes."
    from importlib.resources import files

    def write(*changes, name="mine.cif"):
        text = (files("microgen") / "structures" / "YMnO3.cif").read_text(encoding="utf-8")
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write


def partly(share):
    "The change that leaves the planar oxygen O3 partly empty."
    from importlib.resources import files

    line = next(
        o
        for o in (files("microgen") / "structures" / "YMnO3.cif")
        .read_text(encoding="utf-8")
        .splitlines()
        if o.startswith("O3 ")
    )
    return line, line[:-1] + str(share)


@pytest.mark.filterwarnings("ignore:.*contradicts itself")
@pytest.mark.parametrize("share", [0.75, 0.97, 0.9999])
def test_a_partly_occupied_crystal_is_refused_with_the_remedy(share, cif, tmp_path):
    recipe = dict(structure=cif(partly(share)), n=1, size=48, pixel_size=0.03)
    with pytest.raises(InputError, match=rf"partly occupied sites \(O3: O {share}\).*--partial"):
        build(Recipe(**recipe), tmp_path / "set", workers=1)
    assert not (tmp_path / "set").exists()
    done = CliRunner().invoke(
        app,
        [
            "simulate",
            "--structure",
            recipe["structure"],
            "--n",
            "1",
            "--out",
            str(tmp_path / "set"),
        ],
    )
    assert done.exit_code == 1 and "--partial" in done.output and not (tmp_path / "set").exists()
    out = build(Recipe(**recipe, partial=True), tmp_path / "set", workers=1)
    assert read_recipe(out).partial and len(pd.read_csv(out / "metadata.csv")) == 1


def test_a_mixed_site_is_partly_occupied_too(cif):
    line = partly(1)[0]
    with pytest.raises(InputError, match="O 0.9, F 0.1"):
        Recipe(
            structure=cif(
                (line, line[:-1] + "0.9\n" + line.replace("O3  O", "F3  F", 1)[:-1] + "0.1")
            )
        ).rehearse()


def test_a_dataset_is_gone_on_with_only_on_the_crystal_it_was_begun_with(cif, tmp_path):
    recipe = dict(structure=cif(), n=2, size=48, pixel_size=0.03, seed=1)
    out = build(Recipe(**recipe), tmp_path / "set", workers=1)
    before = contents(out)
    (out / "images/00/000001.tif").unlink()
    cif(("0.2743", "0.2753"))
    with pytest.raises(
        InputError, match="the content of its cif is not that of .*mine.cif"
    ) as error:
        build(Recipe(**recipe), out, workers=1)
    assert len(str(error.value)) < 300
    Path(recipe["structure"]).unlink()  # the recipe holds what it needs, also when the file is gone
    assert contents(build(read_recipe(out), out, workers=1)) == before


@pytest.mark.filterwarnings("ignore:.*contradicts itself")
def test_a_replaced_structure_brings_its_own_file(cif):
    from dataclasses import replace

    mine = Recipe(structure=cif())
    other = replace(mine, structure=cif(("6.1387", "6.2387"), name="other.cif"))
    assert mine.crystal.lattice.a == pytest.approx(
        6.1387
    ) and other.crystal.lattice.a == pytest.approx(6.2387)
    assert replace(mine, structure="LuMnO3").cif == ()


def test_other_versions_are_warned_about(walls, tmp_path, recwarn):
    out = shutil.copytree(walls, tmp_path / "set")
    (out / "images/00/000003.tif").unlink()
    (out / "metadata.csv").unlink()
    build(RECIPES[0], out, workers=1)
    assert not [w for w in recwarn if "was begun with" in str(w.message)]
    held = json.loads((out / "recipe.json").read_text())
    held["versions"] |= {"microgen": "0.0.1"}
    (out / "recipe.json").write_text(json.dumps(held))
    (out / "metadata.csv").unlink()
    with pytest.warns(
        UserWarning, match=r"set was begun with microgen 0.0.1 \(now .*choose a new folder"
    ):
        build(RECIPES[0], out, workers=1)


def test_the_centre_of_a_wall_is_where_its_map_has_it(walls):
    table = pd.read_csv(walls / "metadata.csv")
    assert list(table)[-3:] == ["center_y_nm", "center_x_nm", "sha256"]
    assert table.center_x_nm.isna().equals(table.label != "typeC")
    for i in table.index[table.label == "typeC"]:
        wall = read(paths(walls, i)[1]).data[4] > 0
        row = round(table.center_y_nm[i] / 0.03)
        assert np.flatnonzero(wall[row]).mean() * 0.03 == pytest.approx(
            table.center_x_nm[i], abs=0.25
        )


# --- The command


def test_the_command_writes_the_particles_of_the_recipe(tmp_path):
    recipe = ParticleRecipe(
        ("spheres", "small"),
        n=4,
        size=64,
        pixel_size=(1, 3),
        seed=3,
        shares=(1, 3),
        settings={"gsd": 1.5},
    )
    words = "--preset spheres,small --n 4 --size 64 --pixel-size 1,3 --seed 3 --shares 1,3 --setting gsd=1.5 --workers 2"
    done = CliRunner().invoke(app, ["particles", "--out", str(tmp_path / "set"), *words.split()])
    assert done.exit_code == 0, done.output
    assert read_recipe(tmp_path / "set") == recipe
    assert contents(tmp_path / "set") == contents(build(recipe, tmp_path / "python", workers=1))
    assert pd.read_csv(tmp_path / "set" / "metadata.csv").label.value_counts().to_dict() == {
        "small": 3,
        "spheres": 1,
    }


WRONG = {
    "--preset gold": "gold_on_carbon",
    "--preset ,": "no preset",
    "--setting gsd": "NAME=VALUE",
    "--setting gsd=": "NAME=VALUE",
    "--setting median=3": "median_nm",
    "--setting gsd=0.5": "gsd",
    "--setting gsd=NaN": "gsd",
    "--setting shape=[1]": "shape",
    "--setting size=64": "to the recipe itself",
    "--size 1024 --setting density_um2=1e6": "too many",
    "--pixel-size small": "--pixel-size",
    "--pixel-size 0": "pixel_size",
    "--shares 1,1": "shares",
    "--n 0": "at least one",
    "--size 8": "at least 32",
    "--seed -1": "seed",
    "--workers -1": "workers",
}


@pytest.mark.parametrize("words, hint", WRONG.items())
def test_a_wrong_option_is_one_sentence_and_writes_nothing(tmp_path, words, hint):
    done = CliRunner().invoke(
        app,
        ["particles", "--out", str(tmp_path / "set"), "--n", "2", "--size", "64", *words.split()],
    )
    assert (
        done.exit_code == 1 and hint in done.output and len(done.output.strip().splitlines()) == 1
    ), done.output
    assert not (tmp_path / "set").exists()
