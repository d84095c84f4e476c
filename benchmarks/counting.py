"""Numbers of the counting rooms: how often intervals of the unseen share hold the truth, how wide they are, when they are refused.

    python benchmarks/counting.py sizes --quick        # about a minute: a few cells, for CI
    python benchmarks/counting.py sizes --runs 400 --out runs.csv  # every cell: 135 times 400 runs, about 40 minutes of CPU
    python benchmarks/counting.py refusals --runs 100  # cases that cannot be identified, and good ones
    python benchmarks/counting.py speed

Truth: lognormal, Weibull and gamma laws of GSD 1.3 to 1.8, seen through a curve that leaves 10 to 90 % unseen, 300 to
5,000 particles detected. `--curve known` gives the fit the curve itself, a logistic one of slope 8; with `--curve injected`
the truth is a probit of the same band with an upper asymptote of 0.97, and each run knows it only from 2,000 injected particles.

`--out FILE` gets the runs of each cell when it is done. The same command again goes on where the first was stopped, and with
more `--runs` it adds runs. `--scheduler ADDRESS` sends the cells to Dask.

Is the coverage of each cell between 0.93 and 0.98? A cell lies *beyond chance* where a binomial test rejects this, at 5 % for
all cells together (Holm 1979); it is *shown* where its own 95 % interval (Clopper and Pearson 1934) lies between the two.
"""

import argparse
import os
import sys
import time
from itertools import product
from pathlib import Path

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import numpy as np
import pandas as pd
from joblib import Parallel, delayed
from results import write
from scipy.optimize import brentq
from scipy.stats import binomtest

from microgen.count.law import DetectionCurve, fit_detection, size_law
from microgen.count.size import fit_sizes

FAMILIES = ("lognormal", "weibull", "gamma")
PROBIT = DetectionCurve(1.0, 0.2145, 0.97)
CELL, AIM = ["family", "gsd", "unseen", "n"], (0.93, 0.98)


def results(function, jobs, processes=-1, scheduler=None):
    "function(*job) of each job as it is done, on the processes of this machine or on Dask."
    if not scheduler:
        yield from Parallel(processes, return_as="generator_unordered")(
            delayed(function)(*job) for job in jobs
        )
        return
    from dask.distributed import Client, as_completed

    with Client(scheduler) as client:
        for future in as_completed([client.submit(function, *job, pure=False) for job in jobs]):
            yield future.result()


def logistic(d_nm):
    "The known curve: d50 = 1, slope 8 in ln d."
    return 1 / (1 + np.asarray(d_nm, float) ** -8)


def unseen(law, curve, q=0):
    "True unseen share of the q-th moment."
    x = np.linspace(np.log(law.moment(1)) - 16, np.log(law.moment(3)) / 3 + 6, 20001)
    w = np.exp(law.log_density(x) + q * x)
    return 1 - np.average(curve(np.exp(x)), weights=w)


def law_with(family, gsd, share, curve):
    "The law of this family and spread of which this share is not seen."
    median = brentq(
        lambda m: unseen(size_law(family, np.exp(m), gsd), curve) - share, -4, 3, xtol=1e-5
    )
    return size_law(family, float(np.exp(median)), gsd)


def observe(law, curve, n, rng):
    "n diameters that the curve lets through."
    found, tries = [], int(1.3 * n / (1 - unseen(law, curve))) + 100
    while sum(map(len, found)) < n:
        d = law.sample(tries, rng)
        found.append(d[rng.random(tries) < curve(d)])
    return np.concatenate(found)[:n]


def injected(curve, rng, n=2000):
    "The curve as n injected particles over a factor of 3.3 in size show it."
    d = curve.d50 * np.exp(rng.uniform(-0.6, 0.6, n))
    return fit_detection(d, rng.random(n) < curve(d))


def cell(family, gsd, share, n, kind, runs):
    "These runs of one cell of the table: a row for each run and quantity."
    curve = logistic if kind == "known" else PROBIT
    law = law_with(family, gsd, share, curve)
    truth = [unseen(law, curve, q) for q in (0, 2, 3)]
    rows = []
    for run in runs:
        rng = np.random.default_rng(
            [FAMILIES.index(family), round(10 * gsd), round(100 * share), n, run]
        )
        fit = fit_sizes(
            observe(law, curve, n, rng), curve if kind == "known" else injected(curve, rng)
        )
        own = fit.families.set_index("family").loc[family]
        for true, name in zip(truth, ("number", "surface", "mass")):
            u = getattr(fit, f"unseen_{name}")
            rows.append(
                dict(
                    family=family,
                    gsd=gsd,
                    unseen=share,
                    n=n,
                    curve=kind,
                    run=run,
                    quantity=name,
                    inside=u.low <= true <= u.high,
                    refused=u.refused is not None,
                    width=u.high - u.low,
                    error=u.value - true,
                    right=fit.law.family == family,
                    own=own[f"unseen_{name}_low"] <= true <= own[f"unseen_{name}_high"],
                    own_width=own[f"unseen_{name}_high"] - own[f"unseen_{name}_low"],
                )
            )
    return rows


def held(path):
    "Runs that a file holds whole; a last line cut short is taken off it."
    if not path or not Path(path).exists():
        return pd.DataFrame()
    text = Path(path).read_text()
    Path(path).write_text(text[: text.rfind("\n") + 1])
    if "\n" not in text:
        return pd.DataFrame()
    rows = pd.read_csv(path).drop_duplicates([*CELL, "curve", "run", "quantity"], keep="last")
    return rows[rows.groupby([*CELL, "curve", "run"]).quantity.transform("size") == 3]


def study(cells, kind, runs, out=None, processes=-1, scheduler=None):
    "Rows of every run of these cells; those that the file holds are not done again."
    old = held(out)
    done = {} if old.empty else old[old.curve == kind].groupby(CELL).run.agg(set).to_dict()
    missing = {c: [r for r in range(runs) if r not in done.get(c, ())] for c in cells}
    new = []
    for rows in results(
        cell, [(*c, kind, r) for c, r in missing.items() if r], processes, scheduler
    ):
        new.append(pd.DataFrame(rows))
        if out:
            new[-1].to_csv(
                out,
                mode="a",
                index=False,
                header=not Path(out).exists() or not Path(out).stat().st_size,
            )
    rows = pd.concat([old, *new], ignore_index=True)
    mine = (
        pd.MultiIndex.from_frame(rows[CELL]).isin(cells) & (rows.curve == kind) & (rows.run < runs)
    )
    return rows[mine].sort_values([*CELL, "run"], kind="stable", ignore_index=True)


def judged(rows):
    "Each cell: runs that were not refused, its coverage with a 95 % interval, and whether it lies beyond chance outside of AIM."
    kept = rows[~rows.refused.astype(bool)].groupby(CELL, sort=False).inside.agg(["sum", "size"])
    tests = [
        (
            binomtest(int(k), int(m)).proportion_ci(),
            *(
                binomtest(int(k), int(m), p, side).pvalue
                for p, side in zip(AIM, ("less", "greater"))
            ),
        )
        for k, m in kept.to_numpy()
    ]
    out = pd.DataFrame(
        dict(
            kept=kept["size"],
            coverage=kept["sum"] / kept["size"],
            low=[t[0].low for t in tests],
            high=[t[0].high for t in tests],
            p_below=[t[1] for t in tests],
            p_above=[t[2] for t in tests],
        ),
        kept.index,
    )
    p = np.minimum(1, 2 * out[["p_below", "p_above"]].min(axis=1)).sort_values()
    holm = (p * (len(p) - np.arange(len(p)))).cummax().reindex(out.index)
    side = np.where(out.p_below < out.p_above, "below", "above")
    return out.assign(
        beyond=np.where(holm < 0.05, side, ""), shown=(out.low >= AIM[0]) & (out.high <= AIM[1])
    )


def table(rows):
    "Coverage and median width per cell; refused runs are counted apart."
    kept, every = (r.groupby(CELL, sort=False) for r in (rows[~rows.refused.astype(bool)], rows))
    out = pd.DataFrame(
        {
            "refused": every.refused.mean(),
            "width": kept.width.median(),
            "rmse": kept.error.apply(lambda e: np.sqrt(np.mean(e**2))),
            "right family": every.right.mean(),
            "its coverage": every.own.mean(),
            "its width": every.own_width.median(),
        }
    )
    return out.join(judged(rows)[["coverage", "low", "high", "beyond", "shown"]]).reindex(
        every.refused.mean().index
    )


def verdict(rows):
    "One sentence about all cells."
    j = judged(rows)
    inside, mean = j.coverage.between(*AIM), rows[~rows.refused.astype(bool)].inside.mean()
    by_chance = sum(
        binomtest(int(k), int(m), mean).pvalue < 0.05
        for k, m in zip((j.coverage * j.kept).round(), j.kept)
    )
    return (
        f"{len(j)} cells, mean coverage {mean:.3f}: {inside.sum()} read {AIM[0]} to {AIM[1]}, {(j.coverage < AIM[0]).sum()} less, "
        f"{(j.coverage > AIM[1]).sum()} more; beyond chance {(j.beyond == 'below').sum()} below and {(j.beyond == 'above').sum()} above; "
        f"shown to lie inside: {j.shown.sum()}; "
        f"{by_chance} differ from the mean at 5 % each, where {0.05 * len(j):.0f} would by chance"
    )


def saved_sizes(rows, runs):
    "Coverage over all cells as rows of the results."
    kept = rows[~rows.refused.astype(bool)]
    held = 100 * kept.groupby("quantity").inside.mean()
    cells = judged(rows[rows.quantity == "number"])
    counts = {
        "cells that read 0.93 to 0.98": cells.coverage.between(*AIM).sum(),
        "cells that read less": (cells.coverage < AIM[0]).sum(),
        "cells that read more": (cells.coverage > AIM[1]).sum(),
        "cells outside by more than chance": (cells.beyond != "").sum(),
    }
    mean = {"what": f"coverage, mean of {len(cells)} cells", "unit": "%", "n": runs}
    found = [mean | {"case": f"unseen {name}", "value": v} for name, v in held.items()]
    found += [
        {"what": what, "case": "unseen number", "value": v, "unit": "cells", "n": len(cells)}
        for what, v in counts.items()
    ]
    share = 100 * rows.refused.astype(bool).mean()
    found.append(
        {
            "what": "fits refused",
            "case": "coverage study",
            "value": share,
            "unit": "%",
            "n": runs,
        }
    )
    return found


def sizes(a):
    "Coverage study."
    grid = (
        ((1.5,), (0.5,), (1000,))
        if a.quick
        else ((1.3, 1.5, 1.8), (0.1, 0.3, 0.5, 0.7, 0.9), a.detected)
    )
    runs = 40 if a.quick else a.runs
    rows = study(list(product(FAMILIES, *grid)), a.curve, runs, a.out, a.jobs, a.scheduler)
    print("python benchmarks/counting.py " + " ".join(sys.argv[1:]))
    with pd.option_context(
        "display.width", 200, "display.max_rows", None, "display.max_columns", None
    ):
        for name in ("number", "surface"):
            part = rows[rows.quantity == name]
            print(
                f"\nunseen {name}, {runs} runs per cell, curve {a.curve}\n{table(part).round(3).to_string()}\n{verdict(part)}"
            )
        print("\nmean over cells, by family and n (refused runs left out)")
        print(
            rows[~rows.refused.astype(bool)]
            .groupby(["quantity", "family", "n"], sort=False)[["inside", "width"]]
            .mean()
            .round(3)
            .to_string()
        )
    if a.save:
        write("counting", saved_sizes(rows, runs))
    assert rows[~rows.refused.astype(bool) & (rows.quantity == "number")].inside.mean() > 0.9, (
        "intervals miss the truth too often"
    )


def powers(rng, n):  # number per ln d falls as 1/d**2 from far below what is seen
    d = 0.05 * rng.random(4000 * n) ** (-1 / 2)
    return d[rng.random(len(d)) < logistic(d)][:n]


def two(rng, n):  # two populations, both in sight
    return np.concatenate(
        [observe(size_law("lognormal", m, 1.15), logistic, n // 2, rng) for m in (1.2, 4.0)]
    )


UNIDENTIFIABLE = {
    "150 particles": lambda rng: observe(size_law("lognormal", 1.0, 1.5), logistic, 150, rng),
    "power law": lambda rng: powers(rng, 1000),
    "unseen 0.98, lognormal": lambda rng: observe(
        law_with("lognormal", 1.5, 0.98, logistic), logistic, 1000, rng
    ),
    "unseen 0.98, Weibull": lambda rng: observe(
        law_with("weibull", 1.5, 0.98, logistic), logistic, 1000, rng
    ),
    "two populations": lambda rng: two(rng, 1000),
    "uniform sizes (no family)": lambda rng: rng.uniform(1.5, 6, 1000),
}
GOOD = {
    f"{f}, GSD {g}, unseen {u}, n {n}": (f, g, u, n)
    for f in FAMILIES
    for g in (1.3, 1.5)
    for u in (0.1, 0.3, 0.5)
    for n in (1000, 5000)
}


def refused(case, run):
    "Whether this run of this case is refused, and whether the bound holds."
    rng = np.random.default_rng([7, run, *case.encode()])
    if case in UNIDENTIFIABLE:
        return fit_sizes(UNIDENTIFIABLE[case](rng), logistic).refused
    family, gsd, share, n = GOOD[case]
    return fit_sizes(
        observe(law_with(family, gsd, share, logistic), logistic, n, rng), logistic
    ).refused


def refusals(a):
    "Cases that must be refused and cases that must not."
    runs = 10 if a.quick else a.runs
    rows = []
    for title, cases in (("cannot be identified", UNIDENTIFIABLE), ("good", GOOD)):
        print(f"\n{title}: share refused, {runs} runs each")
        total = []
        for case in cases:
            reasons = Parallel(n_jobs=a.jobs)(delayed(refused)(case, r) for r in range(runs))
            total += [r is not None for r in reasons]
            why = pd.Series([r.split(",")[0][:60] for r in reasons if r]).value_counts()
            print(f"  {case:42s} {np.mean(total[-runs:]):.3f}   {why.index[0] if len(why) else ''}")
        print(f"  {'all':42s} {np.mean(total):.3f}")
        rows.append(
            {
                "what": "fits refused",
                "case": f"{title} sizes" if title == "good" else f"sizes that {title}",
                "value": 100 * np.mean(total),
                "unit": "%",
                "n": len(total),
            }
        )
    if a.save:
        write("counting", rows)


def speed(a):
    "Time of one fit with three families and envelope."
    rng = np.random.default_rng(0)
    d = observe(law_with("lognormal", 1.5, 0.5, PROBIT), PROBIT, 5000, rng)
    every = []
    for name, curve in (("known curve", logistic), ("injected curve", injected(PROBIT, rng))):
        times = []
        for _ in range(7):
            start = time.perf_counter()
            fit_sizes(d, curve)
            times.append(time.perf_counter() - start)
        every += times
        print(
            f"5,000 sizes, three families and envelope, {name}: median {np.median(times):.3f} s, best {min(times):.3f} s"
        )
    if a.save:
        fit = {"case": "5,000 sizes, three families with envelope", "unit": "s", "n": len(every)}
        fastest = fit | {"what": "time of the fit, fastest", "value": min(every)}
        slowest = fit | {"what": "time of the fit, slowest", "value": max(every)}
        write("counting", [fastest, slowest])


if __name__ == "__main__":
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("what", choices=["sizes", "refusals", "speed"])
    p.add_argument("--quick", action="store_true", help="a few cells, for CI")
    p.add_argument("--runs", type=int, default=200, help="runs per cell")
    p.add_argument("--curve", choices=["known", "injected"], default="known")
    p.add_argument(
        "--detected",
        type=int,
        nargs="+",
        default=[300, 1000, 5000],
        help="numbers of detected particles",
    )
    p.add_argument("--jobs", type=int, default=-1, help="processes")
    p.add_argument("--scheduler", help="address of a Dask scheduler, in place of processes (sizes)")
    p.add_argument("--save", action="store_true", help="put the results into benchmarks/results")
    p.add_argument(
        "--out",
        help="CSV file for every run, which the same command goes on with when it was stopped (sizes)",
    )
    args = p.parse_args()
    start = time.perf_counter()
    {"sizes": sizes, "refusals": refusals, "speed": speed}[args.what](args)
    print(f"\n{args.what}: {time.perf_counter() - start:.0f} s")
