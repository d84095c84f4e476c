"""Counting particles: real images, bad input, and folders."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile
from scipy import ndimage as ndi

from microgen.cli import app
from microgen.core import InputError, Micrograph
from microgen.count.batch import count_images, explore
from microgen.count.detect import Detection, Detector, detect, save
from microgen.count.propose import overlay_mask
from microgen.count.sample import count_sample
from microgen.io.files import read
from microgen.sem.preset import scene_preset
from microgen.sem.scene import simulate_scene

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
from counting_detect import centred, discs, matched, sem  # noqa: E402


def data():
    folder = os.environ.get("MICROGEN_TEST_DATA")
    if not folder or not (Path(folder) / "particles").is_dir():
        pytest.skip(
            "set MICROGEN_TEST_DATA to the folder that holds particles/ to test on real images"
        )
    return Path(folder) / "particles"


def grid(pitch, radius, shape, noise=4.0):
    yy, xx = np.mgrid[: shape[0], : shape[1]]
    d = np.hypot(yy % pitch - pitch / 2, xx % pitch - pitch / 2)
    rng = np.random.default_rng(0)
    return (
        50
        + 100 * ndi.gaussian_filter(np.clip(radius - d + 0.5, 0, 1), 0.8)
        + noise * rng.normal(size=shape)
    ).astype(np.float32)


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
    boxes = np.loadtxt(data() / "catalysts" / "labels" / "Ru1.txt")[:, [2, 1, 4, 3]] * [
        high,
        wide,
        high,
        wide,
    ]
    p = detect(image).particles
    assert (
        2 * len(centred(boxes, p["y_px"].to_numpy(), p["x_px"].to_numpy())) / (len(boxes) + len(p))
        >= 0.75
    )


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
    assert (
        abs(row["y_nm"] - 120) < 1
        and abs(row["x_nm"] - 140) < 1
        and abs(row["diameter_nm"] - 60) < 2.5
    )


@pytest.mark.parametrize("value", [0.0, 255.0])
def test_blank_and_saturated(value):
    summary = detect(np.full((64, 64), value)).summary
    assert summary["n_particles"] == 0 and "blank or saturated" in " ".join(summary["notes"])


@pytest.mark.parametrize("seed", range(4))
def test_noise_alone_holds_no_particle(seed):
    image = 100 + 10 * np.random.default_rng(seed).normal(size=(256, 256))
    summary = detect(image, 1.0).summary
    assert summary["n_particles"] == 0 and "no particle" in summary["notes"][-1]


EMPTY = {
    "carbon_black": 1
}  # places of a thick support that cannot be told from particles; haadf has many


@pytest.mark.parametrize(
    "preset",
    [
        "gold_on_carbon",
        "spheres",
        "rafts",
        "cubes",
        "agglomerates",
        "rings",
        "small",
        "carbon_black",
        "bright_field",
    ],
)
def test_a_bare_support_holds_no_particle(preset):
    for seed in range(2):
        found = detect(simulate_scene(scene_preset(preset, size=384, n=0), rng=seed).image)
        assert len(found.particles) <= EMPTY.get(preset, 0)
        assert "do not stand out" in " ".join(found.summary["notes"])


def test_few_particles_stand_out_of_their_support():
    scene = simulate_scene(scene_preset("cubes", size=384, n=4), rng=0)
    assert len(detect(scene.image).particles) >= 4
    scene = simulate_scene(scene_preset("gold_on_carbon", size=384, n=1), rng=0)
    assert len(detect(scene.image).particles) == 1


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
    assert (
        found.unit == "px"
        and "diameter_px" in found.particles
        and "no pixel size" in " ".join(found.summary["notes"])
    )


def test_edge_weights_count_what_the_frame_hides():
    found = detect(grid(50, 11, (210, 230)), 1.0)
    cut = found.particles["on_edge"]
    assert (found.particles.loc[cut, "edge_weight"] == 0).all() and (
        found.particles.loc[~cut, "edge_weight"] > 1
    ).all()
    assert (
        detect(grid(50, 11, (210, 230)), 1.0, Detector(edge_rule="count"))
        .particles["edge_weight"]
        .eq(1)
        .all()
    )


def test_twenty_thousand_particles():
    found = detect(grid(10, 3, (1000, 2000)), 1.0)
    assert abs(len(found.particles) - 20_000) < 200


def test_turning_the_image_turns_the_result():
    image, _, _ = discs(4, (200, 200), 20)
    a, b = (detect(i, 1.0).particles for i in (image, np.rot90(image).copy()))
    assert len(a) == len(b) == 20
    away = np.hypot(
        199 - a["x_nm"].to_numpy()[:, None] - b["y_nm"].to_numpy(),
        a["y_nm"].to_numpy()[:, None] - b["x_nm"].to_numpy(),
    )
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


def test_columns_of_the_table(tmp_path):
    image = grid(40, 9, (120, 160))
    length = [
        "id",
        "y_{0}",
        "x_{0}",
        "diameter_{0}",
        "area_{0}2",
        "mask_area_{0}2",
        "perimeter_{0}",
        "circularity",
        "aspect",
        "on_edge",
        "edge_weight",
        "score",
        "contrast",
        "free_outline",
    ]
    for size, unit in ((0.5, "nm"), (None, "px")):
        header = (
            (save(detect(image, size), tmp_path / unit) / "particles.csv")
            .read_text()
            .splitlines()[0]
        )
        assert header.split(",") == [c.format(unit) for c in length]


def test_labels_are_calibrated_and_wide_enough(tmp_path):
    label = np.arange(70_000, dtype=np.int32).reshape(250, 280) + 1
    few = detect(grid(40, 9, (250, 280)), 0.5)
    many = Detection(
        few.micrograph, pd.DataFrame({"edge_weight": np.ones(70_000)}), label, few.summary, few.unit
    )
    for name, one, kind in (("few", few, np.uint16), ("many", many, np.uint32)):
        file = save(one, tmp_path / name) / "labels.tif"
        assert tifffile.imread(file).dtype == kind and (tifffile.imread(file) == one.labels).all()
        assert read(file).pixel_size == (0.5, 0.5)


@pytest.mark.parametrize(
    "setting, words",
    [
        ({"h": "abc"}, "h='abc'"),
        ({"levels": 1}, "rising"),
        ({"accept": True}, "positive"),
        ({"h": 2}, "at most 1"),
        ({"overlap": None}, "positive"),
        ({"polarity": 3}, "one of"),
        ({"least_snr": float("nan")}, "positive"),
    ],
)
def test_every_setting_is_checked(setting, words):
    with pytest.raises(InputError, match=words):
        Detector(**setting)


def test_nothing_counted_is_drawn_as_a_sentence(tmp_path):
    (tmp_path / "torn.tif").write_bytes(b"torn")
    sample = count_sample(tmp_path / "torn.tif", tmp_path / "out", calibrate=False, workers=1)
    assert (
        len(sample.particles()) == 0
        and "No image could be counted" in sample.show().texts[0].get_text()
    )


def test_a_folder_of_others_is_refused_and_stays(tmp_path):
    "Also one with a summary.csv and folders of the names that a count would give."
    Micrograph(grid(40, 9, (120, 160)), 1.0).save(tmp_path / "a.tif")
    out = tmp_path / "out"
    (out / "a").mkdir(parents=True)
    for name in ("summary.csv", "sizes.json", "a/particles.csv", "a/mine.txt"):
        (out / name).write_text("weeks of work", encoding="utf-8")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for images in (tmp_path / "a.tif", tmp_path / "mistyped.tif"):
        with pytest.raises(InputError, match="is not empty|there is no file"):
            count_sample(images, out, calibrate=False, workers=1)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_second_count_deletes_nothing(tmp_path):
    "A mistyped name and another sample are refused; the same images go on, with more of them."
    for name, n in (("a", 40), ("b", 41), ("c", 42)):
        Micrograph(grid(n, 9, (120, 160)), 1.0).save(tmp_path / f"{name}.tif")
    images, out = [tmp_path / "a.tif", tmp_path / "b.tif"], tmp_path / "out"
    count_sample(images, out, calibrate=False, workers=1)
    (out / "a" / "mine.txt").write_text("a note", encoding="utf-8")

    def written():
        return {p: p.stat().st_mtime_ns for p in out.glob("*/*")}

    before = written()
    for wrong, why in (
        ([tmp_path / "a.tif", tmp_path / "typo.tif"], "no file .*typo.tif"),
        ([tmp_path / "c.tif"], "holds the count of .* too"),
    ):
        with pytest.raises(InputError, match=why):
            count_sample(wrong, out, calibrate=False, workers=1)
    with pytest.raises(InputError, match="another count .detector is"):
        count_images(images, out, detector=Detector(accept=0.5), workers=1, progress=False)
    assert written() == before
    more = count_sample([*images, tmp_path / "c.tif"], out, calibrate=False, workers=1)
    assert len(more.counted) == 3 and before.items() <= written().items()
    assert (out / "c" / "particles.csv").exists()


def test_an_interrupted_count_goes_on(tmp_path):
    "Killed between two images: what was finished is not counted again, and the table is the same."
    for name in "abc":
        Micrograph(grid(40, 9, (120, 160)) + ord(name), 1.0).save(tmp_path / f"{name}.tif")
    code = "import sys; from microgen.count.batch import count_images; count_images(sys.argv[1], sys.argv[2], workers=1)"
    out = tmp_path / "out"
    run = subprocess.Popen([sys.executable, "-c", code, tmp_path, out], stdout=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while run.poll() is None and not list(out.glob("*/row.json")) and time.monotonic() < until:
        time.sleep(0.001)
    run.kill()
    run.wait()
    kept = {p: p.stat().st_mtime_ns for p in out.glob("*/row.json")}
    assert kept
    files = sorted(tmp_path.glob("*.tif"))
    table = count_images(files, out, workers=1, progress=False)
    assert all(p.stat().st_mtime_ns == then for p, then in kept.items())
    fresh = count_images(files, tmp_path / "fresh", workers=1, progress=False)
    pd.testing.assert_frame_equal(table, fresh)


def test_missing_pixels_of_a_file_are_left_out_as_those_of_an_array(tmp_path):
    image = grid(40, 9, (120, 160))
    image[2:6, 70:90] = np.nan
    tifffile.imwrite(tmp_path / "a.tif", image)
    table = count_images(tmp_path / "a.tif", tmp_path / "out", 0.5, workers=1, progress=False)
    here = detect(image, 0.5)
    assert (
        table.error[0] == ""
        and table.n_particles[0] == len(here.particles) == 12
        and "80 pixels are not finite" in table.notes[0]
    )
    assert (
        count_images(tmp_path / "a.tif", tmp_path / "px", workers=1, progress=False).unit[0] == "px"
    )


def test_a_stack_says_what_to_do(tmp_path):
    tifffile.imwrite(
        tmp_path / "stack.tif", np.stack([grid(40, 9, (120, 160))] * 3), photometric="minisblack"
    )
    error = count_images(
        tmp_path / "stack.tif", tmp_path / "out", 1.0, workers=1, progress=False
    ).error[0]
    assert "stack of 3 images" in error and "frame=" in error


def test_the_explorer_draws_anew_when_a_slider_moves(monkeypatch):
    import IPython.display

    drawn = []
    monkeypatch.setattr(
        IPython.display, "display", lambda fig, *_, **__: drawn.append(fig.axes[1].get_title())
    )
    for support, name, moved in (("even", "accept", 0.95), ("uneven", "accept_blob", 0.95)):
        image, _, _ = discs(4, (200, 200), 20)
        image[:, :100] = 0.5 * image[:, :100] + 0.25  # half of the particles are fainter
        box = explore(image, 1.0)
        knobs = {k.description: k for row in box.children[:2] for k in row.children}
        knobs["support"].value = support
        before = drawn[-1]
        assert not knobs[name].disabled
        knobs[name].value = moved
        assert drawn[-1] != before


def test_one_image_shows_the_bar_of_its_injections(tmp_path, capsys):
    simulate_scene(scene_preset("gold_on_carbon", size=256), rng=1).image.save(tmp_path / "a.tif")
    count_sample(tmp_path / "a.tif", tmp_path / "out", n=200, workers=1, progress=True)
    assert "injecting" in capsys.readouterr().out


def command(*words):
    from typer.testing import CliRunner

    return CliRunner().invoke(app, ["count", *map(str, words)])


def test_count_on_the_command_line(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", grid(40, 9, (200, 240)))
    assert (
        command(tmp_path / "a.tif", "--pixel-size", 0.5, "--out", tmp_path / "out").exit_code == 0
    )
    summary = json.loads((tmp_path / "out" / "a" / "summary.json").read_text())
    assert summary["unit"] == "nm" and abs(summary["median_diameter_nm"] - 9) < 0.2
    assert command(
        tmp_path / "a.tif",
        "--pixel-size",
        0.5,
        "--calibrate",
        "--n",
        200,
        "--out",
        tmp_path / "out",
    ).exit_code in (0, 1)
    assert (
        json.loads((tmp_path / "out" / "a" / "calibration.json").read_text())["n_injected"] >= 200
    )


@pytest.mark.parametrize(
    "words, said",
    [
        (["--pixel-size", 0], "must be a finite number above zero"),
        (["--setting", "h=abc"], "h='abc'"),
        (["--setting", "levels=1"], "levels=1"),
        (["--calibrate", "--n", 10], "10 injected particles"),
        (["--ecsa", "m2=5"], "m2"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_sentence(tmp_path, words, said):
    tifffile.imwrite(tmp_path / "a.tif", grid(40, 9, (120, 160)))
    result = command(tmp_path / "a.tif", *words, "--out", tmp_path / "out")
    assert (
        result.exit_code == 1
        and said in result.output
        and "Traceback" not in result.output
        and "float64" not in result.output
    )
    assert not (tmp_path / "out").exists()


def test_no_surface_area_is_said_and_is_no_success(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", grid(40, 9, (200, 240)))
    result = command(
        tmp_path / "a.tif", "--ecsa", "roughness=2", "--n", 200, "--out", tmp_path / "out"
    )
    assert "ECSA was not computed, because" in result.output and result.exit_code == 1
