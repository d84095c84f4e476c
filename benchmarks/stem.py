"""Speed and accuracy of atomic-resolution STEM images, on this machine, in one run.

    python benchmarks/stem.py             # about ten minutes; abTEM rows need the `dev` extra
    python benchmarks/stem.py --quick     # about a minute: fewer repeats, thinner slabs to extrapolate from

Every image has 256 x 256 pixels and shows 5.12 nm of YMnO3 along [100]. A speed marked `extrapolated` was measured
on a part of the work (a slab one cell thick, a few probes) and scaled to a crystal of 5 nm. Beside each speed stands
the accuracy of that method: the correlation of its image with the reference, frozen-phonon PRISM of walls
that no calibration has seen (`benchmarks/haadf_reference.npz`, made by `calibrate_haadf.py`), and the rms
error of the column positions fitted in its own noise-free image.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import calibrate_haadf as reference
import numpy as np
import pandas as pd
import torch
from results import write
from scipy.ndimage import gaussian_filter

from microgen.core import Micrograph
from microgen.stem.crystal import columns
from microgen.stem.probe import Probe
from microgen.stem.render import haadf, haadf_batch
from microgen.stem.wall import displace, wall

PIXEL, SIDE = 0.02, 256
FIELD = (PIXEL * SIDE,) * 2
SHARP = Probe(source_nm=0.0)
HERE = Path(__file__).parent


def timed(function, seconds, least=3):
    "Best wall time and best CPU time of a call, s, over about `seconds`."
    function()
    wall, cpu, start = [], [], time.perf_counter()
    while len(wall) < least or time.perf_counter() - start < seconds:
        t, c = time.perf_counter(), time.process_time()
        function()
        wall.append(time.perf_counter() - t)
        cpu.append(time.process_time() - c)
    return min(wall), min(cpu)


def scenes(n, seed=0):
    "Columns of n images, each with its own wall, thickness and probe."
    rng = np.random.default_rng(seed)
    made, probes = [], []
    for i in range(n):
        crystal = columns("YMnO3", FIELD, rng.uniform(5, 10))
        made.append(displace(crystal, wall(("typeA", "typeD", "UP")[i % 3], FIELD)))
        probes.append(Probe(defocus_nm=rng.uniform(-2, 2)))
    return made, probes


def script_image(table, shape, pixel):
    "The usual private script: one full-frame Gaussian filter per atom, at whole pixels, without oxygen."
    image = np.zeros(shape, np.float32)
    scale = 0.017 / np.asarray(pixel)  # its widths are in pixels of 17 pm
    for y, x, element in zip(table.y_nm, table.x_nm, table.element):
        row, column = round(y / pixel[0]), round(x / pixel[1])
        if element == "O" or not (0 <= row < shape[0] and 0 <= column < shape[1]):
            continue
        spot = np.zeros(shape, np.float32)
        spot[row, column] = 1.5 if element == "Y" else 0.9
        image += gaussian_filter(
            spot, np.multiply((1.2, 2.0) if element == "Y" else (1.0, 1.5), scale)
        )
    return image


def position_error_pm(image, pixel, table):
    "Rms distance, per axis, of the fitted from the true positions of the R and Mn columns, pm."
    from microgen.stem.column import fit_columns

    height, width = (n * p for n, p in zip(image.shape, pixel))
    inside = table.y_nm.between(0.15, height - 0.15) & table.x_nm.between(0.1, width - 0.1)
    true = table[(table.element != "O") & inside].reset_index(drop=True)
    if "y_nm" not in true or not len(true):
        return np.nan
    start = true[["y_nm", "x_nm", "element"]]
    found = fit_columns(Micrograph(np.asarray(image, np.float32), pixel), start)
    if len(found) != len(true):
        return np.nan
    error = np.r_[
        found.y_nm.to_numpy() - true.y_nm.to_numpy(), found.x_nm.to_numpy() - true.x_nm.to_numpy()
    ]
    return 1e3 * np.sqrt(np.mean(error**2))


def references():
    "Reference images {(cell, thickness): dict} of the walls."
    held = np.load(HERE / "haadf_reference.npz")
    names = sorted({k.rsplit("_", 1)[0] for k in held.files if k.endswith("_image")})
    return {
        tuple(n.split("_")): {
            k: held[f"{n}_{k}"] for k in ("image", "noise", "configurations", "pixel")
        }
        for n in names
    }


def stand_in(cell, thickness):
    "Columns of a reference cell and of its periodic neighbours."
    periods, repeats = reference.layout(cell, int(thickness))[0], reference.REPEATS[int(thickness)]
    atoms = reference.atoms(reference.PHI[cell], *periods, 1)  # one atom per column
    size = atoms.cell.lengths()[[1, 0]] / 10
    tiles = [
        atoms.positions[:, [1, 0]] / 10 + size * (i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)
    ]
    table = pd.DataFrame(np.concatenate(tiles), columns=["y_nm", "x_nm"])
    table = table.assign(element=np.tile(atoms.get_chemical_symbols(), 9), n_atoms=float(repeats))
    near = table.y_nm.between(-0.7, size[0] + 0.7) & table.x_nm.between(-0.7, size[1] + 0.7)
    return SimpleNamespace(
        table=table[near],
        fov=tuple(size),
        thickness_nm=repeats * reference.A_FE / 10,
        name="YMnO3",
        polar_deg=0.0,
        depth_disp_pm=None,
    )


def correlations(render, source_nm=0.0):
    "Correlation of `render(columns, shape, pixel)` with each reference: {'A 5 nm': value}."
    found = {}
    for (cell, thickness), held in references().items():
        pixel = tuple(held["pixel"])
        image = render(stand_in(cell, thickness), held["image"].shape, pixel)
        target = reference.blurred(held["image"], pixel, source_nm)
        found[f"{cell} {thickness} nm"] = np.corrcoef(image.ravel(), target.ravel())[0, 1]
    return found


def script_on_reference(crystal, shape, pixel):
    "The script draws at half the reference's pixel, then every second pixel is taken."
    return script_image(crystal.table, tuple(2 * n for n in shape), tuple(p / 2 for p in pixel))[
        ::2, ::2
    ]


def phonon_limit():
    "What the references reach against infinitely many phonon configurations, and the error of their columns, pm."
    found, errors = {}, []
    for (cell, thickness), held in references().items():
        found[f"{cell} {thickness} nm"] = np.sqrt(1 - held["noise"] / held["image"].var())
        image = reference.blurred(held["image"], held["pixel"], 0.035)
        errors.append(
            position_error_pm(image, tuple(held["pixel"]), stand_in(cell, thickness).table)
        )
    return found, np.sqrt(np.nanmean(np.square(errors)))


def abtem_seconds(quick):
    """Seconds that abTEM needs for the same image by multislice and by PRISM, one phonon configuration, static.

    Measured on a slab one cell (3 slices) thick, with a few probes: {name: (wall and CPU seconds, what was measured)}.
    """
    import abtem
    import dask

    dask.config.set(scheduler="synchronous")
    abtem.config.set({"device": "cpu", "precision": "float32", "diagnostics.progress_bar": False})
    slab = reference.atoms(reference.bulk, 5, 5, 1)  # 53.2 x 57.0 Å
    gpts, probes, interpolation = (960, 960), 2 if quick else 8, 8 if quick else 5
    potential = abtem.Potential(
        slab, gpts=gpts, slice_thickness=2.0, projection="infinite", parametrization="lobato"
    )
    detector, thick = abtem.AnnularDetector(inner=70, outer=135), reference.REPEATS[5]
    build = spent_once(lambda: potential.build().compute())
    potential = potential.build().compute()
    rng = np.random.default_rng(0)
    few, many = (abtem.CustomScan(rng.uniform(15, 35, (n, 2))) for n in (probes, 8 * probes))
    probe = abtem.Probe(energy=200e3, semiangle_cutoff=22)
    probe.grid.match(potential)
    each = (
        spent_once(lambda: probe.scan(potential, scan=few, detectors=detector).compute()) / probes
    )
    waves = abtem.SMatrix(
        potential=potential,
        energy=200e3,
        semiangle_cutoff=22,
        interpolation=interpolation,
        downsample=False,
    ).build()
    matrix = []
    propagate = spent_once(lambda: matrix.append(waves.compute()))
    reduce = spent_once(lambda: matrix[0].reduce(scan=many, detectors=detector).compute()) / (
        8 * probes
    )
    return {
        "abTEM multislice": (thick * (build + each * SIDE**2), f"{probes} probes, 3 of 25 slices"),
        f"abTEM PRISM, interpolation {interpolation}": (
            thick * (build + propagate) + reduce * SIDE**2,
            f"{8 * probes} probes, 3 of 25 slices",
        ),
    }


def spent_once(function):
    "Wall and CPU time of one call, s."
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return np.array([time.perf_counter() - wall, time.process_time() - cpu])


def rows(quick):
    "The table: method, images per second, how it was measured, and its accuracy."
    seconds = 1 if quick else 6
    crystals, probes = scenes(16)
    image = haadf(crystals[0], PIXEL, SHARP).data
    ours = correlations(lambda c, shape, pixel: haadf(c, pixel, SHARP, shape).data)
    blurred = correlations(lambda c, shape, pixel: haadf(c, pixel, Probe(), shape).data, 0.035)
    plain = correlations(
        lambda c, shape, pixel: haadf(c, pixel, SHARP, shape, calibration=1.7).data
    )
    error = position_error_pm(image, (PIXEL, PIXEL), crystals[0].table)

    def row(method, n, spent, how, found, error=np.nan):
        return {
            "method": method,
            "images/s": n / spent[0],
            "per CPU-s": n / spent[1],
            "measured": how,
            **{f"r, {k}": v for k, v in found.items()},
            "columns pm": error,
        }

    same = timed(lambda: haadf_batch(crystals, (SIDE, SIDE), PIXEL), seconds)
    yield row("renderer, one probe", 16, same, "batch of 16", ours, error)
    single = timed(lambda: [haadf(c, PIXEL, p) for c, p in zip(crystals, probes)], seconds)
    yield row(
        "renderer, own probe each", 16, single, "one by one; r with 35 pm source", blurred, error
    )
    yield row("renderer, Z^1.7 instead", 16, same, "as the first row", plain, error)
    yield from complete(quick, row, blurred)
    spent = timed(lambda: script_image(crystals[0].table, (SIDE, SIDE), (PIXEL, PIXEL)), 0, 1)
    script = script_image(crystals[0].table, (SIDE, SIDE), (PIXEL, PIXEL))
    yield row(
        "Gaussian filter per atom",
        1,
        spent,
        "one image; rounded positions",
        correlations(script_on_reference),
        position_error_pm(script, (PIXEL, PIXEL), crystals[0].table),
    )
    try:
        peers = abtem_seconds(quick)
    except ImportError:
        print("abTEM is missing: pip install abtem for its rows")
        return
    limit, error = phonon_limit()
    for name, (needed, how) in peers.items():
        yield row(name, 1, needed, f"extrapolated: {how}", limit, error)


def complete(quick, row, found):
    "Rows of complete images: with scan and labels, and written to disk."
    try:
        from microgen.data.build import build
        from microgen.kinds.walls.recipe import Recipe, simulate
    except ImportError:
        return
    recipe = Recipe(n=240 if quick else 960, pixel_size=PIXEL, size=SIDE)
    made = timed(lambda: [simulate(recipe, i) for i in range(8)], 0, 1 if quick else 3)
    yield row("image, scan and labels", 8, made, "one process", found)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        build(recipe, Path(folder) / "set", workers=os.cpu_count())
        wall = time.perf_counter() - start
    yield row(
        "written to disk",
        recipe.n,
        (wall, np.nan),
        f"{recipe.n} images, {os.cpu_count()} processes",
        found,
    )


def saved(table):
    "Speed and accuracy of each method as rows of the results; what is missing is left out."
    found = []
    for row in table.to_dict("records"):
        values = [("speed", row["images/s"], "images/s")]
        values += [(name, v, "1") for name, v in row.items() if name.startswith("r, ")]
        values += [("column error", row["columns pm"], "pm rms")]
        found += [
            {"what": what, "case": row["method"], "value": value, "unit": unit}
            for what, value, unit in values
            if np.isfinite(value)
        ]
    return found


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="fewer repeats, for continuous integration"
    )
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument(
        "--save", action="store_true", help="put the results into benchmarks/results"
    )
    args = parser.parse_args()
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__} on "
        f"{torch.get_num_threads()} threads, {len(scenes(1)[0][0].table)} columns per image"
    )
    table = pd.DataFrame(rows(args.quick))
    show = table.copy()
    for rate in ("images/s", "per CPU-s"):
        show[rate] = [f"{v:.3g}" for v in table[rate]]
    print(show.to_string(index=False, float_format=lambda v: f"{v:.4f}", na_rep="-"))
    print(
        "r: correlation with the mean of "
        + ", ".join(
            f"{int(v['configurations'])} ({c} {t} nm)" for (c, t), v in references().items()
        )
        + " phonon configurations. Their scatter is part of what is missing to 1: the abTEM rows give the correlation, and\n"
        "the column error, that the reference itself has against infinitely many (interpolation 4 or less, finer than the timed PRISM). `per CPU-s` counts all threads. On a busy\n"
        "machine wall times mean little."
    )
    if args.json:
        args.json.write_text(json.dumps(table.to_dict("records"), indent=1), encoding="utf-8")
    if args.save:
        write("stem", saved(table))


if __name__ == "__main__":
    main()
