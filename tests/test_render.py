"""The renderer against its laws: conservation, equivariance, band limit, independent sums, gradients."""

import importlib
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import j0

from microgen.core import InputError
from microgen.stem.probe import Probe, transfer, wavelength_nm
from microgen.stem.render import haadf, haadf_batch, sum_columns
from microgen.stem.scattering import atomic_number, calibration

SHARP = Probe(source_nm=0.0)
ABERRATED = Probe(
    defocus_nm=4.0, cs_um=2.0, a1_nm=2.0, a1_deg=25.0, focal_spread_nm=3.0, source_nm=0.03
)
PROBES = pytest.mark.parametrize(
    "probe",
    [SHARP, Probe(), Probe(defocus_nm=-7), ABERRATED],
    ids=["sharp", "default", "defocus", "aberrated"],
)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    "Small matrices are faster on one thread, above all where other work runs."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def points(n=40, size=1.28, batch=1, seed=0):
    rng = np.random.default_rng(seed)
    return [torch.tensor(rng.random((batch, n)) * s) for s in (size, size, 1)]


def crystal(atoms, fov=(1.0, 1.0), thickness_nm=5.0, **more):
    "Columns from rows (y_nm, x_nm, element)."
    table = pd.DataFrame(atoms, columns=["y_nm", "x_nm", "element"]).assign(n_atoms=8.0)
    return SimpleNamespace(
        **{
            "table": table,
            "fov": fov,
            "thickness_nm": thickness_nm,
            "name": "test",
            "polar_deg": 0.0,
            "depth_disp_pm": None,
            **more,
        }
    )


def psf(r_nm, probe):
    "Intensity of a round, coherent probe at distances r, 1/nm²: Hankel transform of the aperture."
    lam, a = wavelength_nm(probe.voltage_kV), 1e-3 * probe.semiangle_mrad
    u, w = np.polynomial.legendre.leggauss(120)
    u, w = a * (u + 1) / 2, a * w / 2
    chi = 2 * np.pi / lam * (-probe.defocus_nm * u**2 / 2 + 1e3 * probe.cs_um * u**4 / 4)
    wave = (j0(2 * np.pi / lam * u * np.asarray(r_nm)[..., None]) * np.exp(-1j * chi) * u * w).sum(
        -1
    )
    return np.abs(wave) ** 2 * 4 * np.pi / (lam * a) ** 2


@PROBES
def test_transfer_is_one_at_zero_and_zero_beyond_the_limit(probe):
    q = torch.linspace(0, 30, 400, dtype=torch.float64)
    value = transfer(probe, q, 0.7)
    assert abs(value[0] - 1) < 1e-12
    assert (value[q >= probe.limit] == 0).all()
    assert value.abs().max() <= 1 + 1e-9
    assert abs(transfer(probe, torch.tensor(probe.limit * (1 - 1e-9))).item()) < 1e-6


@PROBES
def test_an_aberrated_probe_transfers_less_than_the_ideal_one(probe):
    q = torch.linspace(0, SHARP.limit, 200, dtype=torch.float64)
    assert (transfer(probe, q).abs() <= transfer(SHARP, q) + 1e-9).all()


def test_the_sign_of_defocus_matters_only_beside_aberrations():
    q = torch.linspace(0, 17, 50, dtype=torch.float64)
    assert torch.allclose(
        transfer(Probe(defocus_nm=6), q), transfer(Probe(defocus_nm=-6), q), atol=1e-12
    )
    under, over = (transfer(Probe(defocus_nm=d, cs_um=10), q) for d in (6, -6))
    assert (under - over).abs().max() > 0.05
    assert under.sum() > over.sum()  # underfocus compensates a positive Cs


def test_astigmatism_is_two_foci_along_its_axes():
    q = torch.linspace(0, 17, 50, dtype=torch.float64)
    probe = Probe(a1_nm=5, a1_deg=30)
    first, second = (transfer(probe, q, math.radians(a)) for a in (30, 210))
    assert torch.allclose(first, second, atol=1e-9)  # twofold
    mirrored = [transfer(probe, q, math.radians(30 + s * 20)) for s in (1, -1)]
    assert torch.allclose(*mirrored, atol=1e-9)
    turned = transfer(Probe(a1_nm=-5, a1_deg=120), q, 0.4)
    assert torch.allclose(turned, transfer(probe, q, 0.4), atol=1e-9)


@pytest.mark.parametrize(
    "probe",
    [
        SHARP,
        Probe(source_nm=0.0, defocus_nm=8.0),
        Probe(source_nm=0.0, defocus_nm=8.0, cs_um=5.0),
        Probe(300.0, 30.0, -5.0, 0.0, 0.0),
    ],
)
def test_one_column_is_the_probe_by_an_independent_integral(probe):
    y, x = torch.tensor([[0.503]]).double(), torch.tensor([[0.611]]).double()
    image = sum_columns(y, x, torch.ones_like(y), (50, 60), 0.02, probe, period_nm=(40.0, 40.0))[
        0
    ].numpy()
    grid = np.hypot((np.arange(50) * 0.02 - 0.503)[:, None], np.arange(60) * 0.02 - 0.611)
    assert abs(image - psf(grid, probe)).max() < 1e-5 * image.max()


def test_an_open_field_matches_the_sum_of_probes_in_real_space():
    y, x, w = points(12, 0.8)
    image = sum_columns(y, x, w, (40, 40), 0.02, SHARP, period_nm=(30.0, 30.0))[0].numpy()
    grid = np.arange(40) * 0.02
    direct = sum(
        wi * psf(np.hypot((grid - yi)[:, None], grid - xi), SHARP)
        for yi, xi, wi in zip(*(v[0].numpy() for v in (y, x, w)))
    )
    assert abs(image - direct).max() < 1e-5 * direct.max()


def test_the_rim_makes_wrapping_negligible():
    y, x, w = points(60, 1.28)
    for probe in (Probe(), Probe(defocus_nm=15.0), ABERRATED):
        field = sum_columns(y, x, w, (64, 64), 0.02, probe)
        wide = sum_columns(y, x, w, (64, 64), 0.02, probe, period_nm=(20.0, 20.0))
        assert (field - wide).abs().max() < 3e-3 * wide.max()


def test_a_column_beyond_the_rim_does_not_wrap_into_the_field():
    for at in (-3.0, 1.28 + 3.0, -0.9, 1.28 + 0.9):
        y = torch.tensor([[at]]).double()
        image = sum_columns(y, torch.full_like(y, 0.6), torch.ones_like(y), (64, 64), 0.02)
        assert image.abs().max() < 1e-3 * psf(0.0, SHARP)


@PROBES
def test_total_and_phase_under_a_shift(probe):
    y, x, w = points()
    periodic = {"shape": (64, 64), "pixel_size": 0.02, "period_nm": (1.28, 1.28), "probe": probe}
    still = sum_columns(y, x, w, **periodic)[0].numpy()
    moved = sum_columns(y + 0.00731, x - 0.0123, w, **periodic)[0].numpy()
    assert still.sum() * 4e-4 == pytest.approx(w.sum().item(), rel=1e-10)
    assert moved.sum() == pytest.approx(still.sum(), rel=1e-10)
    k = np.fft.fftfreq(64, 0.02)
    phase = np.exp(-2j * np.pi * (k[:, None] * 0.00731 - k * 0.0123))
    spectrum = np.fft.fft2(still)
    assert abs(np.fft.fft2(moved) - spectrum * phase).max() < 1e-10 * abs(spectrum).max()


def test_the_spectrum_ends_at_twice_alpha_over_lambda():
    y, x, w = points()
    image = sum_columns(y, x, w, (96, 96), 1.28 / 96, SHARP, period_nm=(1.28, 1.28))[0].numpy()
    k = np.fft.fftfreq(96, 1.28 / 96)
    spectrum, q = abs(np.fft.fft2(image)), np.hypot(k[:, None], k)
    assert spectrum[q > SHARP.limit].max() < 1e-9 * spectrum.max()
    assert spectrum[(q > SHARP.limit - 1.5) & (q < SHARP.limit - 0.8)].max() > 1e-6 * spectrum.max()


def test_a_coarse_or_oblong_pixel_samples_the_same_image():
    y, x, w = points()
    fine = sum_columns(y, x, w, (64, 64), 0.02)
    coarse = sum_columns(y, x, w, (16, 32), (0.08, 0.04))
    assert torch.allclose(coarse, fine[:, ::4, ::2], atol=1e-9 * fine.max().item())


def test_a_whole_pixel_shift_of_all_columns_shifts_the_image():
    y, x, w = points()
    a = sum_columns(y, x, w, (64, 64), 0.02, period_nm=(1.28, 1.28))
    b = sum_columns(y + 3 * 0.02, x - 5 * 0.02, w, (64, 64), 0.02, period_nm=(1.28, 1.28))
    assert torch.allclose(a.roll((3, -5), (1, 2)), b, atol=1e-9 * a.max().item())


def test_a_perfect_lattice_is_periodic():
    y, x = (
        v.flatten()[None].double()
        for v in torch.meshgrid(
            torch.arange(-3, 20) * 0.2, torch.arange(-3, 20) * 0.16, indexing="ij"
        )
    )
    image = sum_columns(y, x, torch.ones_like(y), (120, 128), 0.02, Probe())
    inside = image[:, 20:100, 16:112]
    error = max(
        (inside[:, 10:] - inside[:, :-10]).abs().max(),
        (inside[:, :, 8:] - inside[:, :, :-8]).abs().max(),
    )
    assert (
        error < 2e-3 * image.max()
    )  # columns stop 0.6 nm outside the field, the tails of the probe do not


def test_float32_and_batches_and_elements_agree():
    y, x, w = points(800, 5.0, batch=3)
    exact = sum_columns(y, x, w, (256, 256), 0.02)
    single = sum_columns(y.float(), x.float(), w.float(), (256, 256), 0.02)
    assert single.dtype == torch.float32
    assert (single - exact).abs().max() < 2e-5 * exact.max()
    loop = torch.cat(
        [sum_columns(y[i : i + 1], x[i : i + 1], w[i : i + 1], (256, 256), 0.02) for i in range(3)]
    )
    assert torch.allclose(loop, exact, atol=1e-10)
    doubled = sum_columns(
        *(torch.cat([v, v], 1) for v in (y, x)), torch.cat([w, 0 * w], 1), (256, 256), 0.02
    )
    assert torch.allclose(doubled, exact, atol=1e-10)  # padding has no weight


def test_one_probe_per_image():
    y, x, w = points(30, 1.28, batch=3)
    probes = [Probe(), Probe(defocus_nm=5), ABERRATED]
    together = sum_columns(y, x, w, (64, 64), 0.02, probes)
    for i, probe in enumerate(probes):
        alone = sum_columns(y[i : i + 1], x[i : i + 1], w[i : i + 1], (64, 64), 0.02, probe)
        assert (together[i] - alone[0]).abs().max() < 2e-3 * alone.max()


def test_width_of_a_column_is_a_gaussian_blur():
    y, x, w = points(5, 1.28)
    periodic = {"shape": (64, 64), "pixel_size": 0.02, "period_nm": (1.28, 1.28)}
    wide = sum_columns(y, x, w, probe=Probe(source_nm=0.03), sigma_nm=0.04, **periodic)
    same = sum_columns(y, x, w, probe=Probe(source_nm=0.05), **periodic)
    assert torch.allclose(wide, same, atol=1e-9)
    each = sum_columns(
        y, x, w, probe=Probe(source_nm=0.03), sigma_nm=torch.full((1, 5), 0.04), **periodic
    )
    assert torch.allclose(wide, each, atol=1e-6)


def test_gradients_of_positions_weights_and_widths():
    y, x, w = (v.requires_grad_() for v in points(4, 0.3))
    s = torch.tensor([[0.01, 0.02, 0.03, 0.015]]).double().requires_grad_()
    probe = Probe(semiangle_mrad=10.0, a1_nm=3.0)
    assert torch.autograd.gradcheck(
        lambda *v: sum_columns(*v[:3], (6, 5), 0.05, probe, v[3]), (y, x, w, s)
    )


def test_gradients_of_the_probe():
    y, x, w = points(4, 0.3)
    values = [
        torch.tensor(v).double().requires_grad_()
        for v in (200.0, 10.0, 6.0, 5.0, 0.03, 0.0, 20.0, 3.0)
    ]

    def image(
        *v,
    ):  # a fixed period: the number of frequencies must not follow the finite difference
        return sum_columns(y, x, w, (6, 5), 0.05, Probe(*v), period_nm=(1.31, 1.27))

    assert torch.autograd.gradcheck(image, values)


def test_a_displacement_is_recovered_by_descent():
    y, x, w = points(8, 0.8, seed=3)
    target = sum_columns(y, x, w, (40, 40), 0.02)
    shift_pm = torch.full_like(y, 8.0).requires_grad_()
    optimiser = torch.optim.LBFGS(
        [shift_pm], max_iter=60, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss():
        optimiser.zero_grad()
        value = (sum_columns(y + 1e-3 * shift_pm, x, w, (40, 40), 0.02) - target).square().mean()
        value.backward()
        return value

    optimiser.step(loss)
    assert shift_pm.abs().max() < 0.05


@pytest.mark.parametrize("n", [1.6, 1.7, 2.0])
def test_peak_contrast_of_isolated_columns_is_z_to_the_n(n):
    equal = pd.DataFrame(
        {"element": ["Y", "Mn"], "weight_nm2": [39.0**n, 25.0**n], "sigma_pm": 7.0}
    )
    pair = crystal([(0.5, 0.5, "Y"), (0.5, 3.5, "Mn")], fov=(1.0, 4.0))
    image = haadf(pair, 0.02, calibration=equal).data
    assert image[25, 25] / image[25, 175] == pytest.approx((39 / 25) ** n, rel=1e-3)
    table = calibration(("Y", "Mn"), 5, n).set_index("element").weight_nm2
    assert table["Y"] / table["Mn"] == pytest.approx((39 / 25) ** n, rel=1e-12)


@pytest.mark.parametrize("source", ["auto", 1.7])
def test_scandium_is_darker_than_manganese(source):
    bright = {}
    for rare_earth in ("Y", "Sc", "Lu"):
        pair = crystal([(0.5, 0.5, rare_earth), (0.5, 3.5, "Mn")], fov=(1.0, 4.0))
        image = haadf(pair, 0.02, calibration=source).data
        bright[rare_earth] = image[25, 25] / image[25, 175]
    assert bright["Sc"] < 1 < bright["Y"] < bright["Lu"]


def test_the_shipped_table():
    thin, five, ten = (calibration(("Y", "Mn", "O"), t) for t in (2, 4.911, 9.822))
    weight = [t.groupby("element").weight_nm2.sum() for t in (thin, five, ten)]
    assert 1.5 < math.log(weight[1]["Y"] / weight[1]["Mn"]) / math.log(39 / 25) < 2
    assert all(w["Y"] > w["Mn"] > w["O"] > 0 for w in weight)
    assert (
        weight[0].equals(weight[1]) and weight[2]["Y"] < weight[1]["Y"]
    )  # per atom: the beam fades with depth
    between = calibration(("Y", "Mn", "O"), 7.3665).groupby("element").weight_nm2.sum()
    assert between["Y"] == pytest.approx((weight[1]["Y"] + weight[2]["Y"]) / 2, rel=1e-6)
    erbium = calibration(("Er", "Mn", "O"), 5).groupby("element").weight_nm2.sum()
    assert 4 < erbium["Er"] / erbium["Mn"] < 7
    assert set(calibration(("Sr", "Ti", "O"), 5).background) == {0.0}  # not a manganite: Z^n


def test_bent_columns_are_the_mean_over_their_slices():
    atoms = [(0.5, 0.5, "Y"), (0.5, 0.9, "Mn")]
    slices = np.array([[-30.0, -10.0, 10.0, 30.0], [0.0] * 4])
    for polar, step in ((0.0, (-1, 0)), (90.0, (0, -1))):
        bent = crystal(atoms, depth_disp_pm=slices, polar_deg=polar)
        mean = np.mean(
            [
                haadf(
                    crystal([(0.5 + 1e-3 * u * step[0], 0.5 + 1e-3 * u * step[1], "Y"), atoms[1]]),
                    0.02,
                ).data
                for u in slices[0]
            ],
            axis=0,
        )
        assert abs(haadf(bent, 0.02).data - mean).max() < 1e-5 * mean.max()
    straight = crystal(atoms, depth_disp_pm=np.full((2, 4), 25.0))
    assert np.array_equal(haadf(straight, 0.02).data, haadf(crystal(atoms), 0.02).data)


def test_a_batch_is_a_loop():
    many = [
        crystal([(0.3, 0.4 + 0.1 * i, "Y"), (0.6, 0.5, "Mn")] * (i + 1), thickness_nm=4.0 + i)
        for i in range(20)
    ]
    batch = haadf_batch(many, (50, 50), 0.02)
    assert batch.dtype == torch.float32 and batch.shape == (20, 50, 50)
    for i in (0, 7, 19):
        alone = haadf(many[i], 0.02).data
        assert abs(batch[i].numpy() - alone).max() < 1e-6 * alone.max()
    assert np.array_equal(haadf(many[3], 0.02).data, haadf(many[3], 0.02).data)  # the same bytes


def test_walls_match_frozen_phonon_reference_images(monkeypatch):
    "The shipped calibration on walls it was not fitted to: at least 0.99, where two or more configurations are averaged."
    folder = Path(__file__).parents[1] / "benchmarks"
    if not (folder / "haadf_reference.npz").exists():
        pytest.skip(
            "benchmarks/haadf_reference.npz is part of the source tree, not of the installed package"
        )
    monkeypatch.syspath_prepend(str(folder))
    stem = importlib.import_module("stem")
    found = stem.correlations(lambda c, shape, pixel: haadf(c, pixel, SHARP, shape).data)
    counts = {f"{c} {t} nm": held["configurations"] for (c, t), held in stem.references().items()}
    averaged = {k: v for k, v in found.items() if counts[k] > 1}
    assert len(averaged) >= 3
    assert min(averaged.values()) > 0.99, averaged
    uncalibrated = stem.correlations(
        lambda c, shape, pixel: haadf(c, pixel, SHARP, shape, calibration=1.7).data
    )
    assert all(found[k] > uncalibrated[k] + 0.01 for k in found)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_device_does_not_matter():
    many = [crystal([(0.3, 0.4, "Y"), (0.6, 0.5, "Mn")])] * 3
    on = haadf_batch(many, (50, 50), 0.02, device="cuda")
    assert on.device.type == "cuda"
    assert (on.cpu() - haadf_batch(many, (50, 50), 0.02)).abs().max() < 1e-5 * on.max()


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: Probe(voltage_kV=0), "voltage_kV"),
        (lambda: Probe(source_nm=-1), "source_nm"),
        (lambda: Probe(defocus_nm=float("inf")), "defocus_nm"),
        (
            lambda: haadf(
                crystal([(0.1 * i, 0.1 * j, "Y") for i in range(10) for j in range(10)]), 0.06
            ),
            "at most 50 pm",
        ),
        (lambda: haadf(crystal([(0.5, float("nan"), "Y")])), "finite"),
        (lambda: haadf(crystal([]), 0.02), "no columns"),
        (lambda: haadf(crystal([(0.5, 0.5, "Qq")]), 0.02), "not a chemical element"),
        (lambda: haadf(crystal([(0.5, 0.5, "Y")]), 0.0), "positive"),
        (
            lambda: haadf_batch([crystal([(0.5, 0.5, "Y")])], (8, 8), 0.02, [Probe()] * 2),
            "one probe",
        ),
        (lambda: calibration(["Y"], float("nan")), "thickness"),
    ],
)
def test_bad_input_is_one_sentence(call, words):
    with pytest.raises(InputError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_atomic_numbers_ignore_the_charge():
    assert [atomic_number(e) for e in ("O2-", "Mn3+", "Y")] == [8, 25, 39]
