"Generators of images from truth maps, end to end: data, training, resumption, samples, and what goes wrong on the way."

import re
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("fastai")

from microgen.core import InputError, MicrogenError, Micrograph
from microgen.data.build import build
from microgen.data.files import list_images
from microgen.data.load import mixed_dls, paired_dls
from microgen.gan.loss import d_terms, g_terms, generate, read_batch
from microgen.gan.pix2pix import Pix2Pix, pix2pix_learner, spread
from microgen.gan.router import RouterPix2Pix, router_learner
from microgen.io.files import read
from microgen.kinds.walls.evaluate import column_errors, rms_pm
from microgen.kinds.walls.recipe import Recipe
from microgen.models.pix2pix import Pix2PixModel, RouterModel
from microgen.models.sample import sample_run
from microgen.models.train import train_model
from microgen.train.adversarial import term_values
from microgen.train.core import plain_tensor, seed_everything
from microgen.train.history import Fade
from microgen.train.hub import load_model

SMALL = dict(config="small", base=8, depth=2, disc_base=8)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return build(
        Recipe(n=24, size=32, pixel_size=0.03, preset="good"),
        tmp_path_factory.mktemp("data") / "walls",
        workers=1,
    )


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    train_model(Pix2PixModel(epochs=2, bs=4), data, out, progress=False)
    return out


def batch(loader):
    "The first batch, by names."
    return read_batch([plain_tensor(t) for t in loader.one_batch()], loader.fields)


@pytest.mark.parametrize("arch", ["plain", "film", "attention"])
def test_every_parameter_moves(data, arch):
    learn = pix2pix_learner(paired_dls(data, bs=8), arch, **SMALL, weights={"diversity": 0.1})
    model, one = learn.model.train(), batch(learn.dls)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimiser = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(3):  # layers behind one that starts at zero wait for it
        optimiser.zero_grad()
        fakes = generate(model, one)
        weights = dict.fromkeys(
            ("adv", "l1", "ssim", "edge", "spectral", "attention", "diversity", "noise"), 1.0
        )
        total = sum(term_values(g_terms(weights)(model, one, fakes)).values())
        (
            total + sum(d_terms()(model, one, {k: v.detach() for k, v in fakes.items()}).values())
        ).backward()
        optimiser.step()
    assert not [n for n, p in model.named_parameters() if torch.equal(before[n], p)]


def test_four_images_by_heart(data):
    seed_everything(0)
    learn = pix2pix_learner(paired_dls(data, bs=4, augment=()), "film", **SMALL)
    model, one = learn.model.train(), batch(learn.dls)
    weights = {"l1": 1.0, "ssim": 1.0, "noise": 0.05}
    optimiser, losses = torch.optim.Adam(model.g.parameters(), 2e-3), []
    for _ in range(150):
        optimiser.zero_grad()
        terms = term_values(g_terms(weights)(model, one, generate(model, one)))
        sum(w * terms[k] for k, w in weights.items()).backward()
        optimiser.step()
        losses.append(float(terms["l1"].detach()))
    assert np.mean(losses[-5:]) < 0.2 * losses[0], (losses[0], losses[-5:])


def test_size_free(run):
    model = load_model(run)
    for size in (32, 64):
        maps = torch.zeros(1, 4, size, size)
        assert model.sample(1, (maps, 0), rng=0).shape == (1, 1, size, size)


def test_same_samples_after_saving(run, tmp_path):
    model, maps = load_model(run), torch.linspace(-1, 1, 4 * 32 * 32).reshape(1, 4, 32, 32)
    model.save_pretrained(tmp_path / "again")
    again = Pix2Pix.from_pretrained(tmp_path / "again")
    assert torch.equal(model.sample(4, (maps, 1), rng=3), again.sample(4, (maps, 1), rng=3))


def test_noise_changes_pixels_and_not_the_mean(run, data):
    model = load_model(run)
    maps, label = batch(paired_dls(data, bs=4))[:2]
    z = torch.zeros(64, model.g.z_dim)
    noisy, quiet = (
        model.sample(64, (maps[0], label[0]), rng=0, z=z, noise=n) for n in (True, False)
    )
    sd = noisy.std(0)
    assert float(quiet.std(0).max()) < 1e-5 and float(sd.mean()) > 1e-3
    free = (quiet[0].abs() + 4 * sd) < 1  # away from the ends of the range, where values are cut
    assert free.float().mean() > 0.3
    assert (
        float(((noisy.mean(0) - quiet[0]).abs() / sd * 8)[free].mean()) < 1.3
    )  # mean of |normal| is 0.8
    assert spread(noisy).noise.mean() > spread(quiet).noise.mean()


def test_real_images_without_maps_join(data, tmp_path):
    real = tmp_path / "real" / "lab"
    real.mkdir(parents=True)
    for k, path in enumerate(list_images(data).image[:6]):
        shutil.copy(path, real / f"{k}.tif")
    dls = mixed_dls(data, tmp_path / "real", 0.25, bs=4)
    learn = pix2pix_learner(dls, "film", **SMALL)
    learn.fit(1)
    assert {"g_keep", "g_style", "g_l1", "g_adv", "d_real"} <= set(learn.terms)
    assert all(torch.isfinite(v) for v in learn.terms.values())
    assert learn.model.about["domains"] == ["simulated", "real"]
    with pytest.raises(InputError, match="cannot be told that an image is real"):
        pix2pix_learner(dls, "plain", **SMALL)


def test_the_domain_is_no_class(data):
    "With simulated images alone its weights stay zero; each class can be generated in either domain."
    learn = pix2pix_learner(paired_dls(data, bs=8), "film", **SMALL)
    learn.fit(1)
    n = len(learn.dls.vocab)
    slots = [
        p[:, n] for name, p in learn.model.g.named_parameters() if name.endswith("linear.weight")
    ]
    assert slots and not any(s.any() for s in slots)
    learn.model.about["domains"] = ["simulated", "real"]
    maps = batch(learn.dls)[0][:1]

    def draw(label, domain):
        return learn.model.sample(1, (maps, label), rng=0, noise=False, domain=domain)

    assert torch.equal(draw(0, "simulated"), draw(0, "real"))
    with torch.no_grad():
        learn.model.g.unet.up[-1].films[0].linear.weight[:, n] = 1
    assert all(not torch.equal(draw(k, "simulated"), draw(k, "real")) for k in range(n))


def test_style_of_real_images_is_learned_without_pairs(tmp_path):
    "Level, contrast and noise of images in the real domain move to those of the real images; the columns stay."
    sim = build(
        Recipe(n=40, size=48, pixel_size=0.03, preset="good", walls=("UP", "DN")),
        tmp_path / "sim",
        workers=1,
    )
    poor = build(
        Recipe(n=12, size=48, pixel_size=0.03, preset="poor", walls=("UP", "DN"), seed=5),
        tmp_path / "poor",
        workers=1,
    )
    for k, path in enumerate(list_images(poor).image):
        read(path).save(tmp_path / "real" / f"scan{k}.tif")
    dls = mixed_dls(sim, tmp_path / "real", 0.5, bs=8, num_workers=0)
    seed_everything(0)
    learn = pix2pix_learner(dls, "film", **SMALL, cbs=[Fade(0.5)])
    learn.fit(14)
    images = torch.cat([b[-1][b[-2] == 1] for b in dls.train])
    held_out = batch(dls.valid)
    maps, label, true = held_out.maps, held_out.label, held_out.image
    made = {
        d: learn.model.sample(len(maps), (maps, label), rng=0, domain=d)
        for d in ("simulated", "real")
    }
    sets = {"target": images, "pairs": true, **made}
    table = pd.DataFrame({name: spread(x).mean() for name, x in sets.items()}).T
    way = (table.loc["real"] - table.loc["pairs"]) / (
        table.loc["target"] - table.loc["pairs"]
    )  # 0: as simulated images, 1: as real ones
    assert 0.6 < way.noise < 1.4 and 0.6 < way.contrast < 1.4, table
    assert abs(table.level.real - table.level.target) < 0.15, table
    assert (
        table.noise.simulated < table.noise.real
        and table.contrast.simulated > 1.5 * table.contrast.real
    ), table
    quiet = learn.model.sample(len(maps), (maps, label), rng=0, noise=False, domain="real")
    agree = [float(np.corrcoef(a.flatten(), b.flatten())[0, 1]) for a, b in zip(quiet, true)]
    assert min(agree) > 0.85, agree
    row = list_images(sim).query("split == 'valid'").iloc[0]
    errors = rms_pm(
        column_errors(Micrograph(quiet[0, 0].numpy(), 0.03), pd.read_parquet(row["table"]))
    )
    assert errors < 20, errors


def test_properties_are_a_condition(data, tmp_path):
    learn = pix2pix_learner(
        paired_dls(data, bs=8, properties=("dose_e_A2", "thickness_nm")), "film", **SMALL
    )
    learn.fit(1)
    model, maps = learn.model, batch(learn.dls)[0]
    n = len(learn.dls.vocab)
    assert (
        float(model.g.unet.bottom.films[0].linear.weight[:, n + 1 : n + 3].detach().abs().min()) > 0
    )
    mean, sd = model.about["properties"]["dose_e_A2"]

    def draw(**kw):
        return model.sample(2, (maps[0], 0), rng=0, noise=False, **kw)

    assert torch.equal(draw(), draw(props={"dose_e_A2": mean}))
    assert not torch.equal(draw(), draw(props={"dose_e_A2": mean + 2 * sd}))
    assert torch.allclose(draw(props={"dose_e_A2": [mean, mean + sd]})[0], draw()[0], atol=1e-5)
    with pytest.raises(InputError, match="dose_e_A2, thickness_nm"):
        draw(props={"gain": 1})
    model.save_pretrained(tmp_path / "model")
    again = Pix2Pix.from_pretrained(tmp_path / "model")
    one, two = (
        m.sample(1, (maps[0], 0), rng=0, props={"dose_e_A2": mean + sd})
        for m in (model.eval(), again)
    )
    assert torch.equal(one, two)


def test_a_step_in_colour():
    "Images of three channels: shapes, one step of both networks, samples."
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader

    rng = torch.Generator().manual_seed(0)
    maps = torch.randn(8, 2, 32, 32, generator=rng)
    image = torch.tanh(maps.mean(1, keepdim=True) * torch.tensor([1.0, 0.5, -0.5]).view(3, 1, 1))
    focus = (maps[:, :1] > 0).float()
    items = list(zip(maps, torch.arange(8) % 2, focus, image))
    dls = DataLoaders(DataLoader(items, bs=4), DataLoader(items, bs=4))
    dls.n_inp = 2
    dls.fields = ("maps", "label", "focus", "image")
    dls.vocab = ["a", "b"]
    dls.channels = ("u", "v")
    dls.pixel_size = None
    dls.scaling = "image"
    dls.n_channels = 3
    learn = pix2pix_learner(dls, "attention", **SMALL, r1=0.1)
    before = {n: p.detach().clone() for n, p in learn.model.named_parameters()}
    learn.fit(1)
    assert {"g_l1", "g_noise", "g_attention"} <= set(learn.terms)
    still = [n for n, p in learn.model.named_parameters() if torch.equal(before[n], p)]
    assert not still, still
    assert learn.model.sample(2, (maps, None), rng=0).shape == (2, 3, 32, 32)
    assert learn.model.style_of(image).shape == (8, 4)


GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def one_step(data, arch, autocast, device=None):
    "Loss terms of the first step, R1 among them, and the image after it."
    dls = paired_dls(data, bs=16, augment=(), device=device)
    seed_everything(0)
    make = (
        router_learner if arch == "router" else lambda dls, **kw: pix2pix_learner(dls, arch, **kw)
    )
    learn = make(dls, **SMALL, r1=1.0, autocast=autocast)
    learn.fit(1)
    assert len(dls.train) == 1
    maps = batch(dls)[0].cpu()
    return {k: float(v) for k, v in learn.terms.items()}, learn.model.sample(2, (maps[0], 0), rng=0)


@pytest.mark.parametrize("arch", ["film", "attention", "router"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_bfloat16_is_close_to_full_precision(data, arch, device):
    (full, exact), (half, rough) = (one_step(data, arch, a, device) for a in (None, "bf16"))
    assert set(full) == set(half) and "d_r1" in full and (arch == "film" or "g_attention" in full)
    for name, value in full.items():
        assert abs(half[name] - value) < 0.03 + 0.05 * abs(value), (name, value, half[name])
    assert rough.dtype == torch.float32 and float((rough - exact).abs().mean()) < 0.05


def test_attention_without_a_teacher(data):
    learn = pix2pix_learner(paired_dls(data, bs=8), "attention", **SMALL, weights={"attention": 0})
    before = learn.model.g.unet.attention.find[0].weight.detach().clone()
    learn.fit(2)
    assert "g_attention" not in learn.terms and "attention" not in learn.weights
    assert not torch.equal(before, learn.model.g.unet.attention.find[0].weight)
    maps, label = batch(learn.dls)[:2]
    mask = learn.model.g.generate(maps, label).mask.detach()
    assert 0 < float(mask.min()) and float(mask.max()) < 1 and float(mask.std()) > 0


def test_the_weights_in_effect_are_saved(data, tmp_path):
    learn = pix2pix_learner(paired_dls(data, bs=8), "film", **SMALL, weights={"l1": 2})
    assert learn.weights["l1"] == 2.0 and learn.weights["noise"] == 0.05
    assert not {"attention", "keep", "style", "diversity"} & set(learn.weights)
    learn.model.save_pretrained(tmp_path / "model")
    assert load_model(tmp_path / "model").facts["loss_weights"] == learn.weights


def test_router_is_one_model_with_a_table(data, tmp_path):
    learn = train_model(RouterModel(epochs=1, bs=4), data, tmp_path / "run", progress=False)
    assert isinstance(learn.model, RouterPix2Pix)
    table = pd.read_csv(tmp_path / "run/experts.csv")
    assert {"label", "film", "attention", "winner", "makes"} <= set(table)
    assert isinstance(load_model(tmp_path / "run"), RouterPix2Pix)


def test_stopped_and_continued_is_the_same(data, tmp_path):
    model = Pix2PixModel(epochs=2, bs=4, seed=3)
    whole = train_model(model, data, tmp_path / "whole", progress=False)
    part = train_model(replace(model, max_hours=1e-9), data, tmp_path / "part", progress=False)
    assert part.stopped
    part = train_model(model, data, tmp_path / "part", progress=False)
    assert not part.stopped
    for (name, a), b in zip(whole.model.state_dict().items(), part.model.state_dict().values()):
        assert torch.equal(a, b), name


def test_samples_are_a_dataset(run, tmp_path):
    out = sample_run(run, walls=["typeC", "typeA"], n=4, out=tmp_path / "new", progress=False)
    listed = list_images(out)
    assert sorted(listed.label) == ["typeA", "typeA", "typeC", "typeC"]
    assert set(listed.class_known[listed.label == "typeC"]) == {True}
    assert read(listed.image[0]).pixel_size == pytest.approx((0.03, 0.03))
    dls = paired_dls(out, bs=2, valid=0.5) if "split" not in listed else None
    assert dls is None or len(dls.train_ds)


def test_progress_shows_time_left(run, tmp_path, capsys):
    sample_run(run, walls="typeC", n=2, out=tmp_path / "new", progress=True)
    assert re.search(r"sampling.*2/2.*(left|so far)", capsys.readouterr().out)


def test_bad_input_is_one_sentence(run, data, tmp_path):
    cases = [
        lambda: train_model(Pix2PixModel(), tmp_path / "none", tmp_path / "r"),
        lambda: Pix2PixModel(arch="gan"),
        lambda: Pix2PixModel(epochs=0),
        lambda: train_model(Pix2PixModel(arch="attention", epochs=3, bs=4), data, run, False),
        lambda: sample_run(run, walls="typeC", maps=data, out=tmp_path / "s"),
        lambda: sample_run(tmp_path, walls="typeC", out=tmp_path / "s"),
        lambda: sample_run(run, walls="typeC", n=0, out=tmp_path / "s"),
        lambda: sample_run(run, walls="UP", out=run),
    ]
    for case in cases:
        with pytest.raises(MicrogenError) as error:
            case()
        text = str(error.value)
        assert "\n" not in text.strip() and len(text) < 600, text


def test_a_damaged_image_stops_with_its_name(data, tmp_path):
    bad = tmp_path / "bad"
    shutil.copytree(data, bad)
    first = list_images(bad).image[0]
    first.write_bytes(b"no image")
    with pytest.raises(MicrogenError, match=first.name):
        train_model(Pix2PixModel(epochs=1), bad, tmp_path / "r", progress=False)


def test_no_maps_is_said(data, tmp_path):
    folder = tmp_path / "plain" / "UP"
    folder.mkdir(parents=True)
    for k, path in enumerate(list_images(data).image[:4]):
        shutil.copy(path, folder / f"{k}.tif")
    with pytest.raises(InputError, match="nothing but pixels"):
        train_model(Pix2PixModel(epochs=1), tmp_path / "plain", tmp_path / "r", progress=False)
