"Columns, lattices and walls in real micrographs, and what a notebook cell is too small for."

import os
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial import cKDTree

from microgen.core import InputError, Micrograph
from microgen.stem.column import find_columns, fit_columns
from microgen.stem.crystal import columns
from microgen.stem.lattice import assign, reference_columns
from microgen.stem.measure import measure
from microgen.stem.render import haadf
from microgen.stem.wall import displace, wall


@pytest.fixture(scope="module")
def stem():
    folder = os.environ.get("MICROGEN_TEST_DATA")
    if not folder:
        pytest.skip(
            "set MICROGEN_TEST_DATA to the folder that holds stem/ to test on real micrographs"
        )
    return Path(folder) / "stem"


def real(path, **kwargs):
    from microgen.io.files import read

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return read(path, **kwargs)


def simulated(kind, fov=3.0, pixel=0.02, dose=None, seed=0):
    sample = displace(columns("YMnO3", fov=(fov, fov), margin=0.6), wall(kind, fov=(fov, fov)))
    image = haadf(sample, pixel)
    if dose:
        n = dose * 100 * pixel**2
        image = Micrograph(
            (np.random.default_rng(seed).poisson(image.data * n) / n).astype("float32"), pixel
        )
    return image, sample.table


def nearest(found, true):
    return true.iloc[cKDTree(true[["y_nm", "x_nm"]]).query(found[["y_nm", "x_nm"]])[1]]


def test_strontium_titanate_has_its_lattice_constant_and_no_polarisation(stem):
    c = measure(real(stem / "atomap_STO_ADF_cropped.hdf5")).columns
    a = c[c.site == "A"]
    ij, yx = np.c_[a[["i", "j"]], np.ones(len(a))], a[["y_nm", "x_nm"]]
    cell = np.linalg.lstsq(ij, yx, rcond=None)[0][
        :2
    ]  # along [110] the net of A and B is a/2 by a/sqrt 2
    assert np.sqrt(2 * np.sqrt(2) * abs(np.linalg.det(cell))) == pytest.approx(0.3905, rel=0.01)
    b = c[c.site == "B"]
    assert len(a) > 100 and len(b) > 100
    assert abs(b.up_pm.median()) < 3 and abs(b.right_pm.median()) < 3 and b.disp_pm.median() < 6


def test_barium_titanate_is_polar_all_over(stem):
    c = measure(real(stem / "BTO_crystal_1.dm4").crop(0, 0, 180, 180)).columns
    b = c[c.site == "B"].dropna(subset="up_pm")
    assert 0.9 < (c.site == "A").sum() / (c.site == "B").sum() < 1.1
    cell = np.sqrt(
        2
        * abs(
            np.linalg.det(
                np.linalg.lstsq(
                    np.c_[c[["i", "j"]], np.ones(len(c))], c[["y_nm", "x_nm"]], rcond=None
                )[0][:2]
            )
        )
    )
    assert cell == pytest.approx(0.400, rel=0.03)
    mean = np.hypot(b.up_pm.mean(), b.right_pm.mean())
    assert 4 < mean < 20 and b.up_pm.std() < mean  # one direction, larger than its scatter


def test_lead_titanate_is_polar_beside_a_layer_that_is_not(stem):
    c = measure(real(stem / "PTO-SRO_cropped_aligned.hspy").crop(0, 0, 224, 320)).columns
    b = c[c.site == "B"].dropna(subset="disp_pm")
    inner = b[b.x_nm.between(0.4, 4.4)]
    assert (
        1.5 * inner.disp_pm[inner.y_nm.between(1.6, 2.2)].median()
        < inner.disp_pm[inner.y_nm.between(0.3, 0.9)].median()
    )


def test_cadmium_telluride_dumbbells_on_both_sides_of_a_grain_boundary(stem):
    m = real(stem / "CdTe_110_tilt_HAADF149.dm3")
    found = find_columns(m)
    below = found[found.y_nm > 5.2]
    length = cKDTree(below[["y_nm", "x_nm"]]).query(below[["y_nm", "x_nm"]], k=2)[0][:, 1]
    assert np.median(length) == pytest.approx(0.162, rel=0.08)  # a/4 of a = 0.6482 nm


def test_a_real_manganite_wall_has_the_polarity_its_authors_drew(stem):
    m = real(stem / "hREMnO3_domain_wall_300kV.png", pixel_size=0.0103)
    m = m if m.data.ndim == 2 else Micrograph(m.data[:3].mean(0), m.pixel_size)
    found = measure(m, "YMnO3")
    r = found.columns[found.columns.trimer >= 0].dropna(subset="phi")
    polar = -np.cos(3 * r.phi)
    left, right = polar[r.x_nm < 0.6], polar[r.x_nm > 2.6]
    assert (
        len(r) > 110 and left.mean() > 0.3 and right.mean() < -0.3
    )  # arrows in the figure: up on the left, down on the right


def test_a_wrong_structure_is_refused_or_warned_about(stem):
    for name in ("BTO_crystal_1.dm4", "PTO-SRO_cropped_aligned.hspy"):
        with pytest.raises(InputError, match="lattice"):
            reference_columns(real(stem / name), "YMnO3")
    with pytest.warns(UserWarning, match="agrees"):
        reference_columns(real(stem / "CdTe_110_tilt_HAADF149.dm3"), "YMnO3")


@pytest.mark.parametrize("probe_source", (0.01, 0.035))
def test_noise_free_columns_are_right_to_a_picometre(probe_source):
    from microgen.stem.probe import Probe

    sample = displace(columns("YMnO3", fov=(2.4, 2.4), margin=0.6), wall("typeA", fov=(2.4, 2.4)))
    image = haadf(sample, 0.02, Probe(source_nm=probe_source))
    fitted = fit_columns(image, reference_columns(image, "YMnO3"))
    for element in ("Y", "Mn"):
        f = fitted[
            (fitted.element == element)
            & fitted.y_nm.between(0.15, 2.25)
            & fitted.x_nm.between(0.15, 2.25)
        ]
        t = nearest(f, sample.table[sample.table.element == element])
        assert 1e3 * np.sqrt(((f.y_nm.to_numpy() - t.y_nm.to_numpy()) ** 2).mean()) < 0.5
        assert (
            1e3
            * np.hypot(
                f.y_nm.to_numpy() - t.y_nm.to_numpy(), f.x_nm.to_numpy() - t.x_nm.to_numpy()
            ).max()
            < 1
        )


def test_images_in_other_units_give_the_same_columns():
    image, _ = simulated("UP", fov=2.0, dose=1e5)
    start = reference_columns(image, "YMnO3")
    one = fit_columns(image, start)
    two = fit_columns(Micrograph(image.data * 3000 + 500, image.pixel_size), start)
    assert np.abs(one.y_nm - two.y_nm).max() < 2e-5 and np.allclose(
        one.y_se_nm, two.y_se_nm, rtol=0.02
    )
    assert np.allclose(two.amplitude / one.amplitude, 3000, rtol=0.01)


def test_mirrored_along_c_the_polarity_changes_sign():
    image, _ = simulated("UP", dose=1e5)
    polarity = measure(image, "YMnO3").columns.polarity.dropna()
    mirrored = measure(
        Micrograph(image.data[::-1].copy(), image.pixel_size), "YMnO3"
    ).columns.polarity.dropna()
    assert (polarity == 1).all() and (mirrored == -1).all()


def test_free_widths_are_recovered():
    rng = np.random.default_rng(0)
    y, x = (v.ravel() for v in np.mgrid[0.2:2:0.3, 0.2:2:0.3])
    width = rng.uniform(0.04, 0.06, y.size)
    r = np.arange(110) * 0.02
    image = (
        sum(
            np.exp(-0.5 * ((r[:, None] - a) ** 2 + (r - b) ** 2) / w**2)
            for a, b, w in zip(y, x, width)
        )
        + 0.1
    )
    import pandas as pd

    fitted = fit_columns(
        Micrograph(image.astype("float32"), 0.02),
        pd.DataFrame(dict(y_nm=y + 0.01, x_nm=x)),
        widths="column",
    )
    assert np.abs(fitted.sigma_nm.to_numpy() - width).max() < 1e-3


def test_found_columns_are_named():
    image, table = simulated("DN", dose=1e5)
    named = assign(find_columns(image), image, "YMnO3")
    named = named[named.element != ""]
    t = nearest(named, table[table.element.isin(["Y", "Mn"])])
    assert (named.element.to_numpy() == t.element.to_numpy()).mean() > 0.98


def test_drift_and_shear_do_not_look_like_polarisation():
    sample = displace(columns("YMnO3", fov=(4, 4), margin=1), wall("UP", fov=(4, 4)))
    t = sample.table
    y, x = t.y_nm.to_numpy(), t.x_nm.to_numpy()
    table = t.assign(
        y_nm=y + 0.02 * (x - 2) + 0.02 * np.sin(1.3 * y),
        x_nm=x + 0.02 * (y - 2) + 0.03 * np.cos(1.1 * y),
    )
    found = measure(haadf(replace(sample, table=table), 0.02), "YMnO3").columns
    r = found[found.trimer >= 0]
    true = nearest(r, table[table.trimer >= 0])
    inner = (r.y_nm.between(0.5, 3.5) & r.x_nm.between(0.5, 3.5)).to_numpy()
    assert np.abs(r.disp_pm.to_numpy() - true.disp_pm.to_numpy())[inner].max() < 4
    assert (r.polarity[inner] == 1).all()
