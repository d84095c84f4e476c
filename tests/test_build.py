"Datasets: killed and resumed, on any number of workers, on a cluster, on a full disk."
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from microgen.core import MicrogenError
from microgen.data.build import Recipe, build, paths

RECIPE = dict(n=12, size=48, pixel_size=0.03, seed=5)


def contents(folder):
    files = [p for p in Path(folder).rglob("*") if p.suffix in (".tif", ".parquet", ".csv")]
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "The dataset as an uninterrupted run on one worker writes it."
    return build(Recipe(**RECIPE), tmp_path_factory.mktemp("whole") / "walls", workers=1)


@pytest.mark.parametrize("workers", [2, 8])
def test_any_number_of_workers_writes_the_same_bytes(whole, tmp_path, workers):
    assert contents(build(Recipe(**RECIPE), tmp_path / "walls", workers=workers)) == contents(whole)


def test_a_dask_cluster_writes_the_same_bytes(whole, tmp_path):
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, host="127.0.0.1") as cluster:
        assert contents(build(Recipe(**RECIPE), tmp_path / "walls", scheduler=cluster.scheduler_address)) == contents(whole)


def start(out):
    code = f"from microgen.data.build import Recipe, build; build(Recipe(**{RECIPE!r}), {str(out)!r}, workers=1)"
    return subprocess.Popen([sys.executable, "-c", code], start_new_session=True)


def test_killed_at_any_moment_it_goes_on_and_makes_nothing_twice(whole, tmp_path):
    out, rng, kept = tmp_path / "walls", np.random.default_rng(0), {}
    for made in (1, 4, 8):
        run = start(out)
        while run.poll() is None and len(list(out.glob("images/*/*.tif"))) < made: time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.1))
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        for path, stamp in kept.items(): assert path.stat().st_mtime_ns == stamp, f"{path.name} was made twice"
        kept |= {path: path.stat().st_mtime_ns for path in out.glob("images/*/*.tif")}
    assert 0 < len(kept) < RECIPE["n"] or (out / "metadata.csv").exists()
    build(Recipe(**RECIPE), out, workers=1)
    for path, stamp in kept.items(): assert path.stat().st_mtime_ns == stamp, f"{path.name} was made twice"
    assert contents(out) == contents(whole)
    assert not list(out.rglob("*.tmp*")), "a temporary file was left behind"


def test_two_processes_do_not_write_one_folder(tmp_path):
    from filelock import FileLock

    (tmp_path / "walls").mkdir()
    with FileLock(tmp_path / "walls" / ".lock"):
        with pytest.raises(MicrogenError, match="Another process"): build(Recipe(**RECIPE), tmp_path / "walls", workers=1)


def test_a_full_disk_is_one_sentence_and_the_run_goes_on_later(whole, tmp_path, monkeypatch):
    import microgen.data.build as room

    calls, real = [], room.write_tiff

    def full(*args, **kwargs):
        calls.append(args)
        if len(calls) > 3: raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(room, "write_tiff", full)
    with pytest.raises(MicrogenError, match="No space left on device.*same command goes on"):
        build(Recipe(**RECIPE), tmp_path / "walls", workers=1)
    monkeypatch.undo()
    assert contents(build(Recipe(**RECIPE), tmp_path / "walls", workers=1)) == contents(whole)


def test_too_little_room_is_said_before_the_first_image(tmp_path, monkeypatch):
    import microgen.data.build as room

    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(MicrogenError, match="GB free"): build(Recipe(**RECIPE), tmp_path / "walls", workers=1)
    assert not list((tmp_path / "walls").glob("images/*/*"))


def test_metadata_holds_what_a_learner_needs(whole):
    table = pd.read_csv(whole / "metadata.csv")
    needed = ["file_name", "split", "label", "phi_left", "phi_right", "normal_deg", "width_nm", "thickness_nm", "dose",
              "preset", "pixel_size_nm", "seed", "sha256"]
    assert [name for name in needed if name not in table] == []
    for row in table.itertuples(): assert hashlib.sha256((whole / row.file_name).read_bytes()).hexdigest() == row.sha256
    assert table.label.value_counts().nunique() == 1
    assert {"command", "versions", "seed", "recipe"} <= set(json.loads((whole / "recipe.json").read_text()))


def test_tables_hold_every_column_of_the_image(whole):
    from microgen.io import read

    table = pd.read_parquet(paths(whole, 3)[2])
    assert list(table) == ["y_nm", "x_nm", "element", "site", "disp_pm", "domain"]
    image = read(paths(whole, 3)[0])
    y, x = (table.loc[table.element == "Y", name] / 0.03 for name in ("y_nm", "x_nm"))
    at = image.data[y.round().astype(int).clip(0, 47), x.round().astype(int).clip(0, 47)]
    assert at.mean() > 2 * image.data.mean(), "the rare-earth columns of the table are not bright in the image"


def test_the_folder_is_what_the_hub_calls_an_imagefolder(whole):
    table = pd.read_csv(whole / "metadata.csv")
    assert table.columns[0] == "file_name" and all((whole / name).is_file() for name in table.file_name)
    assert asdict(Recipe(**RECIPE))["n"] == len(table)
