"""From images to the unseen share: coverage on simulated scenes, degraded real images, precision and time of the calibration.

    python benchmarks/counting_end_to_end.py coverage --quick    # a few scenes
    python benchmarks/counting_end_to_end.py coverage --runs 40  # every cell: three families, GSD 1.3-1.8, unseen 0.1-0.9
    python benchmarks/counting_end_to_end.py degraded --data FOLDER
    python benchmarks/counting_end_to_end.py calibration
    python benchmarks/counting_end_to_end.py looks               # d50 calibrated against that of the scene's own particles

Each scene is simulated, counted, calibrated by injection into its own image, and fitted; nothing of the truth is used. The
size law is scaled so that the share asked for is missed by the curve of a first, broad scene with the same imaging; the true
share of a scene is counted in its own table: particles wholly in the frame without a match. `degraded` blurs and reduces the
annotated images of FOLDER/particles/sem (default: MICROGEN_TEST_DATA) by 2, 3 and 4, adds noise, and compares with the masks.
`--scheduler ADDRESS` sends the scenes to Dask. `--save` puts the numbers into results/counting_end_to_end.csv.
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
from counting import FAMILIES, results
from results import write
from scipy import ndimage as ndi
from scipy.optimize import brentq

from microgen.core import InputError
from microgen.count.calibrate import calibrate, horvitz_thompson, match
from microgen.count.detect import detect
from microgen.count.law import fit_detection, size_law
from microgen.count.size import fit_sizes
from microgen.sem.preset import Scene, scene_preset
from microgen.sem.scene import simulate_scene

IMAGING = dict(
    pixel_size=1.0,
    probe_nm=1.3,
    astigmatism=1.1,
    electrons=60,
    detector=0.02,
    noise_px=0,
    shape="sphere",
    buried=0,
    clustering=0,
    texture=0.04,
    texture_nm=20,
    tone_spread=0.05,
    escape_nm=1.5,
    edge=0.3,
    jitter_nm=0.1,
    ramp=0.05,
    support_level=0.25,
    particle_level=0.6,
)


def scene(family, median, gsd, n, size, seed):
    return simulate_scene(
        scene_preset("small", **IMAGING, law=family, median_nm=median, gsd=gsd, n=n, size=size),
        rng=seed,
    )


def whole(s):
    "Rows of the particles that lie wholly in the frame."
    t, (h, w), px = s.table, s.image.shape, s.scene.pixel_size
    r = t.diameter_nm / 2
    return t[(t.y_nm > r) & (t.x_nm > r) & (t.y_nm < h * px - r) & (t.x_nm < w * px - r)]


def matched(s, found):
    "Diameters of the particles wholly in the frame, and the row of what was found of each, or -1."
    t = whole(s)
    return t.diameter_nm.to_numpy(), match(
        found, t.diameter_nm.to_numpy(), t[["y_nm", "x_nm"]].to_numpy()
    )


def seen(s, found):
    "Diameters of the particles wholly in the frame, and which of them were found."
    d, which = matched(s, found)
    return d, which >= 0


def in_fitted_diameters(c, true, d, which):
    "ln of calibrated over true d50, less what the diameters fitted near it are off by: the error that decides about the unseen share."
    near = (which >= 0) & (d < 1.35 * true.d50)
    off = np.log(c.sizes[which[near]] / d[near]) - c.response(d[near])[0]
    return np.log(c.curve.d50 / true.d50) - np.nanmedian(off)


def reference_curve(size=768):
    "The curve of this imaging, from the truth of a broad scene."
    s = scene("lognormal", 6.0, 1.5, int(0.0011 * size**2), size, 12345)
    return fit_detection(*seen(s, detect(s.image)))


def median_for(family, gsd, share, curve):
    "Median diameter at which this curve misses the share."
    x = np.linspace(-4, 6, 4001)

    def missed(m):
        f = np.exp(size_law(family, np.exp(m), gsd).log_density(x))
        return 1 - np.average(curve(np.exp(x)), weights=f)

    return float(np.exp(brentq(lambda m: missed(m) - share, -2, 4)))


def judged(found, d, which, n_injected):
    "Fit what was counted, and compare with the truth: one row."
    was_found = which >= 0
    u, s2 = 1 - was_found.mean(), (d**2 * was_found).sum() / (d**2).sum()
    row = dict(
        n_true=len(d),
        n_found=int((found.particles["edge_weight"] > 0).sum()),
        unseen=u,
        visible_surface=s2,
        false=np.nan,
    )
    t = time.perf_counter()
    try:
        c = calibrate(None, detection=found, n=n_injected)
    except InputError as e:
        return row | dict(refused=f"calibration: {e}")
    seconds = time.perf_counter() - t
    kept = (found.particles["edge_weight"] > 0).to_numpy()
    size, weight = c.sizes[kept], found.particles["edge_weight"].to_numpy()[kept]
    row |= dict(
        seconds=seconds,
        foreseen=1 - c.curve(d).mean(),
        d50=c.curve.d50,
        d50_se=c.curve.d50_se,
        look_error=c.look_error(c.curve.d50),
        size_error=c.size_error,
    )
    try:
        row |= dict(
            d50_true=(true := fit_detection(d, was_found)).d50,
            width_off=c.curve.width / true.width - 1,
            gap=in_fitted_diameters(c, true, d, which),
        )
    except InputError:
        pass
    try:
        fit = fit_sizes(
            size, c.curve, edge_weight=weight, size_error=c.response, min_detection=0.02
        )
    except InputError as e:
        return row | dict(refused=f"fit: {e}")
    ht = horvitz_thompson(size, c.curve, weight)
    number, surface = fit.unseen_number, fit.unseen_surface
    guess = (
        fit.families.sort_values("delta_aic").unseen_number.iloc[0] if fit.law else np.nan
    )  # what the best family says, refused or not
    return row | dict(
        refused=number.refused,
        guess=guess,
        low=number.low,
        high=number.high,
        value=number.value,
        inside=number.low <= u <= number.high,
        surface=1 - surface.value,
        surface_inside=surface.low <= 1 - s2 <= surface.high,
        family=fit.law and fit.law.family,
        ht=ht.number,
        ht_fit=ht.number / ht.fitted(fit.law) - 1 if fit.law else np.nan,
    )


def one_scene(family, gsd, share, median, size, n_injected, seed):
    n = int(min(0.0008, 0.04 / (np.pi / 4 * median**2 * np.exp(2 * np.log(gsd) ** 2))) * size**2)
    s = scene(family, median, gsd, n, size, seed)
    found = detect(s.image)
    row = dict(truth=family, gsd=gsd, asked=share, seed=seed) | judged(
        found, *matched(s, found), n_injected
    )
    print(
        ", ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()),
        flush=True,
    )
    return row


def coverage(a):
    "Coverage of the unseen number and surface share, from images."
    curve = reference_curve()
    print(
        f"reference curve: d50 {curve.d50:.2f} ± {curve.d50_se:.2f} px, width {curve.width:.2f}, upper {curve.upper:.3f}",
        flush=True,
    )
    cells = list(
        product(
            FAMILIES,
            a.gsd or ((1.5,) if a.quick else (1.3, 1.5, 1.8)),
            a.unseen or ((0.3,) if a.quick else (0.1, 0.3, 0.5, 0.7, 0.9)),
        )
    )
    runs = a.runs or (1 if a.quick else 20)
    jobs = [
        (f, g, u, median_for(f, g, u, curve), a.size, a.injections, 1000 * i + k)
        for i, (f, g, u) in enumerate(cells)
        for k in range(runs)
    ]
    rows = pd.DataFrame(results(one_scene, jobs, a.jobs, a.scheduler)).sort_values(
        "seed", ignore_index=True
    )
    report(rows, a)
    if a.save:
        counts = refusals(rows)
        del counts["refused: fewer than 200 found"]  # of scenes that are too small: other reasons
        counts[OTHERS] = rows.refused.notna().sum() - sum(
            n for name, n in counts.items() if name != OTHERS
        )
        values = of_number(rows) | {name: (n, "scenes") for name, n in counts.items()}
        case = (
            f"{len(cells)} cells once" if runs == 1 else f"{len(cells)} cells, {runs} scenes each"
        )
        values |= of_surface(rows) | of_d50(rows)
        write("counting_end_to_end", as_rows(values, case, len(rows)))
    columns = [
        c
        for c in (
            "n_found",
            "unseen",
            "value",
            "low",
            "high",
            "inside",
            "visible_surface",
            "surface",
            "surface_inside",
        )
        if c in rows
    ]
    means = (
        rows.assign(refused=rows.refused.notna())
        .astype({c: float for c in columns})
        .groupby(["truth", "gsd", "asked"])[[*columns, "refused"]]
        .mean()
    )
    print(means.round(3).to_string())


REFUSALS = {  # name of a result: words of the reason
    "refused: interval wider than 0.4": "wider than 0.4",
    "refused: no family fits": "no family fits",
    "refused: most common size below the limit": "the most common size",
    "refused: fewer than 200 found": "count 200 or more",
}
OTHERS = "refused: other reasons"


def rms(errors):
    return np.sqrt((errors**2).mean())


def refusals(rows):
    "Number of refused rows for each of REFUSALS, and for other reasons."
    said = rows.refused.dropna()
    counts = {name: said.str.contains(words).sum() for name, words in REFUSALS.items()}
    return counts | {OTHERS: len(said) - sum(counts.values())}


def as_rows(values, case, n):
    "{name: (value, unit)} as rows of the results, less what has no value."
    rows = []
    for what, (value, unit) in values.items():
        if np.isfinite(value):
            rows.append({"what": what, "case": case, "value": value, "unit": unit, "n": n})
    return rows


def column(rows, name):
    "A column, empty where no row has it."
    return rows[name] if name in rows else pd.Series(np.nan, rows.index)


def of_number(rows, unit="scenes"):
    "What was said about the unseen number: {name: (value, unit)}."
    kept = rows[rows.refused.isna()]
    inside = column(rows, "inside")
    error = column(kept, "value") - kept.unseen
    width = column(kept, "high") - column(kept, "low")
    return {
        "unseen number: intervals given": (len(kept), unit),
        "unseen number: intervals that hold the truth": (inside[kept.index].sum(), unit),
        "unseen number: rms error": (rms(error), "1"),
        "unseen number: median width of the interval": (width.median(), "1"),
        "unseen number: refused": (len(rows) - len(kept), unit),
        "unseen number: one-sided bounds of refused scenes that hold the truth": (
            inside.drop(kept.index).sum(),
            unit,
        ),
    }


def of_surface(rows):
    "What was said about the visible surface: {name: (value, unit)}."
    given = rows[column(rows, "surface").notna()]
    error = column(given, "surface") - given.visible_surface
    return {
        "visible surface: intervals given": (len(given), "scenes"),
        "visible surface: intervals that hold the truth": (
            column(given, "surface_inside").sum(),
            "scenes",
        ),
        "visible surface: rms error": (rms(error), "1"),
    }


def of_d50(rows):
    "d50 in fitted diameters against that of the scene's own particles: {name: (value, unit)}."
    gap = 100 * column(rows, "gap").dropna()
    error = 100 * (column(rows, "d50_se") / column(rows, "d50")).median()
    return {
        "d50 in fitted diameters, mean deviation": (gap.mean(), "%"),
        "d50 in fitted diameters, rms deviation": (rms(gap), "%"),
        "d50 in fitted diameters, stated error": (error, "%"),
    }


def stated(rows):
    "Standard error of ln d50 in nm: of the injections, and of the look."
    return np.hypot(rows.d50_se / rows.d50, rows.look_error)


def report(rows, a):
    if a.out:
        rows.to_csv(a.out, index=False)
    kept = rows[rows.refused.isna()]
    print(f"{len(rows)} images, {len(rows) - len(kept)} refused")
    for why, n in (
        rows.refused.dropna()
        .str.replace(r"[\d.]+", "#", regex=True)
        .str[:90]
        .value_counts()
        .items()
    ):
        print(f"  {n} x {why}")
    if "d50" in rows:
        fitted, off = (
            rows.dropna(subset="low" if "low" in rows else "d50"),
            (rows.d50 / rows.d50_true - 1).dropna(),
        )
        print(
            f"d50: calibrated over true {100 * off.median():+.1f} % (median), scatter {100 * off.std():.1f} %, "
            f"stated error {100 * stated(rows).median():.1f} %"
        )
        gap = rows.gap.dropna()
        print(
            f"d50 in fitted diameters: mean {100 * gap.mean():+.1f} %, rms {100 * np.sqrt((gap**2).mean()):.1f} %, stated {100 * (rows.d50_se / rows.d50).median():.1f} %; "
            f"width of the curve off by {100 * rows.width_off.median():+.0f} % (median)"
        )
    if "low" not in rows:
        return
    print(
        f"unseen number, bounds of refused ones too: {int(fitted.inside.sum())} inside, {int((~fitted.inside.astype(bool)).sum())} outside"
    )
    given = fitted.dropna(subset="surface")
    surface = given.surface - given.visible_surface
    print(
        f"visible surface share: {int(given.surface_inside.sum())} of {len(given)} inside, bias {surface.mean():+.3f}, rmse {np.sqrt((surface**2).mean()):.3f}; "
        f"{len(fitted) - len(given)} refused"
    )
    if not len(kept):
        return
    error = kept.value - kept.unseen
    print(
        f"unseen number, not refused: {int(kept.inside.sum())} of {len(kept)} inside, bias {error.mean():+.3f}, rmse {np.sqrt((error**2).mean()):.3f}, "
        f"median width {(kept.high - kept.low).median():.3f}"
    )
    print(
        f"Horvitz-Thompson over the fitted law, sizes with p > 0.2: {100 * kept.ht_fit.median():+.1f} % (median), scatter {100 * kept.ht_fit.std():.1f} %"
    )


def degraded_image(image, label, by, electrons, rng):
    "Blurred, reduced by a whole factor, with Poisson noise; the masks' diameters and centres in the new pixels."
    grey = image if image.ndim == 2 else image @ np.array([0.299, 0.587, 0.114])
    soft = ndi.gaussian_filter(grey.astype(float), 0.6 * by)
    h, w = (n // by * by for n in soft.shape)
    small = soft[:h, :w].reshape(h // by, by, w // by, by).mean((1, 3))
    small = rng.poisson(np.maximum(small, 0) / 255 * electrons) / electrons * 255
    ids = np.unique(label[label > 0])
    area = np.bincount(label.ravel(), minlength=ids.max() + 1)[ids]
    at = (np.array(ndi.center_of_mass(label > 0, label, ids)) + 0.5) / by - 0.5
    return small.astype(np.float32), 2 * np.sqrt(area / np.pi) / by, at


def one_degraded(path, by, electrons, n_injected):
    from skimage.io import imread

    image, label = (
        imread(path)[..., :3],
        imread(path.parent.parent / "masks" / path.name).astype(int),
    )
    small, d, at = degraded_image(image, label, by, electrons, np.random.default_rng(by))
    found = detect(small)
    which = match(found, d, at)
    row = dict(image=path.stem, by=by, false=len(found.particles) - (which >= 0).sum())
    if len(found.particles) == 0:
        return row | dict(refused="no particle was found", unseen=1.0)
    row |= {k: v for k, v in judged(found, d, which, n_injected).items() if k != "false"}
    print(
        ", ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()),
        flush=True,
    )
    return row


def degraded(a):
    "Annotated images, degraded: predicted unseen share against the masks."
    if not a.data:
        sys.exit("give --data, the folder that holds particles/sem")
    paths = sorted((Path(a.data) / "particles" / "sem" / "images").glob("*.png"))
    paths = [
        p for p in paths if p.stem in ("f3b36fb2ab", "6752c27137", "245e1a4826", "9c4905d020")
    ]  # those of more than 100 particles
    jobs = [(p, by, 60, a.injections) for p in paths[: 1 if a.quick else None] for by in (2, 3, 4)]
    rows = pd.DataFrame(results(one_degraded, jobs, a.jobs, a.scheduler)).sort_values(
        ["image", "by"], ignore_index=True
    )
    print(
        rows[
            [
                c
                for c in (
                    "image",
                    "by",
                    "n_true",
                    "n_found",
                    "false",
                    "unseen",
                    "value",
                    "guess",
                    "low",
                    "high",
                    "visible_surface",
                    "surface",
                    "d50",
                    "d50_true",
                    "refused",
                )
                if c in rows
            ]
        ]
        .round(3)
        .to_string()
    )
    if a.out:
        rows.to_csv(a.out, index=False)
    kept, guess = rows[rows.refused.isna()], (rows.guess - rows.unseen).abs()
    print(
        f"best family alone, refused or not: {guess.notna().sum()} estimates, {(guess <= 0.1).sum()} within 0.10"
    )
    if "inside" in rows:
        print(
            f"interval or bound holds the truth: {int(rows.inside.dropna().sum())} of {len(rows.inside.dropna())}"
        )
    if a.save:
        few = "refused: fewer than 200 found"
        bounds = "unseen number: one-sided bounds of refused scenes that hold the truth"
        number = of_number(rows, "images")
        refused = {
            "unseen number: refused": number["unseen number: refused"],
            few: (refusals(rows)[few], "images"),
            bounds: number[bounds],
        }
        close = {"best family's own estimate within 0.10": ((guess <= 0.1).sum(), "images")}
        case = "real images degraded ×2, ×3, ×4"
        found = as_rows(refused, case, len(rows)) + as_rows(close, case, guess.notna().sum())
        write("counting_end_to_end", found)
    print(
        f"within 0.10: {int((np.abs(kept.value - kept.unseen) <= 0.1).sum()) if len(kept) else 0} of {len(rows)}; refused {len(rows) - len(kept)}"
    )


LOOKS = dict(
    probe=dict(),
    film=dict(IMAGING, median_nm=6, gsd=1.5, probe_nm=1.2),
    sharp=dict(probe_nm=0.9, median_nm=6, electrons=30, edge=0.7),
    noisy=dict(probe_nm=1.6, median_nm=9, electrons=20, detector=0.03, edge=0.3),
    deep=dict(escape_nm=3.0, median_nm=9, tone_spread=0.1, texture=0.08),
    blurred=dict(probe_nm=2.2, median_nm=10, edge=0.9, electrons=100, texture=0.06),
    coarse=dict(pixel_size=2.0, probe_nm=2.5, median_nm=18, gsd=1.4, escape_nm=2.5, texture=0.03),
    fine=dict(pixel_size=0.6, probe_nm=0.8, median_nm=5, gsd=1.5, electrons=40, escape_nm=1.0),
)


def looks(a):
    "Each of eight imagings once: d50 calibrated on one image, against that of its own particles and of those of three; what the fit says."
    usual, rows = (
        dict(size=640, pixel_size=1.0, median_nm=8, gsd=1.45, n=500, probe_nm=1.2, electrons=60),
        [],
    )
    for k, (name, own) in enumerate(list(LOOKS.items())[: 1 if a.quick else None]):
        scenes = [
            simulate_scene(Scene(**(usual | own)), np.random.default_rng([a.seed, k, m]))
            for m in range(1, 4)
        ]
        found = [detect(s.image) for s in scenes]
        there = fit_detection(*(np.concatenate(o) for o in zip(*map(seen, scenes, found))))
        rows.append(
            dict(look=name, d50_three=there.d50)
            | judged(found[0], *matched(scenes[0], found[0]), a.injections)
        )
        print(
            ", ".join(
                f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in rows[-1].items()
            ),
            flush=True,
        )
    rows = pd.DataFrame(rows)
    report(rows, a)
    for which, true in (("this image", rows.d50_true), ("three images", rows.d50_three)):
        off = np.log(rows.d50 / true)
        print(
            f"d50 against that of the particles of {which}: mean {off.mean():+.3f}, rms {np.sqrt((off**2).mean()):.3f}, stated {stated(rows).mean():.3f}"
        )
    if a.save:
        off = 100 * np.log(rows.d50 / rows.d50_true)
        d50 = {
            "d50 in nm, mean deviation": (off.mean(), "%"),
            "d50 in nm, rms deviation": (rms(off), "%"),
            "d50 in nm, stated error": (100 * stated(rows).mean(), "%"),
        }
        number = of_number(rows)
        del number["unseen number: median width of the interval"]
        case = "eight imagings" if len(rows) == 8 else f"{len(rows)} imaging(s)"
        values = d50 | of_d50(rows) | number | of_surface(rows)
        write("counting_end_to_end", as_rows(values, case, len(rows)))


def calibration(a):
    "Standard error of d50 and time, on a 1024 x 1024 image of 500 particles."
    s = scene("lognormal", 8.0, 1.5, 250 if a.quick else 500, 512 if a.quick else 1024, 5)
    found = detect(s.image)
    t = time.perf_counter()
    c = calibrate(None, detection=found, n=a.injections, workers=a.jobs)
    alone = fit_detection(c.injections["d_nm"], c.injections["found"])
    seconds = time.perf_counter() - t
    of_injections = 100 * alone.d50_se / alone.d50
    in_fitted = 100 * c.curve.d50_se / c.curve.d50
    in_nm = np.hypot(in_fitted, 100 * c.look_error(c.curve.d50))
    print(
        f"{s.image.shape}, {len(found.particles)} found, {len(c.injections)} injected: d50 {c.curve.d50:.3f} nm, standard error "
        f"{in_fitted:.2f} % in fitted diameters, {in_nm:.2f} % in nm, of the injections alone {of_injections:.2f} %, "
        f"{seconds:.0f} s on {a.jobs} processes"
    )
    jobs = {1: "one process", 2: "two processes"}.get(a.jobs, f"{a.jobs} processes")
    values = {
        "standard error of d50, injections alone": (of_injections, "%"),
        "standard error of d50, in fitted diameters": (in_fitted, "%"),
        "standard error of d50, in nm": (in_nm, "%"),
        "d50, calibrated": (c.curve.d50, "nm"),
        f"time, {jobs}": (seconds, "s"),
    }
    rows = as_rows(values, f"calibration of one image, {a.injections:,} injections", 1)
    try:
        own = fit_detection(*seen(s, found))
        print(f"d50 of the particles that are there: {own.d50:.3f} ± {own.d50_se:.3f} nm")
        limits = {"low": own.d50 - own.d50_se, "high": own.d50 + own.d50_se}
        what = "d50 of the scene's own particles"
        rows.append(rows[0] | {"what": what, "value": own.d50, "unit": "nm"} | limits)
    except InputError as e:
        print(e)
    if a.save:
        write("counting_end_to_end", rows)


if __name__ == "__main__":
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("what", choices=["coverage", "degraded", "calibration", "looks"])
    p.add_argument("--quick", action="store_true", help="a few images, for CI")
    p.add_argument("--runs", type=int, help="scenes per cell")
    p.add_argument("--gsd", type=float, nargs="+", help="only these geometric standard deviations")
    p.add_argument("--unseen", type=float, nargs="+", help="only these unseen shares")
    p.add_argument("--size", type=int, default=768, help="pixels along a side of a scene")
    p.add_argument("--injections", type=int, default=2000)
    p.add_argument("--seed", type=int, default=20, help="of the scenes of `looks`")
    p.add_argument("--jobs", type=int, default=2, help="processes")
    p.add_argument("--scheduler", help="address of a Dask scheduler")
    p.add_argument(
        "--data",
        default=os.environ.get("MICROGEN_TEST_DATA"),
        help="folder that holds particles/sem",
    )
    p.add_argument("--out", help="CSV file for every image")
    p.add_argument("--save", action="store_true", help="put the results into benchmarks/results")
    args = p.parse_args()
    start = time.perf_counter()
    {"coverage": coverage, "degraded": degraded, "calibration": calibration, "looks": looks}[
        args.what
    ](args)
    print(f"\n{args.what}: {time.perf_counter() - start:.0f} s")
