"""Calibrating detection: bad input, dark particles, pixels without a scale, the same on any number of processes."""

import numpy as np
import pytest
from scipy import ndimage as ndi

from microgen.core import InputError
from microgen.count.appearance import stamp
from microgen.count.calibrate import calibrate, match
from microgen.count.detect import detect
from microgen.count.fitting import fitted_sizes, look_of
from microgen.count.law import fit_detection


def discs(seed=0, shape=(200, 200), n=40, sign=1, noise=12.0):
    "Flat discs of 4 to 13 px on an even ground: image, centres, diameters."
    rng = np.random.default_rng(seed)
    yy, xx = np.mgrid[: shape[0], : shape[1]]
    image, rows = np.full(shape, 100.0), []
    while len(rows) < n:
        y, x, d = rng.uniform(8, shape[0] - 8), rng.uniform(8, shape[1] - 8), rng.uniform(4, 13)
        if all(np.hypot(y - b, x - c) > (d + e) / 2 + 4 for b, c, e in rows):
            rows.append((y, x, d))
    for y, x, d in rows:
        image += sign * 60 * np.clip(d / 2 - np.hypot(yy - y, xx - x) + 0.5, 0, 1)
    image = ndi.gaussian_filter(image, 1.1) + noise * rng.normal(size=shape)
    return image.astype(np.float32), np.array(rows)


@pytest.mark.parametrize("sign", [1, -1])
def test_bright_and_dark_look(sign):
    image, _ = discs(sign=sign, noise=4.0)
    look = look_of(detect(image))
    planes = stamp(look, 10.0)
    middle = (look.face * planes[1] + look.rim * planes[2])[
        planes.shape[1] // 2, planes.shape[2] // 2
    ]
    assert abs(middle / (sign * 60) - 1) < 0.15 and 0.7 < look.blur_px < 1.5


def test_without_a_scale_and_on_two_processes():
    image, _ = discs(noise=22.0)
    found = detect(image)
    one, two = (calibrate(image, n=240, detection=found, rng=3, workers=w) for w in (1, 2))
    assert one.unit == "px" and "d_px" in one.injections and one.to_dict()["unit"] == "px"
    assert one.injections.equals(two.injections)
    alone = fit_detection(one.injections["d_px"], one.injections["found"])
    assert (
        one.curve.d50_se / one.curve.d50 > np.hypot(0.01, 0.9 * alone.d50_se / alone.d50)
        and one.look_error(one.curve.d50) > 0.01
    )
    from joblib.externals.loky import get_reusable_executor

    get_reusable_executor().shutdown()


def test_matching_is_one_to_one():
    image, rows = discs(noise=4.0)
    found = detect(image)
    which = match(found, np.r_[rows[:, 2], rows[:, 2]], np.r_[rows[:, :2], rows[:, :2]])
    held = which[which >= 0]
    assert len(held) == len(set(held)) and len(held) >= 0.8 * len(rows)


def test_bad_input():
    with pytest.raises(InputError, match="do not show how particles look"):
        calibrate(np.full((64, 64), 7.0), 1.0)
    with pytest.raises(InputError, match="too small"):
        calibrate(np.zeros((8, 8)), 1.0)
    with pytest.raises(InputError, match="give 200 or more"):
        calibrate(discs()[0], n=10)


def test_fitted_diameters_scatter_less():
    "Flat discs, dark and bright: fitted with the look they are nearer the truth than the counter's, touching the frame they are NaN."
    for sign in (1, -1):
        image, rows = discs(seed=1, sign=sign, noise=20.0)
        found = detect(image)
        which = match(found, rows[:, 2], rows[:, :2])
        true, which = rows[which >= 0, 2], which[which >= 0]
        fitted = fitted_sizes(found, look_of(found))
        counted = found.particles.diameter_px.to_numpy()
        assert np.array_equal(np.isnan(fitted), found.particles.edge_weight.to_numpy() == 0)
        off = [np.log(d[which] / true)[np.isfinite(fitted[which])] for d in (counted, fitted)]
        assert off[1].std() < 0.75 * off[0].std() and abs(np.median(off[1])) < 0.06
