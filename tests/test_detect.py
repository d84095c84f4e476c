"""Counting particles: real images, bad input, and folders."""
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from scipy import ndimage as ndi

from microgen.core import InputError
from microgen.count.batch import count_images
from microgen.count.detect import Detector, detect
from microgen.count.propose import overlay_mask

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
from counting_detect import centred, discs, matched, sem  # noqa: E402


def data():
    folder = os.environ.get("MICROGEN_TEST_DATA")
    if not folder or not (Path(folder) / "particles").is_dir():
        pytest.skip("set MICROGEN_TEST_DATA to the folder that holds particles/ to test on real images")
    return Path(folder) / "particles"


def grid(pitch, radius, shape, noise=4.0):
    yy, xx = np.mgrid[: shape[0], : shape[1]]
    d = np.hypot(yy % pitch - pitch / 2, xx % pitch - pitch / 2)
    rng = np.random.default_rng(0)
    return (50 + 100 * ndi.gaussian_filter(np.clip(radius - d + 0.5, 0, 1), 0.8) + noise * rng.normal(size=shape)).astype(np.float32)


def test_real_sem_images_without_settings():
    tp = total = 0
    for name, image, label, _ in sem(data() / "sem"):
        found = detect(image)
        pairs, both = len(matched(label, found.labels)), label.max() + len(found.particles)
        assert 2 * pairs / both >= 0.5, f"{name}: F1 {2 * pairs / both:.2f}"
        tp, total = tp + pairs, total + both
    assert 2 * tp / total >= 0.8


def test_small_catalyst_image():
    from skimage.io import imread

    image = imread(data() / "catalysts" / "images" / "Ru1.jpg")
    high, wide = image.shape[:2]
    boxes = np.loadtxt(data() / "catalysts" / "labels" / "Ru1.txt")[:, [2, 1, 4, 3]] * [high, wide, high, wide]
    p = detect(image).particles
    assert 2 * len(centred(boxes, p["y_px"].to_numpy(), p["x_px"].to_numpy())) / (len(boxes) + len(p)) >= 0.75


@pytest.mark.parametrize("touching, least", [(0, 0.97), (1, 0.93)])
def test_simulated(touching, least):
    image, label, diameter = discs(11, touching=touching)
    found = detect(image, 1.0)
    pairs = matched(label, found.labels)
    assert 2 * len(pairs) / (label.max() + len(found.particles)) >= least
    ratio = found.particles["diameter_nm"].to_numpy()[pairs[:, 1]] / diameter[pairs[:, 0]]
    assert abs(np.median(ratio) - 1) < 0.03


def test_one_particle():
    yy, xx = np.mgrid[:128, :160]
    image = 40 + 100 * ndi.gaussian_filter((np.hypot(yy - 60, xx - 70) < 15).astype(float), 1)
    found = detect(image + 3 * np.random.default_rng(0).normal(size=image.shape), 2.0)
    assert len(found.particles) == 1
    row = found.particles.iloc[0]
    assert abs(row["y_nm"] - 120) < 1 and abs(row["x_nm"] - 140) < 1 and abs(row["diameter_nm"] - 60) < 2.5


@pytest.mark.parametrize("value", [0.0, 255.0])
def test_blank_and_saturated(value):
    summary = detect(np.full((64, 64), value)).summary
    assert summary["n_particles"] == 0 and "blank or saturated" in " ".join(summary["notes"])


def test_noise_alone_holds_no_particle():
    image = 100 + 10 * np.random.default_rng(3).normal(size=(256, 256))
    assert detect(image, 1.0).summary["n_particles"] <= 2


def test_clipped_at_eight_bits():
    image = np.clip(1.8 * grid(40, 9, (200, 240)), 0, 255).astype(np.uint8)
    found = detect(image, 1.0)
    assert len(found.particles) == 30 and "clipped" in " ".join(found.summary["notes"])


def test_small_clipped_particles_are_no_letters():
    rng, spots = np.random.default_rng(0), np.zeros((256, 256))
    spots[tuple(rng.integers(10, 246, (2, 60)))] = 1
    image = 30 + 5 * rng.normal(size=spots.shape) + 9000 * ndi.gaussian_filter(spots, 1.4)
    assert not overlay_mask(np.clip(image, 0, 255)).any()


def test_pixel_size_missing_is_said():
    found = detect(grid(40, 9, (200, 240)))
    assert found.unit == "px" and "diameter_px" in found.particles and "no pixel size" in " ".join(found.summary["notes"])


def test_edge_weights_count_what_the_frame_hides():
    found = detect(grid(50, 11, (210, 230)), 1.0)
    cut = found.particles["on_edge"]
    assert (found.particles.loc[cut, "edge_weight"] == 0).all() and (found.particles.loc[~cut, "edge_weight"] > 1).all()
    assert detect(grid(50, 11, (210, 230)), 1.0, Detector(edge_rule="count")).particles["edge_weight"].eq(1).all()


def test_twenty_thousand_particles():
    found = detect(grid(10, 3, (1000, 2000)), 1.0)
    assert abs(len(found.particles) - 20_000) < 200


def test_turning_the_image_turns_the_result():
    image, _, _ = discs(4, (200, 200), 20)
    a, b = (detect(i, 1.0).particles for i in (image, np.rot90(image).copy()))
    assert len(a) == len(b) == 20
    away = np.hypot(199 - a["x_nm"].to_numpy()[:, None] - b["y_nm"].to_numpy(), a["y_nm"].to_numpy()[:, None] - b["x_nm"].to_numpy())
    ratio = a["diameter_nm"].to_numpy() / b["diameter_nm"].to_numpy()[away.argmin(1)]
    assert away.min(1).max() < 1 and abs(np.median(ratio) - 1) < 0.01 and ratio.std() < 0.05


def test_same_image_same_table():
    image, _, _ = discs(4, (200, 200), 20)
    assert detect(image, 1.0).particles.equals(detect(image, 1.0).particles)


def test_what_is_no_image():
    with pytest.raises(InputError, match="too small"):
        detect(np.zeros((3, 3)))


def test_a_bad_file_does_not_stop_the_rest(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", grid(40, 9, (120, 160)))
    (tmp_path / "b.tif").write_bytes(b"II*\0damaged")
    table = count_images(tmp_path, tmp_path / "out", workers=2, progress=False)
    assert list(table["error"] == "") == [True, False]
    assert json.loads((tmp_path / "out" / "a" / "summary.json").read_text())["n_particles"] == 12
    assert not (tmp_path / "out" / "b").exists() and not list((tmp_path / "out").rglob("*.tmp"))
