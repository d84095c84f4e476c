"""Training: exact resume through kill -9, several processes, schedules of fastai, averages, what stands still, bad input."""

import importlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("fastai")
import torch
from torch import nn

from microgen.train.adversarial import Every, Parts, adversarial_learner, gan_losses, r1_penalty
from microgen.train.checkpoint import read_checkpoint, write_checkpoint
from microgen.train.core import EMA, averaged_weights, random_state_kept, read_weights
from microgen.train.run import train

ROOT = Path(__file__).resolve().parent.parent
KILL_TRIALS = int(os.environ.get("MICROGEN_KILL_TRIALS", 3))

# A small adversarial run with all that makes resuming hard: BatchNorm, dropout, noise z, augmentation, lazy R1, an average.
SCRIPT = textwrap.dedent("""
    import sys, time
    import torch
    torch.set_num_threads(1)
    from torch import nn
    from fastai.callback.core import Callback
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader
    from microgen.train.adversarial import Every, Parts, adversarial_learner, gan_losses, r1_penalty
    from microgen.train.core import random_state_kept
    from microgen.train.run import train

    def learner(path="."):
        x = torch.randn(48, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        items = [(a, a.tanh()) for a in x]
        jitter = lambda b: (b[0] + .05 * torch.randn_like(b[0]), b[1])
        dls = DataLoaders(DataLoader(items, bs=8, shuffle=True, after_batch=jitter, num_workers=WORKERS), DataLoader(items[:16], bs=8))
        with random_state_kept(0):
            g = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(.3), nn.Conv2d(6, 1, 3, padding=1), nn.Tanh())
            d = nn.Sequential(nn.Conv2d(2, 6, 4, 2, 1), nn.LeakyReLU(.2), nn.Conv2d(6, 1, 4))
        dterm, gterm = gan_losses("hinge")
        pair = lambda b, y: torch.cat([b[0], y], 1)
        def generate(m, b): return m.g(b[0] + .1 * torch.randn_like(b[0]))
        def d_loss(m, b, f): return dterm(m.d(pair(b, b[1])), m.d(pair(b, f)))
        def g_loss(m, b, f): return {"adv": gterm(m.d(pair(b, f))), "l1": (f - b[1]).abs().mean()}
        def reg(m, b, f): return {"r1": r1_penalty(lambda y: m.d(pair(b, y)), b[1])}
        return adversarial_learner(dls, Parts(g, d), generate, d_loss, g_loss, {"l1": 10., "r1": .1}, d_regs=[Every(4, reg)], path=path)

    class Slow(Callback):
        order = 95
        def after_step(self): time.sleep(PAUSE)

    def go(out):
        learn = learner(out)
        with learn.no_logging():
            train(learn, 4, out, ema=50, fade=.5, best_by="valid_loss", preview_every=5, checkpoint_every=EVERY, cbs=[Slow()] if PAUSE else [])
        return learn
""")


def program(out, every=3, pause=0.0, workers=0):
    head = (
        SCRIPT.replace("EVERY", str(every))
        .replace("PAUSE", str(pause))
        .replace("WORKERS", str(workers))
    )
    return head + f"\nif __name__ == '__main__': go({str(out)!r})\n"


def start(out, **kw):
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    return subprocess.Popen(
        [sys.executable, "-c", program(out, **kw)],
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def finish(process, timeout=300):
    _, err = process.communicate(timeout=timeout)
    assert process.returncode == 0, err.decode()[-2000:]


def steps_done(out):
    try:
        return len((out / "history.csv").read_text().splitlines())
    except OSError:
        return 0


def same_run(a, b):
    "Last weights, moments, best weights, result and history: equal bit by bit."
    for file in ("checkpoints/best.safetensors", "model/model.safetensors"):
        x, y = read_weights(a / file), read_weights(b / file)
        assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x), file
    assert json.loads((a / "result.json").read_text()) == json.loads(
        (b / "result.json").read_text()
    )
    tables = [pd.read_csv(p / "history.csv").drop(columns="seconds") for p in (a, b)]
    pd.testing.assert_frame_equal(*tables, check_exact=True)
    pictures = [sorted(p.name for p in (o / "previews").iterdir()) for o in (a, b)]
    assert pictures[0] == pictures[1]
    assert all(
        (a / "previews" / n).read_bytes() == (b / "previews" / n).read_bytes() for n in pictures[0]
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "whole"
    finish(start(out))
    return out


def kill_and_resume(out, rng, every, kills=2):
    "Start, kill -9 at random moments, and start again until it ends; the number of kills that met a running training."
    done = 0
    for _ in range(kills):
        process = start(out, every=every, pause=0.02)
        steps_done(out)
        while process.poll() is None and not (out / "checkpoints").exists():
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.9))
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            done += 1
        process.communicate()
    finish(start(out, every=every))
    return done


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="kill -9 is a word of POSIX")
@pytest.mark.parametrize("trial", range(KILL_TRIALS))
def test_killed_and_resumed_is_bitwise_the_same(undisturbed, tmp_path, trial):
    rng = random.Random(trial)
    assert kill_and_resume(tmp_path / "killed", rng, every=rng.choice([1, 2, 5, 7])) > 0
    same_run(undisturbed, tmp_path / "killed")


def test_workers_of_the_loader_are_repeatable(tmp_path):
    for name in "ab":
        finish(start(tmp_path / name, workers=2))
    same_run(tmp_path / "a", tmp_path / "b")


@pytest.fixture
def made(tmp_path):
    space = {"__name__": "made"}
    module = tmp_path / "made_learner.py"
    module.write_text(program(tmp_path / "out"))
    spec = importlib.util.spec_from_file_location("made_learner", module)
    space = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(space)
    return space


def quietly(learn, n=1, **kw):
    with learn.no_logging(), random_state_kept():
        learn.fit(n, **kw)
    return learn


def test_ctrl_c_stops_cleanly_and_continues(undisturbed, tmp_path):
    out = tmp_path / "stopped"
    process = start(out, every=1000, pause=0.1)
    while not (out / "previews/00000005.png").exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    finish(process)
    step, _ = read_checkpoint(out / "checkpoints")
    assert step >= 5 and not (out / "result.json").exists()
    finish(start(out))
    same_run(undisturbed, out)


def test_a_second_process_is_refused(tmp_path):
    first = start(tmp_path / "run", pause=60)
    while not (tmp_path / "run/checkpoints").exists() and first.poll() is None:
        time.sleep(0.02)
    second = start(tmp_path / "run")
    _, err = second.communicate(timeout=120)
    first.kill()
    first.communicate()
    assert second.returncode and b"Another process is writing" in err


def test_random_numbers_of_the_user_are_not_touched(made, tmp_path):
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    want = torch.rand(1), np.random.rand(), random.random()
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    learn = made.learner(tmp_path)
    torch.manual_seed(5), np.random.seed(5), random.seed(5)  # making loaders draws a seed
    with learn.no_logging():
        train(learn, 1, tmp_path / "r", shown=False)
    assert (torch.rand(1), np.random.rand(), random.random()) == want


def test_watching_changes_nothing(made, tmp_path):
    weights = []
    for every in (None, 1):
        learn = made.learner(tmp_path)
        with learn.no_logging():
            train(
                learn,
                1,
                tmp_path / f"p{every}",
                preview_every=every,
                checkpoint_every=every,
                shown=False,
            )
        weights.append(learn.model.state_dict())
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


def test_more_epochs_go_on(made, tmp_path):
    for epochs in (1, 2):
        learn = made.learner(tmp_path)
        with learn.no_logging(), warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            train(learn, epochs, tmp_path / "r", preview_every=None)
    whole = made.learner(tmp_path)
    with whole.no_logging():
        train(whole, 2, tmp_path / "whole", preview_every=None)
    a, b = learn.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_schedules_of_fastai(made, tmp_path):
    import fastai.callback.schedule  # noqa: F401  (adds fit_one_cycle and lr_find to Learner)

    learn = made.learner(tmp_path)
    with learn.no_logging(), random_state_kept():
        learn.fit_one_cycle(2, 1e-3)
    assert len(learn.recorder.lrs) == 12 and max(learn.recorder.lrs) > 5 * min(learn.recorder.lrs)
    learn = made.learner(tmp_path)
    with learn.no_logging(), random_state_kept():
        found = learn.lr_find(num_it=8, show_plot=False)
    assert 0 < found.valley < 1


def test_predictions_come_from_the_average(made, tmp_path):
    learn = made.learner(tmp_path)
    learn.add_cb(EMA(images=1000))
    quietly(learn, 2)
    with learn.no_logging():
        pred, target = learn.get_preds(ds_idx=1)[:2]
    x = torch.stack([learn.dls.valid_ds[i][0] for i in range(16)])
    with torch.no_grad():
        raw = learn.model.eval()(x)
        with averaged_weights(learn):
            want = learn.model(x)
    assert torch.allclose(pred, want, atol=1e-6)
    assert not torch.allclose(pred, raw, atol=1e-4)


@pytest.mark.parametrize("autocast", [None, "bf16"])
def test_every_parameter_moves(made, tmp_path, autocast):
    learn = made.learner(tmp_path)
    learn.adversarial_trainer.autocast = autocast
    before = {k: v.clone() for k, v in learn.model.named_parameters()}
    quietly(learn)
    for k, v in learn.model.named_parameters():
        assert v.dtype == torch.float32, k
        if k != "d.2.bias":
            assert not torch.equal(v, before[k]), (
                k
            )  # hinge: inside both margins a common offset has no gradient


def test_shares_of_a_batch_are_the_batch(tmp_path):
    "Without BatchNorm and noise the step of 3 unequal shares is that of the whole batch."
    out = []
    for n in (1, 3):
        learn = plain_learner(tmp_path, accumulate=n)
        out.append(torch.cat([p.detach().flatten() for p in quietly(learn, 2).model.parameters()]))
    assert torch.allclose(*out, atol=2e-5)


def plain_learner(path, bs=8, width=8, data=0, **kw):
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader

    x = torch.randn(32, 3, generator=torch.Generator().manual_seed(data))
    items = [(a, a.sum(0, keepdim=True)) for a in x]
    with random_state_kept(0):
        model = Parts(
            nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 1)),
            nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)),
        )
    d, g = gan_losses("lsgan")

    def see(m, b, y):
        return m.d(torch.cat([b[0], y], 1))

    return adversarial_learner(
        DataLoaders(DataLoader(items, bs=bs), DataLoader(items, bs=bs)),
        model,
        lambda m, b: m.g(b[0]),
        lambda m, b, f: d(see(m, b, b[1]), see(m, b, f)),
        lambda m, b, f: {"adv": g(see(m, b, f)), "l2": (f - b[1]).square().mean()},
        d_regs=[Every(2, lambda m, b, f: {"r1": r1_penalty(lambda y: see(m, b, y), b[1])})],
        path=path,
        **{"lr": 1e-3} | kw,
    )


WORKER = """
import sys, torch, torch.distributed as dist
sys.path[:0] = [{tests!r}, {root!r}]
torch.set_num_threads(1)
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="tcp://127.0.0.1:{port}", rank=rank, world_size=2)
from test_train import plain_learner
from microgen.train.run import train
learn = plain_learner({tmp!r}, bs=7)
with torch.no_grad():
    if rank: [p.add_(1.) for p in learn.model.parameters()]     # the first process's weights must win
with learn.no_logging(): train(learn, 2, {out!r}, preview_every=None)
dist.destroy_process_group()
"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_two_processes_do_the_step_of_one(tmp_path):
    text = WORKER.format(
        tests=str(ROOT / "tests"),
        root=str(ROOT),
        port=free_port(),
        tmp=str(tmp_path),
        out=str(tmp_path / "two"),
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
        finish(p)
    learn = plain_learner(tmp_path, bs=7)
    with learn.no_logging():
        train(learn, 2, tmp_path / "one", preview_every=None)
    a, b = (read_weights(tmp_path / n / "model/model.safetensors") for n in ("one", "two"))
    assert all(torch.allclose(a[k], b[k], atol=2e-5) for k in a)


def test_damaged_newest_checkpoint(made, tmp_path):
    learn = made.learner(tmp_path)
    with learn.no_logging():
        train(learn, 1, tmp_path / "r", checkpoint_every=2, preview_every=None)
    found = sorted((tmp_path / "r/checkpoints").glob("step_*"))
    assert len(found) == 2
    (found[-1] / "state.json").write_text("{")
    (tmp_path / "r/result.json").unlink()
    with learn.no_logging(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        train(made.learner(tmp_path), 1, tmp_path / "r", preview_every=None)
    assert any("damaged" in str(w.message) for w in said) and (tmp_path / "r/result.json").exists()


def test_a_full_disk_loses_no_checkpoint(tmp_path, monkeypatch):
    write_checkpoint(tmp_path, 1, {"w": torch.ones(3)})
    monkeypatch.setattr(
        "microgen.train.checkpoint.save_file",
        lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")),
    )
    with pytest.raises(OSError):
        write_checkpoint(tmp_path, 2, {"w": torch.ones(3)})
    assert read_checkpoint(tmp_path)[0] == 1 and len(list(tmp_path.iterdir())) == 1


def test_nan_in_the_discriminator_alone(tmp_path):
    learn = plain_learner(tmp_path)
    good = learn.adversarial_trainer.d_loss
    count = iter(range(1000))

    def bad(m, b, f):
        return {k: v * (float("nan") if next(count) == 3 else 1) for k, v in good(m, b, f).items()}

    learn.adversarial_trainer.d_loss = bad
    with warnings.catch_warnings(record=True) as said, learn.no_logging():
        warnings.simplefilter("always")
        train(learn, 2, tmp_path / "r", preview_every=None, checkpoint_every=1)
    assert any("d_" in str(w.message) and "not finite" in str(w.message) for w in said)
    assert all(v.isfinite().all() for v in learn.model.state_dict().values())


def test_nothing_of_vision_is_imported():
    text = "import sys, microgen.train.run, microgen.train.adversarial, microgen.train.hub; print([m for m in ('torchvision', 'fastai.vision.all') if m in sys.modules])"
    out = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", text],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert out.stdout.strip() == "[]", out.stdout + out.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_resume_on_a_gpu(made, tmp_path):
    learn = made.learner(tmp_path)
    with learn.no_logging():
        train(learn, 1, tmp_path / "r", preview_every=None)
    learn = made.learner(tmp_path)
    with learn.no_logging():
        train(learn, 2, tmp_path / "r", preview_every=None)
    assert all(v.isfinite().all() for v in learn.model.state_dict().values())
