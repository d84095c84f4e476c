"""How true are images of walls that the network never saw: pix2pix trained on simulated walls, three seeds.

    python benchmarks/pix2pix.py --quick                          # two minutes: 64 px, one minute of training a seed
    python benchmarks/pix2pix.py --minutes 12 --seeds 0 1 2 --processes 2   # 128 px on a CPU, one core a seed
    python benchmarks/pix2pix.py --minutes 60 --config full --size 256 --n 6000   # with a GPU

Data: walls of YMnO3, low-noise scans (preset "good"); every image is a geometry, a crystal and a scan of its own, so those of the
test split are unseen. The seeds change weights, order and noise; the images are the same for all. Judged is the averaged
generator, against three things: the true image; a second scan of the same scene (the same specimen, optics and settings, other
noise and other jitter: the ceiling for single draws; a mean over z is free of noise and can pass it); and the Cramér-Rao bound of
the true image's columns.
Training stops by the clock: half of the minutes at the full rate, then as many steps again while the rates fade.
"""
import argparse
import json
import os
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"): os.environ.setdefault(_name, "1")
warnings.filterwarnings("ignore")

import numpy as np
import pandas as pd
import torch

from microgen.core import Micrograph
from microgen.data.build import build, read_recipe
from microgen.data.condition import condition
from microgen.data.files import list_images, scale
from microgen.data.walls import TABLE, Recipe, draw
from microgen.gan.run import train_pix2pix
from microgen.io import read
from microgen.metrics.image import ssim
from microgen.metrics.physics import column_errors, position_bound, rms_pm, structure_errors
from microgen.scan import acquire, mistilt
from microgen.stem.crystal import columns
from microgen.stem.render import haadf
from microgen.stem.wall import displace, truth_maps

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
        yield read(row["image"]), maps, pd.read_parquet(row["table"]), row["label"], int(Path(row["image"]).stem)


def scan_again(recipe, index):
    "A second scan of one scene: same specimen, optics and settings; other motion and noise."
    d, px = draw(recipe, index), recipe.pixel_size
    shape = (recipe.size + 2 * d.rim,) * 2
    crystal = columns(recipe.structure, d.fov, d.thickness, origin=d.origin, rotation_deg=d.rotation)
    tilted = mistilt(displace(crystal, d.field), d.scan.mistilt_mrad, d.scan.mistilt_deg)
    rng = np.random.default_rng([recipe.seed, index, 1])
    seen = acquire(haadf(tilted, px, d.probe, shape), d.scan, rng, truth_maps(crystal, d.field, shape, px), tilted.table, rim=d.rim)
    t, end = seen.table[TABLE], (recipe.size - 1) * px
    inside = t.y_nm.between(0, end) & t.x_nm.between(0, end)
    return seen.image, seen.maps, t[inside].reset_index(drop=True)


def physics(image, table, maps=None):
    "Column error, and with maps polarity and wall, of one image."
    e = column_errors(image, table)
    out = {"rms_pm": rms_pm(e), "found": float(e.found.mean())}
    if maps is None: return out
    s = structure_errors(image, table, maps)
    return out | {"polarity": s["polarity_right"], "wall_cells": s.get("wall_error_nm", np.nan) / CELL_NM,
                  "walls_found": s.get("walls_found", 0) / s["walls"] if s.get("walls") else np.nan}


def repeat_scans(folder, n_ssim, n_physics):
    "What a second scan of each test scene reaches: one row per scene."
    torch.set_num_threads(1)
    recipe, rows = read_recipe(folder), []
    for k, (image, _, table, _, index) in enumerate(scenes(folder, n_ssim)):
        again, maps, moved = scan_again(recipe, index)
        row = {"ssim": float(ssim(unit(image.data)[None], unit(again.data)[None], L=2)[0])}
        if k < n_physics: row |= {"bound_pm": position_bound(image, table)} | physics(again, moved, maps)
        rows.append(row)
    return pd.DataFrame(rows)


def judge(model, folder, n_ssim, n_physics, n_z=16):
    "One row per test scene: SSIM of the mean over z and of single draws, physics of both."
    about, rows = model.about, []
    for k, (image, maps, table, label, index) in enumerate(scenes(folder, n_ssim)):
        cond = torch.from_numpy(condition(maps, table, image.shape, image.pixel_size, tuple(about["channels"])))
        known, rng = about["vocab"].index(label), np.random.default_rng([7, index])
        mean = model.sample(n_z, (cond, known), rng, noise=False).mean(0)[0].numpy()
        drawn = model.sample(2, (cond, known), rng).numpy()[:, 0]
        true = unit(image.data)
        row = {"ssim_mean": float(ssim(true[None], mean[None], L=2)[0]),
               "ssim_draw": float(ssim(np.stack([true] * 2), drawn, L=2).mean())}
        if k < n_physics:
            row |= {f"mean_{a}": b for a, b in physics(Micrograph(mean, image.pixel_size), table).items()}
            row |= physics(Micrograph(drawn[0], image.pixel_size), table, maps)
        rows.append(row)
    return pd.DataFrame(rows)


def learn_for(minutes, data, out, **settings):
    "Train by the clock; the learner, its minutes of wall and of CPU."
    wall, cpu = time.perf_counter(), time.process_time()
    first = train_pix2pix(data, out, epochs=10_000, max_hours=minutes / 120, progress=False, **settings)
    epochs = max(1, round(2 * first.train_iter / len(first.dls.train)))
    learn = train_pix2pix(data, out, epochs=epochs, max_hours=minutes / 80, progress=False, **settings)
    return learn, (time.perf_counter() - wall) / 60, (time.process_time() - cpu) / 60


def one_seed(seed, minutes, data, out, model, config, bs, n_ssim, n_physics):
    "Train and judge one seed: a dict of numbers."
    torch.set_num_threads(1)
    learn, wall, cpu = learn_for(minutes, data, out, model=model, config=config, bs=bs, seed=seed)
    table = judge(learn.model.eval(), data, n_ssim, n_physics)
    steps = pd.read_csv(Path(out) / "history.csv").step.max()
    about = {"seed": seed, "wall_minutes": wall, "cpu_minutes": cpu, "steps": int(steps), "stopped": learn.stopped,
             "parameters": sum(p.numel() for p in learn.model.g.parameters())}
    print(f"seed {seed}: {steps} steps in {wall:.1f} min ({cpu:.1f} of CPU), SSIM {table.ssim_mean.mean():.3f}", flush=True)
    return about | summary(table)


def summary(table):
    "Means over scenes; errors of position and walls as root mean square and median."
    out = {name: float(table[name].mean()) for name in table if not name.endswith(("_pm", "cells"))}
    out |= {name: float(np.sqrt((table[name] ** 2).mean())) for name in table if name.endswith("_pm")}
    if "wall_cells" in table: out["wall_cells"] = float(table.wall_cells.median())
    return out


ROWS = [("SSIM, mean over z", "ssim_mean", "ssim"), ("SSIM, single draws with noise", "ssim_draw", "ssim"),
        ("column error of the mean, rms pm", "mean_rms_pm", None), ("column error of draws, rms pm", "rms_pm", "rms_pm"),
        ("columns found, draws", "found", "found"), ("polarity right, draws", "polarity", "polarity"),
        ("walls found, draws", "walls_found", "walls_found"), ("wall error of draws, median, unit cells", "wall_cells", "wall_cells")]


def report(seeds, again):
    "The table as Markdown: mean and spread over seeds, beside a second scan."
    lines = ["| held-out walls | generated: mean ± sd over seeds | each seed | a second scan |", "|---|---|---|---|"]
    for name, key, ref in ROWS:
        v = np.array([s[key] for s in seeds])
        spread = f" ± {v.std(ddof=1):.3f}" if len(v) > 1 else ""
        beside = f"{again[ref]:.3f}" if ref else ""
        lines.append(f"| {name} | {v.mean():.3f}{spread} | {', '.join(f'{x:.3f}' for x in v)} | {beside} |")
    bound = again["bound_pm"]
    draws = np.mean([s["rms_pm"] for s in seeds])
    lines += [f"| Cramér–Rao bound of the columns, pm | {bound:.3f}; draws are at {draws / bound:.1f} times the bound | | |",
              f"| share of the ceiling, SSIM | {np.mean([s['ssim_mean'] for s in seeds]) / again['ssim']:.3f} | | |"]
    return "\n".join(lines)


def main():
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--minutes", type=float, default=12, help="of training, for each seed")
    ask.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    ask.add_argument("--processes", type=int, default=1, help="seeds at once, one core each")
    ask.add_argument("--size", type=int, default=128, help="pixels along each side")
    ask.add_argument("--pixel-size", type=float, default=0.025, help="nm")
    ask.add_argument("--walls", nargs="+", default=["UP", "DN", "typeA", "typeC", "typeD"])
    ask.add_argument("--n", type=int, default=1000, help="simulated images")
    ask.add_argument("--model", default="film", choices=("film", "attention", "router", "plain"))
    ask.add_argument("--config", default="cpu", choices=("small", "cpu", "full"))
    ask.add_argument("--bs", type=int, default=8)
    ask.add_argument("--judge", type=int, nargs=2, default=(80, 24), help="test scenes for SSIM, and for physics")
    ask.add_argument("--quick", action="store_true")
    ask.add_argument("--keep", help="folder for data and runs; default: thrown away")
    ask.add_argument("--out", default="pix2pix.json")
    a = ask.parse_args()
    if a.quick: a.minutes, a.seeds, a.size, a.pixel_size, a.n, a.config, a.judge = 1, [0], 64, 0.03, 100, "small", (10, 4)
    with TemporaryDirectory() as tmp: run(a, Path(a.keep or tmp))


def run(a, folder):
    recipe = Recipe(walls=tuple(a.walls), n=a.n, size=a.size, pixel_size=a.pixel_size, preset="good", splits=(0.87, 0.03, 0.1), seed=11)
    data = build(recipe, folder / "walls", workers=a.processes)
    again = summary(repeat_scans(data, *a.judge))
    print(f"{a.n} images; a second scan: SSIM {again['ssim']:.3f}, bound {again['bound_pm']:.2f} pm", flush=True)
    jobs = [(s, a.minutes, data, folder / f"seed{s}", a.model, a.config, a.bs, *a.judge) for s in a.seeds]
    with ProcessPoolExecutor(a.processes, mp_context=get_context("spawn")) as pool:
        seeds = [f.result() for f in [pool.submit(one_seed, *job) for job in jobs]]
    where = "GPU" if torch.cuda.is_available() else f"CPU, 1 thread a seed, {os.cpu_count()} cores"
    Path(a.out).write_text(json.dumps({"settings": vars(a), "machine": where, "second_scan": again, "seeds": seeds}, indent=1))
    print(f"\n{a.model}, {a.config} ({seeds[0]['parameters']:,} parameters of the generator), {a.size} px of {a.pixel_size} nm, {where}; "
          f"steps {[s['steps'] for s in seeds]}, minutes {[round(s['wall_minutes'], 1) for s in seeds]}\n")
    print(report(seeds, again))


if __name__ == "__main__": main()
