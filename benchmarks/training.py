"""What the training core costs over a bare PyTorch loop, and whether a killed run comes back bit by bit.

    python benchmarks/training.py --quick     # about two minutes: small nets, few repeats, 3 kills
    python benchmarks/training.py             # U-Net-like 64 px, 20 kills (about half an hour on two cores)
    python benchmarks/training.py --only overhead
    python benchmarks/training.py --only step      # what one step of pix2pix asks of a GPU, and cut batches; a minute

Overhead: the same nets, batch and losses, once in a plain loop with torch.optim.Adam, once through `train` with its NaN
guard, history, checkpoints, repeatable random numbers and time budget (and once more with the average of the weights).
Blocks of steps of the two alternate in one process, so that a change of the machine's load meets both; the ratio is the mean
over blocks of CPU seconds (wall seconds on a GPU) over those of the plain block beside it, with its 95 % interval. Memory: the largest resident size (allocated memory on a GPU), each in a
process of its own.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
warnings.filterwarnings("ignore")

import numpy as np
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback, CancelFitException
from fastai.data.core import DataLoaders
from results import write
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from microgen import gan
from microgen.core import mean_interval
from microgen.data.build import build
from microgen.data.load import mixed_dls, paired_dls
from microgen.gan.pix2pix import pix2pix_learner
from microgen.gan.router import router_learner
from microgen.kinds.walls.recipe import Recipe
from microgen.train.adversarial import Parts, adversarial_learner
from microgen.train.core import random_state_kept
from microgen.train.run import train

ROOT = Path(__file__).resolve().parent.parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def nets(width):
    "A small encoder-decoder and a PatchGAN, as in pix2pix."

    def down(a, b):
        return nn.Sequential(
            nn.Conv2d(a, b, 4, 2, 1), nn.InstanceNorm2d(b, affine=True), nn.LeakyReLU(0.2)
        )

    def up(a, b):
        return nn.Sequential(
            nn.ConvTranspose2d(a, b, 4, 2, 1), nn.InstanceNorm2d(b, affine=True), nn.ReLU()
        )

    w = width
    g = nn.Sequential(
        down(4, w),
        down(w, 2 * w),
        down(2 * w, 4 * w),
        down(4 * w, 4 * w),
        up(4 * w, 4 * w),
        up(4 * w, 2 * w),
        up(2 * w, w),
        nn.ConvTranspose2d(w, 1, 4, 2, 1),
        nn.Tanh(),
    )
    d = nn.Sequential(
        down(5, w),
        down(w, 2 * w),
        nn.Conv2d(2 * w, 4 * w, 4, 1, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(4 * w, 1, 4, 1, 1),
    )
    with torch.no_grad():
        for p in [*g.parameters(), *d.parameters()]:
            p.copy_(
                0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
                if p.ndim > 1
                else p
            )
    return g.to(DEVICE), d.to(DEVICE)


class Fixed:
    "A loader that gives the same batch again: reading data is not what is compared."

    def __init__(self, batch, n):
        self.batch, self.n, self.dataset, self.bs = (
            batch,
            n,
            range(n * len(batch[0])),
            len(batch[0]),
        )

    def __len__(self):
        return self.n

    def __iter__(self):
        return iter([self.batch] * self.n)

    def to(self, device):
        return self


def batch_of(size, bs):
    make = torch.Generator().manual_seed(0)
    maps = torch.randn(bs, 4, size, size, generator=make)
    return maps.to(DEVICE), maps.mean(1, keepdim=True).tanh().to(DEVICE)


def see(d, batch, y):
    return d(torch.cat([batch[0], y], 1))


def generate(m, b):
    return m.g(b[0])


def d_loss(m, b, f):
    return {
        "real": F.softplus(-see(m.d, b, b[1])).mean(),
        "fake": F.softplus(see(m.d, b, f)).mean(),
    }


def g_loss(m, b, f):
    return {"adv": F.softplus(-see(m.d, b, f)).mean(), "l1": F.l1_loss(f, b[1])}


def bare(width, batch):
    "The plain loop: a function that does one step."
    g, d = nets(width)
    m = Parts(g, d)
    og, od = (torch.optim.Adam(p.parameters(), 2e-4, (0.5, 0.999)) for p in (g, d))

    def step():
        fake = g(batch[0])
        od.zero_grad()
        sum(d_loss(m, batch, fake.detach()).values()).backward()
        od.step()
        og.zero_grad()
        d.requires_grad_(False)
        terms = g_loss(m, batch, fake)
        (terms["adv"] + 100 * terms["l1"]).backward()
        d.requires_grad_(True)
        og.step()

    return step


def clock():
    return time.perf_counter() if DEVICE == "cuda" else time.process_time()


class Alternate(Callback):
    "After every block of steps, run a block of the plain loop; time both."

    order = 200

    def __init__(self, step, block):
        self.bare_step, self.block, self.times, self.begun = (
            step,
            block,
            {"microgen": [], "bare": []},
            None,
        )

    def after_batch(self):
        if not self.learn.training or self.learn.train_iter % self.block:
            return
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        if self.begun is not None:
            self.times["microgen"].append((clock() - self.begun) / self.block)
        begun = clock()
        for _ in range(self.block if self.bare_step else 0):
            self.bare_step()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        if self.bare_step:
            self.times["bare"].append((clock() - begun) / self.block)
        self.begun = clock()


def through_microgen(width, size, bs, steps, block, step=None, ema=None, minutes=10.0):
    "`train` over a fixed batch; seconds per step in blocks."
    batch = batch_of(size, bs)
    dls = DataLoaders(Fixed(batch, steps), Fixed(batch, 1))
    watch = Alternate(step, block)
    learn = adversarial_learner(
        dls,
        Parts(*nets(width)),
        generate,
        d_loss,
        g_loss,
        {"l1": 100.0},
        path=tempfile.gettempdir(),
    )
    with tempfile.TemporaryDirectory() as d, learn.no_logging(), random_state_kept():
        train(
            learn,
            1,
            Path(d) / "run",
            ema=ema,
            preview_every=None,
            checkpoint_minutes=minutes,
            cbs=[watch],
        )
    return watch.times


def overhead(width, size, bs, repeats, block):
    rows = []
    for label, ema in ((PARTS[0], None), (PARTS[1], 10_000)):
        times = through_microgen(
            width, size, bs, (repeats + 1) * block, block, bare(width, batch_of(size, bs)), ema
        )
        mine, plain = np.array(times["microgen"]), np.array(times["bare"][:-1])
        ratios = mine / plain  # of blocks that follow each other
        low, high = mean_interval(ratios)
        rows.append(
            (label, np.median(plain) * 1e3, np.median(mine) * 1e3, ratios.mean(), low, high)
        )
        print(
            f"{label:30s} bare {rows[-1][1]:8.2f} ms  microgen {rows[-1][2]:8.2f} ms  ratio {rows[-1][3]:.4f} ({low:.4f} to {high:.4f})  "
            f"{bs / np.median(mine):.1f} images/s",
            flush=True,
        )
    return rows


def peak(kind, width, size, bs, steps):
    "Largest memory of one process that trains `steps` steps, MB above the process with nets and batch only."
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    if kind == "bare":
        step = bare(width, batch_of(size, bs))
        for _ in range(steps):
            step()
    else:
        through_microgen(width, size, bs, steps, steps, ema=10_000 if kind == "ema" else None)
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        1e3 if sys.platform != "darwin" else 1e6
    )


def memory(width, size, bs, steps):
    found = {}
    for kind in ("bare", "microgen", "ema"):
        command = [
            sys.executable,
            __file__,
            "--peak",
            kind,
            "--width",
            str(width),
            "--size",
            str(size),
            "--bs",
            str(bs),
            "--steps",
            str(steps),
        ]
        found[kind] = float(
            json.loads(
                subprocess.run(
                    command, capture_output=True, text=True, check=True
                ).stdout.splitlines()[-1]
            )
        )
    print(
        f"peak memory: bare {found['bare']:.0f} MB, microgen {found['microgen']:.0f} MB (ratio {found['microgen'] / found['bare']:.3f}), "
        f"with EMA {found['ema']:.0f} MB (ratio {found['ema'] / found['bare']:.3f})",
        flush=True,
    )
    return found


def kills(trials):
    "Runs killed twice with SIGKILL at random moments and resumed, compared bit by bit with one that ran through."
    sys.path.insert(0, str(ROOT / "tests"))
    import test_train as t

    with tempfile.TemporaryDirectory() as d:
        whole = Path(d) / "whole"
        t.finish(t.start(whole))
        same, met = 0, 0
        for trial in range(trials):
            rng, out = random.Random(1000 + trial), Path(d) / f"trial{trial}"
            met += t.kill_and_resume(out, rng, every=rng.choice([1, 2, 5, 7]))
            try:
                t.same_run(whole, out)
            except AssertionError as e:
                print(f"trial {trial} differs: {e}")
            else:
                same += 1
    print(
        f"resume after kill -9: {same} of {trials} trials bitwise equal ({met} kills met a running process)",
        flush=True,
    )
    return same, met


# what a GPU would wait for: a number for Python, a tensor from Python, indices of unknown number
WAITS = ("_local_scalar_dense", "nonzero", "lift_fresh", "is_nonzero")


class Operations(TorchDispatchMode):
    "Count operations of torch, and those for which a GPU would wait."

    def __init__(self):
        super().__init__()
        self.total = self.waits = self.views = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        self.total += 1
        self.views += function.is_view or name == "aten.detach.default"
        indices = args[1] if name.startswith(("aten.index.Tensor", "aten.index_put")) else None
        by_mask = any(getattr(index, "dtype", None) == torch.bool for index in indices or [])
        self.waits += by_mask or any(word in name for word in WAITS)
        return function(*args, **(kwargs or {}))


class ThirdStep(Callback):
    "Count the operations of the third step."

    order = 5

    def before_batch(self):
        if self.training and self.learn.train_iter == 2:
            self.counted = Operations()
            self.counted.__enter__()

    def after_batch(self):
        if self.training and self.learn.train_iter == 3:
            self.counted.__exit__(None, None, None)


class FirstGradients(Callback):
    "Keep the gradients of both networks in the first step, and stop."

    order = 80

    def __init__(self):
        self.kept = []

    def before_step(self):
        self.kept.append(torch.cat([p.grad.flatten() for p in self.learn.stepping]))

    def after_step(self):
        raise CancelFitException


def first_gradients(dls, accumulate):
    "Gradients and terms of pix2pix without random numbers and without what a forward pass changes."
    learn = pix2pix_learner(
        dls, "film", "small", base=8, depth=2, disc_base=8, norm="none", spectral_norm=False
    )
    learn.adversarial_trainer.accumulate = accumulate
    learn.model.g.style.forward = lambda image: torch.zeros(len(image), 4)
    keep = FirstGradients()
    dls.train.set_epoch(0)
    with learn.no_bar(), learn.no_logging(), random_state_kept(0):
        learn.fit(1, cbs=keep)
    return keep.kept, {name: float(value) for name, value in learn.terms.items()}


STEPS = (
    "pix2pix, film",
    "pix2pix, film, a quarter real",
    "router",
)  # whose operations are counted
CUT = "paired", "a quarter real"  # batches that are cut into shares


def step():
    "Operations, those that are not views, and waits of a third step; how far the gradient of four shares is off."
    counts, differences = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        recipe = Recipe(n=40, size=32, pixel_size=0.05, preset="good")
        walls = build(recipe, Path(folder) / "walls", workers=1, progress=False)
        paired = paired_dls(walls, bs=8, device="cpu")
        mixed = mixed_dls(walls, walls, ratio=0.25, bs=8, size=32, device="cpu")
        learners = (
            pix2pix_learner(paired, "film", "small"),
            pix2pix_learner(mixed, "film", "small"),
            router_learner(paired, config="small"),
        )
        for case, learn in zip(STEPS, learners):
            count = ThirdStep()
            out = Path(folder) / case
            with learn.no_bar(), learn.no_logging():
                train(learn, 1, out, ema=50, preview_every=None, shown=False, cbs=[count])
            counted = count.counted
            counts[case] = counted.total, counted.total - counted.views, counted.waits
            print(f"{case:32s} operations, without views, waits: {counts[case]}", flush=True)
        gan.loss.normal = lambda shape, like, rng=None: torch.zeros(shape).to(like)
        for case, dls in zip(CUT, (paired, mixed)):
            (whole, _), (cut, _) = first_gradients(dls, 1), first_gradients(dls, 4)
            worst = max(float((a - b).norm() / a.norm()) for a, b in zip(whole, cut))
            differences[case] = float(f"{worst:.2g}")
            print(f"{case:32s} four shares differ by {worst:.1e}", flush=True)
    return counts, differences


def saved_step(counts, differences):
    "One step as rows of the results."
    rows = []
    for case, (operations, without_views, waits) in counts.items():
        about = {"case": case, "unit": "1"}
        rows.append(about | {"what": "waits per step", "value": waits, "aim": "≤ 2"})
        rows.append(about | {"what": "operations per step", "value": operations, "aim": "≤ 800"})
        rows.append(about | {"what": "operations per step, without views", "value": without_views})
    note = "relative difference to that of the whole batch, the worse network"
    for case, worst in differences.items():
        about = {"what": "gradient of four shares", "case": case, "value": worst, "unit": "1"}
        rows.append(about | {"aim": "≤ 1e-5", "note": note})
    return rows


PARTS = "guard, history, checkpoints", "the same with EMA"  # of the training core
AIM = "≤ 1.03"  # of time and memory over those of the plain loop


def saved_overhead(rows, setting, repeats):
    "Time over that of the plain loop as rows of the results."
    return [
        {
            "what": "time over a bare loop",
            "case": label,
            "value": ratio,
            "low": low,
            "high": high,
            "unit": "1",
            "n": repeats,
            "aim": AIM,
            "note": setting,
        }
        for label, _, _, ratio, low, high in rows
    ]


def saved_memory(found, setting):
    "Memory over that of the plain loop as rows of the results."
    ratio = {"what": "memory over a bare loop", "unit": "1", "aim": AIM, "note": setting}
    return [
        ratio | {"case": PARTS[0], "value": found["microgen"] / found["bare"]},
        ratio | {"case": PARTS[1], "value": found["ema"] / found["bare"]},
        {
            "what": "memory",
            "case": "bare loop",
            "value": round(found["bare"]),
            "unit": "MB",
            "note": f"largest resident size; {setting}",
        },
    ]


def saved_kills(same, met, trials):
    "Killed and resumed runs as rows of the results."
    killed = {"case": "killed twice and resumed"}
    return [
        killed
        | {
            "what": "trials that end bitwise equal",
            "value": same,
            "unit": "trials",
            "n": trials,
            "aim": str(trials),
        },
        killed
        | {
            "what": "kills that met a running process",
            "value": met,
            "unit": "kills",
            "n": 2 * trials,
        },
    ]


if __name__ == "__main__":
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--quick", action="store_true", help="small nets, few repeats, 3 kills")
    p.add_argument("--only", choices=("overhead", "memory", "kills", "step"))
    p.add_argument("--trials", type=int, help="kills")
    p.add_argument("--save", action="store_true", help="put the results into benchmarks/results")
    p.add_argument("--width", type=int)
    p.add_argument("--size", type=int, default=64)
    p.add_argument("--bs", type=int)
    p.add_argument("--steps", type=int, default=8)
    p.add_argument("--peak", choices=("bare", "microgen", "ema"), help=argparse.SUPPRESS)
    o = p.parse_args()
    width, bs = o.width or (16 if o.quick else 64), o.bs or (8 if o.quick else 16)
    torch.set_num_threads(1)
    if o.peak:
        print(json.dumps(peak(o.peak, width, o.size, bs, o.steps)))
    else:
        print(
            f"{DEVICE}, torch {torch.__version__}, {o.size} px, batch {bs}, width {width}, one thread"
        )
        setting = f"{o.size} px, width {width}, batch {bs}"
        trials = o.trials or (3 if o.quick else 20)
        same, rows = trials, []
        if o.only in (None, "overhead"):
            repeats = 10 if o.quick else 30
            times = overhead(width, o.size, bs, repeats, 10 if o.quick else 4)
            rows += saved_overhead(times, setting, repeats)
        if o.only in (None, "memory"):
            rows += saved_memory(memory(width, o.size, bs, o.steps), setting)
        if o.only in (None, "step"):
            rows += saved_step(*step())
        if o.only in (None, "kills"):
            same, met = kills(trials)
            rows += saved_kills(same, met, trials)
        if o.save:
            write("training", rows)
        sys.exit(same < trials)
