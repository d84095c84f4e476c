"""One step of two networks: what fastai's verbs and callbacks do with it, what a GPU would wait for, and batches that are cut."""

import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("fastai")
import fastai.callback.hook  # noqa: F401  gives the learner summary
import fastai.callback.schedule  # noqa: F401  gives the learner its other verbs
import torch
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.progress import CSVLogger
from fastai.callback.tracker import (
    EarlyStoppingCallback,
    ReduceLROnPlateau,
    SaveModelCallback,
    TerminateOnNaNCallback,
)
from fastai.callback.training import (
    BnFreeze,
    GradientAccumulation,
    GradientClip,
    ShortEpochCallback,
)
from torch import nn

from microgen import gan
from microgen.core import InputError
from microgen.data.build import build
from microgen.data.files import list_images, split_images
from microgen.data.load import image_dls, mixed_dls, paired_dls
from microgen.gan.pix2pix import pix2pix_learner
from microgen.gan.router import router_learner
from microgen.io.files import read, write_tiff
from microgen.kinds.walls.recipe import Recipe
from microgen.models.pix2pix import Pix2PixModel
from microgen.models.train import train_model
from microgen.train.adversarial import Parts, adversarial_learner, gan_losses
from microgen.train.core import random_state_kept
from microgen.train.run import train

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import training  # what it counts and cuts is held here

TINY = {"config": "small", "base": 8, "depth": 2, "disc_base": 8}


@pytest.fixture(scope="module")
def walls(tmp_path_factory):
    "Forty small scans with their maps."
    folder = tmp_path_factory.mktemp("step") / "walls"
    build(Recipe(n=40, size=32, pixel_size=0.05, preset="good"), folder, workers=1, progress=False)
    return folder


class FromNothing(Parts):
    "A generator without a condition."

    def sample(self, n, cond=None, rng=0):
        return self.g(torch.randn(n, 8, 1, 1))


def from_nothing(walls):
    d_terms, g_term = gan_losses("vanilla")
    generator = nn.Sequential(nn.ConvTranspose2d(8, 1, 32), nn.Tanh())
    judge = nn.Sequential(nn.Conv2d(1, 4, 4, 4), nn.LeakyReLU(0.2), nn.Conv2d(4, 1, 8))
    return adversarial_learner(
        image_dls(walls, bs=8, size=32, device="cpu"),
        FromNothing(generator, judge),
        lambda model, batch: model.g(torch.randn(len(batch[0]), 8, 1, 1)),
        lambda model, batch, fakes: d_terms(model.d(batch[0]), model.d(fakes)),
        lambda model, batch, fakes: {"adv": g_term(model.d(fakes))},
    )


def pix2pix(arch):
    return lambda walls: pix2pix_learner(paired_dls(walls, bs=8, device="cpu"), arch, **TINY)


def router(walls):
    return router_learner(paired_dls(walls, bs=8, device="cpu"), **TINY)


LEARNERS = {
    "plain": pix2pix("plain"),
    "film": pix2pix("film"),
    "attention": pix2pix("attention"),
    "router": router,
    "from nothing": from_nothing,
}

# verb -> what it does with a learner, and what its refusal names (None: it works)
TRAINS = {
    "fit": lambda learn: learn.fit(1),
    "fit_one_cycle": lambda learn: learn.fit_one_cycle(1),
    "fit_flat_cos": lambda learn: learn.fit_flat_cos(1),
    "unfreeze": lambda learn: (learn.unfreeze(), learn.fit(1)),
    "CSVLogger": lambda learn: learn.fit(1, cbs=CSVLogger()),
    "GradientClip": lambda learn: learn.fit(1, cbs=GradientClip(0.1)),
    "ShortEpoch": lambda learn: learn.fit(1, cbs=ShortEpochCallback(pct=0.5)),
    "TerminateOnNaN": lambda learn: learn.fit(1, cbs=TerminateOnNaNCallback()),
    "BnFreeze": lambda learn: learn.fit(1, cbs=BnFreeze()),
}
NEEDS_A_TARGET = {
    "SaveModel": lambda learn: learn.fit(2, cbs=SaveModelCallback()),
    "EarlyStopping": lambda learn: learn.fit(3, cbs=EarlyStoppingCallback(patience=1)),
    "ReduceLROnPlateau": lambda learn: learn.fit(3, cbs=ReduceLROnPlateau(patience=1)),
    "get_preds": lambda learn: learn.get_preds(),
    "validate": lambda learn: learn.validate(),
    "show_results": lambda learn: learn.show_results(),
    "summary": lambda learn: learn.summary(),
}
REFUSED = {
    "freeze": (lambda learn: learn.freeze(), "freeze="),
    "fine_tune": (lambda learn: learn.fine_tune(1), "freeze="),
    "predict": (lambda learn: learn.predict(0), "model.sample"),
    "export": (lambda learn: learn.export("learner.pkl"), "save_pretrained"),
    "to_fp16": (lambda learn: learn.to_fp16(), "autocast="),
    "to_bf16": (lambda learn: learn.to_bf16(), "autocast="),
    "MixedPrecision": (lambda learn: learn.fit(1, cbs=MixedPrecision()), "autocast="),
    "GradientAccumulation": (lambda learn: learn.fit(1, cbs=GradientAccumulation(8)), "accumulate"),
    "MixUp": (lambda learn: learn.fit(1, cbs=MixUp()), "augment="),
    "CutMix": (lambda learn: learn.fit(1, cbs=CutMix()), "augment="),
}


@pytest.mark.parametrize("model", LEARNERS)
def test_verbs_and_callbacks_of_fastai(walls, tmp_path, monkeypatch, model):
    "Each works, or says in one sentence what to use instead."
    monkeypatch.chdir(tmp_path)  # for what SaveModel and CSVLogger write
    learn = LEARNERS[model](walls)
    start = {name: p.detach().clone() for name, p in learn.model.named_parameters()}
    with learn.no_bar(), learn.no_logging(), random_state_kept(0):
        for name, verb in TRAINS.items():
            for parameter, value in learn.model.named_parameters():
                value.data.copy_(start[parameter])
            verb(learn)
            for network in "gd":
                moved = [
                    not torch.equal(value, start[parameter])
                    for parameter, value in learn.model.named_parameters()
                    if parameter.startswith(f"{network}.")
                ]
                assert any(moved), f"{name} left {network} where it was"
        learn.lr_find(num_it=4, show_plot=False)
        assert len(learn.recorder.losses) >= 4
        for verb in NEEDS_A_TARGET.values():
            if model != "from nothing":
                verb(learn)
                continue
            with pytest.raises(InputError, match="target"):
                verb(learn)
        for name, (verb, instead) in REFUSED.items():
            with pytest.raises(InputError) as error:
                verb(learn)
            assert instead in str(error.value) and "\n" not in str(error.value), name
    for text in list(tmp_path.rglob("*.pkl")):
        raise AssertionError(f"{text} was written")


def test_a_plateau_lowers_both_rates(walls):
    "ReduceLROnPlateau writes into the hyper-parameters; both networks follow."
    learn = pix2pix("film")(walls)
    with learn.no_bar(), learn.no_logging():
        learn.fit(3, cbs=ReduceLROnPlateau(patience=0, min_delta=100))
    assert [hyper["lr"] for hyper in learn.opt.hypers] == pytest.approx([5e-5, 5e-6])


@pytest.mark.parametrize("mixed", [False, True])
def test_a_step_waits_twice_and_is_short(walls, tmp_path, mixed):
    "The guard asks once for each network whether the numbers are finite; nothing else waits."
    dls = paired_dls(walls, bs=8, device="cpu")
    if mixed:
        dls = mixed_dls(walls, walls, bs=8, size=32, device="cpu")
    learn, count = pix2pix_learner(dls, "film", "small"), training.ThirdStep()
    with learn.no_bar(), learn.no_logging():
        train(learn, 1, tmp_path, ema=50, preview_every=None, shown=False, cbs=[count])
    assert count.counted.waits == 2
    assert count.counted.total <= (1300 if mixed else 800)


def one_step(walls, mixed, accumulate, monkeypatch):
    "The gradients of both networks in the first step, and the terms; no random numbers differ."
    monkeypatch.setattr(
        gan.loss, "normal", lambda shape, like, rng=None: torch.zeros(shape).to(like)
    )
    dls = paired_dls(walls, bs=8, size=32, device="cpu")
    if mixed:
        dls = mixed_dls(walls, walls, ratio=0.25, bs=8, size=32, device="cpu")
    return training.first_gradients(dls, accumulate)


@pytest.mark.parametrize("mixed", [False, True])
def test_a_batch_in_shares_has_the_gradient_of_the_whole(walls, monkeypatch, mixed):
    "Also where a share holds no real image, or none with maps."
    whole, terms = one_step(walls, mixed, 1, monkeypatch)
    assert ("g_style" in terms) == mixed
    for accumulate in (2, 4, 8):
        cut, terms_cut = one_step(walls, mixed, accumulate, monkeypatch)
        for one, other in zip(whole, cut):
            assert (one - other).norm() < 1e-5 * one.norm()
        assert terms_cut == pytest.approx(terms, rel=1e-4, abs=1e-5)


def test_a_metric_that_is_not_finite_is_never_the_best(walls, tmp_path):
    "The first epoch gives NaN, the third is the best."
    from fastai.metrics import AvgMetric

    values = iter([float("nan"), 0.5, 0.3, 0.9])

    def score(pred, *targets):
        return torch.tensor(next(values))

    dls = paired_dls(walls, bs=16, device="cpu")
    learn = pix2pix_learner(dls, "film", **TINY)
    learn.metrics = [AvgMetric(score)]
    with learn.no_bar(), learn.no_logging(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        train(learn, 4, tmp_path / "run", best_by="score", preview_every=None, shown=False)
    assert any("score is nan in epoch 1" in str(warning.message) for warning in said)
    assert '"epoch": 2' in (tmp_path / "run/result.json").read_text()


def test_a_metric_without_a_target_is_refused_at_once(walls, tmp_path):
    "An unconditional model has no validation loss."
    learn = from_nothing(walls)
    with pytest.raises(InputError, match="has no target to compare with"), learn.no_logging():
        train(learn, 1, tmp_path / "run", best_by="valid_loss", preview_every=None, shown=False)
    assert not (tmp_path / "run/checkpoints").exists()


def test_a_run_goes_on_with_the_same_images_only(walls, tmp_path):
    "Images that were changed behind the first eight are noticed; a copy of the folder is not another."
    data, moved, out = tmp_path / "walls", tmp_path / "moved", tmp_path / "run"
    shutil.copytree(walls, data)
    options = {"bs": 8, "judged": 0}
    train_model(Pix2PixModel(epochs=1, **options), data, out, progress=False)
    shutil.copytree(data, moved)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the learning rates rise again
        train_model(Pix2PixModel(epochs=2, **options), moved, out, progress=False)
    listed = list_images(data)
    training = split_images(listed)[0]
    for index in training[20:]:
        image = read(listed.image[index])
        write_tiff(listed.image[index], image.data[::-1].copy() * 3, image.pixel_size)
    for config in ("as it is", "[]", None):  # nor does a broken config.json switch the check off
        if config is None:
            (out / "config.json").unlink()
        elif config != "as it is":
            (out / "config.json").write_text(config)
        with pytest.raises(InputError, match="trained on other data"):
            train_model(Pix2PixModel(epochs=3, **options), data, out, progress=False)


TWO = """
import sys, torch, torch.distributed as dist
torch.set_num_threads(1)
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://{group}", rank=rank, world_size=2)
from microgen.data.load import mixed_dls, paired_dls
from microgen.gan.pix2pix import pix2pix_learner
dls = paired_dls({data!r}, bs=8, device="cpu", augment=())
if {mixed}: dls = mixed_dls({data!r}, {data!r}, bs=8, size=32, device="cpu", augment=())
learn = pix2pix_learner(dls, "plain" if not {mixed} else "film", config="small", base=8, depth=2, disc_base=8, norm="none", spectral_norm=False)
from fastai.callback.core import Callback
class Size(Callback):
    def after_step(self): self.n = len(self.xb[0])
with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=(size := Size()))
assert learn.adversarial_trainer.loader_is_shared == (not {mixed})
if rank == 0: print(float(learn.terms["g_l1"]), size.n, dls.train.n_images)
dist.destroy_process_group()
"""


@pytest.mark.parametrize("mixed", [False, True])
def test_each_of_two_processes_reads_its_own_images(walls, tmp_path, mixed):
    "Where real images take the maps of others each process looks at the whole batch."
    text = TWO.format(group=tmp_path / "group", data=str(walls), mixed=mixed)
    both = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", text, str(rank)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    said = [process.communicate(timeout=200) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    l1, n_own, n_all = said[0][0].split()[-3:]
    assert np.isfinite(float(l1)) and int(n_all) == 8
    assert int(n_own) == (8 if mixed else 4)


class Turned(nn.Module):
    "A layer whose weight gets a gradient of another layout."

    def __init__(self, n_in, n_out):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_out, n_in) * 0.1)

    def forward(self, x):
        return torch.einsum("bi,oi->bo", x.flatten(1), self.weight)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_gradient_of_any_layout_moves_the_weights_as_it_should(accumulate):
    "Fused Adam reads the memory as it lies; a step of it is that of Adam which is not fused."
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader

    rng = torch.Generator().manual_seed(0)
    images = [(torch.randn(5, generator=rng), torch.randn(5, generator=rng)) for _ in range(4)]
    with random_state_kept(0):
        model = Parts(Turned(5, 5), Turned(5, 1))
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    d_terms, g_term = gan_losses("vanilla")
    dls = DataLoaders(DataLoader(images, bs=4), DataLoader(images, bs=4))
    learn = adversarial_learner(
        dls,
        model,
        lambda m, b: m.g(b[0]),
        lambda m, b, f: d_terms(m.d(b[1]), m.d(f)),
        lambda m, b, f: {"adv": g_term(m.d(f))},
        lr=0.01,
        accumulate=accumulate,
    )
    kept = {}

    class Keep(Callback):
        def before_step(self):
            for p in self.learn.stepping:
                kept[id(p)] = p.grad.clone()

    with learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=Keep())
    for (
        name,
        p,
    ) in model.named_parameters():  # the first step of Adam: against the sign of the slope
        expected = start[name] - 0.01 * kept[id(p)].sign()
        assert torch.allclose(p.detach(), expected, atol=1e-4), name


def refuse_locks(*args, **kwargs):
    "As filelock does on a network folder whose system has no flock."
    raise NotImplementedError("FileSystem does not appear to support flock")


def test_a_folder_without_locks_is_trained_in_and_said(walls, tmp_path, monkeypatch):
    "Nothing keeps a second training out, so the user is told; conditions are then made anew in each run."
    data = tmp_path / "walls"
    shutil.copytree(walls, data, ignore=shutil.ignore_patterns(".cache"))
    monkeypatch.setattr("filelock.BaseFileLock.acquire", refuse_locks)
    with pytest.warns(UserWarning, match="takes no locks") as said:
        train_model(Pix2PixModel(epochs=1, bs=8, judged=0), data, tmp_path / "run", progress=False)
    texts = " ".join(str(warning.message) for warning in said)
    assert "nothing keeps a second process out of it" in texts
    assert "conditions are made anew in each run" in texts
    assert (tmp_path / "run/model/model.safetensors").exists()
    assert not list((data / ".cache").glob("*/*.npy"))
