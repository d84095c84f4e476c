"""How well an image of a wall is measured: displacements, order parameter and walls, against their standard errors.

    python benchmarks/measure.py             # about five minutes
    python benchmarks/measure.py --quick     # under a minute: fewer draws

Images of YMnO3, 5 nm thick. The first table: 3.84 nm of ideal scans at 1e4 e/Å², in which only electrons are
counted. The second table: whole acquisitions of each preset.
"""

import argparse

import numpy as np
import pandas as pd
from results import write
from scipy.spatial import cKDTree

from microgen.core import InputError, Micrograph
from microgen.kinds.walls.recipe import Recipe, simulate
from microgen.stem.crystal import columns
from microgen.stem.measure import measure
from microgen.stem.render import haadf
from microgen.stem.wall import displace, wall

FIELD, PIXEL, DOSE = 3.84, 0.02, 1e4
KINDS = ("UP", "typeA", "typeB", "typeC", "typeD", "HH", "TT")


def counted(kind, rng):
    "Image of a wall with Poisson noise alone, and its true R columns."
    sample = displace(
        columns("YMnO3", fov=(FIELD, FIELD), margin=0.6), wall(kind, fov=(FIELD, FIELD))
    )
    electrons = DOSE * 100 * PIXEL**2
    counts = np.random.default_rng(rng).poisson(haadf(sample, PIXEL).data * electrons)
    return Micrograph((counts / electrons).astype("float32"), PIXEL), sample.table[
        sample.table.trimer >= 0
    ]


def beside(found, true):
    "Measured R columns with order, and the true ones."
    r = found.columns[(found.columns.trimer >= 0) & np.isfinite(found.columns.phi)]
    distance, j = cKDTree(true[["y_nm", "x_nm"]]).query(r[["y_nm", "x_nm"]])
    return r[distance < 0.09], true.iloc[j[distance < 0.09]]


def turned(r, t):
    "Errors of phi, up to the origin of the sublattices, and which columns lie in the core of a wall."
    off = np.angle(np.exp(1j * (r.phi.to_numpy() - t.phi.to_numpy())))
    off = np.angle(np.exp(1j * (off - 2 * np.pi / 3 * np.round(np.median(off) / (2 * np.pi / 3)))))
    return off, np.abs(np.angle(np.exp(6j * t.phi.to_numpy()))) > 0.2


def crossing(found, true, kind):
    "Where the wall was found less where it is, along its normal, pm; its standard error."
    w = found.walls.iloc[0]
    normal = np.array([-np.cos(np.radians(w.normal_deg)), np.sin(np.radians(w.normal_deg))])
    along = true[["y_nm", "x_nm"]].to_numpy() @ normal
    phi = np.unwrap(true.phi.to_numpy()[np.argsort(along)])
    share = (phi - phi[0]) / (phi[-1] - phi[0])
    middle = np.abs(share - 0.5) < 0.45
    line = np.polyfit(np.sort(along)[middle], np.tan(np.pi * (share[middle] - 0.5) / 2), 1)
    return 1e3 * (w.y_nm * normal[0] + w.x_nm * normal[1] + line[1] / line[0]), 1e3 * w.center_se_nm


def rms(v):
    return float(np.sqrt(np.mean(np.square(v)))) if len(v) else np.nan


def order(n):
    "Errors of displacement and phi of single columns, and of the place of the wall."
    rows = []
    for kind in KINDS:
        off, core, error, moved, pull, place = [], [], [], [], [], []
        for rng in range(n):
            image, true = counted(kind, rng)
            found = measure(image, "YMnO3")
            r, t = beside(found, true)
            a, b = turned(r, t)
            off.append(a), core.append(b), error.append(r.phi_se.to_numpy())
            d = r.disp_pm.to_numpy() - t.disp_pm.to_numpy()
            moved.append(d), pull.append(d / r.disp_se_pm.to_numpy())
            if len(found.walls) and kind != "UP":
                place.append(crossing(found, true, kind))
        off, core, error = (np.concatenate(o) for o in (off, core, error))
        far = ~core
        place = np.reshape(place, (-1, 2))
        rows.append(
            {
                "wall": kind,
                "columns": len(off),
                "phi, domains °": np.degrees(rms(off[far])),
                "phi, core °": np.degrees(rms(off[core])),
                "stated, core °": np.degrees(rms(error[core])),
                "pull, domains": rms(off[far] / error[far]),
                "pull, core": rms(off[core] / error[core]),
                "disp pm": rms(np.concatenate(moved)),
                "pull of disp": rms(np.concatenate(pull)),
                "walls": f"{len(place)} of {n if kind != 'UP' else 0}",
                "off pm, rms": rms(place[:, 0]),
                "largest": np.abs(place[:, 0]).max(initial=0),
                "stated pm": rms(place[:, 1]),
            }
        )
    return pd.DataFrame(rows).set_index("wall")


def acquired(n):
    "Displacements of whole acquisitions."
    rows = []
    for name in ("good", "typical", "poor"):
        off, pull, _turn, _tpull = [], [], [], []
        for i in range(n):
            s = simulate(Recipe(n=n, preset=name, size=256, pixel_size=0.015, seed=7), i)
            try:
                found = measure(s.image, "YMnO3")
            except InputError as error:
                print(name, i, error)
                continue
            r, t = beside(found, s.table[s.table.site == "R"].assign(phi=0.0))
            d = r.disp_pm.to_numpy() - t.disp_pm.to_numpy()
            if abs(np.corrcoef(r.disp_pm, t.disp_pm)[0, 1]) < 0.3:
                print(name, i, "not recognised")
                continue
            off.append(d), pull.append((d - d.mean()) / r.disp_se_pm.to_numpy())
        rows.append(
            {
                "preset": name,
                "images": len(off),
                "disp pm, rms": rms(np.concatenate([o - o.mean() for o in off])),
                "mean of an image pm, rms": rms([o.mean() for o in off]),
                "pull": rms(np.concatenate(pull)),
                "pull, least and most of an image": "{:.2f} to {:.2f}".format(
                    *(f(map(rms, pull)) for f in (min, max))
                ),
            }
        )
    return pd.DataFrame(rows).set_index("preset")


SAVED = {  # column of a table: quantity and unit in the results
    "phi, domains °": ("Φ error in domains", "°"),
    "phi, core °": ("Φ error in the core", "°"),
    "stated, core °": ("Φ error stated in the core", "°"),
    "pull, domains": ("error over stated, Φ in domains", "1"),
    "pull, core": ("error over stated, Φ in the core", "1"),
    "disp pm": ("displacement error", "pm rms"),
    "pull of disp": ("error over stated, displacement", "1"),
    "off pm, rms": ("wall position error, rms", "pm"),
    "largest": ("wall position error, largest", "pm"),
    "stated pm": ("wall position error, stated", "pm"),
    "disp pm, rms": ("displacement error", "pm rms"),
    "pull": ("error over stated, displacement", "1"),
}


def saved(table, n, case="{}"):
    "Rows of the results, of a table with a line for each wall or preset; a domain without a wall has fewer."
    found = []
    for name, line in table.iterrows():
        walls = str(line.get("walls", "1")).split()[0]
        for column, (what, unit) in SAVED.items():
            of_wall = "wall" in what or "core" in what
            if column not in line or not np.isfinite(line[column]) or (of_wall and walls == "0"):
                continue
            row = {"what": what, "case": case.format(name), "value": line[column], "unit": unit}
            if column == "pull":
                low, high = line["pull, least and most of an image"].split(" to ")
                row |= {"low": low, "high": high}
            found.append(row | {"n": n})
    return found


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--quick", action="store_true", help="fewer draws")
    arguments.add_argument(
        "--save", action="store_true", help="put the results into benchmarks/results"
    )
    chosen = arguments.parse_args()
    n_draws, n_scans = (4, 4) if chosen.quick else (20, 12)
    with pd.option_context("display.width", 250, "display.max_columns", 30):
        ideal = order(n_draws)
        print(ideal.round(2).to_string(), "\n")
        scans = acquired(n_scans)
        print(scans.round(2).to_string())
    if chosen.save:
        write("measure", saved(ideal, n_draws) + saved(scans, n_scans, "{} scan"))
