"""Files that state the length of a pixel several times, with statements that contradict each other: the right size, or both names."""

import re
from typing import NamedTuple

import numpy as np
import pytest
import samples
import tifffile

from microgen.core import UncalibratedError
from microgen.io.files import read

N = 400
ROWS = 24
# what an old tag may be off by: a resized image, another magnification, a monitor, a lost exponent
FACTORS = (0.5, 2.0, 3.0, 0.93, 1.07, 1024 / 1000, 10.0)
NONSENSE = (0.0, 1e-12, 1e15)  # no micrograph has such a pixel: they state nothing


class Stated(NamedTuple):
    "One place of a file, and how far it is off."

    place: str
    factor: float


def stated_by(rng, places):
    "Some of the places, right or off; a third of the files agree."
    chosen = rng.permutation(places)[: rng.integers(1, len(places) + 1)]
    wrong = 0.0 if rng.random() < 1 / 3 else 0.4
    stated = []
    for place in chosen:
        factor = 1.0
        if rng.random() < wrong:
            factor = float(rng.choice(NONSENSE if rng.random() < 0.4 else FACTORS))
        stated.append(Stated(str(place), factor))
    return stated


def number(value):
    "A number as a program prints it, sometimes with a decimal comma."
    return f"{value:.6e}"


def fei_text(stated, pixel_m, columns, comma):
    "FEI's sections: the pixel, and the field over the columns."
    factor = {place: one for place, one in stated}
    lines = ["[Scan]"]
    if "fei_pixel" in factor:
        lines += [
            f"Pixel{side}={number(pixel_m * factor['fei_pixel'])}" for side in ("Width", "Height")
        ]
    if "fei_field" in factor:
        lines += [f"HorFieldsize={number(pixel_m * factor['fei_field'] * columns)}"]
    text = "\r\n".join([*lines, ""])
    return text.replace(".", ",") if comma else text


def zeiss_text(stated, pixel_m, columns):
    "SmartSEM's four places, three of them printed with four digits."
    factor = {place: one for place, one in stated}
    monitor_m = pixel_m * columns / 1024
    lines = ["0", "0", "0", number(monitor_m * factor.get("zeiss_number", 0))]
    for place, key, metres in (
        ("zeiss_image", "AP_IMAGE_PIXEL_SIZE\r\nImage Pixel Size", pixel_m),
        ("zeiss_monitor", "AP_PIXEL_SIZE\r\nPixel Size", monitor_m),
        ("zeiss_width", "AP_WIDTH\r\nWidth", pixel_m * columns),
    ):
        if place in factor:
            lines.append(f"{key} = {1e9 * metres * factor[place]:#.5g} nm")
    return "\r\n".join([*lines, ""])


PLACES = (
    "fei_pixel",
    "zeiss_number",
    "zeiss_image",
    "zeiss_monitor",
    "zeiss_width",
    "dm",
    "imagej",
)


def write(path, rng, stated, pixel_nm, columns):
    "A TIFF with these statements."
    factor = {place: one for place, one in stated}
    pixel_m, tags = 1e-9 * pixel_nm, []
    if "fei_pixel" in factor:
        text = fei_text(stated, pixel_m, columns, rng.random() < 0.5)
        tags.append((34682, "s", 0, text, True))
    if any(place.startswith("zeiss") for place in factor):
        tags.append((34118, "s", 0, zeiss_text(stated, pixel_m, columns), True))
    if "dm" in factor:
        tags += [(code, "s", 0, "nm", True) for code in (65003, 65004)]
        tags += [(code, "d", 1, pixel_nm * factor["dm"], True) for code in (65009, 65010)]
    how = {}
    if "imagej" in factor and 1e-6 < factor["imagej"] < 1e6:
        per_nm = 1 / (pixel_nm * factor["imagej"])
        how = {"resolution": (per_nm, per_nm), "metadata": {"unit": "nm"}}
    tifffile.imwrite(path, np.zeros((ROWS, columns), np.uint8), imagej=True, extratags=tags, **how)


def expected(stated):
    "Whether the statements that say something agree; None where nothing is said."
    factors = [one.factor for one in stated if 1e-6 < one.factor < 1e6]
    if not factors:
        return None
    return max(factors) / min(factors) < 1.015


def test_tags_that_contradict_each_other(tmp_path):
    seen = {True: 0, False: 0, None: 0}
    for seed in range(N):
        rng = np.random.default_rng([13, seed])
        stated = stated_by(rng, PLACES)
        pixel_nm = float(np.exp(rng.uniform(np.log(0.01), np.log(1000))))
        columns = int(rng.choice([512, 700, 1024, 2048, 3072]))
        write(tmp_path / "a.tif", rng, stated, pixel_nm, columns)
        agree = expected(stated)
        seen[agree] += 1
        if agree:
            factors = [one.factor for one in stated if 1e-6 < one.factor < 1e6]
            found = read(tmp_path / "a.tif").pixel_size
            assert found == pytest.approx(2 * [pixel_nm * factors[0]], rel=1e-3), (seed, stated)
            continue
        with pytest.raises(UncalibratedError, match="pixel_size=") as error:
            read(tmp_path / "a.tif")
        if agree is False:
            said = re.search(
                r"two lengths of one pixel, .* \((.+)\) and .* \((.+)\): give", str(error.value)
            )
            assert said and said[1] != said[2], (seed, stated, str(error.value))
        assert read(tmp_path / "a.tif", 0.02).pixel_size == (0.02, 0.02), "the user's word wins"
    assert min(seen.values()) > 5, seen


@pytest.mark.parametrize("factor", [1.0, 1.005, 0.5, 2.0, 1.3])
@pytest.mark.parametrize("columns", [512, 1024, 3072])
def test_a_field_that_is_not_that_of_the_columns(columns, factor, tmp_path):
    "FEI's field over the columns, as after a program that resized the image and kept the tags."
    stated = [Stated("fei_pixel", 1.0), Stated("fei_field", factor)]
    text = fei_text(stated, 2e-9, columns, comma=False)
    tifffile.imwrite(
        tmp_path / "a.tif",
        np.zeros((ROWS, columns), np.uint8),
        extratags=[(34682, "s", 0, text, True)],
    )
    if abs(factor - 1) < 0.01:
        assert read(tmp_path / "a.tif").pixel_size == pytest.approx((2.0, 2.0), rel=1e-6)
        return
    with pytest.raises(UncalibratedError, match=r"Scan.PixelWidth\) and .*HorFieldsize, over"):
        read(tmp_path / "a.tif")


@pytest.mark.parametrize("factor", [1.0, 0.5, 1e-9])
def test_an_mrc_header_and_its_extension(factor, tmp_path):
    "FEI's software states the pixel behind the header once more."
    raw = samples.mrc(samples.image())
    extension = bytearray(1024)
    np.frombuffer(extension, "<f8", 2, offset=156)[:] = 1e-9 * samples.PIXEL_NM * factor
    head = bytearray(raw[:1024])
    head[92:96], head[104:108] = (1024).to_bytes(4, "little"), b"FEI1"
    (tmp_path / "a.mrc").write_bytes(bytes(head) + bytes(extension) + raw[1024:])
    if factor == 0.5:
        with pytest.raises(UncalibratedError, match="cell of the MRC header.*extended MRC header"):
            read(tmp_path / "a.mrc")
        return
    assert read(tmp_path / "a.mrc").pixel_size == pytest.approx(2 * [samples.PIXEL_NM], rel=1e-6)
