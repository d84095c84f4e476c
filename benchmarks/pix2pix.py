"""How true are images of walls that the network never saw: pix2pix trained on simulated walls, three seeds.

    python benchmarks/pix2pix.py --quick                          # two minutes: 64 px, one minute of training a seed
    python benchmarks/pix2pix.py --epochs 14 --seeds 0 1 2 --processes 2    # 128 px on a CPU, about half an hour of one core a seed
    python benchmarks/pix2pix.py --minutes 12 --seeds 0 1 2 --processes 2   # the same by the clock
    python benchmarks/pix2pix.py --minutes 60 --config full --size 256 --n 6000   # with a GPU
    python benchmarks/pix2pix.py --keep DIR --judge-only --pictures nbs/images    # runs that --keep DIR left
    python benchmarks/pix2pix.py --part adversary --px 64 --seeds 0 1 2 --cpu-seconds 45   # what the adversary is worth

Data: walls of YMnO3, low-noise scans (preset "good"); every image is a geometry, a crystal and a scan of its own, so those of the
test split are unseen. The seeds change weights, order and noise; the images are the same for all. Judged is the averaged
generator, against four things: the true image; a second scan of the same scene (the same specimen, optics and settings, other
noise and other jitter: the ceiling for samples in the style of the true image; a mean over z is free of noise and can pass it); scans
of the same scene by other microscopes (the ceiling for samples with any z); and the Cramér-Rao bound of the true image's columns.
Intervals are of 95 % over scenes, which all seeds share: those of the package for a mean (Student, and Hall for skewed values), of
the jackknife's pseudo-values where a number is no mean, and of order statistics for a median. Set metrics are those of a network with random weights,
each beside its floor, real half against real half. The samples of one scene over z are compared with scans of that scene by the
microscopes (optics, thickness, dose) of other images.
The second half of a training lowers its rates to zero. By the clock: half of the minutes at the full rate, then as many steps again.

The part "adversary" trains on the data of README and takes parts of the loss away. Every training has the same processor time; one
without an adversary does not train a discriminator either. All are judged on the scenes that were not trained on.
"""

import argparse
import json
import os
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
warnings.filterwarnings("ignore")

import matplotlib
import numpy as np
import pandas as pd
import torch
from fastai.callback.core import Callback, CancelFitException, CancelValidException
from results import write
from scipy.stats import binom

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from microgen.core import Micrograph, mean_interval
from microgen.data.build import build, read_recipe
from microgen.data.files import list_images, scale
from microgen.data.load import paired_dls
from microgen.gan.loss import WEIGHTS, judged_both
from microgen.gan.pix2pix import CONFIGS, pix2pix_learner, spread
from microgen.io.files import read
from microgen.kinds.walls.condition import condition
from microgen.kinds.walls.evaluate import (
    RIM_NM,
    bragg_transfer,
    column_errors,
    in_rim,
    position_bound,
    rim_difference,
    rms_pm,
    structure_errors,
)
from microgen.kinds.walls.recipe import TABLE, Recipe, sample_values
from microgen.metrics.features import random_extractor
from microgen.metrics.image import log_power_distance, radial_spectrum, ssim
from microgen.metrics.sets import copy_test, feature_pair, half_samples, kernel_distance
from microgen.models.pix2pix import Pix2PixModel, RouterModel
from microgen.models.train import train_model
from microgen.nets.style import STYLE
from microgen.plot import show
from microgen.scan.acquire import acquire, mistilt
from microgen.stem.crystal import columns
from microgen.stem.render import haadf
from microgen.stem.wall import displace, truth_maps
from microgen.train.adversarial import gan_losses
from microgen.train.core import EMA, ImageIsTarget, MustTrain, Repeat, random_state_kept
from microgen.train.hub import load_model

CELL_NM = 0.5316  # distance of the rare-earth columns along the layer in YMnO3, a cell of the wall's steps


def unit(image):
    "Grey levels in [-1, 1], by the percentiles that the training uses."
    return scale(image, *np.percentile(image, (0.01, 99.99))).astype(np.float32)


def scenes(folder, n):
    "The first n test images: image, maps, table, label, index."
    listed = list_images(folder)
    for _, row in listed[listed.split == "test"].head(n).iterrows():
        stack = read(row["maps"])
        maps = dict(zip(stack.metadata["channels"], np.asarray(stack.data)))
        yield (
            read(row["image"]),
            maps,
            pd.read_parquet(row["table"]),
            row["label"],
            int(Path(row["image"]).stem),
        )


def scan_again(recipe, index):
    "A second scan of one scene: same specimen, optics and settings; other motion and noise."
    d, px = sample_values(recipe, index), recipe.pixel_size
    shape = (recipe.size + 2 * d.rim,) * 2
    crystal = columns(
        recipe.structure, d.fov, d.thickness_nm, origin=d.origin, rotation_deg=d.rotation_deg
    )
    tilted = mistilt(displace(crystal, d.field), d.scan.mistilt_mrad, d.scan.mistilt_deg)
    rng = np.random.default_rng([recipe.seed, index, 1])
    seen = acquire(
        haadf(tilted, px, d.probe, shape),
        d.scan,
        rng,
        truth_maps(crystal, d.field, shape, px),
        tilted.table,
        rim=d.rim,
    )
    t, end = seen.table[TABLE], (recipe.size - 1) * px
    inside = t.y_nm.between(0, end) & t.x_nm.between(0, end)
    return seen.image, seen.maps, t[inside].reset_index(drop=True)


def other_microscopes(recipe, index, n):
    "Scans of one scene, each with optics, thickness and settings of another image: (n, H, W) in [-1, 1]."
    scene, out = sample_values(recipe, index), []
    shape = (recipe.size + 2 * scene.rim,) * 2
    for k in range(n):
        other = sample_values(recipe, k)
        crystal = columns(
            recipe.structure,
            scene.fov,
            other.thickness_nm,
            origin=scene.origin,
            rotation_deg=scene.rotation_deg,
        )
        ideal = haadf(displace(crystal, scene.field), recipe.pixel_size, other.probe, shape)
        out.append(
            unit(acquire(ideal, other.scan, np.random.default_rng([index, k]), rim=scene.rim).data)
        )
    return np.stack(out)


def physics(image, table, maps=None, true=None):
    "Column error; with maps polarity, phase and wall; with the true image the transfer of Bragg reflections."
    e = column_errors(image, table)
    out = {"rms_pm": rms_pm(e), "found": float(e.found.mean())}
    if maps is None:
        return out
    s = structure_errors(image, table, maps)
    out |= {
        "polarity": s["polarity_right"],
        "phi_deg": s["phi_error_deg"],
        "wall_cells": s.get("wall_error_nm", np.nan) / CELL_NM,
        "width_nm": s.get("width_error_nm", np.nan),
        "walls_found": s.get("walls_found", 0) / s["walls"] if s.get("walls") else np.nan,
    }
    return out | (bragg(true, image) if true is not None else {})


def bragg(true, image):
    "Amplitude of a generated image over that of the true one: median over the main and over the superlattice reflections of the scene."
    pair = [Micrograph(unit(i.data), i.pixel_size) for i in (true, image)]
    t = bragg_transfer(pair[:1], pair[1:], "YMnO3")
    return {
        f"bragg_{kind}": float(t.transfer[(t.kind == kind) & (t.snr_real > 30)].median())
        for kind in ("main", "superlattice")
    }


def repeat_scans(folder, n_ssim, n_physics, n_spread):
    "What a second scan of each test scene reaches: one row per scene."
    torch.set_num_threads(1)
    recipe, rows = read_recipe(folder), []
    for k, (image, _, table, _, index) in enumerate(scenes(folder, n_ssim)):
        again, maps, moved = scan_again(recipe, index)
        true, others = (
            unit(image.data),
            other_microscopes(recipe, index, N_SPREAD if k < n_spread else 2),
        )
        row = {
            "ssim_same": float(ssim(true[None], unit(again.data)[None], L=2)[0]),
            "ssim_draw": float(ssim(np.stack([true] * len(others)), others, L=2).mean()),
        }
        if k < n_physics:
            row |= {"bound_pm": position_bound(image, table)} | physics(again, moved, maps, image)
        if k < n_spread:
            row |= varied(others)
        rows.append(row)
    return pd.DataFrame(rows)


N_SPREAD = 12  # samples and scans of one scene


def varied(images):
    "Standard deviation of level, contrast, noise and sharpness over images of one scene."
    return {f"sd_{name}": float(v) for name, v in spread(images).std().items()}


def judge(model, folder, n_ssim, n_physics, n_spread, n_z=16):
    "One row per test scene, and what holds for the set: SSIM of the mean over z and of single samples, physics, spread; sets."
    about, rows, real, fake = model.about, [], [], []
    for k, (image, maps, table, label, index) in enumerate(scenes(folder, n_ssim)):
        cond = torch.from_numpy(
            condition(maps, table, image.shape, image.pixel_size, tuple(about["channels"]))
        )
        known, rng = about["vocab"].index(label), np.random.default_rng([7, index])
        mean = model.sample(n_z, (cond, known), rng, noise=False).mean(0)[0].numpy()
        drawn = model.sample(2, (cond, known), rng).numpy()[:, 0]
        true = unit(image.data)
        own = (
            model.style_of(torch.from_numpy(true)[None, None]).repeat(2, 1)
            if model.g.z_dim
            else None
        )
        same = model.sample(2, (cond, known), rng, z=own).numpy()[:, 0]
        row = {"ssim_mean": float(ssim(true[None], mean[None], L=2)[0])}
        row |= {
            f"ssim_{name}": float(ssim(np.stack([true] * 2), x, L=2).mean())
            for name, x in (("same", same), ("draw", drawn))
        }
        if k < n_physics:
            for name, x in (("mean", mean), ("same", same[0])):
                row |= {
                    f"{name}_{a}": b
                    for a, b in physics(Micrograph(x, image.pixel_size), table).items()
                }
            row |= physics(Micrograph(drawn[0], image.pixel_size), table, maps, image)
        if k < n_spread:
            row |= varied(model.sample(N_SPREAD, (cond, known), rng).numpy()[:, 0])
        rows.append(row)
        real.append(true)
        fake.append(drawn[0])
    return pd.DataFrame(rows), sets(folder, np.stack(real), np.stack(fake))


def sets(folder, real, fake, n_train=400):
    "Kernel distance of generated to true images with its floor, and the copying test, in features of a network with random weights."
    listed, net = list_images(folder), random_extractor()
    train = np.stack(
        [unit(read(p).data) for p in listed[listed.split == "train"].image.head(n_train)]
    )
    x, y = feature_pair(real, fake, net)
    values, floors = half_samples(x, y, lambda a, b: {"kd": kernel_distance(a, b)})
    both, seen = feature_pair(np.concatenate([real, fake]), train, net)
    chance, z = copy_test(seen, both[: len(real)], both[len(real) :])
    return {
        "kd": list(values.kd.quantile([0.5, 0.025, 0.975])),
        "kd_floor": list(floors.kd.quantile([0.5, 0.025, 0.975])),
        "kd_n": len(x) // 2,
        "copy": [chance.value, chance.low, chance.high],
        "copy_z": float(z),
    }


def learn_for(minutes, data, out, model):
    "Train by the clock; the learner, its minutes of wall and of CPU."
    wall, cpu = time.perf_counter(), time.process_time()
    first_half = replace(model, epochs=10_000, max_hours=minutes / 120)
    first = train_model(first_half, data, out, progress=False)
    epochs = max(1, round(2 * first.train_iter / len(first.dls.train)))
    second_half = replace(model, epochs=epochs, max_hours=minutes / 80)
    learn = train_model(second_half, data, out, progress=False)
    return learn, (time.perf_counter() - wall) / 60, (time.process_time() - cpu) / 60


def learn_epochs(epochs, data, out, model):
    "Train so many passes over the images; the learner, its minutes of wall and of CPU."
    wall, cpu = time.perf_counter(), time.process_time()
    learn = train_model(replace(model, epochs=epochs), data, out, progress=False)
    return learn, (time.perf_counter() - wall) / 60, (time.process_time() - cpu) / 60


def one_seed(seed, minutes, epochs, data, out, model, config, bs, counts):
    "Train and judge one seed: a dict of numbers."
    torch.set_num_threads(1)
    options = {"config": config, "bs": bs, "seed": seed}
    if model == "router":
        options = RouterModel(**options)
    else:
        options = Pix2PixModel(arch=model, **options)
    if epochs:
        learn, wall, cpu = learn_epochs(epochs, data, out, options)
    else:
        learn, wall, cpu = learn_for(minutes, data, out, options)
    steps = int(pd.read_csv(Path(out) / "history.csv").step.max())
    about = {"wall_minutes": wall, "cpu_minutes": cpu, "steps": steps, "stopped": learn.stopped}
    return judged(seed, learn.model.eval(), data, counts) | about


def judged(seed, model, data, counts):
    "The numbers of one trained seed."
    torch.set_num_threads(1)
    table, of_sets = judge(model, data, *counts)
    print(
        f"seed {seed}: SSIM {table.ssim_mean.mean():.3f}, columns {aim(table.rms_pm):.3f} pm",
        flush=True,
    )
    return {
        "seed": seed,
        "parameters": sum(p.numel() for p in model.g.parameters()),
        "scenes": table.to_dict("list"),
        "sets": of_sets,
    }


def only_judged(seed, data, out, counts):
    "Judge a run that is finished."
    return judged(seed, load_model(out), data, counts) | {
        "steps": int(pd.read_csv(Path(out) / "history.csv").step.max())
    }


def aim(v, how="rms"):
    "One number of many scenes (and seeds): root mean square, median or mean of what is finite."
    v = np.asarray(v, float)
    v = v[np.isfinite(v)]
    if not len(v):
        return np.nan
    return float(
        {"rms": lambda v: np.sqrt((v**2).mean()), "median": np.median, "mean": np.mean}[how](v)
    )


def over_scenes(statistic, *tables):
    "Value and 95 % interval of a smooth function of tables (seeds, scenes): the interval of the mean of the jackknife's pseudo-values."
    known = np.all([np.isfinite(t).any(0) for t in tables], axis=0)  # scenes that were measured
    tables = [t[:, known] for t in tables]
    value, n = statistic(*tables), int(known.sum())
    if n < 3:
        return value, np.nan, np.nan
    without = np.array([statistic(*(np.delete(t, i, 1) for t in tables)) for i in range(n)])
    pseudo = n * value - (n - 1) * without  # of a mean: the values themselves
    low, high = mean_interval(pseudo)
    return value, float(low), float(high)


def median_over_scenes(table):
    "Median and 95 % interval of a table (seeds, scenes), from the order of the scenes' own medians."
    of_scene = np.sort([np.nanmedian(v) for v in table.T if np.isfinite(v).any()])
    value, n = aim(table, "median"), len(of_scene)
    if n < 6:  # the outermost of five hold a median less often than 95 %
        return value, np.nan, np.nan
    k = int(binom.ppf(0.025, n, 0.5))  # P(fewer than k scenes below the median) < 2.5 %
    return value, min(of_scene[k - 1], value), max(of_scene[n - k], value)


# Quantity, column of the scenes, how they are averaged, unit.
ROWS = [
    ("SSIM, mean over z", "ssim_mean", "mean", "1"),
    ("SSIM, own style", "ssim_same", "mean", "1"),
    ("SSIM, any style", "ssim_draw", "mean", "1"),
    ("column error, mean over z", "mean_rms_pm", "rms", "pm rms"),
    ("column error, any style", "rms_pm", "rms", "pm rms"),
    ("column error, own style", "same_rms_pm", "rms", "pm rms"),
    ("columns found", "found", "mean", "1"),
    ("polarity right", "polarity", "mean", "1"),
    ("Φ error", "phi_deg", "median", "°"),
    ("walls found", "walls_found", "mean", "1"),
    ("wall error, median", "wall_cells", "median", "unit cells"),
    ("wall width error", "width_nm", "median", "nm"),
    ("Bragg transfer, main reflections", "bragg_main", "mean", "1"),
    ("Bragg transfer, superlattice reflections", "bragg_superlattice", "mean", "1"),
    ("spread over z, level", "sd_level", "mean", "1"),
    ("spread over z, contrast", "sd_contrast", "mean", "1"),
    ("spread over z, noise", "sd_noise", "mean", "1"),
    ("spread over z, sharpness", "sd_sharpness", "mean", "1"),
]


class Judgement(NamedTuple):
    "One quantity over the held-out scenes: value and 95 % interval of all seeds, each seed, and scans beside."

    what: str
    unit: str
    generated: tuple  # value, low, high
    each: list  # value of each seed
    scans: tuple | None  # value, low, high of a second scan, where there is one


def judgements(seeds, again):
    "Every quantity of the report."
    tables = [pd.DataFrame(s["scenes"]) for s in seeds]
    found = []
    for what, key, how, unit in ROWS:

        def one(values, how=how):
            if how == "median":
                return median_over_scenes(values)
            return over_scenes(lambda v: aim(v, how), values)

        generated = one(column(tables, key))
        each = [aim(t[key], how) for t in tables]
        scans = one(column([again], key)) if key in again else None
        found.append(Judgement(what, unit, generated, each, scans))
    return found + _ratios(tables, again)


def say(v, low, high):
    return f"{v:.3f} [{low:.3f}, {high:.3f}]"


def report(seeds, again):
    "The table as Markdown: value with its interval over scenes, each seed, and a second scan."
    lines = [
        "| held-out walls | generated [95 % over scenes] | each seed | a second scan [95 % over scenes] |",
        "|---|---|---|---|",
    ]
    for j in judgements(seeds, again):
        what = j.what if j.unit == "1" else f"{j.what}, {j.unit}"
        each = ", ".join(f"{v:.3f}" for v in j.each)
        beside = say(*j.scans) if j.scans else ""
        lines.append(f"| {what} | {say(*j.generated)} | {each} | {beside} |")
    lines.append(f"| Cramér–Rao bound of the columns, pm | {aim(again['bound_pm']):.3f} | | |")
    for s in seeds:
        k = s["sets"]
        lines.append(
            f"| seed {s['seed']}: KD(random), N = {k['kd_n']}; floor | {say(*k['kd'])}; {say(*k['kd_floor'])} | | |"
        )
        copied = f"{say(*k['copy'])}, z = {k['copy_z']:.1f}"
        lines.append(
            f"| seed {s['seed']}: further from the training set than unseen scans (0.5: as far; 0: copies) | {copied} | | |"
        )
    return "\n".join(lines)


def saved(seeds, again, counts):
    "The report as rows of the results."
    n_ssim, n_physics, n_spread = counts
    found = []
    for j in judgements(seeds, again):
        ssim = "SSIM" in j.what or "ceiling" in j.what
        n = n_ssim if ssim else n_spread if "spread" in j.what else n_physics
        cases = [("generated", *j.generated)]
        cases += [(f"seed {s['seed']}", v, np.nan, np.nan) for s, v in zip(seeds, j.each)]
        cases += [("scans", *j.scans)] if j.scans else []
        for case, value, low, high in cases:
            row = {"what": j.what, "case": case, "value": value, "unit": j.unit, "n": n}
            interval = {"low": low, "high": high} if np.isfinite(low) else {}
            found += [row | interval] if np.isfinite(value) else []
    bound = {"what": "Cramér–Rao bound of the columns", "case": "scans", "unit": "pm rms"}
    found.append(bound | {"value": aim(again["bound_pm"]), "n": n_physics})
    copied = [s["sets"]["copy"][0] for s in seeds]
    for which, value in (("lowest", min(copied)), ("highest", max(copied))):
        what = f"copying test, {which} seed"
        row = {"what": what, "case": "generated", "value": value, "unit": "1", "n": len(seeds)}
        found.append(row)
    return found


def column(frames, key):
    "(frames, scenes) of one column."
    return np.stack([f[key].to_numpy(float) for f in frames])


RATIOS = [
    ("column error over the Cramér–Rao bound, any style", "rms_pm", "bound_pm", "rms"),
    ("column error over the Cramér–Rao bound, own style", "same_rms_pm", "bound_pm", "rms"),
    ("column error over the Cramér–Rao bound, mean over z", "mean_rms_pm", "bound_pm", "rms"),
    ("share of the ceiling of a second scan, mean over z", "ssim_mean", "ssim_same", "mean"),
    ("share of the ceiling, own style", "ssim_same", "ssim_same", "mean"),
    ("share of the ceiling, any style", "ssim_draw", "ssim_draw", "mean"),
    *((f"spread over z over that of scans, {v}", f"sd_{v}", f"sd_{v}", "mean") for v in STYLE),
]


def _ratios(tables, again):
    "What is divided: errors by the bound, spread of samples by that of scans, SSIM by the ceiling."
    found = []
    for what, top, bottom, how in RATIOS:

        def ratio(a, b, how=how):
            return aim(a, how) / aim(b, how)

        known = np.isfinite(column([again], bottom)[0])
        below = column([again], bottom)[:, known]
        generated = over_scenes(ratio, column(tables, top)[:, known], below)
        each = [ratio(column([t], top)[:, known], below) for t in tables]
        scans = None
        if top == "rms_pm":
            scans = over_scenes(ratio, column([again], top)[:, known], below)
        found.append(Judgement(what, "1", generated, each, scans))
    return found


def pictures(model, data, runs, out, per_kind=("UP", "typeC", "typeD")):
    "The two stored pictures: held-out walls with their maps, and the course of training."
    recipe, shown = read_recipe(data), {}
    for scene in scenes(data, 10_000):
        if scene[3] in per_kind:
            shown.setdefault(scene[3], scene)
        if len(shown) == len(per_kind):
            break
    titles = (
        "displacement",
        "a scan",
        "a second scan",
        "generated",
        "generated, another z",
        "mean over z",
    )
    fig, axes = plt.subplots(
        len(shown),
        len(titles),
        figsize=(11, 1.95 * len(shown)),
        dpi=72,
        layout="constrained",
        squeeze=False,
    )
    for row, (label, (image, maps, table, _, index)) in zip(axes, shown.items()):
        cond = torch.from_numpy(
            condition(maps, table, image.shape, image.pixel_size, tuple(model.about["channels"]))
        )
        given = cond, model.about["vocab"].index(label)
        mean = model.sample(16, given, 0, noise=False).mean(0)[0].numpy()
        drawn = model.sample(2, given, 1).numpy()[:, 0]
        disp = cond[list(model.about["channels"]).index("disp")].numpy()
        for ax, panel, title in zip(
            row,
            (disp, unit(image.data), unit(scan_again(recipe, index)[0].data), *drawn, mean),
            titles,
        ):
            style = {"cmap": "RdBu_r", "vmin": -1, "vmax": 1} if panel is disp else {}
            show(
                panel,
                image.pixel_size,
                ax=ax,
                title=f"{label}: {title}" if panel is disp else title,
                **style,
            )
    save_picture(fig, Path(out) / "pix2pix_walls.png")
    fig, axes = plt.subplots(1, 2, figsize=(7.4, 2.7), dpi=72, layout="constrained")
    for run in runs:
        h = pd.read_csv(run / "history.csv")
        valid = h.dropna(subset=["ssim"])
        axes[0].plot(valid.step, valid.ssim, lw=1, label=run.name)
        axes[1].semilogy(h.step, h.g_l1.rolling(20, min_periods=1).mean(), lw=1)
    axes[0].set(xlabel="step", ylabel="SSIM, validation", ylim=(0.85, 1))
    axes[0].legend(fontsize=8)
    axes[1].set(xlabel="step", ylabel="L1, mean over 20 steps")
    save_picture(fig, Path(out) / "pix2pix_training.png")


def save_picture(fig, file):
    "Write a picture for the documentation."
    file.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(file)
    plt.close(fig)


# --- What the adversary is worth: the same data and seeds, equal processor time, other losses


ONLY_L1 = dict.fromkeys(WEIGHTS, 0.0) | {"l1": 1.0}
# the terms of the first results: structure, edges and spectrum beside L1
EVERY_TERM = WEIGHTS | {"adv": 0.02, "ssim": 1.0, "edge": 0.5, "spectral": 0.1}
TRAININGS = {
    "as it is": {},
    "no adversary": {"weights": {"adv": 0.0}},
    "plain U-Net + L1": {"arch": "plain", "weights": ONLY_L1},
    "plain U-Net + L1 + patch discriminator": {"arch": "plain", "weights": ONLY_L1 | {"adv": 0.01}},
    "larger discriminator": {"larger": True},
    "every term": {"weights": EVERY_TERM},
}


def option_of(training):
    "The name of a training as a word of the command line."
    return training.lower().replace(" + ", "+").replace(" ", "-")


LATE = 0.75  # share of the processor time after which the discriminator is scored


class ByProcessor(Callback):
    "Train for so many seconds of processor time; the second half of them lowers the rates to zero."

    order = 40

    def __init__(self, seconds):
        self.seconds = seconds
        self.begin = 0.0
        self.base = []  # rates to fade from

    def done(self):
        "Share of the time that is over."
        return (time.process_time() - self.begin) / self.seconds

    def before_fit(self):
        self.begin = time.process_time()
        self.base = [hyper["lr"] for hyper in self.learn.opt.hypers]

    def before_batch(self):
        scale = min(1.0, 2 * max(1 - self.done(), 0.0))
        self.learn.opt.set_hyper("lr", [lr * scale for lr in self.base])

    def after_batch(self):
        if self.done() >= 1:
            raise CancelFitException

    def before_validate(self):
        raise CancelValidException


class Watched:
    "The loss of the discriminator, which notes late in training how often it is right."

    def __init__(self, clock):
        self.clock = clock
        self.right = []  # share of patches, one number a step
        self.loss = gan_losses("lsgan")[0]

    def __call__(self, model, batch, fakes):
        real, fake = judged_both(model, batch, fakes["image"])
        if self.clock.done() > LATE:
            is_right = torch.cat(
                [real > 0.5, fake < 0.5]
            )  # least squares: 1 for a scan, 0 for a generated one
            self.right.append(float(is_right.float().mean()))
        return self.loss(real, fake)


def without_discriminator(model, batch, fakes):
    "A loss without a slope: what nothing is learned from costs no time either."
    return {"none": sum(0 * p.sum() for p in model.d.parameters())}


def train_for(seconds, dls, config, seed, arch="film", weights=None, larger=False):
    "Train one of TRAININGS: the averaged network, its steps, and the share of patches that its discriminator tells apart."
    over = {}
    if larger:
        size = CONFIGS[config]
        over = {"disc_base": 4 * size["disc_base"], "n_layers": size["n_layers"] + 1}
    learn = pix2pix_learner(dls, arch, config, weights=weights, seed=seed, **over)
    clock = ByProcessor(seconds)
    watched = Watched(clock)
    has_adversary = bool(learn.weights.get("adv"))
    learn.adversarial_trainer.d_loss = watched if has_adversary else without_discriminator
    average = EMA(500 * dls.train.bs)
    learn.train_iter = 0
    with learn.no_bar(), learn.no_logging(), random_state_kept(seed, 0):
        learn.fit(10_000, cbs=[clock, Repeat(seed), ImageIsTarget(), MustTrain(), average])
    average.apply()
    right = float(np.mean(watched.right)) if has_adversary else np.nan
    return learn.model.eval(), learn.train_iter, right


class Held(NamedTuple):
    "A scene that was not trained on, with what its scan is compared with; images in [-1, 1]."

    condition: torch.Tensor  # (C, H, W)
    label: str
    table: pd.DataFrame  # true columns
    pixel_size: tuple  # nm
    true: np.ndarray  # (H, W) its scan
    again: np.ndarray  # (H, W) a second scan of it
    moved: pd.DataFrame  # the columns of that
    noise: np.ndarray  # (H, W) of the scan: what it has beside the same scan at a dose without end


def held_scenes(folder, channels):
    "Every scene that was not trained on."
    recipe, listed, held = read_recipe(folder), list_images(folder), []
    for _, row in listed[listed.split != "train"].iterrows():
        image, stack = read(row["image"]), read(row["maps"])
        table = pd.read_parquet(row["table"])
        maps = dict(zip(stack.metadata["channels"], np.asarray(stack.data)))
        index = int(Path(row["image"]).stem)
        again, _, moved = scan_again(recipe, index)
        low, high = np.percentile(image.data, (0.01, 99.99))
        noise = (image.data - without_noise(recipe, index)) * 2 / (high - low)
        given = condition(maps, table, image.shape, image.pixel_size, channels)
        held.append(
            Held(
                torch.from_numpy(given),
                row["label"],
                table,
                image.pixel_size,
                unit(image.data),
                unit(again.data),
                moved,
                noise,
            )
        )
    return held


def without_noise(recipe, index, more=1e6):
    "The scan of a scene with its own motion, at a dose at which counting leaves no noise."
    d = sample_values(recipe, index)
    shape = (recipe.size + 2 * d.rim,) * 2
    crystal = columns(
        recipe.structure, d.fov, d.thickness_nm, origin=d.origin, rotation_deg=d.rotation_deg
    )
    tilted = mistilt(displace(crystal, d.field), d.scan.mistilt_mrad, d.scan.mistilt_deg)
    ideal = haadf(tilted, recipe.pixel_size, d.probe, shape)
    bright = replace(d.scan, dose_e_A2=more * d.scan.dose_e_A2)
    return acquire(ideal, bright, d.rng, rim=d.rim).data / more


def neighbours(noise):
    "Correlation of a pixel with the next one, mean of both directions."
    noise = noise - noise.mean()
    both = [(noise[:, 1:] * noise[:, :-1]).mean(), (noise[1:] * noise[:-1]).mean()]
    return float(np.mean(both) / (noise**2).mean())


def even(images):
    "Each image with mean 0 and standard deviation 1, as `compare` takes brightness and contrast out."
    off_mean = images - images.mean((1, 2), keepdims=True)
    return off_mean / off_mean.std((1, 2), keepdims=True)


def fine_spectrum(true, images, pixel_size):
    "Rms of log10 of the ratio of mean powers, over the upper half of the frequencies."
    a, b = (radial_spectrum(even(x), pixel_size) for x in (true, images))
    upper = a.q > a.q.max() / 2
    return log_power_distance(a.power.mean(0)[upper], b.power.mean(0)[upper])


def two_samples(true, images, n=999):
    "Kernel distance of two sets of the same scenes, and p: how often it is as large with the pairs exchanged at random."
    x, y = feature_pair(even(true), even(images), random_extractor())
    rng = np.random.default_rng(0)
    found, as_large = kernel_distance(x, y), 0
    for exchanged in rng.random((n, len(x), 1)) < 0.5:
        a, b = np.where(exchanged, y, x), np.where(exchanged, x, y)
        as_large += kernel_distance(a, b) >= found
    return found, (as_large + 1) / (n + 1)


def displacement_pm(image, table):
    "Error of the displacements, rms over the columns of an image."
    return structure_errors(image, table)["disp_rms_pm"]


def of_images(held, images, tables, n_physics, name=""):
    "SSIM, columns and displacements of images of the held-out scenes."
    true = np.stack([scene.true for scene in held])
    inside, outside, displacements = [], [], []
    for scene, image, table in zip(held[:n_physics], images, tables):
        image = Micrograph(image, scene.pixel_size)
        errors = column_errors(image, table, rim_nm=0.0)
        inside.append(rms_pm(in_rim(errors, image, rim_nm=np.inf, cut_nm=RIM_NM)))
        outside.append(rms_pm(in_rim(errors, image)))
        displacements.append(displacement_pm(image, table))
    return {
        f"SSIM{name}": (float(ssim(true, images, L=2).mean()), "1"),
        f"column error{name}": (aim(inside), "pm rms"),
        f"column error in the outer 0.25 nm{name}": (aim(outside), "pm rms"),
        f"displacement error{name}": (aim(displacements), "pm rms"),
    }


def of_rim(held, images):
    "Difference of images to the scans of their scenes: the rim beside the inside."
    found = []
    for scene, image in zip(held, images):
        pair = (Micrograph(i, scene.pixel_size) for i in (image, scene.true))
        found.append(rim_difference(*pair))
    rim, inside = np.sqrt(np.mean(np.square(found), axis=0))
    return {
        "difference to scans in the outer 0.25 nm": (rim, "1"),
        "difference to scans inside": (inside, "1"),
    }


def of_looks(held, images, noise, pairs):
    "What a set of images looks like beside the true scans."
    true = np.stack([scene.true for scene in held])
    own = np.stack([scene.noise for scene in held])
    distance, p = two_samples(true, images)
    found = {
        "noise over that of scans": (float(np.sqrt((noise**2).mean() / (own**2).mean())), "1"),
        "spectrum, upper half": (fine_spectrum(true, images, held[0].pixel_size), "log10"),
        "kernel distance to scans": (distance, "1"),
        "p of the two-sample test": (p, "1"),
    }
    if noise.any():
        found["correlation of neighbouring noise"] = (
            float(np.mean([neighbours(n) for n in noise])),
            "1",
        )
        found["correlation of what two images differ in"] = (
            float(np.mean([neighbours(a - b) for a, b in pairs])),
            "1",
        )
    return found


def judge_training(model, held, n_physics, draws_noise):
    "Every number of one training: quantity to value and unit."
    about, drawn, mean, second = model.about, [], [], []
    for number, scene in enumerate(held):
        given = scene.condition, about["vocab"].index(scene.label)
        z = torch.randn(1, model.g.z_dim, generator=torch.Generator().manual_seed(number))
        told = {"z": z if model.g.z_dim else None, "noise": draws_noise}
        drawn.append(model.sample(1, given, number, **told)[0, 0].numpy())
        second.append(model.sample(1, given, 1000 + number, **told)[0, 0].numpy())
        mean.append(model.sample(1, given, number, **told | {"noise": False})[0, 0].numpy())
    drawn, mean = np.stack(drawn), np.stack(mean)
    tables = [scene.table for scene in held]
    found = of_images(held, drawn, tables, n_physics) | of_rim(held, drawn)
    if draws_noise:
        found |= of_images(held, mean, tables, n_physics, ", noise left out")
    return found | of_looks(held, drawn, drawn - mean, list(zip(drawn, second)))


def judge_scans(held, n_physics):
    "The same numbers of second scans: what can be reached."
    again = np.stack([scene.again for scene in held])
    found = of_images(held, again, [scene.moved for scene in held], n_physics)
    found |= of_rim(held, again)
    noise = np.stack([scene.noise for scene in held])
    pairs = [(scene.true, scene.again) for scene in held]
    return found | of_looks(held, again, noise, pairs)


def judge_floor(held, n_physics):
    "What is measured in the scans themselves without their noise, and with white noise of its strength: the error of measuring."
    rng = np.random.default_rng(0)
    quiet = np.stack([scene.true - scene.noise for scene in held]).astype(np.float32)
    strength = np.array([scene.noise.std() for scene in held])[:, None, None]
    noisy = quiet + (strength * rng.standard_normal(quiet.shape)).astype(np.float32)
    tables = [scene.table for scene in held]
    return {
        "scans without noise": of_images(held, quiet, tables, n_physics),
        "scans with white noise instead": of_images(held, noisy, tables, n_physics),
    }


def adversary_rows(case, trained):
    "Mean and range over the seeds, as rows of the results."
    rows = []
    for what, (_, its_unit) in trained[0].items():
        values = [found[what][0] for found in trained if what in found]
        row = {"what": what, "case": case, "value": float(np.mean(values)), "unit": its_unit}
        if len(values) > 1:
            row |= {"low": min(values), "high": max(values)}
        rows.append(row | {"n": len(values)})
    return rows


def adversary(a, folder):
    "Train each of TRAININGS with every seed for the same processor time, and judge all on the same scenes."
    torch.set_num_threads(1)
    config = "small" if a.px <= 64 else "cpu"
    recipe = Recipe(n=300, size=a.px, pixel_size=0.03, preset="good")  # README's data
    data = build(recipe, folder / f"walls{a.px}", workers=1)
    dls = paired_dls(data, bs=8)
    for _ in dls.train:  # what the first pass makes is no part of a training
        pass
    held = held_scenes(data, tuple(dls.channels))
    setting = f"{a.px} px, {a.cpu_seconds:g} s"
    scans = adversary_rows(f"second scans, {a.px} px", [judge_scans(held, a.physics)])
    for name, numbers in judge_floor(held, a.physics).items():
        scans += adversary_rows(f"{name}, {a.px} px", [numbers])
    print(pd.DataFrame(scans)[["what", "case", "value"]].to_string(index=False), flush=True)
    trainings = {
        name: options
        for name, options in TRAININGS.items()
        if not a.trainings or option_of(name) in a.trainings
    }
    found = {name: [] for name in trainings}
    for seed in a.seeds:
        for name, options in trainings.items():
            dls = paired_dls(data, bs=8, seed=seed)
            model, steps, right = train_for(a.cpu_seconds, dls, config, seed, **options)
            draws_noise = name != "plain U-Net + L1"  # nothing taught it any
            numbers = judge_training(model, held, a.physics, draws_noise)
            numbers["steps"] = steps, "steps"
            if np.isfinite(right):
                numbers["discriminator right, last quarter"] = right, "1"
            found[name].append(numbers)
            shown = ", ".join(f"{what} {value:.4g}" for what, (value, _) in numbers.items())
            print(f"seed {seed}, {name}: {shown}", flush=True)
        rows = scans.copy()
        for name, trained in found.items():
            rows += adversary_rows(f"{name}, {setting}", trained)
        if a.save:  # after each seed: n says how many
            write("pix2pix", rows)
    print(pd.DataFrame(rows).drop(columns=["unit"]).to_string(index=False))


def main():
    ask = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ask.add_argument("--part", default="walls", choices=("walls", "adversary"))
    ask.add_argument("--px", type=int, default=64, choices=(64, 128), help="of the part adversary")
    ask.add_argument(
        "--cpu-seconds", type=float, default=60, help="of each training of the part adversary"
    )
    ask.add_argument(
        "--physics",
        type=int,
        default=16,
        help="scenes of the part adversary whose columns are measured",
    )
    ask.add_argument(
        "--trainings",
        nargs="+",
        choices=list(map(option_of, TRAININGS)),
        help="of the part adversary; default: all",
    )
    ask.add_argument("--minutes", type=float, default=12, help="of training, for each seed")
    ask.add_argument(
        "--epochs", type=int, help="passes over the training images, instead of minutes"
    )
    ask.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    ask.add_argument("--processes", type=int, default=1, help="seeds at once, one core each")
    ask.add_argument("--size", type=int, default=128, help="pixels along each side")
    ask.add_argument("--pixel-size", type=float, default=0.025, help="nm")
    ask.add_argument("--walls", nargs="+", default=["UP", "DN", "typeA", "typeC", "typeD"])
    ask.add_argument("--n", type=int, default=1000, help="simulated images")
    ask.add_argument("--model", default="film", choices=("film", "attention", "router", "plain"))
    ask.add_argument("--config", default="cpu", choices=("small", "cpu", "full"))
    ask.add_argument("--bs", type=int, default=8)
    ask.add_argument(
        "--judge",
        type=int,
        nargs=3,
        default=(80, 24, 8),
        help="test scenes for SSIM, for physics, and for spread",
    )
    ask.add_argument("--judge-only", action="store_true", help="judge the runs that --keep holds")
    ask.add_argument("--pictures", help="folder for the two pictures of the documentation")
    ask.add_argument("--quick", action="store_true")
    ask.add_argument("--keep", help="folder for data and runs; default: thrown away")
    ask.add_argument("--out", default="pix2pix.json")
    ask.add_argument("--save", action="store_true", help="put the results into benchmarks/results")
    a = ask.parse_args()
    if a.quick:
        a.minutes, a.seeds, a.size, a.pixel_size, a.n, a.config, a.judge = (
            1,
            [0],
            64,
            0.03,
            100,
            "small",
            (10, 4, 2),
        )
    with TemporaryDirectory() as tmp:
        (adversary if a.part == "adversary" else run)(a, Path(a.keep or tmp))


def run(a, folder):
    recipe = Recipe(
        walls=tuple(a.walls),
        n=a.n,
        size=a.size,
        pixel_size=a.pixel_size,
        preset="good",
        splits=(0.87, 0.03, 0.1),
        seed=11,
    )
    data = (
        folder / "walls" if a.judge_only else build(recipe, folder / "walls", workers=a.processes)
    )
    runs = [folder / f"seed{s}" for s in a.seeds]
    with ProcessPoolExecutor(a.processes, mp_context=get_context("spawn")) as pool:
        scans = pool.submit(repeat_scans, data, *a.judge)
        if a.judge_only:
            jobs = [pool.submit(only_judged, s, data, r, a.judge) for s, r in zip(a.seeds, runs)]
        else:
            settings = a.model, a.config, a.bs, a.judge
            jobs = [
                pool.submit(one_seed, s, a.minutes, a.epochs, data, r, *settings)
                for s, r in zip(a.seeds, runs)
            ]
        again, seeds = scans.result(), [job.result() for job in jobs]
    print(
        f"a second scan: SSIM {again.ssim_same.mean():.3f}, bound {aim(again.bound_pm):.2f} pm",
        flush=True,
    )
    where = "GPU" if torch.cuda.is_available() else f"CPU, 1 thread a seed, {os.cpu_count()} cores"
    found = {
        "settings": vars(a),
        "machine": where,
        "second_scan": again.to_dict("list"),
        "seeds": seeds,
    }
    Path(a.out).write_text(json.dumps(found, indent=1))
    print(
        f"\n{a.model}, {a.config} ({seeds[0]['parameters']:,} parameters of the generator), {a.size} px of {a.pixel_size} nm, {where}; "
        f"steps {[s['steps'] for s in seeds]}, minutes {[round(s.get('wall_minutes', np.nan), 1) for s in seeds]}\n"
    )
    print(report(seeds, again))
    if a.save:
        write("pix2pix", saved(seeds, again, a.judge))
    if a.pictures:
        pictures(load_model(runs[0]), data, runs, a.pictures)


if __name__ == "__main__":
    main()
