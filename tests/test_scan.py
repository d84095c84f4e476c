"""What a notebook cell cannot test of the scan: threads, order, another room's fit as judge, real micrographs, fuzz."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from scipy.optimize import least_squares

from microgen.core import InputError, Micrograph
from microgen.scan.acquire import acquire, detector_counts, electrons, mistilt, rim_px, scan_field
from microgen.scan.settings import PRESETS, Scan, preset
from microgen.stem.crystal import columns
from microgen.stem.probe import Probe
from microgen.stem.render import haadf
from microgen.stem.wall import displace, truth_maps, wall

PX, SHAPE = 0.02, (128, 128)
NAMES = [n for n in PRESETS if n != "ideal"]


@pytest.fixture(scope="module")
def specimen():
    "Columns, ideal image and truth maps of a wall, with the rim that the worst preset may need."
    rim = rim_px("poor", SHAPE, PX)
    shape = tuple(n + 2 * rim for n in SHAPE)
    fov = tuple(n * PX for n in shape)
    field = wall("typeC", fov=fov)
    cols = displace(columns("YMnO3", fov=fov, thickness=8), field)
    return cols, haadf(cols, PX, shape=shape), truth_maps(cols, field, shape, PX), rim


def everything(specimen, name, seed):
    "Bytes of image, maps and table of one scan."
    cols, ideal, maps, rim = specimen
    got = acquire(ideal, name, seed, maps, cols.table, rim=rim)
    return (
        got.image.data.tobytes()
        + b"".join(m.tobytes() for m in got.maps.values())
        + got.table[["y_nm", "x_nm"]].to_numpy().tobytes()
    )


# --- The same bytes, whatever runs beside


@pytest.mark.parametrize("name", NAMES)
def test_bytes_do_not_depend_on_threads(specimen, name):
    threads = torch.get_num_threads()
    try:
        found = set()
        for n in (1, 2, 4):
            torch.set_num_threads(n)
            found.add(everything(specimen, name, 3))
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 1


def test_bytes_do_not_depend_on_order(specimen):
    forward = [everything(specimen, "typical", i) for i in range(4)]
    backward = [everything(specimen, "typical", i) for i in reversed(range(4))]
    assert forward == backward[::-1]
    assert len(set(forward)) == 4


@pytest.mark.parametrize(
    "seed",
    [7, np.random.SeedSequence(7), np.random.default_rng(7)],
    ids=["int", "SeedSequence", "Generator"],
)
def test_every_kind_of_seed(specimen, seed):
    cols, ideal, _, rim = specimen
    assert np.isfinite(acquire(ideal, "typical", seed, rim=rim).data).all()


def test_the_input_is_left_alone(specimen):
    cols, ideal, maps, rim = specimen
    before = ideal.data.copy(), {k: m.copy() for k, m in maps.items()}, cols.table.copy()
    acquire(
        ideal,
        preset("poor", salt_pepper=0.04, row_wave=0.05, row_noise=0.1),
        0,
        maps,
        cols.table,
        rim=rim,
    )
    assert np.array_equal(ideal.data, before[0]) and cols.table.equals(before[2])
    assert all(np.array_equal(maps[k], before[1][k]) for k in maps)


# --- Truth moves with the image


SMOOTH = ("drift_pm_s", "drift_deg", "flyback_pm", "shear", "scale_y", "scale_x")
SHAKY = ("walk_pm", "mains_pm", "line_jitter_pm", "dwell_jitter_pm")


def table_error_pm(specimen, name, effects):
    "Noise-free scan: rms of table minus fitted Gaussians (y, x), less the bias of the fit on the still image; and the settings."
    cols, ideal, _, rim = specimen
    s = preset(name).sample(2)
    s = Scan(**{k: getattr(s, k) for k in effects})
    got, still = (acquire(ideal, scan, 5, table=cols.table, rim=rim) for scan in (s, Scan()))
    high, wide = (n * PX - 0.25 for n in SHAPE)
    rows = got.table[
        (got.table.element == "Y")
        & got.table.y_nm.between(0.25, high)
        & got.table.x_nm.between(0.25, wide)
    ].index
    assert len(rows) > 20
    off = [
        fitted(g.image.data, t) - t[["y_nm", "x_nm"]].to_numpy()
        for g in (got, still)
        for t in [g.table.loc[rows]]
    ]
    return 1e3 * np.sqrt(((off[0] - off[1]) ** 2).mean(0)), s


@pytest.mark.parametrize("name", list(PRESETS))
def test_table_agrees_with_fitted_columns_under_smooth_motion(specimen, name):
    assert table_error_pm(specimen, name, SMOOTH)[0].max() < 1


@pytest.mark.parametrize("name", list(PRESETS))
def test_table_agrees_with_fitted_columns_under_all_motion(specimen, name):
    "The mean of a jitter over a column is of first order; what is left is of second order, jitter squared over the column's width."
    error, s = table_error_pm(specimen, name, SMOOTH + SHAKY)
    jitter = s.line_jitter_pm**2 + s.dwell_jitter_pm**2 + s.mains_pm**2
    assert error.max() < 0.5 + jitter / 45


def fitted(image, table, high=0.12, wide=0.085):
    "Least-squares centres (N, 2) of Gaussians on a constant, nm; a window that cuts the flanks would answer jitter differently."
    out = []
    for y, x in table[["y_nm", "x_nm"]].to_numpy():
        i, j = np.mgrid[
            int((y - high) / PX) : int((y + high) / PX) + 2,
            int((x - wide) / PX) : int((x + wide) / PX) + 2,
        ]
        near = np.hypot((i * PX - y) / high, (j * PX - x) / wide) < 1
        v, u, data = i[near] * PX, j[near] * PX, image[i[near], j[near]] / image.max()

        def residual(p):
            return (
                p[0] * np.exp(-((v - p[1]) ** 2 + (u - p[2]) ** 2) / (2 * p[3] ** 2)) + p[4] - data
            )

        out.append(
            least_squares(
                residual, [np.ptp(data), y, x, 0.05, data.min()], x_scale=[1, 0.01, 0.01, 0.01, 1]
            ).x[1:3]
        )
    return np.array(out)


def test_wall_map_and_table_move_together(specimen):
    "Under a shear the map of the wall and the columns inside it stay together."
    cols, ideal, maps, rim = specimen
    got = acquire(ideal, Scan(shear=0.15, scale_y=0.05), 0, maps, cols.table, rim=rim)
    at = np.rint(got.table[["y_nm", "x_nm"]].to_numpy() / PX).astype(int)
    before = np.rint(cols.table[["y_nm", "x_nm"]].to_numpy() / PX).astype(int)
    inside = ((at > 1) & (at < SHAPE[0] - 2)).all(1) & (
        (before > 1) & (before < maps["Q"].shape[0] - 2)
    ).all(1)
    phi_before = maps["phi"][tuple(before[inside].T)]
    phi_after = got.maps["phi"][tuple(at[inside].T)]
    difference = np.angle(np.exp(1j * (phi_after - phi_before)))
    assert inside.sum() > 100
    assert np.abs(at - before + rim)[inside].max() >= 4  # the columns did move, by pixels
    assert np.median(np.abs(difference)) < 0.02 and np.mean(np.abs(difference) > 0.3) < 0.03


def test_rolled_rows_move_every_fifth_row(specimen):
    cols, ideal, _, rim = specimen
    d = scan_field(Scan(roll_px=3, roll_every=5), SHAPE, PX, 1)[1]
    assert not np.delete(d, np.arange(0, 128, 5), axis=0).any()
    assert 0.5 < np.abs(d[::5]).max() / PX <= 3


# --- Statistics


@pytest.mark.parametrize("dose", [1e3, 1e4, 1e5, 1e6])
def test_poisson_at_every_dose(dose):
    s = Scan(dose_e_A2=dose)
    counts = detector_counts(np.full((600, 600), 0.03, np.float32), s, PX, 1)
    mean = 0.03 * electrons(s, PX)
    assert abs(counts.mean() / mean - 1) < 5 / (600 * mean**0.5)
    assert abs(counts.var() / counts.mean() - 1) < 0.02
    assert np.array_equal(counts, counts.round())


def test_salt_and_pepper_and_rows():
    flat = Micrograph(np.tile(np.linspace(0, 1, 200, dtype=np.float32), (200, 1)), PX)
    change = acquire(flat, Scan(salt_pepper=0.04), 0).data - flat.data
    assert abs((change != 0).mean() - 0.04) < 0.003
    noisy = (acquire(flat, Scan(row_noise=0.1), 0).data != flat.data).any(1)
    assert 0.04 < noisy.mean() < 0.18
    wave = (acquire(flat, Scan(row_wave=0.05, row_wave_px=10), 0).data - flat.data)[:, 0]
    assert np.abs(np.fft.rfft(wave)).argmax() == 20 and abs(wave.max() - 0.05) < 0.003


def test_thickness_ramp_follows_its_direction():
    flat = Micrograph(np.ones((64, 64), np.float32), PX)
    for deg, axis, sign in ((0, 1, 1), (90, 0, 1), (180, 1, -1), (270, 0, -1)):
        slope = np.diff(acquire(flat, Scan(ramp=0.2, ramp_deg=deg)).data, axis=axis)
        assert np.allclose(slope, sign * 0.2 / 64, atol=1e-6)


def test_mistilt_of_a_whole_crystal(specimen):
    cols, *_ = specimen
    moved = mistilt(cols, 5, 0).table.x_nm - cols.table.x_nm
    assert np.allclose(moved, (cols.table.depth_nm - cols.thickness_nm / 2) * np.tan(5e-3))
    assert np.allclose(mistilt(cols, 5, 0).table.y_nm, cols.table.y_nm)
    assert mistilt(cols, 0).table.equals(cols.table)


# --- Settings: JSON, ranges, fuzz


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_survive_json_and_sample_inside_their_ranges(name):
    s = PRESETS[name]
    assert Scan.from_json(json.loads(json.dumps(json.loads(s.to_json())))) == s
    for seed in range(20):
        one = s.sample(seed)
        assert Scan.from_json(one.to_json()) == one
        for k in Scan.__dataclass_fields__:
            value, sampled = getattr(s, k), getattr(one, k)
            assert not isinstance(sampled, tuple)
            assert value[0] <= sampled <= value[1] if isinstance(value, tuple) else sampled == value


ANYTHING = st.one_of(
    st.none(),
    st.floats(),
    st.integers(),
    st.text(max_size=3),
    st.lists(st.floats(), max_size=3),
    st.booleans(),
)


@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from(list(Scan.__dataclass_fields__)), value=ANYTHING)
def test_any_value_is_taken_or_refused_in_one_sentence(name, value):
    try:
        s = Scan(**{name: value})
    except InputError as error:
        assert name in str(error) and "\n" not in str(error)
    else:
        assert Scan.from_json(s.to_json()) == s
        assert not isinstance(getattr(s.sample(0), name), tuple)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    name=st.sampled_from(NAMES),
    shape=st.tuples(st.integers(8, 70), st.integers(8, 70)),
)
def test_any_shape_scans_to_finite_values(seed, name, shape):
    image = Micrograph(
        np.random.default_rng(seed).random(shape).astype(np.float32) * 0.05, (0.02, 0.015)
    )
    got = acquire(image, name, seed, maps={"Q": image.data}, rim=2)
    assert got.image.data.shape == got.maps["Q"].shape == (shape[0] - 4, shape[1] - 4)
    assert np.isfinite(got.image.data).all() and got.image.data.dtype == np.float32
    assert 0 <= got.maps["Q"].min() and got.maps["Q"].max() <= 0.05


# --- Beside real micrographs


def real(name):
    if "MICROGEN_TEST_DATA" not in os.environ:
        pytest.skip(
            "MICROGEN_TEST_DATA is unset; it names the folder that holds stem/ with real micrographs"
        )
    return Path(os.environ["MICROGEN_TEST_DATA"]) / "stem" / name


def noise(image, pixel_size, low, high):
    "Median spectral power between two frequencies (1/nm) over the variance of the image: between the lattice peaks, it is noise."
    image = np.asarray(image, dtype=float) - np.mean(image)
    window = np.outer(*map(np.hanning, image.shape))
    power = (
        np.abs(np.fft.fft2(image * window)) ** 2 / (window**2).sum() / image.var() * pixel_size**2
    )
    q = np.hypot(
        np.fft.fftfreq(image.shape[0], pixel_size)[:, None],
        np.fft.fftfreq(image.shape[1], pixel_size),
    )
    return np.median(power[(q > low) & (q < high)])


def test_noise_of_a_published_wall_lies_between_the_presets():
    from skimage.io import imread

    wall_300kV = np.asarray(imread(real("hREMnO3_domain_wall_300kV.png")), dtype=float)[
        125:330, 108:275, :3
    ].mean(-1)
    px = 0.0102  # c / 2 = 0.570 nm is 55.8 px
    cols = displace(columns("YMnO3", fov=(2.6, 2.6), thickness=8), wall("UP", fov=(2.6, 2.6)))
    ideal = haadf(cols, px, probe=Probe(voltage_kV=300))
    level = {}
    for name in NAMES:
        scans = [acquire(ideal, name, i, rim=24).data[:205, :167] for i in range(4)]
        level[name] = np.mean(
            [noise(ndimage.gaussian_filter(m, 1.3), px, 7, 14) for m in scans]
        )  # denoised as published
    assert level["good"] < noise(wall_300kV, px, 7, 14) < 2 * level["poor"]
    assert level["good"] < level["typical"] < level["poor"]


def test_noise_of_a_raw_image_is_that_of_the_good_preset():
    import h5py

    with h5py.File(real("atomap_STO_ADF_cropped.hdf5")) as file:
        found = []
        file.visititems(
            lambda _, o: found.append(o) if isinstance(o, h5py.Dataset) and o.ndim == 2 else None
        )
        raw = np.asarray(found[0], dtype=float)
    px = 0.00933
    cols = columns("YMnO3", fov=(4, 4), thickness=8)
    level = noise(
        acquire(haadf(cols, px), preset("good", dose_e_A2=5e5), 0, rim=20).data, px, 25, 45
    )
    assert 1 / 4 < noise(raw, px, 25, 45) / level < 4
