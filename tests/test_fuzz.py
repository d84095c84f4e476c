"""Damaged files: 500 seeded mutations of every format. A reader may succeed or raise ReadError, within two seconds of processor time; nothing else."""

import logging
import time
import warnings
from collections import Counter

import numpy as np
import pytest
import samples
import vendors
from samples import FORMATS, HOW, UNCALIBRATED
from vendors import VENDORS

from microgen.core import ReadError
from microgen.io.files import read

pytest.importorskip("ncempy.io.dm", reason="the fuzz reads every format: pip install ncempy h5py")
N = 500
EXTREMES = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]


KINDS = (*FORMATS, *VENDORS)
ENDING = {kind: kind for kind in FORMATS} | samples.ENDING | vendors.ENDING


def write(folder, kind):
    "A good file of one format or maker; its path."
    if kind in VENDORS:
        return vendors.write(folder, kind, np.floor(samples.image()))
    return samples.write(folder, kind)


def mutate(good, rng):
    "One of six damages: flipped bits, overwritten bytes, a cut, an extreme number, deleted bytes, inserted bytes."
    raw = bytearray(good)

    def at():
        return int(
            rng.integers(min(len(raw), 512) if rng.random() < 0.5 else len(raw))
        )  # half of them in the header

    damage, i, n = rng.integers(6), at(), int(rng.integers(1, 65))
    if damage == 0:
        for _ in range(1 + n % 8):
            raw[at()] ^= 1 << int(rng.integers(8))
    elif damage == 1:
        raw[i : i + n % 16] = rng.bytes(len(raw[i : i + n % 16]))
    elif damage == 2:
        del raw[i:]
    elif damage == 3:
        size = int(rng.choice([2, 4, 8]))
        raw[i : i + size] = (int(rng.choice(EXTREMES)) % 256**size).to_bytes(
            size, rng.choice(["little", "big"])
        )
    elif damage == 4:
        del raw[i : i + n]
    else:
        raw[i:i] = rng.bytes(n)
    return bytes(raw)


@pytest.mark.parametrize("kind", KINDS)
def test_fuzz(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(logging.getLogger("tifffile"), "disabled", True)
    path = write(tmp_path, kind)
    has_no_length = kind in (*UNCALIBRATED, *vendors.UNCALIBRATED)
    good, how = (
        path.read_bytes(),
        HOW.get(kind, {}) | {"pixel_size": 0.02 if has_no_length else None},
    )
    read(path, **how)  # loads the libraries
    seen, slowest = Counter(), (0.0, 0)
    for seed in range(N):
        path.write_bytes(mutate(good, np.random.default_rng([KINDS.index(kind), seed])))
        begin = time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                image = read(path, max_bytes=2**26, **how)
                seen["read"] += 1
                is_number = np.isfinite(image.data) | np.isnan(image.data)  # NaN is missing
                assert is_number.all() and min(image.pixel_size) > 0, (
                    f"seed {seed} reads as nonsense"
                )
            except ReadError as e:
                seen["refused"] += 1
                assert str(path) in str(e) and "\n" not in str(e)
            except Exception as e:
                raise AssertionError(f"seed {seed} of {kind} raised {type(e).__name__}: {e}") from e
        slowest = max(slowest, (time.process_time() - begin, seed))
    assert slowest[0] < 2, f"seed {slowest[1]} of {kind} took {slowest[0]:.1f} s"
    assert seen["refused"] > N // 5 and sum(seen.values()) == N, seen


def test_a_heap_that_runs_in_a_circle(tmp_path):
    "HDF5 never leaves a text heap whose free space has no size; the fuzz found it, and microgen does not enter."
    good = samples.write(tmp_path, "hspy").read_bytes()
    heap = good.index(b"GCOL")
    i, end = heap + 16, heap + int.from_bytes(good[heap + 8 : heap + 16], "little")
    while i + 16 <= end and good[i : i + 2] != b"\0\0":
        i += 16 + -(-int.from_bytes(good[i + 8 : i + 16], "little") // 8) * 8
    (tmp_path / "circle.hspy").write_bytes(good[:i] + bytes(16) + good[i + 16 :])
    assert good[i : i + 16] != bytes(16), "the sample has to have free space in its heap"
    assert read(tmp_path / "circle.hspy").pixel_size == (0.02, 0.02)


def test_other_files_under_every_name(tmp_path):
    "A file of one format under the ending of another is refused by name, not misread."
    made = {kind: write(tmp_path, kind).read_bytes() for kind in KINDS}
    for kind in KINDS:
        ending = ENDING[kind]
        for other, raw in made.items():
            other_ending = ENDING[other]
            if (
                any(
                    {ending, other_ending} <= same
                    for same in (
                        {"png", "jpg", "bmp"},
                        {"dm3", "dm4"},
                        {"emd", "hspy", "hdf5", "h5"},
                    )
                )
                or ending == other_ending
            ):
                continue
            path = tmp_path / f"{other}_as.{ending}"
            path.write_bytes(raw)
            with pytest.raises(ReadError):
                read(path, pixel_size=0.02)
