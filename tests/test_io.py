"""Reading and writing: real microscope files, every format byte by byte, other people's readers, lies, full disks and kills."""

import json
import os
import signal
import struct
import subprocess
import sys
import time
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import samples
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import ENDING, FORMATS, HOW, PIXEL_NM, UNCALIBRATED

import microgen
from microgen.core import (
    Micrograph,
    MissingExtra,
    ReadError,
    UncalibratedError,
    UnitError,
    WriteError,
)
from microgen.io import files as io
from microgen.io.files import (
    atomic_folder,
    atomic_path,
    make_folder,
    read,
    write_csv,
    write_json,
    write_parquet,
    write_text,
    write_tiff,
)

pytest.importorskip("ncempy.io.dm", reason="these tests read every format: pip install ncempy h5py")
ROOT = Path(__file__).resolve().parent.parent
CALIBRATED = [f for f in FORMATS if f not in UNCALIBRATED]


# --- Real files


@pytest.fixture
def real():
    "The folder of real micrographs."
    folder = os.environ.get("MICROGEN_TEST_DATA")
    if not folder:
        pytest.skip(
            "MICROGEN_TEST_DATA is not set: it names the folder with real micrographs (stem/BTO_crystal_1.dm4, …)"
        )
    return Path(folder) / "stem"


REAL = {  # file: shape, pixel size in pm
    "BTO_crystal_1.dm4": ((413, 469), 29.66),
    "CdTe_110_tilt_HAADF149.dm3": ((512, 512), 16.39),
    "PTO-SRO_cropped_aligned.hspy": ((224, 1312), 15.00),
    "atomap_STO_ADF_cropped.hdf5": ((400, 380), 9.33),
}


@pytest.mark.filterwarnings("ignore:.*states no unit")
@pytest.mark.parametrize("name", REAL)
def test_real_pixel_sizes(real, name):
    shape, pixel_pm = REAL[name]
    image = read(real / name)
    assert image.shape == shape and image.data.dtype == np.float32 and np.isfinite(image.data).all()
    assert image.pixel_size == pytest.approx(2 * [1e-3 * pixel_pm], abs=5.1e-6), (
        "the pixel size of the file, rounded to 0.01 pm"
    )
    assert Path(image.source).name == name


def spacing_pm(image, low, high, along=None):
    "Spacings of the brightest Fourier peaks between two lengths, in pm; with `along` the brightest near that axis (0: y, 1: x)."
    data = image.data - image.data.mean()
    window = np.outer(*(np.hanning(n) for n in data.shape))
    power = np.log(np.abs(np.fft.fft2(data * window)) ** 2 + 1e-12)
    fy, fx = (np.fft.fftfreq(n, p) for n, p in zip(data.shape, image.pixel_size))
    y, x = np.meshgrid(fy, fx, indexing="ij")
    radius = np.hypot(y, x)
    inside = (radius > 1 / high) & (radius < 1 / low)
    if along is not None:
        inside &= np.abs(x if along == 0 else y) < 0.1 * radius
    i, j = np.unravel_index(np.where(inside, power, -np.inf).argmax(), power.shape)

    def peak(values, k, step):  # vertex of the parabola through three points
        a, b, c = (values[(k + d) % len(values)] for d in (-1, 0, 1))
        return (a - c) / 2 / (a - 2 * b + c) * step

    fit = fy[i] + peak(power[:, j], i, fy[1]), fx[j] + peak(power[i], j, fx[1])
    return 1e3 / np.hypot(*fit)


@pytest.mark.filterwarnings("ignore:.*states no unit")
@pytest.mark.parametrize(
    "name, lattice_pm", [("BTO_crystal_1.dm4", 400.0), ("atomap_STO_ADF_cropped.hdf5", 390.5)]
)
def test_lattice_of_real_perovskites(real, name, lattice_pm):
    "Along the fast scan the lattice is right to 1 %; along the slow scan these images carry 5 to 7 % of drift, which no reader undoes."
    image = read(real / name)
    assert spacing_pm(image, 0.3, 0.6, along=1) == pytest.approx(lattice_pm, rel=0.01)
    assert spacing_pm(image, 0.3, 0.6, along=0) == pytest.approx(lattice_pm, rel=0.08)


def test_lattice_of_cdte(real):
    "The brightest spacing of CdTe [110] is (111), 648.1 pm / √3."
    assert spacing_pm(read(real / "CdTe_110_tilt_HAADF149.dm3"), 0.3, 0.5) == pytest.approx(
        648.1 / 3**0.5, rel=0.05
    )


def test_gatan_files_as_hyperspy_reads_them(real):
    rsciio_dm = pytest.importorskip("rsciio.digitalmicrograph")
    for name in ("BTO_crystal_1.dm4", "CdTe_110_tilt_HAADF149.dm3"):
        ours, theirs = read(real / name), rsciio_dm.file_reader(str(real / name))[0]
        np.testing.assert_array_equal(ours.data, theirs["data"])
        assert [a["units"] for a in theirs["axes"]] == ["nm", "nm"]
        assert ours.pixel_size == pytest.approx([a["scale"] for a in theirs["axes"]], rel=1e-9)


def test_atomap_warns_that_it_reads_a_blank_unit_as_nm(real):
    with pytest.warns(UserWarning, match="states no unit.*atomap.*pixel_size="):
        read(real / "atomap_STO_ADF_cropped.hdf5")


def test_a_png_of_a_real_wall_needs_a_pixel_size(real):
    with pytest.raises(UncalibratedError, match="pixel_size=.*--pixel-size.*calibration"):
        read(real / "hREMnO3_domain_wall_300kV.png")
    image = read(real / "hREMnO3_domain_wall_300kV.png", pixel_size=0.02)
    assert image.data.ndim == 2 and image.pixel_size == (0.02, 0.02)


def test_real_file_through_tiff_and_back(real, tmp_path):
    image = read(real / "BTO_crystal_1.dm4")
    again = read(image.save(tmp_path / "BTO.tif"))
    np.testing.assert_array_equal(again.data, image.data)
    assert again.pixel_size == image.pixel_size and again.metadata == image.metadata


# --- Every format, from its bytes


@pytest.mark.parametrize("kind", CALIBRATED)
def test_every_format_gives_its_pixels_and_scale(kind, tmp_path):
    image = read(samples.write(tmp_path, kind), **HOW.get(kind, {}))
    np.testing.assert_array_equal(image.data, samples.image())
    assert image.pixel_size == pytest.approx(
        (PIXEL_NM, PIXEL_NM), rel=1e-7
    )  # dm and mrc store 32-bit floats
    assert image.data.dtype == np.float32 and image.data.flags["C_CONTIGUOUS"]


@pytest.mark.parametrize("kind", ["dm3", "dm4", "ser", "mrc", "emd", "velox", "hspy"])
def test_our_samples_are_real_files_of_their_kind(kind, tmp_path):
    "Other people's readers see the same image in the files that these tests are built on."
    path = samples.write(tmp_path, kind)
    from ncempy.io import dm, emd, emdVelox, mrc, ser

    if kind == "hspy":
        hspy = pytest.importorskip("rsciio.hspy")
        found = hspy.file_reader(str(path))[0]["data"]
    else:
        reader = {
            "dm3": dm.dmReader,
            "dm4": dm.dmReader,
            "ser": ser.serReader,
            "mrc": mrc.mrcReader,
            "emd": emd.emdReader,
            "velox": emdVelox.emdVeloxReader,
        }
        if kind == "velox":  # its reader wants the date and stage that Velox always writes
            with emdVelox.fileEMDVelox(path) as f:
                found = np.squeeze(f.list_data[0]["Data"][:])
        else:
            found = reader[kind](path)["data"]
    np.testing.assert_array_equal(np.squeeze(found), samples.image())


@pytest.mark.parametrize("kind", ["dm3", "dm4", "ser", "mrc"])
@pytest.mark.parametrize("dtype", ["u2", "f4"])
def test_pixel_types(kind, dtype, tmp_path):
    data = samples.image().astype(dtype)
    path = tmp_path / f"a.{kind}"
    path.write_bytes(
        samples.dm(data, version=int(kind[-1]))
        if kind.startswith("dm")
        else getattr(samples, kind)(data)
    )
    np.testing.assert_array_equal(read(path).data, data.astype(np.float32))


def test_png_and_jpeg(tmp_path):
    expected = (255 * samples.image() / samples.image().max()).astype(np.uint8).astype(np.float32)
    np.testing.assert_array_equal(read(samples.write(tmp_path, "png"), 0.02).data, expected)
    assert np.abs(read(samples.write(tmp_path, "jpg"), 0.02).data - expected).mean() < 3
    for kind in ("png", "jpg"):
        with pytest.raises(UncalibratedError, match="--pixel-size"):
            read(tmp_path / f"{kind}.{kind}")


def test_an_atom_lattice_of_atomap_asks_for_its_unit(tmp_path):
    "atomap keeps the pixel size as a bare number beside each sublattice."
    path = samples.write(tmp_path, "atomap")
    with pytest.raises(UncalibratedError, match="no length.*pixel_size="):
        read(path)
    np.testing.assert_array_equal(read(path, pixel_size=PIXEL_NM).data, samples.image())
    import h5py

    from microgen.io.hdf5 import _atomap_images

    with h5py.File(path) as f:
        (image,) = _atomap_images(f, path)
        about = image.describe()
        assert (image.name, image.data.shape, about.axes) == ("image_data", (24, 32), (0, 1))
        assert {(said.length, said.unit) for said in about.statements} == {(PIXEL_NM, "")}
    with h5py.File(samples.hspy(tmp_path / "a.hspy", samples.image())) as f:
        assert not _atomap_images(f, path), "a file of another layout holds no atom lattice"


STACK = np.stack([samples.image(), samples.image() + 1, samples.image() + 2])


def stacks(folder):
    "A stack of three in every format that knows stacks."
    (folder / "s.dm4").write_bytes(samples.dm(STACK))
    (folder / "s.mrc").write_bytes(samples.mrc(STACK))
    (folder / "s.ser").write_bytes(samples.ser(samples.image(), n=3))
    tifffile.imwrite(
        folder / "s.tif",
        STACK,
        imagej=True,
        resolution=(50, 50),
        metadata={"unit": "nm", "axes": "ZYX"},
    )
    return [
        folder / "s.dm4",
        folder / "s.mrc",
        folder / "s.ser",
        folder / "s.tif",
        samples.hspy(folder / "s.hspy", STACK),
        samples.velox(folder / "velox.emd", STACK),
        samples.emd(folder / "ncem.emd", STACK),
    ]


def test_a_stack_asks_for_a_frame(tmp_path):
    for path in stacks(tmp_path):
        with pytest.raises(ReadError, match="stack of 3 images; pick one with frame=0 to frame=2"):
            read(path)
        with pytest.raises(ReadError, match="frame=3 is not among"):
            read(path, frame=3)
        for k in (0, 2, -1):
            image = read(path, frame=k)
            np.testing.assert_array_equal(
                image.data,
                samples.image() if path.suffix == ".ser" else STACK[k],
                err_msg=path.name,
            )
            assert image.pixel_size == pytest.approx((0.02, 0.02), rel=1e-6)


def test_several_images_in_a_file_ask_for_a_name(tmp_path):
    for path in (
        samples.hspy(tmp_path / "a.hspy", samples.image(), names=("BF", "HAADF")),
        samples.velox(tmp_path / "a.emd", samples.image(), detectors=("BF", "HAADF")),
    ):
        with pytest.raises(ReadError, match="0: BF.*, 1: HAADF.*dataset="):
            read(path)
        for which in ("HAADF", 1, -1):
            assert read(path, dataset=which).shape == (24, 32)


def test_complex_and_one_dimensional_data_are_refused(tmp_path):
    for data, why in (
        (np.ones((8, 8), complex), "complex"),
        (np.ones(8), "1-dimensional"),
        (np.full((2, 2), np.nan), "NaN"),
    ):
        with pytest.raises(ReadError, match=why):
            read(samples.hspy(tmp_path / "a.hspy", data))


# --- Units

UNITS = {
    "pm": 1e-3,
    "Å": 0.1,
    "A": 0.1,
    "angstrom": 0.1,
    "nm": 1.0,
    "µm": 1e3,
    "μm": 1e3,
    "um": 1e3,
    "mm": 1e6,
    "m": 1e9,
}


@pytest.mark.parametrize("unit", UNITS)
def test_every_unit_ends_as_nm(unit, tmp_path):
    files = [
        samples.hspy(tmp_path / "a.hspy", samples.image(), 0.02 / UNITS[unit], unit),
        samples.emd(tmp_path / "a.emd", samples.image(), 0.02 / UNITS[unit], unit),
    ]
    for path in files:
        assert read(path).pixel_size == pytest.approx((0.02, 0.02), rel=1e-12)


@pytest.mark.parametrize(
    "unit, why",
    [
        ("1/nm", "diffraction"),
        ("1 / Å", "diffraction"),
        ("[1/n_m]", "diffraction"),
        ("nm^-1", "diffraction"),
        ("mrad", "not a length"),
        ("eV", "not a length"),
        ("px", "no length"),
        ("", "no length"),
        (None, "no length"),
    ],
)
def test_what_is_no_length_is_refused(unit, why, tmp_path):
    path = samples.hspy(tmp_path / "a.hspy", samples.image(), 0.02, unit)
    with pytest.raises(UncalibratedError, match=why) as error:
        read(path)
    assert isinstance(error.value, ReadError) and isinstance(error.value, UnitError)
    assert read(path, pixel_size=0.02).pixel_size == (0.02, 0.02), "the user's own word is enough"


def test_a_missing_unit_names_three_ways(tmp_path):
    tifffile.imwrite(
        tmp_path / "plain.tif", samples.image(), resolution=(72, 72), resolutionunit="INCH"
    )
    (tmp_path / "zero.mrc").write_bytes(samples.mrc(samples.image(), calibrated=False))
    (tmp_path / "unset.ser").write_bytes(samples.ser(samples.image(), pixel_m=1.0))
    (tmp_path / "blank.dm4").write_bytes(samples.dm(samples.image(), unit=""))
    tifffile.imwrite(tmp_path / "imagej.tif", samples.image(), imagej=True, resolution=(50, 50))
    tifffile.imwrite(
        tmp_path / "pixel.tif",
        samples.image(),
        imagej=True,
        resolution=(1, 1),
        metadata={"unit": "pixel"},
    )
    for unit, per in (
        ("inch", 72),
        ("cm", 72 / 2.54),
        ("mm", 7.2 / 2.54),
        ("m", 7200 / 2.54),
        ("inch", 600),
    ):  # what ImageJ makes of 72 and 600 dpi
        tifffile.imwrite(
            tmp_path / f"paper_{unit}_{per:.0f}.tif",
            samples.image(),
            imagej=True,
            resolution=(per, per),
            metadata={"unit": unit},
        )
    for path in tmp_path.iterdir():
        with pytest.raises(UncalibratedError, match="pixel_size=.*--pixel-size.*calibration"):
            read(path)


def test_large_units_are_lengths_where_the_pixel_is_small(tmp_path):
    for unit, nm in (("inch", 25.4e6), ("cm", 1e7), ("mm", 1e6), ("m", 1e9)):
        tifffile.imwrite(
            tmp_path / "a.tif",
            samples.image(),
            imagej=True,
            resolution=(nm / 500, nm / 500),
            metadata={"unit": unit},
        )
        assert read(tmp_path / "a.tif").pixel_size == pytest.approx((500, 500), rel=1e-6)


def test_diffraction_patterns_of_tia_and_gatan_are_refused(tmp_path):
    (tmp_path / "a.ser").write_bytes(samples.ser(samples.image(), pixel_m=2e7))
    (tmp_path / "a.dm3").write_bytes(samples.dm(samples.image(), unit="1/nm", version=3))
    for path in tmp_path.iterdir():
        with pytest.raises(UncalibratedError, match="diffraction"):
            read(path)


def test_tvips_tiff(tmp_path):
    "TVIPS keeps nm per pixel in its binary header."
    from tifffile import TIFF

    first = np.zeros((), np.dtype([(n, t) for n, t in TIFF.TVIPS_HEADER_V1]).newbyteorder("<"))
    second = np.zeros((), np.dtype([(n, t) for n, t in TIFF.TVIPS_HEADER_V2]).newbyteorder("<"))
    first["Version"], second["Magic"], second["PixelSizeX"], second["PixelSizeY"] = (
        2,
        0xAAAAAAAA,
        0.02,
        0.03,
    )
    raw = first.tobytes() + second.tobytes()
    tifffile.imwrite(
        tmp_path / "a.tif", samples.image(), extratags=[(37706, 1, len(raw), raw, True)]
    )
    assert read(tmp_path / "a.tif").pixel_size == pytest.approx((0.03, 0.02), rel=1e-6)


# --- Round trips of what microgen writes


@settings(max_examples=60, deadline=None)
@given(px=st.floats(1e-3, 1e3), ratio=st.floats(0.2, 5), bits=st.sampled_from([16, 32]))
def test_calibration_survives_to_1e_9(tmp_path_factory, px, ratio, bits):
    "ImageJ's tags, HyperSpy's reader and microgen agree with what was written."
    path = write_tiff(
        tmp_path_factory.mktemp("tif") / "a.tif", samples.image(), (px * ratio, px), bits=bits
    )
    with tifffile.TiffFile(path) as tif:
        tags, described = tif.pages[0].tags, tif.imagej_metadata
        assert described["unit"] == "nm" and tif.is_imagej
        for name, size in (("YResolution", px * ratio), ("XResolution", px)):
            numerator, denominator = tags[name].value
            assert denominator / numerator == pytest.approx(size, rel=1e-9)
    assert read(path).pixel_size == pytest.approx((px * ratio, px), rel=1e-9)
    rsciio_tiff = pytest.importorskip("rsciio.tiff")
    axes = rsciio_tiff.file_reader(str(path))[0]["axes"]
    assert [a["units"] for a in axes] == ["nm", "nm"]
    assert [a["scale"] for a in axes] == pytest.approx([px * ratio, px], rel=1e-9)


def test_imagej_alone_is_enough(tmp_path):
    "ImageJ drops tags it does not know when it saves again; its own calibration then carries the pixel size."
    write_tiff(tmp_path / "ours.tif", samples.image(), (0.03, 0.0296599))
    with tifffile.TiffFile(tmp_path / "ours.tif") as tif:
        y, x = (tif.pages[0].tags[k].value for k in ("YResolution", "XResolution"))
    tifffile.imwrite(
        tmp_path / "again.tif",
        samples.image(),
        imagej=True,
        resolution=(x, y),
        metadata={"unit": "nm"},
    )
    assert read(tmp_path / "again.tif").pixel_size == pytest.approx((0.03, 0.0296599), rel=1e-9)


@pytest.mark.parametrize("bits", [16, 32])
def test_pixels_survive(bits, tmp_path):
    rng = np.random.default_rng(3)
    for data in (
        rng.poisson(500, (31, 17)),
        rng.normal(0, 1e-3, (31, 17)),
        rng.normal(size=(4, 9, 8)),
        np.zeros((5, 5)),
        np.full((5, 5), 1e30),
    ):
        back = read(write_tiff(tmp_path / "a.tif", data, 0.02, bits=bits)).data
        exact = bits == 32 or data.dtype.kind == "i"
        tolerance = 0 if exact else 0.51 * float(np.ptp(data)) / 65535
        assert np.abs(back.astype(float) - data.astype(np.float32)).max() <= tolerance


def test_metadata_survive(tmp_path):
    meta = {"dose": 1e4, "detector": "HAADF ½", "nested": {"a": [1, 2.5, None, True]}}
    assert read(write_tiff(tmp_path / "a.tif", samples.image(), 1, meta)).metadata == meta


def test_tiff_bytes_are_deterministic(tmp_path):
    a, b = (
        write_tiff(tmp_path / n, samples.image(), 0.02, {"seed": 1}).read_bytes()
        for n in ("a.tif", "b.tif")
    )
    assert a == b


def test_names_with_spaces_and_letters_of_the_world(tmp_path):
    folder = tmp_path / "Mikroskop Ångström" / "図 1"
    path = Micrograph(samples.image(), 0.02).save(folder / "wall α−β+ 5 µm.tif")
    assert path.exists() and read(str(path)).shape == (24, 32)


def test_other_formats_through_rosettasciio(tmp_path):
    ripple = pytest.importorskip("rsciio.ripple")
    axes = [
        {
            "name": n,
            "size": s,
            "scale": 0.2,
            "offset": 0.0,
            "units": "Å",
            "navigate": False,
            "index_in_array": i,
        }
        for i, (n, s) in enumerate(zip("yx", (24, 32)))
    ]
    signal = {
        "data": samples.image(),
        "axes": axes,
        "metadata": {"General": {"title": "a"}, "Signal": {"signal_type": ""}},
        "original_metadata": {},
    }
    ripple.file_writer(str(tmp_path / "a.rpl"), signal)
    image = read(tmp_path / "a.rpl")
    np.testing.assert_array_equal(image.data, samples.image())
    assert image.pixel_size == pytest.approx((0.02, 0.02))
    (tmp_path / "a.xyz").write_text("what is this")
    with pytest.raises(ReadError, match="no reader knows the ending '.xyz'; microgen reads .tif"):
        read(tmp_path / "a.xyz")


@pytest.mark.parametrize(
    "module, kind, packages",
    [
        ("h5py", "hspy", "ncempy h5py"),
        ("ncempy.io.dm", "dm4", "ncempy h5py"),
        ("rsciio", "blo", "rosettasciio"),
    ],
)
def test_a_missing_extra_is_named(module, kind, packages, tmp_path, monkeypatch):
    path = tmp_path / f"a.{kind}" if kind == "blo" else samples.write(tmp_path, kind)
    if kind == "blo":
        path.write_bytes(b"anything")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtra, match=f"pip install {packages}"):
        read(path)


def test_xarray_is_understood():
    xarray = pytest.importorskip("xarray")
    y, x = (
        xarray.DataArray(20 * np.arange(n), dims=d, attrs={"units": "pm"})
        for n, d in ((24, "y"), (32, "x"))
    )
    image = microgen.as_micrograph(
        xarray.DataArray(samples.image(), dims=("y", "x"), coords={"y": y, "x": x})
    )
    assert image.pixel_size == pytest.approx((0.02, 0.02))


# --- Truncated and lying files


@pytest.mark.parametrize("kind", FORMATS)
def test_truncated_files(kind, tmp_path):
    good = samples.write(tmp_path, kind).read_bytes()
    bad = tmp_path / f"cut.{ENDING.get(kind, kind)}"
    for part in np.linspace(0, 0.9, 40):
        bad.write_bytes(good[: int(part * len(good))])
        with pytest.raises(ReadError) as error:
            read(bad, pixel_size=0.02, **HOW.get(kind, {}))
        assert (
            str(bad) in str(error.value)
            and error.value.reader in str(error.value)
            and error.value.cause
        )


def patched(good, old, new, occurrence=0):
    "The file with one field changed."
    i = -1
    for _ in range(occurrence + 1):
        i = good.index(old, i + 1)
    return good[:i] + new + good[i + len(old) :]


def lies(folder):
    "Small files that declare 100 000 x 100 000 pixels or more: name, bytes."
    n, h, w = 100_000, 24, 32
    data = samples.image((h, w))
    u4, be = (lambda v: struct.pack("<I", v)), (lambda v: struct.pack(">I", v))
    for version in (3, 4):
        wide = ">Q" if version == 4 else ">I"
        good = samples.dm(data, version=version)

        def field(v):
            return b"%%%%" + struct.pack(wide, 1) + struct.pack(wide, 5) + u4(v)

        yield f"a.dm{version}", patched(patched(good, field(w), field(n)), field(h), field(n))
    yield (
        "a.ser",
        patched(samples.ser(data), struct.pack("<hii", 7, w, h), struct.pack("<hii", 7, n, n)),
    )
    yield "a.mrc", struct.pack("<2i", n, n) + samples.mrc(data)[8:]
    for name, how in (("raw.tif", {}), ("deflated.tif", {"compression": "zlib"})):
        tifffile.imwrite(folder / name, data, rowsperstrip=h, photometric="minisblack", **how)
        good = (folder / name).read_bytes()
        with tifffile.TiffFile(folder / name) as tif:
            places = [tif.pages[0].tags[t] for t in ("ImageWidth", "ImageLength", "RowsPerStrip")]
        for tag in places:
            good = (
                good[: tag.valueoffset]
                + struct.pack("<H" if tag.dtype == 3 else "<I", n if tag.dtype == 4 else 65535)
                + good[tag.valueoffset + (2 if tag.dtype == 3 else 4) :]
            )
        yield name, good
    from PIL import Image

    Image.fromarray(data.astype(np.uint8)).save(folder / "a.png")
    good = (folder / "a.png").read_bytes()
    head = b"IHDR" + be(n) + be(n) + good[24:29]
    yield "a.png", good[:12] + head + be(zlib.crc32(head)) + good[33:]
    import h5py

    for name, write in (
        ("a.hspy", samples.hspy),
        ("ncem.emd", samples.emd),
        ("velox.emd", samples.velox),
    ):
        write(folder / name, data)
        with h5py.File(folder / name, "a") as f:
            found = []
            f.visititems(
                lambda k, o: (
                    found.append(k)
                    if isinstance(o, h5py.Dataset) and k.lower().endswith("/data")
                    else None
                )
            )
            del f[found[0]]
            f.create_dataset(
                found[0],
                (n, n, 1) if name == "velox.emd" else (n, n),
                "f4",
                compression="gzip",
                chunks=(1000, 1000, 1) if name == "velox.emd" else (1000, 1000),
            )
        yield name, (folder / name).read_bytes()


def test_lying_files_cost_no_memory(tmp_path):
    "The declared size is refused before anything is allocated, and below the limit a file that holds less is found out."
    (
        read(samples.write(tmp_path, "dm3")),
        read(samples.write(tmp_path, "velox")),
    )  # the libraries are loaded before memory is measured
    for name, raw in lies(tmp_path):
        path = tmp_path / name
        path.write_bytes(raw)
        for limit in (
            (2**30,) if name == "deflated.tif" else (2**30, 2**50)
        ):  # with the limit lifted, what is compressed may be large
            tracemalloc.start()
            begin = time.process_time()
            with pytest.raises(
                ReadError, match="above the limit|bomb" if limit < 2**40 else "truncated|bomb"
            ):
                read(path, pixel_size=0.02, max_bytes=limit)
            took, peak = time.process_time() - begin, tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < 50e6, (
                f"{name} of {len(raw)} bytes made the reader allocate {peak / 1e6:.0f} MB"
            )
            assert took < 2, f"{name} took {took:.1f} s"


def test_a_bomb_is_refused_by_its_header(tmp_path):
    "400 MB of zeros in a file of half a megabyte."
    tifffile.imwrite(
        tmp_path / "bomb.tif",
        np.zeros((10_000, 10_000), np.float32),
        compression="zlib",
        imagej=False,
    )
    assert (tmp_path / "bomb.tif").stat().st_size < 2e6
    with pytest.raises(
        ReadError,
        match="381 MiB in memory, above the limit of 100 MiB; if that is right, raise max_bytes=",
    ):
        read(tmp_path / "bomb.tif", max_bytes=100 * 2**20)


def test_limit_is_a_parameter(tmp_path):
    path = samples.write(tmp_path, "mrc")
    need = 4 * samples.image().size
    assert read(path, max_bytes=need).shape == (24, 32)
    with pytest.raises(ReadError, match="max_bytes="):
        read(path, max_bytes=need - 1)


def test_no_such_file_a_folder_and_nothing(tmp_path):
    (tmp_path / "empty.ser").touch()
    for path, why in (
        (tmp_path / "none.dm3", "no such file"),
        (tmp_path, "a folder"),
        (tmp_path / "empty.ser", "it is empty"),
    ):
        with pytest.raises(ReadError, match=why):
            read(path)


def test_links_to_other_files_are_not_followed(tmp_path):
    h5py = pytest.importorskip("h5py")
    (tmp_path / "secret.bin").write_bytes(bytes(range(64)))
    with h5py.File(samples.hspy(tmp_path / "a.hspy", samples.image()), "a") as f:
        del f["Experiments/HAADF/data"]
        f.create_dataset(
            "Experiments/HAADF/data", (8, 8), "u1", external=[(str(tmp_path / "secret.bin"), 0, 64)]
        )
    with pytest.raises(ReadError, match="other files"):
        read(tmp_path / "a.hspy")


# --- Faults of the disk

WRITERS = """
import errno, os, resource, signal, sys
from pathlib import Path
import numpy as np, pandas as pd
from microgen.io import files as io
from microgen.core import WriteError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the kernel then answers EFBIG, as a full disk answers ENOSPC
folder = Path(sys.argv[1])
rng = np.random.default_rng(0)
data = [rng.normal(size=(64, 64)) for _ in range(2)]
table = [pd.DataFrame({"y_nm": rng.normal(size=800), "element": "Mn"}) for _ in range(2)]
jobs = {"a.tif": lambda p, i: io.write_tiff(p, data[i], 0.02), "b.csv": lambda p, i: io.write_csv(p, table[i]),
        "c.parquet": lambda p, i: io.write_parquet(p, table[i]), "d.json": lambda p, i: io.write_json(p, {"x": list(data[i].ravel())})}
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
refused = 0
for name, write in jobs.items():
    path = folder / name
    write(path, 0)
    old = path.read_bytes()
    for k in rng.integers(0, len(old), 50):
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(k), hard))
        try: write(path, 1)
        except WriteError as e:
            refused += 1
            assert name in str(e) and len(str(e).splitlines()) == 1 and "choose another folder" in str(e), str(e)
        except BaseException as e: raise SystemExit(f"{name} at {k} bytes: {type(e).__name__}: {e}")
        finally: resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        assert path.read_bytes() == old, f"{name}: the old file changed when the disk ended at byte {k}"
        assert sorted(p.name for p in folder.iterdir()) == sorted(n for n in jobs if (folder / n).exists()), list(folder.iterdir())
print(refused)
"""


@pytest.mark.skipif(os.name != "posix", reason="the kernel's file size limit is a POSIX matter")
def test_a_disk_that_ends_at_any_byte_leaves_the_old_file(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", WRITERS, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert int(run.stdout) == 200, "every write has to meet the end of the disk"


@pytest.mark.parametrize("fault", ["fsync", "replace", "open"])
@pytest.mark.parametrize(
    "code, words",
    [
        ("ENOSPC", "the disk is full; free some space"),
        ("EROFS", "read-only"),
        ("EACCES", "not writable"),
    ],
)
def test_faults_at_each_step_of_an_atomic_write(fault, code, words, tmp_path, monkeypatch):
    import errno

    path = write_text(tmp_path / "a.txt", "old")

    def fail(*args, **kw):
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    with monkeypatch.context() as m:
        m.setattr(*((Path, "write_bytes") if fault == "open" else (os, fault)), fail)
        with pytest.raises(WriteError, match=words):
            write_text(path, "new")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]


KILLED = """
import sys, numpy as np
from microgen.io import files as io
data = np.random.default_rng(0).normal(size=(256, 256))
io.write_tiff(sys.argv[1], data, 0.02)
print("ready", flush=True)
while True: io.write_tiff(sys.argv[1], data, 0.02)
"""


@pytest.mark.skipif(os.name != "posix", reason="kill -9")
def test_kill_9_while_writing(tmp_path):
    path, rng = tmp_path / "a.tif", np.random.default_rng(1)
    for _ in range(5):
        run = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(path)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        run.stdout.readline()
        time.sleep(rng.uniform(0.005, 0.1))
        run.send_signal(signal.SIGKILL)
        run.wait()
        run.stdout.close()
        assert read(path).shape == (256, 256), "the file under its name is always whole"
        left = [p for p in tmp_path.iterdir() if p != path]
        assert len(left) <= 1 and all(
            p.name.startswith(".") and p.name.endswith(".tmp") for p in left
        ), left
        for p in left:
            p.unlink()


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), OSError("22500 requested and 14220 written")],
    ids=["system", "numpy"],
)
def test_a_folder_is_written_whole_or_not_at_all(there, error, tmp_path):
    out = tmp_path / "deep" / "measured"
    if there:
        with atomic_folder(out) as folder:
            write_text(folder / "maps" / "Q.txt", "old")
        (out / "mine.txt").write_text("stays")
    before = {p: p.read_text() for p in tmp_path.rglob("*.txt")}
    with pytest.raises(
        WriteError, match="measured: the disk is full; free some space or choose another folder"
    ):
        with atomic_folder(out) as folder:
            write_text(folder / "maps" / "Q.txt", "new")
            raise error
    with pytest.raises(KeyboardInterrupt):
        with atomic_folder(out) as folder:
            write_text(folder / "walls.txt", "new")
            raise KeyboardInterrupt
    assert {p: p.read_text() for p in tmp_path.rglob("*") if p.is_file()} == before and len(
        before
    ) == 2 * there
    assert (tmp_path / "deep").exists() == there and not list(tmp_path.rglob("*.tmp"))


def test_a_folder_takes_the_files_of_a_second_run(tmp_path):
    for text in ("one", "two"):
        with atomic_folder(tmp_path / "out") as folder:
            write_text(folder / "maps" / "Q.txt", text)
            write_text(folder / f"{text}.txt", text)
    found = {
        p.relative_to(tmp_path).as_posix(): p.read_text()
        for p in tmp_path.rglob("*")
        if p.is_file()
    }
    assert found == {"out/maps/Q.txt": "two", "out/one.txt": "one", "out/two.txt": "two"}


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="/proc is a matter of Linux")
def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file.tif").write_text("x")
    for path, why in (
        ("/proc/x", "choose another"),
        (tmp_path / "file.tif", "it is a file"),
        (tmp_path / "file.tif" / "x", "its folder is a file"),
        (tmp_path / ("a" * 300), "shorten it"),
    ):
        with pytest.raises(WriteError, match=why):
            make_folder(path)
        with pytest.raises(WriteError, match=why):
            with atomic_folder(path):
                raise AssertionError("the work begins only where there is a folder")
    assert [p.name for p in tmp_path.iterdir()] == ["file.tif"]


def test_a_folder_in_the_way(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(WriteError, match="its folder is a file"):
        write_json(tmp_path / "file" / "a.json", {})
    (tmp_path / "dir.csv").mkdir()
    with pytest.raises(WriteError, match="folder"):
        write_csv(tmp_path / "dir.csv", [{"a": 1}])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dir.csv", "file"]


def test_a_failure_of_the_caller_passes_through(tmp_path):
    with pytest.raises(ZeroDivisionError):
        with atomic_path(tmp_path / "a.txt") as p:
            p.write_text("half")
            1 / 0
    assert not list(tmp_path.iterdir())


def test_new_files_have_ordinary_permissions(tmp_path):
    mask = os.umask(0o022)
    os.umask(mask)
    mode = write_tiff(tmp_path / "a.tif", samples.image(), 1).stat().st_mode & 0o777
    assert os.name != "posix" or mode == 0o666 & ~mask


def test_tables_are_deterministic_and_exact(tmp_path):
    import pandas as pd

    table = pd.DataFrame(
        {"x": np.random.default_rng(0).normal(size=50), "element": ["Y", "Mn"] * 25}
    )
    for write, load in ((write_csv, pd.read_csv), (write_parquet, pd.read_parquet)):
        a, b = write(tmp_path / "a", table), write(tmp_path / "b", table)
        assert a.read_bytes() == b.read_bytes()
        pd.testing.assert_frame_equal(load(a), table, check_exact=True)


def test_every_module_is_reached_from_the_package():
    "In a fresh interpreter: here, other tests have imported them."
    code = "import microgen, pkgutil; print(*[m.name for m in pkgutil.iter_modules(microgen.__path__) if not m.name.startswith('_') and not hasattr(microgen, m.name)])"
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert run.returncode == 0 and run.stdout.strip() == "", run.stdout + run.stderr


def test_provenance_is_json_and_the_same_twice():
    one = io.provenance(seed=3, recipe={"n": 2})
    assert one == io.provenance(seed=3, recipe={"n": 2}) and json.loads(json.dumps(one)) == one
    assert one["versions"]["microgen"] == microgen.__version__ and one["seed"] == 3
    assert not any(word in json.dumps(one) for word in (str(Path.home()), os.getcwd()))
