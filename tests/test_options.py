"""What a training may be asked for beside its model: no adversary, a compiled generator, channels last; and what a loss remembers."""

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("fastai")
import torch
from fastai.callback.core import Callback
from test_models import Denoiser
from test_step import TINY, walls  # noqa: F401  a fixture
from torch import nn

from microgen.core import InputError, MicrogenError
from microgen.data.load import paired_dls
from microgen.gan.pix2pix import Pix2Pix, pix2pix_learner
from microgen.gan.router import RouterPix2Pix
from microgen.models.model import MODELS
from microgen.models.pix2pix import Pix2PixModel, RouterModel
from microgen.models.run import load_run
from microgen.models.train import train_model
from microgen.train.adversarial import Parts, adversarial_learner, gan_losses
from microgen.train.core import random_state_kept, read_weights
from microgen.train.run import train

torch.set_num_threads(1)


def stopped_after(learn, steps):
    "The learner, whose time is over after so many steps."

    class Stop(Callback):
        order = 69

        def after_batch(self):
            if self.learn.training and self.learn.train_iter == steps:
                self.learn.time_budget.asked = "the test"

    learn.add_cb(Stop())
    return learn


def same_weights(one, other):
    assert list(one) == list(other)
    assert all(torch.equal(one[name], other[name]) for name in one)


# --- no adversary


def refuse(*args):
    raise AssertionError("the discriminator was asked")


def without_adversary(walls):  # noqa: F811
    learn = pix2pix_learner(paired_dls(walls, bs=8, device="cpu"), weights={"adv": 0}, **TINY)
    learn.model.d.forward = refuse
    return learn


def test_without_an_adversary_nobody_asks_the_discriminator(walls, tmp_path):  # noqa: F811
    "Neither its terms nor its steps are there, and a run that was stopped ends with the same bits."
    start = {name: p.clone() for name, p in without_adversary(walls).model.state_dict().items()}
    how = {"ema": 50, "preview_every": None, "shown": False}
    ended = {}
    for name, stops in {"whole": [None], "halves": [5, None]}.items():
        for at in stops:
            learn = without_adversary(walls)
            learn = stopped_after(learn, at) if at else learn
            with learn.no_bar(), learn.no_logging():
                train(learn, 2, tmp_path / name, **how)
        ended[name] = learn.model.state_dict()
        assert not learn.opt.opts["d"].state
    same_weights(ended["whole"], ended["halves"])
    moved = {name for name in start if not torch.equal(start[name], ended["whole"][name])}
    assert moved and all(name.startswith("g.") for name in moved)
    tables = [pd.read_csv(tmp_path / name / "history.csv") for name in ended]
    pd.testing.assert_frame_equal(*(t.drop(columns="seconds") for t in tables), check_exact=True)
    terms = {name for name in tables[0] if name.startswith(("d_", "g_"))}
    assert "g_l1" in terms and not terms & {"d_real", "d_fake", "g_adv"}


def test_a_penalty_of_a_discriminator_that_stands_still_is_refused(walls):  # noqa: F811
    dls = paired_dls(walls, bs=8, device="cpu")
    with pytest.raises(InputError, match="r1 teaches the discriminator, which stands still"):
        pix2pix_learner(dls, weights={"adv": 0}, r1=1.0, **TINY)


# --- one program, channels last

SMALL = {"bs": 8, "judged": 2, "preview_every": 1000, "augment": ("none",)}
ASKED = {
    "pix2pix": Pix2PixModel(config="small", **SMALL),
    "attention": Pix2PixModel(config="small", arch="attention", **SMALL),
    "router": RouterModel(config="small", explore=0.2, **SMALL),
    "plain": Denoiser(**SMALL),
}


@pytest.fixture
def quickly_compiled(monkeypatch):
    "torch.compile without a compiler of C++: the graph is that of a GPU, its operations are torch's own."
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", eagerly)
    monkeypatch.setitem(MODELS, "denoiser", Denoiser)


COMPILE, compiled = torch.compile, []


def eagerly(method, backend):
    compiled.append(method)
    return COMPILE(method, backend="aot_eager")


@pytest.mark.parametrize("name", ASKED)
def test_compiled_and_channels_last(name, walls, tmp_path, quickly_compiled):  # noqa: F811
    "Close to a training without them, stopped and resumed bit by bit, saved under the same names, loaded, sampled."
    compiled.clear()
    model = replace(ASKED[name], epochs=1)
    usual = train_model(model, walls, tmp_path / "usual", progress=False).model
    assert not compiled
    model = replace(model, compile=True, channels_last=True)
    whole = train_model(model, walls, tmp_path / "whole", progress=False)
    assert len(compiled) == (2 if name == "router" else 1)
    halted = replace(model, max_hours=1e-9)
    assert train_model(halted, walls, tmp_path / "halves", progress=False).stopped
    halves = train_model(model, walls, tmp_path / "halves", progress=False).model
    same_weights(whole.model.state_dict(), halves.state_dict())

    written = read_weights(tmp_path / "whole/model/model.safetensors")
    assert list(written) == list(read_weights(tmp_path / "usual/model/model.safetensors"))
    run = load_run(tmp_path / "whole")
    same_weights(run.network.state_dict(), whole.model.state_dict())
    assert run.model.compile and run.model.channels_last
    for weights, others in zip(usual.parameters(), whole.model.parameters()):
        assert (weights - others).norm() < 0.05 * weights.norm() + 1e-3
    convolutions = [m for m in whole.model.modules() if isinstance(m, nn.Conv2d)]
    assert all(m.weight.is_contiguous(memory_format=torch.channels_last) for m in convolutions)


def test_other_options_than_before_are_refused_and_older_runs_go_on(
    walls,  # noqa: F811
    tmp_path,
    quickly_compiled,
):
    "A run of a version that knew no compile goes on without it."
    out = tmp_path / "run"
    model = replace(ASKED["plain"], epochs=1, judged=0)
    train_model(model, walls, out, progress=False)
    with pytest.raises(InputError, match="compile was False and is True"):
        train_model(replace(model, epochs=2, compile=True), walls, out, progress=False)
    about = json.loads((out / "config.json").read_text())
    for name in ("compile", "channels_last"):
        del about["settings"][name]
    (out / "config.json").write_text(json.dumps(about))
    assert not train_model(replace(model, epochs=2), walls, out, progress=False).stopped


def test_without_a_compiler_there_is_one_sentence(walls, tmp_path, monkeypatch):  # noqa: F811
    def none(graph, example):
        raise RuntimeError("no C++ compiler")

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda method, backend: COMPILE(method, backend=none))
    model = replace(ASKED["pix2pix"], epochs=1, compile=True)
    with pytest.raises(MicrogenError, match="could not compile the model .*leave compile out"):
        train_model(model, walls, tmp_path / "run", progress=False)


@pytest.mark.parametrize("arch", ["plain", "film", "attention", "router"])
def test_a_generator_is_one_graph(arch):
    "Nothing of it has to come back to Python."
    settings = {"in_ch": 4, "base": 8, "depth": 2, "n_classes": 2, "n_props": 1, "disc_base": 8}
    if arch == "router":
        model = RouterPix2Pix(arch=("film", "attention"), **settings)
    else:
        model = Pix2Pix(arch=arch, **settings)
    told = (torch.tensor([0, 1, 1]), torch.randn(3, 4), torch.randn(3, 1, 32, 32))
    if arch == "plain":
        told = (None, None, told[-1])
    methods = model.to_compile()
    assert len(methods) == (2 if arch == "router" else 1)
    for module, name in methods:
        torch._dynamo.reset()
        said = torch._dynamo.explain(getattr(module, name))(torch.randn(3, 4, 32, 32), *told)
        assert (said.graph_count, said.graph_break_count) == (1, 0), said.break_reasons


# --- memory that is short in one of two processes

SHORT = """
import sys, warnings, torch, torch.distributed as dist
torch.set_num_threads(1)
rank, at = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://{group}", rank=rank, world_size=2)
from microgen.data.load import paired_dls
from microgen.gan.pix2pix import pix2pix_learner
dls = paired_dls({data!r}, bs=8, device="cpu", augment=())
learn = pix2pix_learner(dls, "film", config="small", base=8, depth=2, disc_base=8)
trainer, failed = learn.adversarial_trainer, []
def once(name):
    work = getattr(trainer, name)
    def short(model, batch, *more):
        if rank == 1 and not failed and (torch.is_grad_enabled() or at != "gradient"):
            failed.append(name)
            raise torch.OutOfMemoryError("as if")
        return work(model, batch, *more)
    setattr(trainer, name, short)
once({{"fakes": "generate", "sums": "g_loss", "gradient": "g_loss"}}[at])
if {last}: learn.model.to(memory_format=torch.channels_last)
with warnings.catch_warnings(), learn.no_bar(), learn.no_logging():
    warnings.simplefilter("ignore")
    learn.fit(1)
assert len(failed) == rank, failed
print(trainer.accumulate, sum(float(p.detach().double().abs().sum()) for p in learn.model.parameters()))
dist.destroy_process_group()
"""


@pytest.mark.parametrize("at", ["fakes", "sums", "gradient"])
def test_memory_that_is_short_in_one_process_cuts_the_batches_of_both(walls, tmp_path, at):  # noqa: F811
    "Wherever it happens, nobody waits for sums that never come."
    text = SHORT.format(group=tmp_path / "group", data=str(walls), last=at == "gradient")
    both = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", text, str(rank), at],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        said = [process.communicate(timeout=120) for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], said
    one, other = (out.split()[-2:] for out, _ in said)
    assert one[0] == "2" and one == other


# --- what looks at the logits


class Balance:
    "As adaptive augmentation does: a number that follows the signs of the logits."

    def __init__(self):
        self.p = 0.5
        self.calls = 0

    def __call__(self, real, fake):
        self.calls += 1
        self.p += 0.1 * (float(real.sign().mean()) - self.p)

    def state(self):
        return {"p": self.p, "calls": self.calls}

    def load_state(self, state):
        self.p, self.calls = state["p"], state["calls"]


def with_watch():
    "Points, with noise on the real ones that follows what the discriminator says."
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader

    rng = torch.Generator().manual_seed(0)
    items = [(torch.randn(4, generator=rng), torch.randn(4, generator=rng)) for _ in range(32)]
    with random_state_kept(0):
        model = Parts(nn.Linear(4, 4), nn.Linear(4, 1))
    watch = Balance()
    d_terms, g_term = gan_losses("vanilla", watch=watch)

    def real(m, b):
        return m.d(b[1] + watch.p * torch.randn_like(b[1]))

    learn = adversarial_learner(
        DataLoaders(DataLoader(items, bs=4, shuffle=True), DataLoader(items, bs=4)),
        model,
        lambda m, b: m.g(b[0]),
        lambda m, b, f: d_terms(real(m, b), m.d(f)),
        partial(lambda term, m, b, f: {"adv": term(m.d(f))}, g_term),
        lr=0.01,
    )
    return learn, watch


def test_what_a_watch_remembers_is_stored(tmp_path):
    "A run that was stopped ends with the same bits, also where the watch decides."
    ended = {}
    for name, stops in {"whole": [None], "halves": [5, 11, None]}.items():
        for at in stops:
            learn, watch = with_watch()
            assert learn.adversarial_trainer.with_memory() == [watch]
            learn = stopped_after(learn, at) if at else learn
            with learn.no_bar(), learn.no_logging():
                train(learn, 2, tmp_path / name, preview_every=None, shown=False)
        ended[name] = learn.model.state_dict(), watch.state()
    same_weights(ended["whole"][0], ended["halves"][0])
    assert ended["whole"][1] == ended["halves"][1] and ended["whole"][1]["calls"] == 16
    assert np.isfinite(ended["whole"][1]["p"])
