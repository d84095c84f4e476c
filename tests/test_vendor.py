"""What the makers of SEMs, detectors and simulations write: the right pixel size, a contradiction refused, a cut file named as such."""

import numpy as np
import pytest
import samples
import tifffile
import vendors
from vendors import PIXEL_NM, UNCALIBRATED, VENDORS

from microgen.core import ReadError, UncalibratedError, to_nm
from microgen.io.detector import byte_offset
from microgen.io.files import read

pytest.importorskip("hdf5plugin", reason="Dectris compresses its series: pip install ncempy h5py")
DATA = np.floor(samples.image())  # counts, as detectors have them
CALIBRATED = [kind for kind in VENDORS if kind not in UNCALIBRATED]


@pytest.mark.parametrize("kind", CALIBRATED)
def test_every_maker_gives_its_pixels_and_scale(kind, tmp_path):
    image = read(vendors.write(tmp_path, kind, DATA))
    np.testing.assert_array_equal(image.data, DATA)
    assert image.pixel_size == pytest.approx((PIXEL_NM, PIXEL_NM), rel=1e-7)


@pytest.mark.parametrize("kind", UNCALIBRATED)
def test_detectors_ask_for_a_length(kind, tmp_path):
    "The size of a detector's pixel is no length on the specimen, and is not taken for one."
    path = vendors.write(tmp_path, kind, DATA)
    np.testing.assert_array_equal(read(path, pixel_size=0.5).data, DATA)
    has_camera_length = kind in ("cbf", "smv")
    with pytest.raises(
        UncalibratedError, match="diffraction" if has_camera_length else "pixel_size="
    ):
        read(path)


def test_the_master_of_a_series_is_diffraction(tmp_path):
    vendors.dectris(tmp_path, DATA, n=2, parts=2)
    master = tmp_path / "series_master.h5"
    for k in (0, 3, -1):
        np.testing.assert_array_equal(read(master, 1.0, frame=k).data, DATA + k % 4)
    with pytest.raises(ReadError, match="frame=0 to frame=3"):
        read(master, 1.0)
    with pytest.raises(UncalibratedError, match="diffraction"):
        read(master, frame=0)


# --- Two statements that disagree


def with_tags(path, data=DATA, pixel_nm=PIXEL_NM, more=()):
    "A TIFF with DigitalMicrograph's calibration and other tags."
    tags = [(code, "s", 0, "nm", True) for code in (65003, 65004)]
    tags += [(code, "d", 1, pixel_nm, True) for code in (65009, 65010)]
    tifffile.imwrite(path, data, extratags=[*tags, *more], metadata=None)
    return path


def beside(path, name, text):
    "Another file in the same folder."
    path.with_name(name).write_text(text, encoding="utf-8")
    return path


def contradictions(folder):
    "Files that state two lengths of one pixel: path, and what the message has to name."
    columns = DATA.shape[1]
    tag = vendors.tescan_tag()
    path = with_tags(
        folder / "a.tif", pixel_nm=2 * PIXEL_NM, more=[(50431, 1, len(tag), tag, True)]
    )
    yield path, "TESCAN tag 50431", "0.04 nm"
    path = vendors.write(folder, "tescan", DATA)
    yield (
        beside(path, "tescan-tif.hdr", vendors.tescan_text(2 * vendors.METRES)),
        "TESCAN tag 50431",
        "TESCAN sidecar",
    )
    path = with_tags(folder / "b.tif", pixel_nm=2 * PIXEL_NM)
    yield beside(path, "b.txt", vendors.hitachi_text(columns)), "Hitachi sidecar", "0.04 nm"
    path = with_tags(folder / "c.tif", pixel_nm=2 * PIXEL_NM)
    yield beside(path, "c.txt", vendors.jeol_text(columns)), "JEOL sidecar", "0.04 nm"
    path = with_tags(folder / "d.tif")
    yield beside(path, "d.txt", vendors.hitachi_text(2 * columns)), "DataSize: 64 columns", "has 32"
    path = with_tags(folder / "e.tif")
    yield beside(path, "e.txt", vendors.jeol_text(2 * columns)), "CM_FULL_SIZE: 64", "has 32"
    for name, xml in (("f", vendors.phenom_xml()), ("g", vendors.titan_xml())):
        path = with_tags(folder / f"{name}.tif", pixel_nm=0.03, more=[(34683, 2, 0, xml, True)])
        yield path, "FEI tag 34683", "0.03 nm"
    tifffile.imwrite(
        folder / "h.tif",
        DATA,
        extratags=[(271, 2, 0, "JEOL Ltd.", True)],
        description=vendors.sightx_xml(),
        resolution=(1000, 1000),
        resolutionunit="CENTIMETER",
        metadata=None,
    )
    yield (
        beside(folder / "h.tif", "h.txt", vendors.hitachi_text(columns, 0.05)),
        "SightX",
        "0.05 nm",
    )
    (folder / "i.tif").write_bytes(vendors.sis_tiff(DATA))
    yield beside(folder / "i.tif", "i.txt", vendors.hitachi_text(columns, 0.05)), "SIS", "0.05 nm"
    path = vendors.prismatic(folder / "j.emd", DATA, unit="[n_m]")
    yield path, "0.2 nm", "simulation_parameters rx, ry"
    path = vendors.py4dstem(folder / "k.h5", DATA, calibration_nm=2 * PIXEL_NM)
    yield path, "coordinates of haadf", "py4DSTEM's R_pixel_size"


def test_two_statements_that_disagree_are_both_named(tmp_path):
    n = 0
    for path, one, other in contradictions(tmp_path):
        with pytest.raises(UncalibratedError) as error:
            read(path)
        assert one in str(error.value) and other in str(error.value), str(error.value)
        assert read(path, pixel_size=0.02).pixel_size == (0.02, 0.02), "the user's word ends it"
        n += 1
    assert n == 12


def test_statements_that_agree_to_a_per_cent_are_one(tmp_path):
    path = with_tags(tmp_path / "a.tif", pixel_nm=1.004 * PIXEL_NM)
    beside(path, "a.txt", vendors.hitachi_text(DATA.shape[1]))
    assert read(path).pixel_size == pytest.approx((PIXEL_NM, PIXEL_NM), rel=0.01)


def test_a_diffraction_pattern_of_sightx_is_refused(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(
        path,
        DATA,
        extratags=[(271, 2, 0, "JEOL Ltd.", True)],
        description=vendors.sightx_xml(80, "DIFF", "cm"),
        resolution=(1000, 1000),
        resolutionunit="CENTIMETER",
        metadata=None,
    )
    with pytest.raises(UncalibratedError, match="not a length"):
        read(path)


# --- Beside the image


def test_a_text_that_is_no_makers_says_nothing(tmp_path):
    path = with_tags(tmp_path / "a.tif")
    for name, text in (
        ("a.txt", "PixelSize=7\nnotes"),
        ("a.hdr", "PixelSizeX=7"),
        ("a-tif.hdr", "ENVI"),
    ):
        beside(path, name, text)
    assert read(path).pixel_size == pytest.approx((PIXEL_NM, PIXEL_NM))


def test_a_text_beside_a_picture_calibrates_it(tmp_path):
    path = samples.write(tmp_path, "bmp")
    beside(path, "bmp.TXT", vendors.jeol_text(DATA.shape[1], 200, "1um"))
    assert read(path).pixel_size == (5.0, 5.0)


def test_a_jpeg_of_phenom_carries_its_length(tmp_path):
    path = samples.write(tmp_path, "jpg")
    path.write_bytes(path.read_bytes() + vendors.phenom_xml(5.0).encode())
    assert read(path).pixel_size == pytest.approx((5.0, 5.0))
    beside(path, "jpg.txt", vendors.hitachi_text(DATA.shape[1], 7.0))
    with pytest.raises(UncalibratedError, match="Phenom XML in the picture.*Hitachi"):
        read(path)


def test_what_the_maker_says_of_the_microscope_is_kept(tmp_path):
    for kind, key, value in (
        ("tescan", "HV", "15000.0"),
        ("hitachi", "InstructName", "SU8230"),
        ("jeol", "$CM_MAG", "5000"),
        ("cbf", "Wavelength", "0.0197 A"),
        ("smv", "DISTANCE", "500"),
    ):
        assert read(vendors.write(tmp_path, kind, DATA), 0.02).metadata[key] == value


# --- Cut, and not what it seems


@pytest.mark.parametrize("kind", VENDORS)
def test_a_cut_file_is_called_truncated(kind, tmp_path):
    path = vendors.write(tmp_path, kind, DATA)
    good = path.read_bytes()
    at_the_end = good[: -len(good) // 3]
    path.write_bytes(at_the_end)
    with pytest.raises(ReadError, match="truncated"):
        read(path, pixel_size=0.02)


@pytest.mark.parametrize(
    "kind, old, new, why",
    [
        ("cbf", b"\x0c\x1a\x04\xd5", b"\x0c\x1a\x04\xd5\0", "Content-MD5.*damaged"),
        ("cbf", b"BYTE_OFFSET", b"PACKED", "compressed by x-CBF_PACKED"),
        ("cbf", b"X-Binary-Size:", b"X-Binary-Sign:", "lacks a number"),
        ("smv", b"unsigned_short", b"float_ieee_oth", "type float_ieee_oth"),
        ("smv", b"SIZE1", b"SIZE9", "lacks SIZE1 or SIZE2"),
        ("mib", b"U16", b"U99", "type .U99."),
        ("mib", b"MQ1", b"MZ1", "no file of a Merlin"),
        ("npy", b"'<f4'", b"'|O' ", "pickle"),
    ],
)
def test_the_true_cause(kind, old, new, why, tmp_path):
    path = vendors.write(tmp_path, kind, DATA)
    path.write_bytes(patched(path.read_bytes(), old, new))
    with pytest.raises(ReadError, match=why):
        read(path, pixel_size=0.02)


def patched(good, old, new):
    "The file with one field changed."
    at = good.index(old)
    return good[:at] + new + good[at + len(old) :]


def test_a_stack_of_a_detector_asks_for_a_frame(tmp_path):
    (tmp_path / "a.mib").write_bytes(vendors.mib([DATA, DATA + 1, DATA + 2]))
    np.save(tmp_path / "a.npy", np.stack([DATA, DATA + 1, DATA + 2]))
    for name in ("a.mib", "a.npy"):
        with pytest.raises(ReadError, match="frame=0 to frame=2"):
            read(tmp_path / name, 0.02)
        for k in (0, 2, -1):
            np.testing.assert_array_equal(read(tmp_path / name, 0.02, frame=k).data, DATA + k % 3)


def test_a_lying_array_costs_no_memory(tmp_path):
    path = vendors.write(tmp_path, "npy", DATA)
    wide = patched(path.read_bytes(), b"(24, 32), }  ", b"(99999, 99999)}")[:-2]
    path.write_bytes(wide)
    with pytest.raises(ReadError, match="above the limit"):
        read(path, 0.02)
    (tmp_path / "a.mib").write_bytes(patched(vendors.mib([DATA]), b"0032,0024", b"9999,9999"))
    with pytest.raises(ReadError, match="truncated"):
        read(tmp_path / "a.mib", 0.02)


# --- Other people's readers


@pytest.mark.parametrize("kind", ["tif", "helios", "zeiss", "tvips", "sightx", "sis"])
def test_hyperspy_reads_the_same_tiff(kind, tmp_path):
    "RosettaSciIO finds the same pixels and the same pixel size in the files that these tests are built on."
    from rsciio import tiff as rsciio_tiff

    folder = vendors if kind in VENDORS else samples
    path = folder.write(tmp_path, kind, DATA)
    (theirs,) = rsciio_tiff.file_reader(str(path))
    np.testing.assert_array_equal(theirs["data"], DATA)
    sizes = [to_nm(axis["scale"], axis["units"]) for axis in theirs["axes"]]
    assert sizes == pytest.approx(read(path).pixel_size, rel=1e-4)


def test_hyperspy_reads_the_same(tmp_path):
    from rsciio import emd, quantumdetector

    (theirs,) = emd.file_reader(str(vendors.write(tmp_path, "prismatic", DATA)))
    np.testing.assert_array_equal(theirs["data"], DATA)
    square = np.arange(256.0**2).reshape(256, 256) % 4000
    path = tmp_path / "a.mib"
    path.write_bytes(vendors.mib([square]))
    (theirs,) = quantumdetector.file_reader(str(path))
    np.testing.assert_array_equal(np.squeeze(theirs["data"]), square)
    np.testing.assert_array_equal(read(path, 1.0).data, square)


def test_ncempy_reads_the_same(tmp_path):
    from ncempy.io import dectris, smv

    path = vendors.write(tmp_path, "smv", DATA)
    np.testing.assert_array_equal(smv.fileSMV(path).getDataset()["data"], DATA)
    vendors.dectris(tmp_path, DATA, n=2, parts=2)
    with dectris.fileDECTRIS(tmp_path / "series_master.h5") as f:
        theirs = f.getDataset()["data"].reshape(4, *DATA.shape)
    np.testing.assert_array_equal(theirs[3], read(tmp_path / "series_master.h5", 1, frame=3).data)


def test_steps_of_every_size_in_a_cbf():
    "One byte, or after the mark of each smaller size two, four or eight."
    steps = [0, 127, -127, -128, 128, 32767, -32767, -32768, 32768, -(2**31), 2**31, 2**40, -1]
    marks = {1: b"", 2: b"\x80", 4: b"\x80\x00\x80", 8: b"\x80\x00\x80\x00\x00\x00\x80"}
    raw = b""
    for step in steps:
        size = next(size for size in marks if abs(step) < 1 << (8 * size - 1))
        raw += marks[size] + step.to_bytes(size, "little", signed=True)
    np.testing.assert_array_equal(byte_offset(raw, len(steps)), np.cumsum(steps))
