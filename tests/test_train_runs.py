"""Runs that must not go wrong quietly: what a folder refuses, several processes that stop and shrink together, NaN without end, kill -9 of pix2pix."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pandas as pd
import pytest

pytest.importorskip("fastai")
import torch
from test_train import ROOT, finish, free_port, plain_learner, same_run
from torch import nn

from microgen.core import InputError
from microgen.data.build import build
from microgen.kinds.walls.recipe import Recipe
from microgen.train.checkpoint import read_checkpoint
from microgen.train.core import Diverged, read_weights
from microgen.train.run import train

QUIET = dict(preview_every=None, shown=False)


def go(learn, epochs, out, config=None, **kw):
    with learn.no_logging():
        return train(learn, epochs, out, config, **QUIET | kw)


def files(folder):
    "Every file of a folder with its bytes."
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in Path(folder).rglob("*")
        if p.is_file()
    }


def refused(folder, call):
    "The sentence of a refusal that changed no byte and warned of nothing."
    before = files(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with pytest.raises(InputError) as said:
            call()
    assert files(folder) == before
    return str(said.value)


OTHERS = {
    "a setting": (dict(), dict(config={"arch": "attention"}), "arch was film and is attention"),
    "a setting left out": (dict(), dict(config={}), "arch was film and is None"),
    "an option": (dict(), dict(ema=100), "ema was None and is 100"),
    "a seed": (dict(), dict(seed=1), "seed was 0 and is 1"),
    "a model": (
        dict(width=9),
        dict(),
        "holds another model: g.0.weight is (8, 3) there and (9, 3) here",
    ),
    "batches": (dict(bs=16), dict(), "has 4 batches per epoch and there are 2 now"),
    "data of the same size": (dict(data=1), dict(), "was trained on other data"),
}


@pytest.mark.parametrize("epochs", [1, 2], ids=["finished", "to go on"])
@pytest.mark.parametrize("what", OTHERS)
def test_another_run_is_refused_before_anything_is_written(tmp_path, what, epochs):
    made, options, sentence = OTHERS[what]
    out, first = tmp_path / "run", {"config": {"arch": "film", "data": "a"}}
    go(plain_learner(tmp_path), 1, out, **first)
    said = refused(out, lambda: go(plain_learner(tmp_path, **made), epochs, out, **first | options))
    assert sentence in said and "init=" in said, said
    moved = {
        "config": {"arch": "film", "data": "b"}
    }  # the same data in another place, and limits that may change
    assert not go(plain_learner(tmp_path), 2, out, max_hours=1, **moved).stopped


def test_a_first_line_that_is_refused_leaves_nothing(tmp_path):
    out = tmp_path / "run"
    for wrong in (dict(best_by="fid"), dict(freeze=("g.up",)), dict(init=tmp_path / "none")):
        with pytest.raises((InputError, OSError)):
            go(plain_learner(tmp_path), 1, out, **wrong)
        assert not files(out), wrong
    learn = plain_learner(tmp_path, weights={"l9": 1.0})
    with pytest.raises(InputError, match="l9, which no loss gives"):
        go(learn, 1, out)
    assert not files(out)
    go(plain_learner(tmp_path), 1, out, best_by="valid_loss")


def test_without_its_checkpoints_a_result_is_not_begun_anew(tmp_path):
    out = tmp_path / "run"
    go(plain_learner(tmp_path), 1, out)
    shutil.rmtree(out / "checkpoints")
    assert "are gone" in refused(out, lambda: go(plain_learner(tmp_path), 2, out))
    assert not go(plain_learner(tmp_path), 1, out).stopped


def test_ended_without_its_result(tmp_path):
    "Killed after the last step, before the result was written."
    out = tmp_path / "run"
    go(plain_learner(tmp_path), 2, out)
    result = (out / "result.json").read_text()
    (out / "result.json").unlink()
    go(plain_learner(tmp_path), 2, out)
    assert (out / "result.json").read_text() == result


# --- previews and NaN


@pytest.mark.parametrize(
    "every, epochs, names", [(500, 1, [1, 4]), (3, 2, [1, 3, 6, 8]), (4, 1, [1, 4])]
)
def test_the_last_step_is_shown(tmp_path, every, epochs, names):
    def draw(m, xb, yb):
        return (m(*xb).view(2, 4).clamp(0, 1) * 255).byte().numpy()

    go(plain_learner(tmp_path), epochs, tmp_path / "r", preview_every=every, preview=draw)
    assert [int(p.stem) for p in sorted((tmp_path / "r/previews").iterdir())] == names


def test_the_last_step_of_an_early_end_is_shown_and_that_of_a_pause_is_not(tmp_path):
    def draw(m, xb, yb):
        return (m(*xb).view(2, 4).clamp(0, 1) * 255).byte().numpy()

    how = dict(preview_every=500, preview=draw)
    go(
        plain_learner(tmp_path, lr=1e-12),
        9,
        tmp_path / "early",
        best_by="valid_loss",
        patience=2,
        **how,
    )
    assert [int(p.stem) for p in sorted((tmp_path / "early/previews").iterdir())] == [1, 12]
    assert go(plain_learner(tmp_path), 9, tmp_path / "pause", max_hours=0, **how).stopped
    assert [int(p.stem) for p in sorted((tmp_path / "pause/previews").iterdir())] == [1]


def test_one_bad_item_does_not_roll_back_for_ever(tmp_path):
    "Once per epoch of 120 steps: more than a hundred good steps lie between."
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader
    from fastai.learner import Learner

    x = torch.randn(120, 3, generator=torch.Generator().manual_seed(0))
    x[7] = float("nan")
    items = [(a, a.sum(0, keepdim=True)) for a in x]
    learn = Learner(
        DataLoaders(DataLoader(items, bs=1), DataLoader(items[:4], bs=4)),
        nn.Linear(3, 1),
        loss_func=nn.functional.mse_loss,
        lr=1e-3,
    )
    with warnings.catch_warnings(), pytest.raises(Diverged) as said:
        warnings.simplefilter("ignore")
        go(learn, 40, tmp_path / "r", checkpoint_every=60)
    assert "for the 11th time (steps 8, 128, 248" in str(said.value) and "look for an image" in str(
        said.value
    ), said.value
    assert pd.read_csv(tmp_path / "r/history.csv").epoch.max() == 10


# --- several processes

WORKER = """
import sys, datetime, torch, torch.distributed as dist
sys.path[:0] = [{tests!r}, {root!r}]
torch.set_num_threads(1)
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="tcp://127.0.0.1:{port}", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60))
from test_train import plain_learner
from microgen.train.run import train
def go(name, learn, epochs, **kw):
    with learn.no_logging(): return train(learn, epochs, {folder!r} + "/" + name, preview_every=None, **kw)
{body}
dist.destroy_process_group()
"""


def two_processes(folder, body):
    "Run the body in two processes; they must both end well."
    text = WORKER.format(
        tests=str(ROOT / "tests"), root=str(ROOT), port=free_port(), folder=str(folder), body=body
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
        finish(p, 280)


def test_processes_stop_together_when_the_time_of_one_is_over(tmp_path):
    two_processes(
        tmp_path,
        """
for slow in (0, 1):
    learn = go(f"of {slow}", plain_learner(".", bs=7), 2, max_hours=0 if rank == slow else None)
    assert learn.stopped and learn.train_iter == 1, (learn.stopped, learn.train_iter)
assert not go("of 1", plain_learner(".", bs=7), 2).stopped
""",
    )
    first, second = tmp_path / "of 0", tmp_path / "of 1"
    assert read_checkpoint(first / "checkpoints")[0] == 1
    assert (first / "model/model.safetensors").exists() and not (first / "result.json").exists()
    go(plain_learner(tmp_path, bs=7), 2, tmp_path / "one")
    near(second, tmp_path / "one")


def test_processes_stop_together_for_want_of_patience(tmp_path):
    two_processes(
        tmp_path,
        """
learn = go("run", plain_learner(".", lr=1e-12), 9, best_by="valid_loss", patience=2)
assert learn.epoch == 2 and not learn.stopped
""",
    )
    assert json.loads((tmp_path / "run/result.json").read_text())["best"]["epoch"] == 0


def test_processes_halve_together_when_one_has_no_memory(tmp_path):
    two_processes(
        tmp_path,
        """
def short(f):
    def g(m, b, *fakes):
        if rank and len(b[0]) > 2: raise torch.OutOfMemoryError("CUDA out of memory.")
        return f(m, b, *fakes)
    return g
for name in ("generate", "d_loss", "g_loss"):
    learn = plain_learner(".", bs=7)
    trainer = learn.adversarial_trainer
    setattr(trainer, name, short(getattr(trainer, name)))
    go(name, learn, 2)
    assert trainer.accumulate == 2, (name, trainer.accumulate)
""",
    )
    go(plain_learner(tmp_path, bs=7), 2, tmp_path / "one")
    for name in ("generate", "d_loss", "g_loss"):
        near(tmp_path / name, tmp_path / "one")


def near(a, b):
    "The same weights up to the order of sums: each phase was done once on each batch."
    a, b = (read_weights(p / "model/model.safetensors") for p in (a, b))
    assert all(torch.allclose(a[k], b[k], atol=2e-5) for k in a)


# --- pix2pix: real networks, simulated and real images in one batch

PIX = """
import time, torch
torch.set_num_threads(1)
from fastai.callback.core import Callback
from microgen.data.load import mixed_dls
from microgen.gan.pix2pix import pix2pix_learner
from microgen.train.run import train

class Slow(Callback):
    def after_step(self): time.sleep({pause})

dls = mixed_dls({data!r}, {real!r}, bs=4, device="cpu")
learn = pix2pix_learner(dls, "film", "small", base=8, depth=2, disc_base=8, r1=.1, cbs=[Slow()])
with learn.no_logging():
    train(learn, 4, {out!r}, ema=20, fade=.5, best_by="ssim", largest=True, preview_every=7, checkpoint_every=3, shown=False)
"""


@pytest.fixture(scope="module")
def walls(tmp_path_factory):
    made = tmp_path_factory.mktemp("data")

    def make(name, **kw):
        return build(
            Recipe(**{"size": 32, "pixel_size": 0.03, "preset": "good"} | kw),
            made / name,
            workers=1,
        )

    return make("sim", n=18), make("real", n=8, preset="poor", seed=5), make("other", n=18, seed=1)


def pix(walls, out, pause=0.0):
    return PIX.format(data=str(walls[0]), real=str(walls[1]), out=str(out), pause=pause)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="kill -9 is a word of POSIX")
def test_pix2pix_killed_and_resumed_is_bitwise_the_same(walls, tmp_path):
    out, checkpoints = tmp_path / "killed", tmp_path / "killed/checkpoints"
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    process = subprocess.Popen(
        [sys.executable, "-c", pix(walls, out, 0.05)],
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    while process.poll() is None and not list(checkpoints.glob("step_*")):
        time.sleep(0.005)
    time.sleep(random.Random(os.getpid()).uniform(0, 0.7))
    process.kill()
    _, said = process.communicate()
    assert process.returncode == -signal.SIGKILL and not (out / "result.json").exists(), (
        said.decode()[-2000:]
    )
    for folder in (out, tmp_path / "whole"):
        exec(pix(walls, folder), {})
    same_run(tmp_path / "whole", out)


def test_pix2pix_refuses_another_model_and_another_dataset(walls, tmp_path):
    from microgen.models.pix2pix import Pix2PixModel
    from microgen.models.train import train_model

    out = tmp_path / "run"

    def line(data=walls[0], **kw):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            model = Pix2PixModel(epochs=kw.pop("epochs", 2), bs=4, **kw)
            return train_model(model, data, out, progress=False)

    line(epochs=1)
    assert "arch was film and is attention" in refused(out, lambda: line(arch="attention"))
    assert "other data" in refused(out, lambda: line(walls[2]))
    with pytest.raises(UserWarning, match="had faded to zero after 1 epochs and rise again"):
        line()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = Pix2PixModel(epochs=2, bs=4)
        assert not train_model(model, walls[0], out, progress=False).stopped
