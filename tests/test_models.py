"Every model on every kind of image: trained, stopped, resumed bit by bit, sampled, saved, loaded, judged; others are refused."

import subprocess
import sys
from dataclasses import dataclass, fields, replace

import numpy as np
import pandas as pd
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("fastai")

from fastai.callback.core import Callback
from fastai.learner import Learner
from PIL import Image
from torch import nn

from microgen.cli import comments_of
from microgen.core import InputError, PlugError, as_rng
from microgen.data.build import build
from microgen.data.files import list_images
from microgen.io.files import read
from microgen.kind import KINDS, Kind, kind, kind_of
from microgen.kinds.particles.recipe import ParticleRecipe
from microgen.kinds.walls.recipe import Recipe
from microgen.models.judge import card_rows
from microgen.models.model import MODELS, Model, Sampling, model_named
from microgen.models.run import load_run
from microgen.models.sample import sample_run
from microgen.models.train import train_model

torch.set_num_threads(1)


class Clean(nn.Sequential):
    "Two convolutions."

    def __init__(self, channels):
        first, last = nn.Conv2d(channels, 8, 3, padding=1), nn.Conv2d(8, channels, 3, padding=1)
        super().__init__(first, nn.ReLU(), last)

    def sample(self, n, cond=None, rng=None):
        shape = (n, self[0].in_channels, 32, 32)
        with torch.no_grad():
            return self(torch.from_numpy(as_rng(rng).standard_normal(shape, np.float32)))


class AddNoise(Callback):
    "Noisy images in, the images themselves wanted."

    order = 61  # after the checkpoint, which puts the random numbers back

    def before_batch(self):
        image = self.xb[0]
        self.learn.xb, self.learn.yb = (image + 0.3 * torch.randn_like(image),), (image,)


@dataclass(kw_only=True)
class Denoiser(Model):
    "A plain fastai model."

    name = "denoiser"
    summary = "takes noise out of images"

    def network(self, data):
        return Clean(data.n_channels)

    def learner(self, dls, data):
        return Learner(dls, self.network(data), nn.MSELoss(), lr=self.lr or 3e-3, cbs=AddNoise())

    def judge(self, network, dls, data, progress=False):
        images = dls.loaders[-1].one_batch()[-1]
        with torch.no_grad():
            errors = (network(images) - images).abs().mean((1, 2, 3)).cpu().numpy()
        return card_rows(pd.DataFrame({"error": errors}), {"error": "mean error of a clean image"})


SPLITS = (0.5, 0.25, 0.25)


def small_recipe(name):
    "A recipe on which every model trains in no time; a new kind is made as its recipe comes."
    if name == "walls":
        return Recipe(n=12, size=32, pixel_size=0.03, preset="good", splits=SPLITS)
    if name == "particles":
        settings = dict(presets=("spheres",), settings={"n": 6}, pixel_size=2.0)
        return ParticleRecipe(n=12, size=64, splits=SPLITS, **settings)
    return kind(name).recipe()(n=12, size=64, splits=SPLITS)


SIMULATED = [name for name in KINDS if kind(name).recipe() is not None]
FOLDERS = (*SIMULATED, "grey", "colour")  # each kind; images of anything twice
CHOICES = {"epochs": 2, "bs": 4, "judged": 2}


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    "A small folder of each kind of image."
    at = tmp_path_factory.mktemp("kinds")
    made = {}
    for name in SIMULATED:
        made[name] = build(small_recipe(name), at / name, workers=1)
    for name, shape in (("grey", (32, 32)), ("colour", (32, 32, 3))):
        made[name] = at / name
        made[name].mkdir()
        for i in range(12):
            smooth = np.random.default_rng(i).integers(0, 255, shape).astype("uint8")
            Image.fromarray(smooth).save(made[name] / f"{i}.png")
    return made


@pytest.fixture(scope="module", autouse=True)
def with_a_plain_model():
    "The denoiser stands beside the models of microgen, in this module alone: pages list MODELS too."
    MODELS["denoiser"] = Denoiser
    yield
    del MODELS["denoiser"]


NAMES = [*MODELS, "denoiser"]
PAIRS = [(name, folder) for name in NAMES for folder in FOLDERS]


def accepts(name, folder):
    "Does this model take images of this folder?"
    plain = kind_of_name(folder)
    return not model_named(name)().refuses(plain)


def kind_of_name(folder):
    return kind(folder) if folder in KINDS else Kind()


def weights(network):
    return {name: w.cpu().clone() for name, w in network.state_dict().items()}


@pytest.mark.parametrize("name", NAMES)
def test_every_option_has_a_line_of_help(name):
    model = model_named(name)
    for options in (model, model.sampling):
        silent = {field.name for field in fields(options)} - set(comments_of(options))
        assert not silent, f"{options.__name__}: a comment beside {silent}, on the same line"


def test_the_folders_show_every_kind(folders):
    assert {kind_of(folder).name for folder in folders.values()} == set(KINDS)
    assert {kind_of(folders[name]).name for name in ("grey", "colour")} == {"images"}


@pytest.mark.parametrize("name,folder", PAIRS)
def test_every_model_on_every_kind(name, folder, folders, tmp_path):
    model = model_named(name)(**CHOICES)
    if model.refuses(kind_of(folders[folder])):
        with pytest.raises(InputError) as refused:
            train_model(model, folders[folder], tmp_path / "refused", progress=False)
        said = str(refused.value)
        assert "\n" not in said and said.count(". ") == 0 and len(said) < 300, said
        assert not (tmp_path / "refused").exists()
        return

    # trained in one go, and stopped in the middle and resumed: the same to the last bit
    whole = train_model(model, folders[folder], tmp_path / "whole", progress=False)
    assert not whole.stopped
    halted = replace(model, max_hours=1e-9)
    assert train_model(halted, folders[folder], tmp_path / "halves", progress=False).stopped
    resumed = train_model(model, folders[folder], tmp_path / "halves", progress=False)
    assert not resumed.stopped
    mine, other = weights(whole.model), weights(resumed.model)
    assert list(mine) == list(other)
    assert all(torch.equal(mine[key], other[key]) for key in mine)

    # saved and loaded
    run = load_run(tmp_path / "whole")
    assert run.data.kind == kind_of(folders[folder]).name
    assert replace(run.model, init=None).to_dict() == model.settled(whole.dls).to_dict()
    loaded = weights(run.network)
    assert all(torch.equal(loaded[key], mine[key]) for key in mine)

    # judged
    rows = run.facts["metrics"]
    assert rows and all(np.isfinite(row["value"]) for row in rows)
    assert "None was measured" not in (tmp_path / "whole/model/README.md").read_text()

    # sampled, twice the same
    out = [
        sample_run(tmp_path / run, tmp_path / f"of_{run}", n=2, seed=4, progress=False)
        for run in ("whole", "halves")
    ]
    one, two = (list_images(folder) for folder in out)
    assert len(one) == 2 and list(one.sha256) == list(two.sha256)
    assert kind_of(out[0]).name == kind_of(folders[folder]).name
    has_truth = one["maps"].notna() if "maps" in one else pd.Series(False, one.index)
    assert has_truth.nunique() == 1
    if name in ("pix2pix", "router"):
        assert has_truth.all() == (run.data.recipe is not None)


def test_some_pairs_are_accepted_and_some_refused():
    answers = {pair: accepts(*pair) for pair in PAIRS}
    assert answers["pix2pix", "walls"] and answers["pix2pix", "particles"]
    assert not answers["pix2pix", "grey"] and not answers["router", "colour"]
    assert all(answers["denoiser", folder] for folder in FOLDERS)


# --- a model of somebody else, who has read one page


def quick(folders, out, **options):
    "A denoiser that has learned next to nothing."
    return train_model(Denoiser(epochs=1, bs=4, **options), folders["grey"], out, progress=False)


def test_an_unknown_option_to_sample_by_is_called_as_the_user_called_it(folders, tmp_path):
    model = Denoiser(epochs=1, bs=4, judged=0)
    train_model(model, folders["walls"], tmp_path / "run", progress=False)
    with pytest.raises(InputError, match="denoiser has no sampling option 'walls'. Use n, seed"):
        sample_run(tmp_path / "run", tmp_path / "out", walls="typeC", progress=False)


def test_a_model_that_nobody_could_load_is_refused_before_it_trains(folders, tmp_path, monkeypatch):
    monkeypatch.delitem(MODELS, "denoiser")
    with pytest.raises(InputError, match=r"write MODELS\['denoiser'\] = Denoiser first"):
        quick(folders, tmp_path / "run")
    monkeypatch.setitem(MODELS, "denoiser", "microgen.models.pix2pix.Pix2PixModel")
    with pytest.raises(InputError, match="is that of Pix2PixModel"):
        quick(folders, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_training_shows_no_bar_of_fastai(folders, tmp_path, monkeypatch):
    shown = []
    bar = type("ProgressCallback", (Callback,), {"before_fit": lambda self: shown.append(1)})
    plain = Denoiser.learner
    with_bar = lambda self, dls, data: plain(self, dls, data).add_cb(bar())  # noqa: E731
    monkeypatch.setattr(Denoiser, "learner", with_bar)
    learn = quick(folders, tmp_path / "run")
    assert not shown and any(type(one) is bar for one in learn.cbs)


WRONG_JUDGEMENTS = {
    "number": (0.3, "0.3 \\(a float\\)"),
    "nothing": (None, "None"),
    "table": (pd.DataFrame({"error": [0.3]}), "a DataFrame"),
    "rows": ([{"name": "error"}], "a dict"),
}


@pytest.mark.parametrize("wrong", WRONG_JUDGEMENTS)
def test_a_judgement_of_another_form_is_one_sentence(wrong, folders, tmp_path, monkeypatch):
    judged, said = WRONG_JUDGEMENTS[wrong]
    right = Denoiser.judge
    monkeypatch.setattr(Denoiser, "judge", lambda *a, **k: judged)
    with pytest.raises(PlugError, match=f"'denoiser' judged its result as .*{said}.*card_rows"):
        quick(folders, tmp_path / "run")
    monkeypatch.setattr(Denoiser, "judge", right)
    assert len(quick(folders, tmp_path / "run").model.facts["metrics"]) == 1  # the training is kept


def test_a_learner_that_is_none_is_one_sentence(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(Denoiser, "learner", lambda self, dls, data: self.network(data))
    with pytest.raises(PlugError, match="learner of the model 'denoiser' gave a Clean"):
        quick(folders, tmp_path / "run")
    monkeypatch.setattr(Denoiser, "learner", Model.learner)
    with pytest.raises(PlugError, match=r"write learner\(self, dls, data\)"):
        quick(folders, tmp_path / "run")


def test_samples_of_another_form_are_one_sentence(folders, tmp_path, monkeypatch):
    right = Clean.sample
    as_numpy = lambda self, n, cond=None, rng=None: np.zeros((n, 32, 32))  # noqa: E731
    monkeypatch.setattr(Clean, "sample", as_numpy)
    with pytest.raises(PlugError, match=r"sample of Clean gave a ndarray of shape \(.*, 32, 32\)"):
        quick(folders, tmp_path / "refused")
    monkeypatch.setattr(Clean, "sample", right)
    quick(folders, tmp_path / "run", judged=0)
    monkeypatch.setattr(Clean, "sample", as_numpy)
    with pytest.raises(PlugError, match=r"gave a ndarray.*tensor \(n, 1, H, W\)"):
        sample_run(tmp_path / "run", tmp_path / "out", progress=False)
    monkeypatch.delattr(Clean, "sample")
    with pytest.raises(PlugError, match=r"Clean of the model 'denoiser' has no sample\(self"):
        sample_run(tmp_path / "run", tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


@dataclass(kw_only=True)
class SpreadSampling(Sampling):
    "What to sample, near the mean or far from it."

    spread: float = 1.0  # of the noise that is cleaned


def test_options_of_a_model_to_sample_by_reach_its_network(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(Denoiser, "sampling", SpreadSampling)
    quick(folders, tmp_path / "run", judged=0)

    def made(out, **options):
        sample_run(tmp_path / "run", tmp_path / out, n=1, progress=False, **options)
        return read(next((tmp_path / out).rglob("*.tif")), 1.0).data

    with pytest.raises(PlugError, match="'denoiser' has the option 'spread'.*Clean takes no such"):
        made("refused")
    right = Clean.sample
    spreads = lambda self, n, cond=None, rng=None, spread=1.0: spread * right(self, n, cond, rng)  # noqa: E731
    monkeypatch.setattr(Clean, "sample", spreads)
    assert made("wide").std() > 3 * made("narrow", spread=0.1).std() > 0


def test_a_model_that_is_not_here_says_what_works(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"command line knows only these.*MODELS\['mine'\] = its"):
        model_named("mine")
    monkeypatch.setitem(MODELS, "mine", "microgen.models.model.Mine")
    with pytest.raises(PlugError, match=r"MODELS\['mine'\] is 'microgen.models.model.Mine', which"):
        model_named("mine")


SCRIPT = """
import sys
from dataclasses import dataclass

from fastai.learner import Learner
from torch import nn

from microgen.models.model import MODELS, Model
from microgen.models.train import train_model
from microgen.train.hub import HubModel


class Net(PARENT):
    def __init__(self, width=4):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.Conv2d(width, 1, 1))

    def forward(self, x):
        return self.body(x)


@dataclass(kw_only=True)
class Plain(Model):
    "A net."

    name = "plain"
    summary = "a net"

    def network(self, data):
        return Net()

    def learner(self, dls, data):
        return Learner(dls, self.network(data), nn.MSELoss(), lr=1e-3)


MODELS["plain"] = Plain
data, out = sys.argv[1:]
train_model(Plain(epochs=1, bs=4, judged=0), data, out, progress=False)
card = open(f"{out}/model/README.md").read()
example = card.split("```python")[1].split("```")[0]
assert "from __main__" not in card and "defined in the script mine.py" in example, example
exec(example.replace("FOLDER or USER/NAME", out).replace("FOLDER", out).split("images =")[0])
from microgen.models.run import load_run
assert type(load_run(out).network) is Net
"""


@pytest.mark.parametrize("parent", ["nn.Module", "HubModel, nn.Module"])
def test_the_card_of_a_model_of_a_script_shows_what_works(parent, folders, tmp_path):
    script = tmp_path / "mine.py"
    script.write_text(SCRIPT.replace("PARENT", parent))
    words = [sys.executable, script, folders["grey"], tmp_path / "run"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
