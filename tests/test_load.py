"""Loading: splits, order and resume, truth that stays with its pixels, real files and bad ones."""
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

from microgen.core import InputError
from microgen.data.build import build
from microgen.data.condition import CHANNELS, condition, move
from microgen.data.files import list_images, split_by_group, split_images, unscale
from microgen.data.load import image_dls, mixed_dls, paired_dls, unpaired_dls
from microgen.data.walls import Recipe
from microgen.io import read, write_tiff


@pytest.fixture(scope="module")
def walls(tmp_path_factory):
    "Nine small images of domains and a wall."
    out = tmp_path_factory.mktemp("data") / "walls"
    recipe = Recipe(walls=("UP", "DN", "typeC"), n=12, size=64, pixel_size=0.03, seed=3, splits=(0.5, 0.25, 0.25))
    return build(recipe, out, workers=1, progress=False)


@pytest.fixture
def copy(walls, tmp_path):
    "A copy of the dataset, to be damaged."
    return Path(shutil.copytree(walls, tmp_path / "copy"))


def tree(folder, names, shape=(48, 48), seed=0, pixel_size=0.03):
    "Noise as calibrated 32-bit images."
    rng = np.random.default_rng(seed)
    for name in names:
        write_tiff(Path(folder) / name, rng.normal(100, 10, shape), pixel_size)
    return Path(folder)


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for one, two in zip(a, b) for x, y in zip(one, two))


def test_batches_hold_the_truth_of_the_files(walls):
    "Without augmentation a validation batch is the files: image, channels, wall, label."
    dls = paired_dls(walls, bs=2, device="cpu", augment=(), percentiles=(0, 100))
    listed = list_images(walls)
    rows = split_images(listed)[1]
    maps, label, wall, image = (torch.cat(x) for x in zip(*dls.valid))
    for k, i in enumerate(rows):
        data = read(listed.image[i]).data
        np.testing.assert_allclose(unscale(image[k, 0].numpy(), (data.min(), data.max())), data, atol=1e-3 * np.ptp(data))
        truth = dict(zip(("Q", "phi", "disp_pm", "polarisation", "wall"), read(listed.maps[i]).data))
        drawn = condition(truth, pd.read_parquet(listed.table[i]), data.shape, 0.03, (*CHANNELS, "wall"))
        np.testing.assert_allclose(maps[k].numpy(), drawn[:-1], atol=1e-3)
        np.testing.assert_array_equal(wall[k, 0].numpy(), drawn[-1])
        assert dls.vocab[label[k]] == listed.label[i]


def test_the_split_of_the_metadata_is_kept_and_test_images_stay_away(walls):
    dls, listed = paired_dls(walls, bs=2, device="cpu"), list_images(walls)
    assert [len(dl.dataset) for dl in dls.loaders] == [(listed.split == s).sum() for s in ("train", "valid", "test")]


@pytest.mark.parametrize("seed", range(5))
def test_tiles_of_one_image_stay_together(tmp_path, seed):
    tree(tmp_path, [f"A/s{s}_r{r}_c{c}.tif" for s in range(7) for r in range(1 + s % 3) for c in range(2)])
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
    def loaders(): return paired_dls(walls, bs=2, size=40, seed=5, device="cpu", contrast=0.2)
    whole = loaders()
    batches = [b for _ in range(2) for b in whole.train]
    dls = loaders()
    seen = []
    while len(seen) < stop:
        for b in dls.train:
            seen.append(b)
            if len(seen) == stop: break
    torch.manual_seed(123)
    np.random.seed(9)
    later = loaders()
    later.load_rng_state(dls.rng_state())
    rest = list(later.train)
    while len(rest) < len(batches) - stop: rest += list(later.train)
    assert same(seen + rest, batches)


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only")
def test_any_number_of_workers_gives_the_same_batches(walls):
    kept, read_each = (paired_dls(walls, bs=2, size=40, seed=5, device="cpu", memory_gb=m, num_workers=w) for m, w in ((4, 0), (0, 2)))
    assert same(list(kept.train), list(read_each.train))


def test_a_mirrored_batch_is_the_truth_of_the_mirrored_image(walls):
    "Both mirrors and the turn on UP and DN: each image is one of four views, and its maps are that view's."
    def loaders(augment): return paired_dls(walls, bs=4, classes=("UP", "DN"), augment=augment, seed=1, device="cpu")
    plain, moved = loaders(()), loaders("auto")
    assert moved.augment == ("mirror_lr", "mirror_ud", "turn")
    views = set()
    for _ in range(6):
        for (m, l, w, i), (m2, l2, w2, i2) in zip(plain.train, moved.train):
            for k in range(len(l)):
                view, = [v for v in (None, *moved.augment) if torch.equal(i2[k], i[k] if v is None else move(v, i[k][None])[0])]
                views.add(view)
                assert int(l2[k]) == int(l[k]) ^ (view in ("mirror_ud", "turn"))
                assert torch.allclose(m2[k], m[k] if view is None else move(view, m[k][None], CHANNELS)[0], atol=1e-5)
    assert len(views) == 4


def test_no_global_random_state_is_used(walls):
    torch.manual_seed(0), np.random.seed(0)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    dls = paired_dls(walls, bs=2, size=40, device="cpu", contrast=0.2, gamma=0.2)
    first = list(dls.train)
    assert torch.equal(states[0], torch.get_rng_state()) and (states[1] == np.random.get_state()[1]).all()
    assert all(b[3].abs().max() <= 1 for b in first)


def test_real_images_of_other_pixel_size_join_simulated_ones(walls, tmp_path):
    "Real images are resampled to the pixels of the simulated ones, and have no maps."
    tree(tmp_path, [f"s{k}.tif" for k in range(5)], (60, 60), pixel_size=0.06)
    dls = mixed_dls(walls, tmp_path, ratio=0.5, bs=4, size=48, device="cpu", seed=2)
    for _ in range(2):
        for maps, label, wall, domain, image in dls.train:
            assert int(domain.sum()) == 2 and image.shape == (4, 1, 48, 48)
            assert maps[domain == 1].abs().max() == 0 and maps[domain == 0].abs().amax((1, 2, 3)).min() > 0.1
            assert all((dls.vocab[k] == "real") == bool(d) for k, d in zip(label, domain))
    pair = unpaired_dls(walls, tmp_path, bs=2, size=48, device="cpu")
    assert [x.shape for x in pair.one_batch()] == [(2, 1, 48, 48)] * 2
    assert len(list(pair.train)) == 3


def test_images_without_scale_are_loaded_alone_and_asked_for_when_mixed(walls, tmp_path):
    from PIL import Image
    for k in range(4):
        Image.fromarray(np.random.default_rng(k).integers(0, 65535, (64, 64)).astype(np.uint16)).save(tmp_path / f"s{k}.png")
    alone = image_dls(tmp_path, bs=2, size=32, device="cpu")
    assert alone.pixel_size is None and len(np.unique(alone.one_batch()[0])) > 1500, "more than 8 bits"
    assert alone.show_batch(max_n=2) is not None
    with pytest.raises(InputError, match="pixel size"):
        mixed_dls(walls, tmp_path, bs=4, size=32, device="cpu")
    assert len(mixed_dls(walls, tmp_path, ratio=0.5, bs=4, size=32, real_pixel_size=0.03, device="cpu").one_batch()) == 5


def test_a_learner_trains_and_shows_its_results(walls):
    "fastai's own Learner takes the batches: two inputs, two targets."
    from fastai.callback.progress import ProgressCallback
    from fastai.learner import Learner

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Conv2d(4, 1, 1)

        def forward(self, maps, label): return self.layer(maps)

    dls = paired_dls(walls, bs=2, size=32, device="cpu")
    learn = Learner(dls, Net(), loss_func=lambda out, wall, image: (out - image).square().mean(), lr=0.05)
    learn.remove_cb(ProgressCallback)
    with learn.no_logging():
        before = learn.validate()[0]
        learn.fit(3)
    assert learn.validate()[0] < before
    fig = dls.valid.show_results(dls.valid.one_batch(), learn.model(*dls.valid.one_batch()[:2]), max_n=2)
    assert "generated" in [ax.get_title() for ax in fig.axes]


# --- bad input: one sentence, with what to do

def damaged(path, value):
    data = tifffile.imread(path)
    data[..., 3, 3] = value
    tifffile.imwrite(path, data)


def test_nan_in_an_image(copy):
    damaged(list_images(copy).image[2], np.nan)
    with pytest.raises(InputError, match="1 of 12 images cannot be read.*NaN"): paired_dls(copy)


def test_nan_in_a_map(copy):
    maps = list_images(copy).maps[1]
    data = read(maps).data.copy()
    data[0, 3, 3] = np.nan
    tifffile.imwrite(maps, data, photometric="minisblack", planarconfig="separate")
    with pytest.raises(InputError, match="cannot be read.*NaN"): paired_dls(copy)


def test_a_folder_of_corrupt_files(tmp_path):
    for k in range(3): (tmp_path / f"{k}.tif").write_bytes(os.urandom(300))
    with pytest.raises((InputError, OSError), match="0.tif"): image_dls(tmp_path)


def test_maps_of_another_size_than_the_image(copy):
    path = list_images(copy).maps[4]
    write_tiff(path, read(path).data[:, :50], 0.03, {"channels": ["Q", "phi", "disp_pm", "polarisation", "wall"]})
    with pytest.raises(InputError, match="50 × 64 pixels, its image 64 × 64"): paired_dls(copy)


def test_fewer_maps_than_images(copy):
    list_images(copy).maps[4].unlink()
    with pytest.raises(InputError, match="1 of the 12 images .* lack their maps"): paired_dls(copy)


def test_one_image(tmp_path):
    with pytest.raises(InputError, match="There is one image"): image_dls(tree(tmp_path, ["a.tif"]))


def test_one_group(tmp_path):
    with pytest.raises(InputError, match="none can be held back"):
        image_dls(tree(tmp_path, ["a_tile0.tif", "a_tile1.tif", "a_tile2.tif"]))


def test_empty_class(tmp_path):
    (tree(tmp_path, ["A/a.tif", "A/b.tif"]) / "B").mkdir()
    with pytest.raises(InputError, match="The class 'B'"): image_dls(tmp_path)


def test_class_that_is_only_in_validation(copy):
    meta = pd.read_csv(copy / "metadata.csv")
    meta.loc[meta.label == "UP", "split"] = "valid"
    meta.to_csv(copy / "metadata.csv", index=False)
    with pytest.raises(InputError, match="'UP' has no image to train on"): paired_dls(copy)


def test_loading_needs_no_torchvision_and_no_vision_all():
    code = "import sys, microgen.data.load; print([m for m in ('torchvision', 'fastai.vision.all', 'kornia') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)})
    assert out.stdout.strip() == "[]", out.stdout + out.stderr


@pytest.mark.skipif("MICROGEN_TEST_DATA" not in os.environ, reason="set MICROGEN_TEST_DATA to a folder with real images (stem/)")
def test_real_micrographs_load_with_their_scale(walls, tmp_path):
    "A real BaTiO3 film and simulated walls in one batch, at one pixel size."
    source = Path(os.environ["MICROGEN_TEST_DATA"]) / "stem" / "BTO_crystal_1.dm4"
    image = read(source)
    for k, part in enumerate(image.tiles(200)[:4]): part.save(tmp_path / "BTO" / f"spot{k}.tif")
    shutil.copy(source, tmp_path / "BTO" / source.name)
    dls = mixed_dls(walls, tmp_path, ratio=0.5, bs=4, size=64, device="cpu")
    maps, label, wall, domain, seen = dls.one_batch()
    assert "BTO" in dls.vocab and int(domain.sum()) == 2 and torch.isfinite(seen).all()
