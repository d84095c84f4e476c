"""Metrics against other libraries, at their limits, and on input that is not what it should be."""

import numpy as np
import pandas as pd
import pytest
import torch

from microgen.core import InputError, Micrograph
from microgen.kinds.walls import evaluate as physics
from microgen.metrics import features, sets
from microgen.metrics import image as im

RNG = np.random.default_rng(0)


def noise(n=8, size=64, rng=0):
    return np.random.default_rng(rng).normal(0, 1, (n, size, size)).astype("float32")


# --- pairs


def test_ssim_agrees_with_torchmetrics_inside():
    lib = pytest.importorskip("torchmetrics.functional.image")
    a = noise(2, 200)
    b = a + 0.5 * noise(2, 200, 1)
    theirs = lib.structural_similarity_index_measure(
        torch.tensor(b)[:, None], torch.tensor(a)[:, None], data_range=im.data_range(a)
    )
    assert (
        abs(im.ssim(a, b).mean() - float(theirs)) < 3e-3
    )  # the border is a twentieth of the image


def test_ms_ssim_of_five_levels_is_torchmetrics_own():
    lib = pytest.importorskip("torchmetrics.functional.image")
    a = noise(1, 180)
    b = a + 0.3 * noise(1, 180, 1)
    theirs = lib.multiscale_structural_similarity_index_measure(
        torch.tensor(b)[:, None], torch.tensor(a)[:, None], data_range=im.data_range(a)
    )
    assert im.ms_ssim(a, b)[0] == pytest.approx(float(theirs), abs=1e-4)


def test_metrics_do_not_depend_on_the_unit_of_intensity():
    a, b = noise(3), noise(3, rng=1)
    assert np.allclose(im.ssim(a, b), im.ssim(1e-6 * a, 1e-6 * b), atol=1e-4)
    assert np.allclose(im.psnr(a, b), im.psnr(1e6 * a + 3, 1e6 * b + 3), atol=1e-2)
    x, y = im.intensity_distance(a, b), im.intensity_distance(1e-6 * a, 1e-6 * b)
    assert x["js"] == pytest.approx(y["js"], rel=0.2) and x["wasserstein"] == pytest.approx(
        1e6 * y["wasserstein"], rel=1e-3
    )


def test_spectrum_keeps_power_and_turns_with_the_image():
    a = noise(4, 96)
    s, t = (
        im.radial_spectrum(a, (0.02, 0.03)),
        im.radial_spectrum(a.transpose(0, 2, 1), (0.03, 0.02)),
    )
    assert np.allclose(s.q, t.q) and np.allclose(s.power, t.power, rtol=1e-4)
    assert np.average(s.power, weights=np.tile(s.modes, (4, 1))) == pytest.approx(
        0.02 * 0.03, rel=0.05
    )


def test_odd_sizes_and_tensors():
    a = torch.from_numpy(noise(2, 63))[:, None]
    assert im.radial_spectrum(a, 0.1).power.shape[0] == 2 and im.ssim(a, a) == pytest.approx(1)


def test_no_limit_beyond_what_the_scene_holds():
    from scipy.ndimage import gaussian_filter

    smooth = 100 * gaussian_filter(
        noise(6, 128), (0, 3, 3)
    )  # passes nothing beyond about 0.15 per pixel
    limit = im.information_limit(smooth + 0.3 * noise(6, 128, 1), 1.0)
    assert (limit < 0.25).all() and (limit > 0.08).all()


# --- sets


@pytest.mark.parametrize("n, d", [(40, 8), (40, 100), (300, 64)])
def test_frechet_distance_agrees_with_the_matrix_root(n, d):
    from scipy.linalg import sqrtm

    x, y = RNG.normal(0, 1, (n, d)), RNG.normal(0.3, 1.3, (n, d))
    a, b = np.cov(x.T), np.cov(y.T)
    direct = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(
        a + b - 2 * np.real(sqrtm(a @ b + 1e-12 * np.eye(d)))
    )
    assert sets.frechet_distance(x, y) == pytest.approx(direct, rel=1e-3, abs=1e-3)


def test_frechet_and_kernel_distance_agree_with_torch_fidelity():
    fid = pytest.importorskip("torch_fidelity.metric_fid")
    kid = pytest.importorskip("torch_fidelity.metric_kid")
    x, y = RNG.normal(0, 1, (200, 32)), RNG.normal(0.2, 1.2, (200, 32))

    def stat(v):
        return {"mu": v.mean(0), "sigma": np.cov(v.T)}

    theirs = fid.fid_statistics_to_metric(stat(x), stat(y), False)["frechet_inception_distance"]
    assert sets.frechet_distance(x, y) == pytest.approx(theirs, rel=1e-4)

    def kernel(a, b):
        return (a @ b.T / 32 + 1) ** 3

    assert sets.kernel_distance(x, y) == pytest.approx(
        kid.mmd2(kernel(x, x), kernel(x, y), kernel(y, y), unit_diagonal=False, mmd_est="unbiased")
    )


def test_fid_through_torchmetrics_with_the_same_network():
    tm = pytest.importorskip("torchmetrics.image.fid")
    net, a, b = features.random_extractor(dim=32), noise(60, 32), 1.2 * noise(60, 32, 1)
    window = features.intensity_window(a)

    def as_input(v):
        return torch.tensor((v - window[0]) / (window[1] - window[0]))[:, None]

    class Wide(torch.nn.Module):
        num_features = 32

        def forward(self, x):
            return net.network(x.float())

    fid = tm.FrechetInceptionDistance(
        Wide(), input_img_size=(1, 32, 32), normalize=False
    ).set_dtype(torch.float64)
    fid.update(as_input(a).double(), real=True)
    fid.update(as_input(b).double(), real=False)
    assert sets.frechet_distance(net(a, window), net(b, window)) == pytest.approx(
        float(fid.compute()), rel=1e-2
    )


def test_order_of_images_and_orthogonal_turns_change_nothing():
    x, y = RNG.normal(0, 1, (50, 10)), RNG.normal(0.5, 1, (50, 10))
    turn = np.linalg.qr(RNG.normal(0, 1, (10, 10)))[0]
    for f in (
        sets.frechet_distance,
        sets.kernel_distance,
        lambda a, b: sets.neighbour_metrics(a, b)["density"],
    ):
        assert f(x, y) == pytest.approx(f(x[::-1], y[::-1])) == pytest.approx(f(x @ turn, y @ turn))


def test_a_table_names_its_network_and_its_n():
    table = sets.set_table(
        noise(24, 40),
        noise(24, 40, 1),
        features.module_extractor(lambda x: x.flatten(1)[:, :9], "mine"),
        repeats=4,
    )
    assert list(table.metric[:3]) == ["FD(mine)", "FD(mine), N → ∞", "KD(mine)"]
    assert (table.n == 12).all() and (table.features == "mine").all()
    assert not any(name.startswith(("FID", "KID")) for name in table.metric)


def test_inception_is_given_grey_as_three_bytes(tmp_path, monkeypatch):
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    seen = []

    class Stub(torch.nn.Module):
        def __init__(self, name, wanted, feature_extractor_weights_path):
            super().__init__()
            seen.append((wanted, feature_extractor_weights_path))

        def forward(self, x):
            assert x.dtype == torch.uint8 and x.shape[1] == 3
            return (x.float().mean((2, 3)),)

    monkeypatch.setattr(module, "FeatureExtractorInceptionV3", Stub)
    monkeypatch.setattr(features, "_checked", lambda path: path)
    net = features.inception_extractor(tmp_path / "w.pth")
    assert net(noise(3), (-3, 3)).shape == (3, 3) and net.distance == "FID"
    assert seen == [(["2048"], str(tmp_path / "w.pth"))]


def test_weights_are_looked_for_where_torch_puts_them(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert features.inception_path().parent == tmp_path / "hub" / "checkpoints"
    with pytest.raises(features.MissingWeights, match="6726825d"):
        features.inception_extractor()


# --- physics


def lattice(n=96, pixel=0.02, missing=()):
    "A square lattice of strontium, 0.25 nm apart, and its table."
    at = np.arange(0.1, n * pixel, 0.25)
    y, x = (v.ravel() for v in np.meshgrid(at, at, indexing="ij"))
    keep = ~np.isin(np.arange(len(y)), missing)
    grid = np.arange(n) * pixel
    gy, gx = (np.exp(-0.5 * ((grid[:, None] - v[keep]) / 0.05) ** 2) for v in (y, x))
    return Micrograph(0.1 + gy @ gx.T, pixel), pd.DataFrame({"y_nm": y, "x_nm": x, "element": "Sr"})


def counted(m, electrons=400, rng=0):
    return Micrograph(
        np.random.default_rng(rng).poisson(m.data * electrons) / electrons, m.pixel_size
    )


def test_any_crystal_is_found_again_to_a_hundredth_of_a_pixel():
    image, table = lattice()
    errors = physics.column_errors(image, table)
    assert errors.found.all() and physics.rms_pm(errors) < 0.2


@pytest.mark.parametrize("gone", [(27,), (27, 28), (18, 36, 43)])
def test_each_missing_column_is_seen(gone):
    image, table = lattice(missing=gone)
    errors = physics.column_errors(counted(image), table)
    lost = errors[~errors.found]
    assert len(lost) == len(gone)
    assert np.allclose(np.sort(lost.y_nm), np.sort(table.y_nm[list(gone)]))


def test_an_extra_column_is_counted():
    image, table = lattice()
    assert physics.extra_columns(counted(image), table) == 0
    assert physics.extra_columns(counted(image), table.drop(index=[27, 36])) == 2


def test_a_displacement_that_was_not_drawn_is_not_found():
    image, table = lattice()
    asked = table.assign(disp_pm=20.0, y_nm=table.y_nm - 0.02)
    errors = physics.column_errors(image, asked)
    assert errors.dy_pm.mean() == pytest.approx(20, abs=0.5)


def test_errors_reach_the_bound_and_not_below():
    image, table = lattice()
    ratio = [physics.rms_pm(physics.column_errors(counted(image, rng=i), table)) for i in range(6)]
    bound = physics.position_bound(counted(image), table)
    assert 0.85 < np.sqrt(np.mean(np.square(ratio))) / bound < 1.2


@pytest.mark.parametrize(
    "bad",
    [[], [np.zeros((4, 4)), np.zeros((5, 5))], np.zeros((2, 2, 8, 8)), np.full((2, 8, 8), np.inf)],
)
def test_what_is_no_set_of_images_is_refused_in_one_sentence(bad):
    with pytest.raises(InputError) as why:
        im.as_images(bad)
    assert "\n" not in str(why.value)


# --- compare


def test_compare_writes_a_page_that_needs_nothing_else(tmp_path):
    from microgen.metrics.compare import compare

    found = compare(noise(16), noise(20, rng=1), tmp_path / "out", pixel_size=0.1)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "16 of 20 generated images" in page and "<script" not in page and 'src="http' not in page
    assert (pd.read_csv(tmp_path / "out" / "sets.csv").n == 8).all()
    again = compare(noise(16), noise(20, rng=1), pixel_size=0.1)
    assert found.tables["sets"].equals(again.tables["sets"])


def test_compare_pairs_what_the_user_says_is_paired(tmp_path):
    from microgen.metrics.compare import compare

    a = noise(4)
    table = compare(
        a, a + 0.1 * noise(4, rng=1), ceiling=a + 0.1 * noise(4, rng=2), paired=True, pixel_size=0.1
    ).tables["pairs"]
    row = table[table.metric == im.SSIM_NAME].iloc[0]
    assert row.value == pytest.approx(row["two real scans"], abs=0.01) and row.n == 4


def test_two_halves_of_a_real_micrograph_lie_within_their_floor():
    import os
    from pathlib import Path

    from microgen.io.files import read
    from microgen.metrics.compare import compare

    if "MICROGEN_TEST_DATA" not in os.environ:
        pytest.skip("set MICROGEN_TEST_DATA to the folder that holds stem/")
    path = Path(os.environ["MICROGEN_TEST_DATA"]) / "stem" / "CdTe_110_tilt_HAADF149.dm3"
    if not path.exists():
        pytest.skip(f"there is no {path.name}")
    tiles = read(path).tiles(96)
    order = np.random.default_rng(0).permutation(len(tiles))
    table = (
        compare(*([tiles[i] for i in part] for part in (order[:12], order[12:24])))
        .tables["sets"]
        .set_index("metric")
    )
    assert (
        table.low["KD(random)"] < table.floor_high["KD(random)"]
        and table.low["FD(random)"] < table.floor_high["FD(random)"]
    )
    assert (
        10 < im.information_limit(tiles[:4])[0] < 25
    )  # 1/nm: the file is filtered, its Nyquist frequency is 30.5


def of_a_network(images, folder, scaling="image"):
    "A folder of images that says that a network generated them."
    import json

    folder.mkdir()
    for i, image in enumerate(images):
        Micrograph(image, 0.02).save(folder / f"{i:02d}.tif")
    stated = {"generated": {"model": "pix2pix", "scaling": scaling}}
    (folder / "recipe.json").write_text(json.dumps(stated))
    return folder


def test_arbitrary_brightness_and_contrast_are_not_compared(tmp_path):
    "A copy of a set, each image with another brightness and contrast, is the same set where these are arbitrary."
    from microgen.metrics.compare import compare

    rng = np.random.default_rng(0)
    images = 100 + 10 * noise(24, 48, 0)
    copy = rng.lognormal(0, 0.5, (24, 1, 1)) * images + rng.normal(0, 50, (24, 1, 1))
    alone = of_a_network(copy, tmp_path / "alone")
    together = of_a_network(copy, tmp_path / "together", "dataset")

    def kd(fake, **how):
        found = compare(images, fake, paired=False, pixel_size=0.02, **how)
        told = any("not compared" in note for note in found.notes)
        return found.tables["sets"].set_index("metric").loc["KD(random)"], told

    for fake, how in ((alone, {}), (copy, {"standardise": True})):
        row, told = kd(fake, **how)
        assert row.value < row.floor_high and told
    for fake, how in ((copy, {}), (together, {}), (alone, {"standardise": False})):
        row, told = kd(fake, **how)
        assert row.value > 10 * row.floor_high and not told


def test_the_interval_of_a_mean_holds_it_as_often_as_it_says():
    from microgen.core import mean_interval

    low, high = mean_interval(np.random.default_rng(1).normal(3, 2, (10_000, 16)))
    assert 0.93 < np.mean((low < 3) & (3 < high)) < 0.97
    low, high = mean_interval(np.random.default_rng(2).exponential(1, (10_000, 16)))
    assert 0.93 < np.mean((low < 1) & (1 < high)) < 0.97


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    "Two small datasets with their truth: UP and typeC, and typeC alone, of a worse scan."
    from microgen.data.build import build
    from microgen.kinds.walls.recipe import Recipe

    out, same = tmp_path_factory.mktemp("sets"), dict(size=96, pixel_size=0.024)
    return (
        build(
            Recipe(walls=("UP", "typeC"), n=8, preset="good", seed=1, **same),
            out / "real",
            workers=1,
            progress=False,
        ),
        build(
            Recipe(walls=("typeC",), n=5, preset="typical", seed=2, **same),
            out / "fake",
            workers=1,
            progress=False,
        ),
    )


@pytest.fixture(scope="module")
def unlike(folders):
    "Their comparison, without a word about structure or classes."
    from microgen.metrics.compare import compare

    return compare(*folders, folders[0].parent / "report", most_evaluated=2)


def test_the_recipe_says_which_structure_is_measured(unlike):
    assert unlike.tables["evaluation"].polarity_right.between(0, 1).all()
    assert (
        unlike.tables["evaluation"].phi_error_deg.notna().any()
        and len(unlike.tables["bragg_reflections"]) > 3
    )
    assert {"bragg_reflections.csv", "evaluation_means.csv"} <= {
        p.name for p in unlike.out.iterdir()
    }


def test_only_classes_of_both_sets_are_compared(unlike, folders):
    from microgen.metrics.compare import compare
    from microgen.metrics.match import load_set

    assert (
        "Compared are the classes that both sets have: typeC. Left out, real: UP; generated: none."
        in unlike.notes
    )
    assert "left out, real: up" in (unlike.out / "report.html").read_text().lower()
    real = load_set(folders[0])
    walls = real.images._replace(
        data=real.images.data[[k for k, name in enumerate(real.labels) if name == "typeC"]]
    )
    alone = compare(walls, folders[1], structure="YMnO3", most_evaluated=2)
    assert alone.tables["intensity_and_spectrum"].equals(unlike.tables["intensity_and_spectrum"])


def test_sets_without_a_common_class_are_compared_and_told_apart(folders, tmp_path):
    import shutil

    from microgen.metrics.compare import compare

    renamed = shutil.copytree(folders[1], tmp_path / "renamed")
    meta = pd.read_csv(renamed / "metadata.csv")
    meta.assign(label="lab").to_csv(renamed / "metadata.csv", index=False)
    found = compare(renamed, folders[1], paired=False, most_evaluated=1)
    assert any(
        "No class is in both sets (real: lab; generated: typeC)" in note for note in found.notes
    )


def test_every_number_of_whole_sets_and_of_physics_has_an_interval(unlike):
    table = unlike.tables["intensity_and_spectrum"]
    assert (
        (table.low <= table.value).all()
        and (table.value <= table.high).all()
        and (table.low < table.high).all()
    )
    assert (table.floor_low <= table.floor).all() and (table.n == 2).all()
    means = unlike.tables["evaluation_means"].set_index("metric")
    known = means.dropna(subset="low")  # images of one value have no interval
    assert (known.low < known.value).all() and (known.value < known.high).all()
    values = unlike.tables["evaluation"][means.index]
    assert (values.nunique()[means.low.isna()] <= 1).all()
    assert (
        means.value["rms_pm"] == pytest.approx(unlike.tables["evaluation"].rms_pm.mean())
        and means.n["rms_pm"] == 2
    )


def test_intervals_of_whole_sets_hold_the_distance_of_many_images():
    "Nineteen of twenty should; the chance that fewer than 13 of 20 do is below 1e-6."
    from microgen.metrics.compare import global_table

    def make(n, mean, seed):
        return im.as_images(
            np.random.default_rng(seed).normal(mean, 1, (n, 1, 1)) + noise(n, 16, seed + 1) / 4, 1.0
        )

    truth = im.intensity_distance(make(4000, 0, 0), make(4000, 2, 1))["wasserstein"]
    rows = [
        global_table(make(40, 0, 10 + 2 * k), make(40, 2, 500 + 2 * k), k)
        .set_index("metric")
        .loc["wasserstein"]
        for k in range(20)
    ]
    assert sum(r.low <= truth <= r.high for r in rows) >= 13


@pytest.mark.parametrize("what", ["NaN", "corrupt", "label"])
def test_a_damaged_set_is_named_in_one_sentence(folders, tmp_path, what):
    import shutil

    from microgen.core import MicrogenError
    from microgen.metrics.compare import compare

    bad = shutil.copytree(folders[1], tmp_path / "bad")
    path = bad / "tables" / "00" / "000002.parquet"
    path = path if path.exists() else sorted((bad / "tables").rglob("*.parquet"))[2]
    if what == "NaN":
        pd.read_parquet(path).assign(x_nm=np.nan).to_parquet(path)
    if what == "corrupt":
        path.write_bytes(b"no table")
    if what == "label":
        meta = pd.read_csv(path := bad / "metadata.csv")
        meta.assign(label=meta.label.where(meta.index > 0)).to_csv(path, index=False)
    with pytest.raises(MicrogenError, match=path.name) as why:
        compare(folders[0], bad)
    assert "\n" not in str(why.value)


def test_inception_is_used_where_its_weights_lie_and_never_fetched(tmp_path, monkeypatch):
    import socket

    from microgen.metrics import compare as room
    from microgen.metrics.features import Extractor, inception_path

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(socket.socket, "connect", lambda *a: pytest.fail("a connection was opened"))
    assert set(
        room.compare(noise(16), noise(16, rng=1)).tables["sets"].features.str.split().str[0]
    ) == {"random"}
    inception_path().parent.mkdir(parents=True)
    inception_path().write_bytes(b"something else")
    found = room.compare(noise(16), noise(16, rng=1))
    assert any(
        "Inception is left out" in note and "is not the Inception file" in note
        for note in found.notes
    )
    stand_in = Extractor("Inception (stand-in)", "FID", lambda x: x.mean((2, 3)).repeat(1, 3) + 0.1)
    monkeypatch.setattr(room, "inception_extractor", lambda: stand_in)
    assert "FID" in set(room.compare(noise(16), noise(16, rng=1)).tables["sets"].metric)


def test_the_discriminator_of_a_run_is_an_extractor():
    "PatchGAN of four maps and an image: its features see a change of texture, and are called FD(run)."
    from microgen.metrics.features import run_extractor
    from microgen.metrics.sets import set_table
    from microgen.nets.unet import PatchGAN

    disc = PatchGAN(5, 8, 2, "none", True, seed=0)
    seen = run_extractor(type("Model", (), {"d": disc})())
    a = noise(24, 32)
    assert seen(a, (-3, 3)).shape == (24, 32) and np.array_equal(
        seen(a, (-3, 3)), run_extractor(disc)(a, (-3, 3))
    )
    table = set_table(a, noise(24, 32, 1) ** 3, seen).set_index("metric")
    assert "FD(run)" in table.index and not table.index.str.contains("FID").any()
    assert table.low["FD(run)"] > table.floor_high["FD(run)"]


# --- kinds and colour


@pytest.fixture(scope="module")
def particle_sets(tmp_path_factory):
    "Three small datasets of particles, the third of larger ones."
    from microgen.data.build import build
    from microgen.kinds.particles.recipe import ParticleRecipe

    out = tmp_path_factory.mktemp("particles")
    same = dict(presets=("gold_on_carbon",), n=6, size=128)
    larger = {"settings": {"median_nm": 32.0}}
    made = {}
    for name, over in dict(real={"seed": 1}, fake={"seed": 2}, larger={"seed": 3} | larger).items():
        made[name] = build(ParticleRecipe(**same | over), out / name, workers=1)
    return made


def test_two_datasets_of_particles_are_compared(particle_sets, tmp_path):
    from microgen.metrics.compare import compare

    found = compare(
        particle_sets["real"], particle_sets["fake"], tmp_path / "report", most_evaluated=6
    )
    means = found.tables["evaluation_means"].set_index("metric")
    assert means.value["f1"] > 0.6
    known = means.dropna(subset="low")  # measures that are the same in all images have no interval
    assert len(known) and (known.low < known.value).all() and (known.value < known.high).all()
    assert {"evaluation.csv", "sizes_of_the_particles.csv"} <= {p.name for p in found.out.iterdir()}
    page = (found.out / "report.html").read_text()
    assert "particles counted over particles asked for" in page and "column" not in page


def test_larger_particles_are_told_from_smaller_ones(particle_sets):
    from microgen.metrics.compare import compare

    found = compare(particle_sets["real"], particle_sets["larger"], most_evaluated=6)
    sizes = found.tables["sizes_of_the_particles"].set_index("measure")
    median = sizes.loc["median diameter, nm"]
    assert median.generated_low > median.real_high
    same = compare(particle_sets["real"], particle_sets["real"], most_evaluated=3)
    assert "evaluation_real" in same.tables and "pairs" in same.tables  # the truth agrees: pairs
    distance = same.tables["sizes_of_the_particles"].set_index("measure").generated.iloc[-1]
    assert distance == 0


def test_sets_of_different_kinds_are_compared_as_plain_images(particle_sets, folders):
    from microgen.metrics.compare import compare
    from microgen.metrics.match import kind_of_sets

    notes = []
    assert kind_of_sets([particle_sets["real"], folders[0]], notes=notes).name == "images"
    assert notes == [
        "The sets are of different kinds (particles, walls): they are compared as plain images."
    ]
    as_plain = compare(
        particle_sets["real"], particle_sets["fake"], kind="images", most_evaluated=2
    )
    assert "evaluation" not in as_plain.tables
    with pytest.raises(InputError, match="leave structure= out"):
        compare(particle_sets["real"], particle_sets["fake"], structure="YMnO3")
    with pytest.raises(InputError, match="no kind of image"):
        compare(*folders, kind="cats")


def test_a_crystal_that_is_none_is_refused_in_one_sentence(folders):
    from microgen.metrics.compare import compare

    with pytest.raises(InputError, match="no trimer distortion"):
        compare(*folders, structure="YMnO3-PE")


def tinted(folder, tint, seed, n=16):
    "A folder of colour images: one texture in three tints."
    from PIL import Image

    rng = np.random.default_rng(seed)
    folder.mkdir()
    for i in range(n):
        texture = rng.normal(0, 12, (40, 40, 1)) + rng.normal(0, 3, (40, 40, 3))
        pixels = np.clip(np.array(tint) + texture, 0, 255).astype("uint8")
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
    return folder


@pytest.mark.parametrize(
    "tint, seen", [((150, 90, 120), 0), ((158, 90, 120), 1), ((120, 90, 150), 2)]
)
def test_colour_is_compared(tmp_path, tint, seen):
    "The same tint, more red, and red and blue in each other's place."
    from microgen.metrics.compare import compare

    real = tinted(tmp_path / "real", (150, 90, 120), 0)
    fake = tinted(tmp_path / "fake", tint, 1)
    found = compare(real, fake, tmp_path / "out")
    assert (tmp_path / "out" / "report.html").exists()
    table = found.tables["intensity_by_channel"].set_index(["metric", "channel"]).loc["wasserstein"]
    assert (table.low > table.floor_high).sum() == seen
    kernel = found.tables["sets"].set_index("metric").loc["KD(random)"]
    assert (kernel.low > kernel.floor_high) == bool(seen)


def test_the_luminance_of_colour_is_that_of_the_reader(tmp_path):
    from microgen.io.files import read
    from microgen.metrics.match import load_set

    folder = tinted(tmp_path / "set", (150, 90, 120), 0, 3)
    images = load_set(folder).images
    grey = np.stack([read(p, 1.0).data for p in sorted(folder.iterdir())])
    assert images.colour.shape == (3, 3, 40, 40) and np.allclose(images.data, grey, atol=1e-4)


def test_grey_among_colour_and_colour_against_grey(tmp_path):
    from microgen.metrics.compare import compare

    colour = tinted(tmp_path / "colour", (150, 90, 120), 0)
    found = compare(colour, noise(16, 40))
    assert "Only the real images are in colour: their luminance is compared." in found.notes
    assert "intensity_by_channel" not in found.tables


@pytest.mark.parametrize("side", [44, 81, 98, 99, 161, 175, 176])
def test_as_many_levels_of_ms_ssim_as_the_library_takes(side):
    pytest.importorskip("torchmetrics.functional.image")
    a = noise(1, side)
    assert im.ms_ssim(a, a, levels=im.ms_ssim_levels((side, side))) == pytest.approx(1)
