"""Loading: splits, order and resume, truth that stays with its pixels, real files and bad ones."""

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("fastai")
import tifffile
import torch
from fastcore.basics import noop

from microgen.core import InputError, ReadError
from microgen.data.build import build
from microgen.data.cache import CACHE
from microgen.data.files import label_of, list_images, split_by_group, split_images, unscale
from microgen.data.load import image_dls, mixed_dls, paired_dls, target_dls, unpaired_dls
from microgen.data.loader import Travelling
from microgen.io.files import read, write_tiff
from microgen.kinds.walls.condition import CHANNELS, condition, move, sites
from microgen.kinds.walls.recipe import Recipe
from microgen.kinds.walls.walls import Walls


@pytest.fixture(scope="module")
def walls(tmp_path_factory):
    "Nine small images of domains and a wall."
    out = tmp_path_factory.mktemp("data") / "walls"
    recipe = Recipe(
        walls=("UP", "DN", "typeC"),
        n=12,
        size=64,
        pixel_size=0.03,
        seed=3,
        splits=(0.5, 0.25, 0.25),
    )
    return build(recipe, out, workers=1, progress=False)


@pytest.fixture
def copy(walls, tmp_path):
    "A copy of the dataset, to be damaged."
    without_arrays = shutil.ignore_patterns(CACHE)
    return Path(shutil.copytree(walls, tmp_path / "copy", ignore=without_arrays))


def tree(folder, names, shape=(48, 48), seed=0, pixel_size=0.03):
    "Noise as calibrated 32-bit images."
    rng = np.random.default_rng(seed)
    for name in names:
        write_tiff(Path(folder) / name, rng.normal(100, 10, shape), pixel_size)
    return Path(folder)


def same(a, b):
    return len(a) == len(b) and all(
        torch.equal(x, y) for one, two in zip(a, b) for x, y in zip(one, two)
    )


def test_batches_hold_the_truth_of_the_files(walls):
    "Without augmentation a validation batch is the files: image, channels, wall, label."
    dls = paired_dls(walls, bs=2, device="cpu", augment=(), percentiles=(0, 100))
    listed = list_images(walls)
    rows = split_images(listed)[1]
    maps, label, wall, image = (torch.cat(x) for x in zip(*dls.valid))
    for k, i in enumerate(rows):
        data = read(listed.image[i]).data
        np.testing.assert_allclose(
            unscale(image[k, 0].numpy(), (data.min(), data.max())), data, atol=1e-3 * np.ptp(data)
        )
        truth = dict(
            zip(("Q", "phi", "disp_pm", "polarisation", "wall"), read(listed.maps[i]).data)
        )
        drawn = condition(
            truth, pd.read_parquet(listed.table[i]), data.shape, 0.03, (*CHANNELS, "wall")
        )
        np.testing.assert_allclose(maps[k].numpy(), drawn[:-1], atol=1e-3)
        np.testing.assert_array_equal(wall[k, 0].numpy(), drawn[-1])
        assert dls.vocab[label[k]] == listed.label[i]


def test_the_split_of_the_metadata_is_kept_and_test_images_stay_away(walls):
    dls, listed = paired_dls(walls, bs=2, device="cpu"), list_images(walls)
    assert [len(dl.dataset) for dl in dls.loaders] == [
        (listed.split == s).sum() for s in ("train", "valid", "test")
    ]


@pytest.mark.parametrize("seed", range(5))
def test_tiles_of_one_image_stay_together(tmp_path, seed):
    tree(
        tmp_path,
        [f"A/s{s}_r{r}_c{c}.tif" for s in range(7) for r in range(1 + s % 3) for c in range(2)],
    )
    listed = list_images(tmp_path)
    train, valid = split_by_group(listed.group, 0.3, seed)
    stem = [p.name.split("_")[0] for p in listed.image]
    assert not {stem[i] for i in train} & {stem[i] for i in valid}
    assert sorted([*train, *valid]) == list(range(len(listed)))


def test_same_seed_same_batches_whatever_was_looked_at(walls):
    one, two = (paired_dls(walls, bs=2, size=40, seed=5, device="cpu") for _ in range(2))
    two.one_batch()
    two.valid.one_batch()
    first = list(one.train)
    assert same(first, list(two.train))
    assert not same(first, list(one.train)), "the second epoch has other crops"
    assert not same(first, list(paired_dls(walls, bs=2, size=40, seed=6, device="cpu").train))


@pytest.mark.parametrize("stop", [0, 1, 2, 3, 4])
def test_resume_gives_the_batches_that_would_have_come(walls, stop):
    "Stopped after any batch of two epochs, with another process state, and with contrast augmentation."

    def loaders():
        return paired_dls(walls, bs=2, size=40, seed=5, device="cpu", contrast=0.2)

    whole = loaders()
    batches = [b for _ in range(2) for b in whole.train]
    dls = loaders()
    seen = []
    while len(seen) < stop:
        for b in dls.train:
            seen.append(b)
            if len(seen) == stop:
                break
    torch.manual_seed(123)
    np.random.seed(9)
    later = loaders()
    later.load_rng_state(dls.rng_state())
    rest = list(later.train)
    while len(rest) < len(batches) - stop:
        rest += list(later.train)
    assert same(seen + rest, batches)


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only")
def test_any_number_of_workers_gives_the_same_batches(walls):
    kept, read_each = (
        paired_dls(walls, bs=2, size=40, seed=5, device="cpu", memory_gb=m, num_workers=w)
        for m, w in ((4, 0), (0, 2))
    )
    assert same(list(kept.train), list(read_each.train))


def test_a_mirrored_batch_is_the_truth_of_the_mirrored_image(walls):
    "Both mirrors and the turn on UP and DN: each image is one of four views, and its maps are that view's."

    def loaders(augment):
        return paired_dls(walls, bs=4, classes=("UP", "DN"), augment=augment, seed=1, device="cpu")

    plain, moved = loaders(()), loaders("auto")
    assert moved.augment == ("mirror_lr", "mirror_ud", "turn")
    views = set()
    for _ in range(6):
        for (m, l, _w, i), (m2, l2, _w2, i2) in zip(plain.train, moved.train):
            for k in range(len(l)):
                (view,) = [
                    v
                    for v in (None, *moved.augment)
                    if torch.equal(i2[k], i[k] if v is None else move(v, i[k][None])[0])
                ]
                views.add(view)
                assert int(l2[k]) == int(l[k]) ^ (view in ("mirror_ud", "turn"))
                assert torch.allclose(
                    m2[k], m[k] if view is None else move(view, m[k][None], CHANNELS)[0], atol=1e-5
                )
    assert len(views) == 4


def test_no_global_random_state_is_used(walls):
    torch.manual_seed(0), np.random.seed(0)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    dls = paired_dls(walls, bs=2, size=40, device="cpu", contrast=0.2, gamma=0.2)
    first = list(dls.train)
    assert (
        torch.equal(states[0], torch.get_rng_state())
        and (states[1] == np.random.get_state()[1]).all()
    )
    assert all(b[3].abs().max() <= 1 for b in first)


def test_real_images_of_other_pixel_size_join_simulated_ones(walls, tmp_path):
    "Real images are resampled to the pixels of the simulated ones, and have no maps."
    tree(tmp_path, [f"s{k}.tif" for k in range(5)], (60, 60), pixel_size=0.06)
    dls = mixed_dls(walls, tmp_path, ratio=0.5, bs=4, size=48, device="cpu", seed=2)
    for _ in range(2):
        for maps, label, _wall, domain, image in dls.train:
            assert int(domain.sum()) == 2 and image.shape == (4, 1, 48, 48)
            assert (
                maps[domain == 1].abs().max() == 0
                and maps[domain == 0].abs().amax((1, 2, 3)).min() > 0.1
            )
            assert all((dls.vocab[k] == "real") == bool(d) for k, d in zip(label, domain))
    maps, label, wall, domain, image = (torch.cat(x) for x in zip(*dls.valid))
    assert not domain.any() and maps.abs().amax((1, 2, 3)).min() > 0.1, (
        "validation is on pairs alone"
    )
    assert len(domain) == (list_images(walls).split == "valid").sum()
    seen = {i for seed in range(4) for i in dls.train.order(np.random.default_rng(seed))}
    assert seen == set(range(len(dls.train_ds))), "every real image trains"
    pair = unpaired_dls(walls, tmp_path, bs=2, size=48, device="cpu")
    assert [x.shape for x in pair.one_batch()] == [(2, 1, 48, 48)] * 2
    assert len(list(pair.train)) == 3


def test_images_without_scale_are_loaded_alone_and_asked_for_when_mixed(walls, tmp_path):
    from PIL import Image

    for k in range(4):
        Image.fromarray(
            np.random.default_rng(k).integers(0, 65535, (64, 64)).astype(np.uint16)
        ).save(tmp_path / f"s{k}.png")
    alone = image_dls(tmp_path, bs=2, size=32, device="cpu")
    assert alone.pixel_size is None and len(np.unique(alone.one_batch()[0])) > 1500, (
        "more than 8 bits"
    )
    assert alone.show_batch(max_n=2) is not None
    with pytest.raises(InputError, match="pixel size"):
        mixed_dls(walls, tmp_path, bs=4, size=32, device="cpu")
    assert (
        len(
            mixed_dls(
                walls, tmp_path, ratio=0.5, bs=4, size=32, real_pixel_size=0.03, device="cpu"
            ).one_batch()
        )
        == 5
    )


def test_a_learner_trains_and_shows_its_results(walls):
    "fastai's own Learner takes the batches: two inputs, two targets."
    from fastai.callback.progress import ProgressCallback
    from fastai.learner import Learner

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Conv2d(4, 1, 1)

        def forward(self, maps, label):
            return self.layer(maps)

    dls = paired_dls(walls, bs=2, size=32, device="cpu")
    learn = Learner(
        dls, Net(), loss_func=lambda out, wall, image: (out - image).square().mean(), lr=0.05
    )
    learn.remove_cb(ProgressCallback)
    with learn.no_logging():
        before = learn.validate()[0]
        learn.fit(3)
    assert learn.validate()[0] < before
    fig = dls.valid.show_results(
        dls.valid.one_batch(), learn.model(*dls.valid.one_batch()[:2]), max_n=2
    )
    assert "generated" in [ax.get_title() for ax in fig.axes]


class Mean(torch.nn.Module):
    "Says of each item the mean of its inputs, through a weight."

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, *inputs):
        return self.weight * inputs[0].flatten(1).mean(1)


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("kind", ["paired", "mixed", "images", "unpaired"])
def test_predictions_come_in_the_order_of_the_items(walls, tmp_path, kind, part):
    "fastai's get_preds, on shuffled and unshuffled loaders, against predictions made item by item."
    from fastai.learner import Learner

    tree(tmp_path, [f"s{k}.tif" for k in range(9)], (64, 64))
    small = {"size": 40, "device": "cpu", "bs": 2}
    dls = {
        "paired": lambda: paired_dls(walls, **small),
        "mixed": lambda: mixed_dls(walls, tmp_path, 0.5, **small),
        "images": lambda: image_dls(walls, **small),
        "unpaired": lambda: unpaired_dls(walls, tmp_path, **small),
    }[kind]()
    dls.train.load_rng_state({"seed": 0, "epoch": 3, "step": 1})
    learn = Learner(dls, Mean(), loss_func=lambda out, *y: out.mean())
    found = learn.get_preds(part, with_targs=False)[0]
    items = dls.loaders[part].new(shuffle=False, bs=1, drop_last=False)
    pixels, data = items.pixels, dls.loaders[part].dataset
    pixels.corner = 0.5, 0.5
    one_by_one = torch.stack([data[i][0].mean() for i in range(len(data))])
    if kind == "unpaired":
        one_by_one = torch.cat([b[0].mean((1, 2, 3)) for b in items])
    assert found.shape == one_by_one.shape and torch.allclose(found, one_by_one, atol=1e-6)
    assert dls.train.rng_state() == {"seed": 0, "epoch": 3, "step": 1}


def test_batches_have_names(walls, tmp_path):
    "What is in a batch is told by dls.fields, whatever was asked for."
    tree(tmp_path, [f"s{k}.tif" for k in range(3)], (64, 64))
    conditional = paired_dls(walls, bs=2, properties=("dose_e_A2",), device="cpu")
    both = mixed_dls(
        walls, tmp_path, 0.5, bs=2, device="cpu", classes=("typeC", "UP"), contrast=0.3, gamma=0.3
    )
    assert both.vocab == ["typeC", "UP", "real"]
    for dls in (conditional, both):
        batch = dict(zip(dls.fields, dls.one_batch(), strict=True))
        assert batch["image"].shape == (2, 1, 64, 64) and batch["maps"].shape == (2, 4, 64, 64)
        assert ("domain" in batch) == hasattr(dls, "paired") != ("props" in batch)


def test_one_real_image_is_enough_to_join(walls, tmp_path):
    dls = mixed_dls(
        walls, tree(tmp_path, ["lab/a.tif"], (200, 200)), 0.5, bs=4, size=48, device="cpu"
    )
    batches = list(dls.train)
    assert all(int(b[3].sum()) == 2 for b in batches) and "lab" in dls.vocab
    real = torch.cat([b[4][b[3] == 1] for b in batches])
    assert len(torch.unique(real.flatten(1), dim=0)) == len(real), "each time another crop"


def test_real_images_of_another_split_do_not_train(walls, tmp_path):
    names = [f"s{k}.tif" for k in range(4)]
    csv = pd.DataFrame({"file_name": names, "split": ["train", "valid", "test", "train"]})
    csv.to_csv(tree(tmp_path, names, (64, 64)) / "metadata.csv", index=False)
    dls = mixed_dls(walls, tmp_path, 0.5, bs=2, device="cpu")
    assert len(dls.train_ds) == (list_images(walls).split == "train").sum() + 2
    csv.assign(split="test").to_csv(tmp_path / "metadata.csv", index=False)
    with pytest.raises(InputError, match="No image in .* has split 'train'"):
        mixed_dls(walls, tmp_path, 0.5, bs=2)


def test_folders_without_images_are_no_classes(tmp_path):
    tree(tmp_path, ["a.tif", "b.tif", ".thumbs/a.tif", "A/.cache/a.tif", "A/c.tif"])
    (tmp_path / "dft").mkdir()
    (tmp_path / "dft" / "YMnO3.cif").write_text("data_")
    assert list_images(tmp_path).label.tolist() == ["A", "", ""]


# --- conditions that are made once


def entries(folder):
    return [p for p in (Path(folder) / CACHE).iterdir() if p.is_dir()]


@pytest.fixture
def made(monkeypatch):
    "Labels of the images of which a condition was made."
    labels = []
    condition_of = Walls.condition

    def noted(self, truth, *args):
        labels.append(truth.label)
        return condition_of(self, truth, *args)

    monkeypatch.setattr(Walls, "condition", noted)
    return labels


@pytest.mark.parametrize("memory_gb", [0, 4])
def test_conditions_are_made_once(copy, made, memory_gb):
    "The second loaders, and every epoch, read arrays; batches are those that are made anew each time."
    how = {"bs": 2, "size": 40, "seed": 5, "device": "cpu", "num_workers": 0}
    plain = list(paired_dls(copy, memory_gb=0, cache=False, **how).train)
    assert not (copy / CACHE).exists()
    made.clear()
    first = list(paired_dls(copy, memory_gb=memory_gb, **how).train)
    assert len(made) == 2 * 12, "channels and focus of each image, once"
    made.clear()
    dls = paired_dls(copy, memory_gb=memory_gb, **how)
    second = list(dls.train)
    list(dls.train), list(dls.valid)
    assert not made and same(first, plain) and same(second, plain)
    few = paired_dls(copy, memory_gb=memory_gb, classes=("typeC",), **how)
    assert not made and few.vocab == ["typeC"], "some of the classes are among those of all"
    items = few.valid.dataset.items
    assert torch.equal(few.valid_ds[0][0], torch.from_numpy(few.valid.pixels.maps(items[0])))


def test_kept_conditions_are_16_bit_and_exact_enough(walls):
    "Numbers of about 1 as 16-bit floats: within 0.0005."
    dls = paired_dls(walls, bs=2, augment=(), memory_gb=0, device="cpu")
    pixels = dls.train.pixels
    worst = 0
    for i in range(len(pixels)):
        exact = pixels.kind.condition(pixels.truth(i), (64, 64), (0.03, 0.03), pixels.channels)
        worst = max(worst, np.abs(pixels.maps(i) - exact).max())
    assert 0 < worst < 5e-4


MINE = """
from dataclasses import dataclass

from dots.rule import strength
from microgen.kinds.walls.walls import Walls


@dataclass(eq=False)
class Dots(Walls):
    "Walls whose condition is stronger or weaker."

    name = "dots"
    factor: float = 1.0

    def condition(self, *args):
        return self.factor * strength() * super().condition(*args)
"""


@pytest.fixture
def dots(tmp_path, monkeypatch):
    "The module of a kind of somebody's own, and another module that it imports a rule from."
    folder = tmp_path / "code/dots"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "rule.py").write_text("def strength():\n    return 1.0\n")
    (folder / "kinds.py").write_text(MINE)
    monkeypatch.syspath_prepend(folder.parent)

    def fresh():
        for name in [name for name in sys.modules if name.partition(".")[0] == "dots"]:
            monkeypatch.delitem(sys.modules, name)
        importlib.invalidate_caches()
        return importlib.import_module("dots.kinds").Dots

    return folder, fresh


def strongest(folder, kind):
    dls = paired_dls(folder, bs=2, device="cpu", kind=kind)
    return max(float(batch[0].abs().max()) for batch in dls.valid)


def test_kept_conditions_are_never_those_of_another_kind(copy, dots):
    "Neither of other settings of the same class, nor of a module that its module imports and that has changed."
    code, fresh = dots
    weak, strong = fresh()(factor=0.5), fresh()(factor=2.0)
    one = strongest(copy, weak)
    assert strongest(copy, strong) == pytest.approx(4 * one, rel=1e-3)
    assert strongest(copy, weak) == one
    assert len(entries(copy)) == 2, "settings stand side by side"
    (code / "rule.py").write_text("def strength():\n    return 0.25 * 1.0\n")
    assert strongest(copy, fresh()(factor=2.0)) == pytest.approx(one, rel=1e-3)
    assert len(entries(copy)) == 1, "those of the older code are removed"


def test_a_kind_that_cannot_be_compared_keeps_nothing_and_says_so(copy, dots):
    odd = dots[1]()(factor=1.0)
    odd.rule = lambda: 1.0
    said = "The kind 'dots' holds a function as rule.*so conditions are made anew in each run"
    with pytest.warns(UserWarning, match=said):
        paired_dls(copy, bs=2, device="cpu", kind=odd)
    assert not (copy / CACHE).exists()


@pytest.mark.parametrize("what", ["map", "table", "image", "label"])
def test_kept_conditions_are_never_those_of_other_files(copy, what):
    "Each thing that a condition or an image is made of is changed behind the back of the metadata."
    how = {"bs": 12, "augment": (), "device": "cpu", "percentiles": (0, 100)}
    paired_dls(copy, **how)
    row = list_images(copy).query("split == 'valid'").iloc[0]
    if what == "map":
        maps = tifffile.imread(row["maps"])
        about = {"channels": ["Q", "phi", "disp_pm", "polarisation", "wall"]}
        write_tiff(row["maps"], 0.5 * maps, 0.03, about, compress=True)
    elif what == "table":
        table = pd.read_parquet(row["table"])
        table.assign(y_nm=table["y_nm"] + 0.05).to_parquet(row["table"])
    elif what == "image":
        write_tiff(row["image"], read(row["image"]).data[::-1], 0.03)
    else:
        meta = pd.read_csv(copy / "metadata.csv")
        meta["label"] = meta["label"].replace("UP", "DN")
        meta.to_csv(copy / "metadata.csv", index=False)
    seen = list(paired_dls(copy, **how).valid)
    assert same(seen, list(paired_dls(copy, cache=False, **how).valid))
    assert len(entries(copy)) == 1, "arrays that are out of date are removed"


def test_a_copy_takes_its_conditions_along(copy, tmp_path, made):
    paired_dls(copy, bs=2, device="cpu")
    made.clear()
    paired_dls(shutil.copytree(copy, tmp_path / "again"), bs=2, device="cpu")
    assert not made


def test_damaged_arrays_are_made_again(copy, made):
    paired_dls(copy, bs=2, device="cpu")
    (entry,) = entries(copy)
    (entry / "conditions.npy").write_bytes((entry / "conditions.npy").read_bytes()[:-7])
    (copy / CACHE / "killed.tmp").mkdir()
    made.clear()
    paired_dls(copy, bs=2, device="cpu")
    assert made and entries(copy) == [entry], "what a killed run left is removed"


PROCESS = """
import sys, torch
from microgen.data.load import paired_dls
if __name__ == "__main__":
    dls = paired_dls(sys.argv[1], bs=2, size=40, seed=5, device="cpu", memory_gb=0, num_workers=0)
    print(sum(float(x.double().sum()) for b in dls.train for x in b))
"""


def run(code, *words):
    "A process of its own."
    told = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    return subprocess.Popen([sys.executable, code, *words], env=env, **told)


def test_processes_that_begin_together_make_one_set_of_arrays(copy, tmp_path):
    (tmp_path / "load.py").write_text(PROCESS)
    running = [run(tmp_path / "load.py", copy) for _ in range(3)]
    said = [p.communicate() for p in running]
    assert len({out for out, _ in said}) == 1 and said[0][0], said
    assert len(entries(copy)) == 1 and not list((copy / CACHE).glob("*.tmp"))


def test_a_folder_that_cannot_be_written_to(copy, tmp_path, monkeypatch):
    "Conditions go to the user's cache, or else are made each time; either is said in one line."
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "mine"))
    (copy / CACHE).write_text("a file in its place")
    with pytest.warns(UserWarning, match="is read-only: its conditions are kept in .*mine"):
        first = paired_dls(copy, bs=2, device="cpu", memory_gb=0, num_workers=0)
    assert first.train.pixels.arrays.folder.is_relative_to(tmp_path / "mine")
    monkeypatch.setenv("XDG_CACHE_HOME", str(copy / "metadata.csv"))
    with pytest.warns(UserWarning, match="can be written to: conditions are not kept"):
        second = paired_dls(copy, bs=2, device="cpu", memory_gb=0, num_workers=0)
    assert second.train.pixels.arrays is None
    assert same(list(first.train), list(second.train))


SPAWNED = """
import sys, torch
from microgen.data.load import paired_dls, unpaired_dls
if __name__ == "__main__":
    torch.multiprocessing.set_start_method("spawn")
    folder, how = sys.argv[1], {"bs": 2, "size": 40, "device": "cpu", "memory_gb": 0, "seed": 5}
    paired = [paired_dls(folder, num_workers=n, contrast=0.2, **how) for n in (0, 1)]
    unpaired = [unpaired_dls(folder, folder, num_workers=n, **how) for n in (0, 1)]
    for loaders in (paired, unpaired):
        alone, spawned = (list(dls.train) for dls in loaders)
        assert len(alone) == len(spawned) > 1
        print(all(torch.equal(x, y) for a, b in zip(alone, spawned) for x, y in zip(a, b)))
"""


def test_spawned_workers_give_the_same_batches(walls, tmp_path):
    "Workers that are begun afresh, as on macOS and Windows, get all they need from the loader."
    (tmp_path / "spawned.py").write_text(SPAWNED)
    out, err = run(tmp_path / "spawned.py", walls).communicate()
    assert out.split() == ["True", "True"], err


@pytest.mark.parametrize("n_processes", [2, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_processes_read_their_own_share(walls, n_processes, workers):
    "Every n-th image each: together the batches of one process, the last and smaller one too."

    def loaders():
        how = {"bs": 5, "size": 40, "device": "cpu", "contrast": 0.2, "classes": ("UP", "DN")}
        return paired_dls(walls, memory_gb=0, num_workers=workers, seed=3, **how)

    whole = loaders()
    shares = [loaders() for _ in range(n_processes)]
    read = [[] for _ in shares]
    for rank, dls in enumerate(shares):
        pixels = dls.train.pixels
        get = pixels.item
        pixels.item = lambda i, get=get, of=read[rank]: of.append(i) or get(i)
        for part in dls.loaders:
            part.share(rank, n_processes)
    for part in (0, 1):
        batches = list(whole.loaders[part])
        parts = [list(dls.loaders[part]) for dls in shares]
        for k, batch in enumerate(batches):
            for x, *of_shares in zip(batch, *(p[k] for p in parts)):
                for rank, y in enumerate(of_shares):
                    assert torch.equal(y, x[rank::n_processes])
    assert shares[0].train.n_images == whole.train.bs
    if not workers:
        assert not set(read[0]) & set(read[1]), "no image is read twice"


# --- targets, classes, stacks


def own_maps(folder, n=6, channels=7):
    "Images of no kind, with maps that count the pixels: 10000 of the map and more."
    y, x = np.mgrid[:32, :32]
    names = [f"map{k}" for k in range(channels)]
    for i in range(n):
        maps = np.stack([10_000.0 * k + 100 * y + x + i / 4 for k in range(channels)])
        write_tiff(folder / "images" / f"{i}.tif", maps[0], 0.03)
        write_tiff(folder / "maps" / f"{i}.tif", maps, 0.03, {"channels": names})
    files = [f"images/{i}.tif" for i in range(n)]
    pd.DataFrame({"file_name": files}).to_csv(folder / "metadata.csv", index=False)
    return folder


@pytest.mark.parametrize("memory_gb", [0, 4])
def test_targets_are_as_many_maps_as_are_asked_for(tmp_path, memory_gb):
    "Maps of a folder of no kind keep their numbers, all digits, and are mirrored and cut with the image."
    how = {"bs": 2, "size": 20, "device": "cpu", "memory_gb": memory_gb, "num_workers": 0}
    how |= {"augment": ("mirror_lr", "rot90"), "percentiles": (0, 100)}
    dls = target_dls(own_maps(tmp_path), **how)
    assert dls.channels == tuple(f"map{k}" for k in range(7))
    views = set()
    for image, maps in dls.train:
        assert maps.shape == (2, 7, 20, 20) and maps.dtype == torch.float32
        assert torch.equal(
            maps - maps[:, :1], 10_000.0 * torch.arange(7)[:, None, None].expand(maps.shape)
        )
        for one, of in zip(image, maps[:, :1]):
            seen = (one + 1) / 2 * 3131
            assert (seen - seen.min() - (of - of.min())).abs().max() < 0.1
            views.add(tuple(torch.diff(of[0, :2, :2].flatten())[[0, 2]].tolist()))
    assert len(views) > 1, "some are mirrored or turned"
    two = target_dls(tmp_path, ("map5", "map2"), **how).one_batch()[1]
    assert torch.equal(two[:, 0] - two[:, 1], torch.full((2, 20, 20), 30_000.0))


def test_targets_of_a_kind_move_as_its_truth_does(walls):
    how = {"bs": 3, "device": "cpu", "seed": 1}
    plain, moved = (target_dls(walls, augment=a, **how) for a in ((), "auto"))
    assert moved.augment == ("turn",)
    paired = paired_dls(walls, **how)
    turned = 0
    for (image, _maps), (i2, m2), batch in zip(plain.train, moved.train, paired.train):
        assert torch.equal(i2, batch[3]) and torch.equal(m2, batch[0])
        turned += sum(not torch.equal(a, b) for a, b in zip(image, i2))
    assert turned


@pytest.fixture
def uneven(tmp_path):
    "Forty images of one class, eight of another, three of a third; two tiles each of the first."
    names = [f"often/s{k}_tile{j}.tif" for k in range(20) for j in range(2)]
    names += [f"seldom/s{k}.tif" for k in range(8)] + [f"rare/s{k}.tif" for k in range(3)]
    return tree(tmp_path, names, (32, 32))


@pytest.mark.parametrize("seed", range(6))
def test_splits_are_even_in_each_class(uneven, seed):
    listed = list_images(uneven)
    train, valid = split_images(listed, 0.25, seed)
    assert listed.label[valid].value_counts().to_dict() == {"often": 10, "seldom": 2, "rare": 1}
    assert not set(listed.group[train]) & set(listed.group[valid])


@pytest.mark.parametrize("seed", range(4))
def test_groups_across_classes_stay_together(tmp_path, seed):
    "A specimen has images of both classes: it is on one side, and both classes are on both."
    rng = np.random.default_rng(seed)
    labels, groups = rng.choice(["A", "B"], 60, p=[0.8, 0.2]), rng.integers(0, 9, 60)
    train, valid = split_by_group(groups, 0.3, seed, labels)
    assert not set(groups[train]) & set(groups[valid])
    assert set(labels[train]) == set(labels[valid]) == {"A", "B"}
    assert abs(len(valid) - 18) <= 8


def test_no_class_is_held_back_as_a_whole(tmp_path):
    tree(tmp_path, ["A/1.tif", *(f"B/{k}.tif" for k in range(5))])
    for seed in range(8):
        listed = list_images(tmp_path)
        train, valid = split_images(listed, 0.4, seed)
        assert set(listed.label[train]) == {"A", "B"} and len(valid) == 2


def test_balanced_training_shows_each_class_equally_often(uneven):
    how = {"bs": 3, "label": True, "device": "cpu", "valid": 0.25}
    dls = image_dls(uneven, balance=True, **how)
    one, two = (np.concatenate([b[0] for b in dls.train]) for _ in range(2))
    assert len(one) == 36 and not np.array_equal(one, two)
    assert np.ptp(np.bincount(one)) <= 3
    plain = np.concatenate([b[0] for b in image_dls(uneven, **how).train])
    assert np.ptp(np.bincount(plain)) > 20
    valid = [b[0] for b in dls.valid]
    assert sum(map(len, valid)) == len(dls.valid_ds), "validation shows each image once"


def test_balanced_mixtures_show_each_class_equally_often(walls, uneven):
    "Of the simulated images and of the real ones, at the same share of a batch."
    how = {"ratio": 0.5, "bs": 4, "size": 32, "device": "cpu", "real_pixel_size": 0.03}
    lonely = list_images(walls).query("split == 'train'").label.value_counts()
    dls = mixed_dls(walls, uneven, balance=True, **how)
    shown = [batch[dls.fields.index("label")] for batch in dls.train]
    domain = torch.cat([batch[dls.fields.index("domain")] for batch in dls.train])
    labels = torch.cat(shown)
    assert all(len(one) == 4 for one in shown) and int(domain.sum()) == len(labels) // 2
    for part in (0, 1):
        counts = torch.bincount(labels[domain == part])
        counts = counts[counts > 0]
        assert counts.max() - counts.min() <= 1, counts
    plain = mixed_dls(walls, uneven, **how)
    labels = torch.cat(
        [b[plain.fields.index("label")][b[plain.fields.index("domain")] == 1] for b in plain.train]
    )
    assert np.ptp(torch.bincount(labels)[-3:].numpy()) > 1
    assert lonely.size > 1


def test_batches_travel_to_a_gpu_without_being_waited_for(walls, monkeypatch):
    "What a pinned loader gives is what any loader gives."
    how = {"bs": 2, "size": 40, "seed": 5, "device": "cpu", "num_workers": 0}
    plain, pinned = paired_dls(walls, **how).train, paired_dls(walls, **how).train
    sent = []
    begin = Travelling.arrived
    monkeypatch.setattr(Travelling, "arrived", lambda batch: sent.append(1) or begin(batch))
    list(plain)
    assert not sent
    pinned = pinned.new(pin_memory=True)
    assert same(list(paired_dls(walls, **how).train), list(pinned)) and len(sent) == len(pinned)
    bare = pinned.new(after_batch=noop)  # without a transform that takes it in
    assert all(isinstance(batch, tuple) for batch in bare)


def test_pages_of_a_stack_are_images_of_one_group(tmp_path):
    tree(tmp_path, ["A/one.tif", "A/two.tif", "B/three.tif"], (32, 32))
    rng = np.random.default_rng(0)
    pages = rng.integers(0, 4000, (5, 32, 32)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "B" / "stack.tif", pages, photometric="minisblack")
    write_tiff(tmp_path / "A" / "channels.tif", rng.random((3, 32, 32)), 0.03)
    listed = list_images(tmp_path)
    stack = listed[listed.image == tmp_path / "B" / "stack.tif"]
    assert len(listed) == 4 + 5 and stack.frame.tolist() == list(range(5))
    assert stack.group.nunique() == 1 and set(stack.label) == {"B"}
    assert listed.drop(stack.index).frame.isna().all()
    for seed in range(6):
        train, valid = split_images(listed, 0.4, seed)
        assert not set(listed.group[train]) & set(listed.group[valid])
    (tmp_path / "A" / "channels.tif").unlink()
    pixel_size = {"pixel_size": 0.03, "percentiles": (0, 100), "device": "cpu", "bs": 1}
    dls = image_dls(tmp_path, memory_gb=0, num_workers=0, **pixel_size)
    pixels = dls.train.pixels
    for i, row in pixels.listed.iterrows():
        if not pd.isna(row.frame):
            assert np.array_equal(pixels.item(i)[0], pages[row.frame])
    assert "frame" not in list_images(tree(tmp_path / "plain", ["a.tif", "b.tif"]))


def test_the_class_of_one_image(walls, uneven):
    listed = list_images(walls)
    assert [label_of(p) for p in listed.image] == listed.label.tolist()
    listed = list_images(uneven)
    assert [label_of(p, uneven) for p in listed.image] == listed.label.tolist()
    assert label_of(uneven / "often" / "s0_tile0.tif") == "often"
    assert label_of("XYZ/Images/1.png") == "XYZ" and label_of("XYZ/1.png", ".") == "XYZ"
    with pytest.raises(InputError, match="is not in"):
        label_of(listed.image[0], walls)
    with pytest.raises(InputError, match="does not name images/00/9.tif: add a line"):
        label_of(walls / "images" / "00" / "9.tif")


# --- the rim of a condition


@pytest.mark.parametrize("preset, limit", [("ideal", 0.005), ("good", 0.005), ("typical", 0.02)])
def test_columns_beyond_the_edge_are_in_the_condition(monkeypatch, preset, limit):
    "The outermost 0.25 nm of the channel sites, against the columns of a crystal that is larger than the image."
    from microgen.kinds.walls import recipe as simulated

    names = ["y_nm", "x_nm", "site", "disp_pm"]
    shape, pixel_size = (128, 128), 0.015
    rim = np.ones(shape, bool)
    rim[17:-17, 17:-17] = False
    asked = Recipe(n=3, size=128, pixel_size=pixel_size, preset=preset, seed=4)
    inside = simulated._inside
    monkeypatch.setattr(simulated, "_inside", lambda recipe, table: table[names])
    errors = []
    for index in range(3):
        one = simulated.simulate(asked, index)
        exact = sites(one.table, shape, pixel_size)
        monkeypatch.setattr(simulated, "TABLE", names)
        listed = inside(asked, one.table)
        made = condition(one.maps, listed, shape, pixel_size, ("sites",))[0]
        assert len(listed) < len(one.table) and np.abs(made - exact)[~rim].max() < 1e-3
        errors.append(((made - exact)[rim] ** 2).mean())
    assert np.sqrt(np.mean(errors)) < limit


# --- bad input: one sentence, with what to do

TABLES = {
    "NaN": lambda t: t.assign(y_nm=np.nan),
    "infinite": lambda t: t.assign(x_nm=np.inf),
    "site": lambda t: t.drop(columns="site"),
    "missing": lambda t: t.assign(site=None),
}


@pytest.mark.parametrize("what", [*TABLES, "corrupt"])
def test_bad_tables_are_named(copy, what):
    path = list_images(copy).table[3]
    if what == "corrupt":
        path.write_bytes(b"PAR1 no table")
    else:
        TABLES[what](pd.read_parquet(path)).to_parquet(path)
    with pytest.raises(
        InputError, match=f"1 of 12 images cannot be read.*{path.name}.*build the dataset again"
    ) as e:
        paired_dls(copy, bs=2)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("column", ["label", "file_name", "split"])
def test_gaps_in_the_metadata(copy, column):
    meta = pd.read_csv(copy / "metadata.csv")
    meta[column] = meta[column].where(meta.index != 4)
    meta.to_csv(copy / "metadata.csv", index=False)
    with pytest.raises(
        InputError, match=f"1 of 12 images have no {column} in .*metadata.csv, the first in line 6"
    ):
        paired_dls(copy)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b'file_name,label\n"a'])
def test_metadata_that_are_no_table(copy, content):
    (copy / "metadata.csv").write_bytes(content)
    with pytest.raises((InputError, ReadError), match="metadata.csv") as e:
        paired_dls(copy)
    assert "\n" not in str(e.value)


def test_a_split_of_another_name(copy):
    meta = pd.read_csv(copy / "metadata.csv")
    meta.assign(split=meta.split.replace("test", "holdout")).to_csv(
        copy / "metadata.csv", index=False
    )
    with pytest.raises(InputError, match="split 'holdout': call them train, valid or test"):
        paired_dls(copy)


def test_images_that_the_metadata_do_not_name_are_told_of(copy):
    tree(copy / "images", ["00/more.tif", "01/new.tif"])
    with pytest.warns(
        UserWarning, match="^2 images in .* does not name them; the first is images/00/more.tif.$"
    ) as told:
        paired_dls(copy, bs=2, device="cpu")
    assert len(told) == 1
    run = subprocess.run(
        [
            sys.executable,
            "-c",
            f"from microgen.data.files import list_images; list_images({str(copy)!r})",
        ],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    assert (
        run.stderr.startswith("microgen:0: UserWarning: 2 images") and run.stderr.count("\n") == 1
    )


@pytest.mark.parametrize(
    "load",
    [
        paired_dls,
        image_dls,
        lambda d, **kw: unpaired_dls(d, d, **kw),
        lambda d, **kw: mixed_dls(d, d, **kw),
    ],
)
@pytest.mark.parametrize("bs", [0, -3])
def test_no_image_in_a_batch(walls, load, bs):
    with pytest.raises(InputError, match="above zero|at least one of each"):
        load(walls, bs=bs)


def test_no_pixel_in_a_crop(walls):
    with pytest.raises(InputError, match="size is 0"):
        paired_dls(walls, size=0)


def damaged(path, value):
    data = tifffile.imread(path)
    data[..., 3, 3] = value
    tifffile.imwrite(path, data)


def test_nan_in_an_image(copy):
    damaged(list_images(copy).image[2], np.nan)
    with pytest.raises(InputError, match="000002.tif has no value in 1 of 4096 pixels.*NaN"):
        paired_dls(copy)


def test_nan_in_a_map(copy):
    maps = list_images(copy).maps[1]
    data = read(maps).data.copy()
    data[0, 3, 3] = np.nan
    tifffile.imwrite(maps, data, photometric="minisblack", planarconfig="separate")
    with pytest.raises(InputError, match="has no value in 1 of 4096 pixels.*NaN"):
        paired_dls(copy)


def test_a_folder_of_corrupt_files(tmp_path):
    for k in range(3):
        (tmp_path / f"{k}.tif").write_bytes(os.urandom(300))
    with pytest.raises((InputError, OSError), match="0.tif"):
        image_dls(tmp_path)


def test_maps_of_another_size_than_the_image(copy):
    path = list_images(copy).maps[4]
    write_tiff(
        path,
        read(path).data[:, :50],
        0.03,
        {"channels": ["Q", "phi", "disp_pm", "polarisation", "wall"]},
    )
    with pytest.raises(InputError, match="50 × 64 pixels, its image 64 × 64"):
        paired_dls(copy)


def test_fewer_maps_than_images(copy):
    list_images(copy).maps[4].unlink()
    with pytest.raises(InputError, match="1 of the 12 images .* lack their maps"):
        paired_dls(copy)


def test_one_image(tmp_path):
    with pytest.raises(InputError, match=f"There is one image, {tmp_path}/a.tif.*mixed_dls"):
        image_dls(tree(tmp_path, ["a.tif"]))


def test_one_group(tmp_path):
    with pytest.raises(InputError, match="of one group, '/.*none can be held back"):
        image_dls(tree(tmp_path, ["a_tile0.tif", "a_tile1.tif", "a_tile2.tif"]))


def test_empty_class(tmp_path):
    (tree(tmp_path, ["A/a.tif", "A/b.tif"]) / "B").mkdir()
    with pytest.raises(InputError, match="The class 'B'"):
        image_dls(tmp_path)


def test_class_that_is_only_in_validation(copy):
    meta = pd.read_csv(copy / "metadata.csv")
    meta.loc[meta.label == "UP", "split"] = "valid"
    meta.to_csv(copy / "metadata.csv", index=False)
    with pytest.raises(InputError, match="'UP' has no image to train on"):
        paired_dls(copy)


def test_loading_needs_no_torchvision_and_no_vision_all():
    code = "import sys, microgen.data.load; print([m for m in ('torchvision', 'fastai.vision.all', 'kornia') if m in sys.modules])"
    out = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
    )
    assert out.stdout.strip() == "[]", out.stdout + out.stderr


@pytest.mark.skipif(
    "MICROGEN_TEST_DATA" not in os.environ,
    reason="set MICROGEN_TEST_DATA to a folder with real images (stem/)",
)
def test_real_micrographs_load_with_their_scale(walls, tmp_path):
    "A real BaTiO3 film and simulated walls in one batch, at one pixel size."
    source = Path(os.environ["MICROGEN_TEST_DATA"]) / "stem" / "BTO_crystal_1.dm4"
    image = read(source)
    for k, part in enumerate(image.tiles(200)[:4]):
        part.save(tmp_path / "BTO" / f"spot{k}.tif")
    shutil.copy(source, tmp_path / "BTO" / source.name)
    dls = mixed_dls(walls, tmp_path, ratio=0.5, bs=4, size=64, device="cpu")
    maps, label, wall, domain, seen = dls.one_batch()
    assert "BTO" in dls.vocab and int(domain.sum()) == 2 and torch.isfinite(seen).all()


@pytest.mark.skipif(
    "MICROGEN_TEST_DATA" not in os.environ,
    reason="set MICROGEN_TEST_DATA to a folder with real images (stem/)",
)
def test_a_folder_of_measurements_joins_as_it_is(walls, tmp_path):
    "Files of four microscopes' formats beside a folder of structures; the picture without a scale is asked about."
    source = Path(os.environ["MICROGEN_TEST_DATA"]) / "stem"
    with pytest.raises(
        InputError, match="^hREMnO3_domain_wall_300kV.png does not say how large its pixels are"
    ):
        mixed_dls(walls, source, bs=4, size=48, device="cpu")
    shutil.copytree(source, tmp_path / "stem", ignore=shutil.ignore_patterns("*.png"))
    with pytest.warns(UserWarning, match="states no unit"):
        dls = mixed_dls(walls, tmp_path / "stem", bs=4, size=48, device="cpu")
    assert (
        dls.vocab[-1] == "typeC"
        and "real" in dls.vocab
        and len(dls.train_ds) == (list_images(walls).split == "train").sum() + 4
    )
