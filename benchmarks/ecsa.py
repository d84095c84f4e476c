"""How often the intervals of the explained ratio hold 1, on fields of known truth.

    python benchmarks/ecsa.py                  # inputs sampled from their stated distributions: a few minutes
    python benchmarks/ecsa.py --exact          # inputs known: only count, detection curve and family are left
    python benchmarks/ecsa.py --runs 5         # quick
    python benchmarks/ecsa.py --save           # the lowest and the highest cell into results/counting.csv

Each run: a Poisson number of particles of GSD 1.5 and median 3 nm, d50 2.6 nm (known from 2,000 injected particles), and a
charge computed from the true law. The interval of R_tot, per area and per mass, should hold 1.
"""

import argparse
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pandas as pd
from results import write

from microgen.count.ecsa import ecsa
from microgen.count.law import DetectionCurve, fit_detection, size_law
from microgen.count.size import fit_sizes

CURVE = DetectionCurve(2.6, 0.21, 0.98)


def one_run(seed, family, expected, exact):
    "Is 1 held per area and per mass (None where refused), and the half width of the interval per area over 1.96."
    rng = np.random.default_rng([5, seed])
    law = size_law(family, 3, 1.5)
    d = 2.6 * np.exp(rng.uniform(-0.7, 0.7, 2000))
    curve = fit_detection(d, rng.random(2000) < CURVE(d))
    n = rng.poisson(expected)
    d = law.sample(n, rng)
    fit = fit_sizes(d[rng.random(n) < CURVE(d)], curve)
    c, k, px = (
        (0.75, 210.0, 1.0)
        if exact
        else (
            0.75 * np.exp(0.05 * rng.normal()),
            210 * np.exp(0.1 * rng.normal()),
            np.exp(0.02 * rng.normal()),
        )
    )
    if exact:
        stated = dict(charge_constant=210, contact=0.75, size_percent=0, density=21.45)
    else:
        stated = dict(method="hupd", contact=(0.75, 0.75 * 0.05), density=21.45)
    roughness, m2_g = c * expected * np.pi * law.moment(2) / 1e6, 6e3 * c / 21.45 / law.d32_nm
    area = ecsa(fit, charge_uC=k * roughness, area_cm2=1, field_nm2=1e6 * px**-2, **stated).r_tot
    mass = ecsa(fit, charge_uC=k * m2_g * px / 100, mass_ug=1, **stated).r_tot
    return [None if e.refused else e.low < 1 < e.high for e in (area, mass)] + [
        None if area.refused else np.log(area.high / area.low) / 3.92
    ]


def saved(cells, runs, exact):
    "Coverage of the lowest and the highest cell as rows of the results."
    rows = []
    for basis, coverage in cells.items():
        case = f"per {basis}, inputs known" if exact else f"per {basis}"
        for which, value in (("lowest", min(coverage)), ("highest", max(coverage))):
            what = f"coverage of the ECSA interval, {which} cell"
            rows.append({"what": what, "case": case, "value": value, "unit": "1", "n": runs})
    return rows


def main():
    a = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    a.add_argument("--runs", type=int, default=80, help="fields per cell")
    a.add_argument("--exact", action="store_true", help="inputs known")
    a.add_argument("--save", action="store_true", help="put the results into benchmarks/results")
    a = a.parse_args()
    first = 200 if a.exact else 100
    cells = {"area": [], "mass": []}
    for expected in (800, 2500):
        for family in ("lognormal", "weibull", "gamma"):
            runs = [one_run(s, family, expected, a.exact) for s in range(first, first + a.runs)]
            t = pd.DataFrame(runs, columns=["area", "mass", "error"])
            print(
                f"{expected} particles, {family:9s}: refused {t.area.isna().mean():.2f}; 1 is held per area {t.area.dropna().mean():.3f}, "
                f"per mass {t.mass.dropna().mean():.3f}; relative error {t.error.median():.3f}",
                flush=True,
            )
            for basis, coverage in cells.items():
                coverage += [t[basis].dropna().mean()] if t[basis].notna().any() else []
    if a.save:
        write("counting", saved(cells, a.runs, a.exact))


if __name__ == "__main__":
    main()
