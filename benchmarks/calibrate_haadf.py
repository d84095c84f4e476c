"""Calibrate the linear HAADF model against frozen-phonon PRISM images: YMnO3 along [100], or a crystal of yours.

    python benchmarks/calibrate_haadf.py simulate --data DIR     # abTEM; about 1.5 CPU-hours in all, resumable
    python benchmarks/calibrate_haadf.py fit --data DIR          # seconds; prints the validation
    python benchmarks/calibrate_haadf.py fit --data DIR --write  # also writes microgen/tables/haadf.json

    # another crystal, direction, probe, detector or thickness: a table of your own, for calibration= of `haadf`
    python benchmarks/calibrate_haadf.py simulate --data DIR --structure mine.cif --zone 1,1,0 --voltage 300 --inner 60 --outer 180
    python benchmarks/calibrate_haadf.py fit --data DIR --structure mine.cif --zone 1,1,0 --voltage 300 --table mine.csv

The table is fitted to the perfect crystal only (one domain, Phi = pi). It is validated on walls that the fit never
sees: A, a pi/3 wall of finite width; D, an abrupt pi wall; AP, an antiphase wall. The form of the model (a core and a
common foot) was chosen against one Gaussian per element with the images of bulk, AP and D at 5 nm in view, where it
adds 0.0007 to the correlation of the walls; A, and both walls at 10 nm, are later. Needs the `dev` extra (abTEM).
"""

import argparse
import json
import os
import time
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pandas as pd
import torch
from scipy.optimize import least_squares, nnls

from microgen.stem.crystal import supercell
from microgen.stem.probe import Probe, wavelength_nm
from microgen.stem.render import sum_columns
from microgen.stem.scattering import thermal_nm
from microgen.stem.structure import load_structure

# YMnO3 at 300 K, Å: van Aken et al., Acta Cryst. C57, 230 (2001); R heights u0 cos(Phi + 2 pi n/3) + p0 cos 3 Phi
A_FE, C = 6.1387, 11.4071
A = A_FE / np.sqrt(3)
U0, P0 = 0.314, -0.037
APICAL = 0.0865
SITES = [
    ("Y", 0, 0, 0),
    ("Y", 0, 0, 0.5),
    ("Mn", 1 / 3, 2 / 3, 0.25),
    ("Mn", 2 / 3, 1 / 3, 0.75),
    ("O", 0, 0, 0.25),
    ("O", 0, 0, 0.75),
    ("O", 1 / 3, 2 / 3, APICAL),
    ("O", 2 / 3, 1 / 3, APICAL + 0.5),
    ("O", 2 / 3, 1 / 3, -APICAL),
    ("O", 1 / 3, 2 / 3, -APICAL + 0.5),
]
THERMAL_A = {"Y": 0.075, "Mn": 0.067, "O": 0.091}  # rms per axis, from B of 0.45, 0.35, 0.65 Å²
ELEMENTS = tuple(THERMAL_A)
OPTICS = {
    "voltage_kV": 200.0,
    "semiangle_mrad": 22.0,
    "inner_mrad": 70.0,
    "outer_mrad": 135.0,
    "source_nm": 0.0,
}
REPEATS = {5: 8, 10: 16}  # nominal thickness of YMnO3, nm: unit cells along the beam
THICKNESSES = list(REPEATS)
WALL_LENGTH = 12 * A  # Å, four periods of three columns
WALL_XI = 1.48  # Å, sine-Gordon width of the elementary wall


def bulk(x):
    return np.pi


def wall_a(x):
    "Phi from pi to 4 pi/3 and back: two elementary walls in the periodic cell."
    step = [np.arctan(np.exp((x - at * WALL_LENGTH) / WALL_XI)) for at in (0.25, 0.75)]
    return np.pi + 2 / 3 * (step[0] - step[1])


def wall_d(x):
    return np.pi if 0.25 * WALL_LENGTH < x < 0.75 * WALL_LENGTH else 0.0


def wall_ap(x):
    "Phi from 2 pi/3 to 4 pi/3 and back: half of each step is abrupt, half has the elementary width."
    away = [
        (x - at * WALL_LENGTH + WALL_LENGTH / 2) % WALL_LENGTH - WALL_LENGTH / 2
        for at in (0.25, 0.75)
    ]
    return np.pi + 2 / 3 * (
        np.arctan(np.exp(away[0] / WALL_XI)) - np.arctan(np.exp(away[1] / WALL_XI))
    )


PHI = {"bulk": bulk, "A": wall_a, "D": wall_d, "AP": wall_ap}
FIRST_SEED = {"bulk": 0, "A": 100, "D": 200, "AP": 100}


def layout(name, thickness):
    """Periods of the cell along x (10.6 Å) and c (11.4 Å), and PRISM's interpolation.

    PRISM repeats the probe every cell / interpolation. What scatters out of its window arrives in the next one: at
    10 nm and 135 mrad a window of 10.6 Å mixes in a fifth of the neighbours' image, at 5 nm nothing that can be
    measured. Walls of 10 nm get 21 Å; the perfect crystal needs no more, because its period is 5.3 Å.
    """
    if name == "bulk":
        return (2, 2), (2, 2)
    return ((4, 2), (4, 2)) if thickness == 5 else ((4, 1), (2, 1))


def atoms(phi, nx, ny, nz):
    "Periodic cell: x along the R row, y along c, z along the beam."
    import ase

    size = nx * 3 * A, ny * C, nz * A_FE
    symbols, positions = [], []
    for element, fx, fy, fz in SITES:
        for h in range(-4 * nz - 4, 4 * nz + 5):
            for k in range(-4 * nx - 4 * nz - 6, 4 * nx + 4 * nz + 7):
                x, z = (fy + k - (fx + h) / 2) * A, (fx + h) * A * np.sqrt(3) / 2
                if not (-1e-6 <= x < size[0] - 1e-6 and -1e-6 <= z < size[2] - 1e-6):
                    continue
                lift = U0 * np.cos(phi(x) + 2 * np.pi * ((h + k) % 3) / 3) + P0 * np.cos(3 * phi(x))
                for layer in range(ny):
                    symbols.append(element)
                    positions.append((x, ((fz + layer) * C + lift * (element == "Y")) % size[1], z))
    return ase.Atoms(symbols, positions=positions, cell=size, pbc=True)


def other(structure, zone, up, thickness):
    "Periodic cell of any crystal, at least 1 nm wide, as `atoms` makes it."
    from pymatgen.io.ase import AseAtomsAdaptor

    return AseAtomsAdaptor.get_atoms(supercell(structure, zone, up, fov=1.0, thickness=thickness))


def grid_of(lengths):
    "Points of the potential along x and y: two thirds of its angles reach past the detector."
    step = 10 * wavelength_nm(OPTICS["voltage_kV"]) / (3 * 1.05e-3 * OPTICS["outer_mrad"])
    return tuple(2 * int(np.ceil(v / step / 2)) for v in lengths)


def prism(cell, scan, seed, gpts, interpolation):
    "One phonon configuration: image (x, y) and its sampling in Å."
    import abtem
    import dask

    dask.config.set(scheduler="synchronous")
    abtem.config.set({"device": "cpu", "precision": "float32", "diagnostics.progress_bar": False})
    phonons = abtem.FrozenPhonons(cell, num_configs=1, sigmas=THERMAL_A, seed=seed)
    potential = abtem.Potential(
        phonons, gpts=gpts, slice_thickness=2.0, projection="infinite", parametrization="lobato"
    )
    matrix = abtem.SMatrix(
        potential=potential,
        energy=1e3 * OPTICS["voltage_kV"],
        interpolation=interpolation,
        semiangle_cutoff=OPTICS["semiangle_mrad"],
        downsample=False,
    )
    grid = abtem.GridScan(start=(0, 0), end=scan, sampling=0.28, endpoint=False)
    detector = abtem.AnnularDetector(inner=OPTICS["inner_mrad"], outer=OPTICS["outer_mrad"])
    image = matrix.scan(scan=grid, detectors=detector).compute()
    return np.asarray(image.array).squeeze().astype("f4"), image.sampling


def simulate(folder, counts, crystal=None):
    "Simulate what is missing; one file per configuration. `crystal`: (structure, zone, up) of another one."
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(max(counts.values())):
        for thickness in THICKNESSES:
            for name in (n for n in counts if seed < counts[n]):
                path = folder / f"{name}_{thickness:g}_{seed}.npz"
                if path.exists():
                    continue
                start = time.process_time()
                if crystal:
                    cell, interpolation = other(*crystal, thickness), (1, 1)
                    scan, gpts = tuple(cell.cell.lengths()[:2]), grid_of(cell.cell.lengths()[:2])
                else:
                    periods, interpolation = layout(name, thickness)
                    repeats = REPEATS.get(thickness, max(1, round(10 * thickness / A_FE)))
                    cell, gpts = (
                        atoms(PHI[name], *periods, repeats),
                        (180 * periods[0], 192 * periods[1]),
                    )
                    scan = 2 * 5.316 if name == "bulk" else WALL_LENGTH, C
                image, sampling = prism(cell, scan, FIRST_SEED[name] + seed, gpts, interpolation)
                part = path.with_suffix(".part.npz")
                np.savez(
                    part,
                    image=image,
                    sampling=sampling,
                    pos=cell.positions,
                    cell=cell.cell.lengths(),
                    el=np.array(cell.get_chemical_symbols()),
                    cpu=time.process_time() - start,
                )
                part.rename(path)
                print(
                    f"{path.name}: {len(cell)} atoms, {image.shape} probes, "
                    f"{time.process_time() - start:.0f} CPU-s",
                    flush=True,
                )


def load(folder, name, thickness):
    "Images (configurations, y, x), columns {element: (y, x, atoms)} in nm, pixel size and period (y, x) in nm."
    files = [
        np.load(f)
        for f in sorted(
            folder.glob(f"{name}_{thickness:g}_*.npz"), key=lambda f: (len(f.name), f.name)
        )
    ]
    if not files:
        raise SystemExit(f"No images {name}_{thickness:g}_*.npz in {folder}; run `simulate` first.")
    first, columns = files[0], {}
    for element in ELEMENTS:
        flat = np.round(first["pos"][first["el"] == element][:, 1::-1] / 10, 6)
        places, count = np.unique(flat, axis=0, return_counts=True)
        columns[element] = torch.as_tensor(np.c_[places, count].T[:, None])
    return (
        np.stack([f["image"].T for f in files]).astype(float),
        columns,
        tuple(first["sampling"][::-1] / 10),
        tuple(float(v) for v in first["cell"][1::-1] / 10),
    )


def basis(columns, shape, pixel, period, widths):
    "One image per element and width (nm), of weight 1 nm² per atom: lists of (H, W)."
    probe = Probe(OPTICS["voltage_kV"], OPTICS["semiangle_mrad"], source_nm=0.0)
    return [
        [
            sum_columns(*columns[e], shape, pixel, probe, torch.tensor(s), period)[0].numpy()
            for s in widths[e]
        ]
        for e in ELEMENTS
    ]


def design(data, p):
    """Images that the weights multiply, for widths p = (one per element, wide, share of wide): (pixels, elements + 1).

    Each element has a core of its own width and a wide foot, common to all: the channelled probe spreads as it goes
    through the crystal.
    """
    images, columns, pixel, period = data
    parts = basis(
        columns, images.shape[1:], pixel, period, {e: (w, p[-2]) for e, w in zip(ELEMENTS, p)}
    )
    mixed = [((1 - p[-1]) * core + p[-1] * foot).ravel() for core, foot in parts]
    return np.stack([*mixed, np.ones(mixed[0].size)], 1)


def fit(data):
    "Widths (nm) and share by least squares; weights and background follow linearly, never negative."
    target = data[0].mean(0).ravel()

    def solve(p):
        matrix = design(data, p)
        weights = nnls(matrix, target)[0]
        return weights, (matrix @ weights - target) / target.std()

    n = len(ELEMENTS)
    start, low, high = [0.016] * n + [0.06, 0.2], [0.005] * n + [0.03, 0], [0.04] * n + [0.12, 0.5]
    best = least_squares(
        lambda p: solve(p)[1], start, bounds=(low, high), diff_step=1e-3, x_scale=start
    )
    return best.x, solve(best.x)[0]


def blurred(image, pixel, source_nm):
    "Images (..., H, W) on a periodic field, blurred by the source."
    q = [np.fft.fftfreq(n, p) for n, p in zip(image.shape[-2:], pixel)]
    otf = np.exp(-2 * (np.pi * source_nm) ** 2 * (q[0][:, None] ** 2 + q[1] ** 2))
    return np.fft.ifft2(np.fft.fft2(image) * otf).real


def judge(data, p, weights, noise, source_nm):
    """How the model, unchanged, meets a set of images.

    `noise` is the variance between phonon configurations in the perfect crystal. `phonons` is the share of the
    residual's variance that the finite number of configurations explains; `unlimited` is the correlation expected
    with infinitely many.
    """
    images, _, pixel, _ = data
    model = (design(data, p) @ weights).reshape(images.shape[1:])
    mean, model = (
        blurred(v, pixel, source_nm) if source_nm else v for v in (images.mean(0), model)
    )
    noise, residual = noise / len(images), mean - model
    correlation = np.corrcoef(mean.ravel(), model.ravel())[0, 1]
    return {
        "configurations": len(images),
        "correlation": correlation,
        "unlimited": correlation / np.sqrt(1 - noise / mean.var()),
        "slope": np.polyfit(model.ravel(), mean.ravel(), 1)[0],
        "rms_percent": 100 * residual.std() / mean.max(),
        "phonons": noise / residual.var(),
    }


def phonon_variance(data, source_nm=0.0):
    "Variance between single phonon configurations, mean over the image."
    images, _, pixel, _ = data
    return (blurred(images, pixel, source_nm) if source_nm else images).var(0, ddof=1).mean()


def rows_of(thickness_nm, p, weights):
    "The table rows of one thickness."
    rows = []
    for i, element in enumerate(ELEMENTS):
        for component, (sigma, share) in enumerate(((p[i], 1 - p[-1]), (p[-2], p[-1]))):
            rows.append(
                {
                    "thickness_nm": round(thickness_nm, 4),
                    "element": element,
                    "component": component,
                    "weight_nm2": float(f"{weights[i] * share:.5g}"),
                    "sigma_pm": round(1e3 * sigma, 2),
                    "background": float(f"{weights[-1]:.4g}"),
                }
            )
    return rows


def calibrate(folder, write=False, table=None):
    "Fit each thickness to the bulk, judge it on bulk and walls, print, and write the tables if asked."
    rows, checks = [], []
    for nominal in THICKNESSES:
        crystal = load(folder, "bulk", nominal)
        p, weights = fit(crystal)
        depth = float(np.load(next(folder.glob(f"bulk_{nominal:g}_*.npz")))["cell"][2]) / 10
        rows += rows_of(depth, p, weights)
        print(
            f"{nominal:g} nm: widths {', '.join(ELEMENTS)}, foot {np.round(1e3 * p[:-1], 1)} pm, share of the foot {p[-1]:.2f}, "
            f"background {weights[-1]:.1e}"
        )
        if {"Y", "Mn"} <= set(ELEMENTS):
            ratio = weights[ELEMENTS.index("Y")] / weights[ELEMENTS.index("Mn")]
            print(f"Y/Mn = (39/25)^{np.log(ratio) / np.log(39 / 25):.2f}")
        for name in PHI:
            for source in (0.0, 0.035):
                if list(folder.glob(f"{name}_{nominal:g}_*.npz")):
                    found = judge(
                        load(folder, name, nominal),
                        p,
                        weights,
                        phonon_variance(crystal, source),
                        source,
                    )
                    checks.append(
                        {
                            "cell": name,
                            "thickness_nm": nominal,
                            "source_pm": 1e3 * source,
                            **{k: round(float(v), 4) for k, v in found.items()},
                        }
                    )
    print(pd.DataFrame(checks).to_string(index=False))
    about = {
        "what": "YMnO3 along [100]: frozen-phonon PRISM, fitted on the perfect crystal, checked on walls outside the fit; the form of the model was chosen with AP and D at 5 nm in view",
        "optics": OPTICS,
        "thermal_A": THERMAL_A,
        "made_by": "benchmarks/calibrate_haadf.py",
        "abtem": version("abtem"),
        "checks": checks,
    }
    if write:
        path = Path(__file__).parents[1] / "microgen" / "tables" / "haadf.json"
        lines = ",\n".join(json.dumps(r) for r in rows)
        path.write_text(
            f'{{"provenance": {json.dumps(about, indent=1)},\n"rows": [\n{lines}\n]}}\n',
            encoding="utf-8",
        )
        print(f"wrote {path} and {keep_references(folder)}")
    if table:
        pd.DataFrame(rows).to_csv(table, index=False)
        print(
            f"wrote {table}; the rows of one thickness are the table: haadf(..., calibration=pd.read_csv({str(table)!r}).query('thickness_nm == {rows[0]['thickness_nm']}'))"
        )


def keep_references(folder):
    "Store the mean image of each wall beside this script, for `benchmarks/stem.py`."
    held = {}
    for nominal in THICKNESSES:
        noise = phonon_variance(load(folder, "bulk", nominal))
        for name in list(PHI)[1:]:
            if list(folder.glob(f"{name}_{nominal:g}_*.npz")):
                images, _, pixel, _ = load(folder, name, nominal)
                values = {
                    "image": images.mean(0).astype("f4"),
                    "noise": noise / len(images),
                    "configurations": len(images),
                    "pixel": pixel,
                }
                held |= {f"{name}_{nominal:g}_{k}": v for k, v in values.items()}
    path = Path(__file__).with_name("haadf_reference.npz")
    np.savez_compressed(path, **held)
    return path


def choose(args):
    "Set crystal, optics and thicknesses of this run; (structure, zone, up) of another crystal than YMnO3 along [100]."
    global THERMAL_A, ELEMENTS
    THICKNESSES[:] = args.thickness
    OPTICS.update(
        voltage_kV=args.voltage,
        semiangle_mrad=args.semiangle,
        inner_mrad=args.inner,
        outer_mrad=args.outer,
    )
    if args.structure is None:
        return None
    structure = load_structure(args.structure)
    ELEMENTS = tuple(sorted({e.symbol for e in structure.composition}))
    THERMAL_A = {e: 10 * thermal_nm(e) for e in ELEMENTS}
    return structure, args.zone, args.up


def main():
    def numbers(kind):
        return lambda text: [kind(v) for v in text.split(",")]

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=["simulate", "fit"])
    parser.add_argument("--data", type=Path, required=True, help="folder of the simulated images")
    parser.add_argument(
        "--bulk", type=int, default=16, help="phonon configurations of the perfect crystal"
    )
    parser.add_argument(
        "--walls", type=int, default=4, help="phonon configurations of each wall of YMnO3"
    )
    parser.add_argument("--write", action="store_true", help="write the shipped table")
    parser.add_argument("--table", type=Path, help="write a table of your own, CSV")
    parser.add_argument(
        "--structure", help="shipped name or CIF file; without it YMnO3 along [100] with its walls"
    )
    parser.add_argument(
        "--zone", type=numbers(int), default=[1, 0, 0], help="zone axis of --structure"
    )
    parser.add_argument(
        "--up", type=numbers(int), default=[0, 0, 1], help="direction of --structure that points up"
    )
    parser.add_argument(
        "--thickness", type=numbers(float), default=THICKNESSES, help="nm, separated by commas"
    )
    for name, unit in (
        ("voltage", "kV"),
        ("semiangle", "mrad"),
        ("inner", "mrad"),
        ("outer", "mrad"),
    ):
        parser.add_argument(
            f"--{name}",
            type=float,
            default=OPTICS[f"{name}_{unit}"],
            help=f"{unit}; default %(default)g",
        )
    args = parser.parse_args()
    shipped = OPTICS | {"thickness": [5, 10]}
    crystal = choose(args)
    if args.write and (crystal or OPTICS | {"thickness": THICKNESSES} != shipped):
        parser.error(
            "--write is for the shipped table: YMnO3 along [100] with the defaults; use --table for yours"
        )
    if args.task == "fit":
        calibrate(args.data, args.write, args.table)
    else:
        simulate(
            args.data,
            {"bulk": args.bulk} | ({} if crystal else dict.fromkeys(list(PHI)[1:], args.walls)),
            crystal,
        )


if __name__ == "__main__":
    main()
