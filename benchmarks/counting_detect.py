"""Detection and sizing: F1, centre F1, bias of the diameter, time.

    python benchmarks/counting_detect.py [--quick] [--data FOLDER]
    python benchmarks/counting_detect.py --scenes [--quick]
    python benchmarks/counting_detect.py --leave-one-out [--data FOLDER]

FOLDER holds particles/sem and particles/catalysts (default: the environment variable MICROGEN_TEST_DATA); without it
only the simulated part runs. One setting, `Detector()`, for all images.

--scenes: a table of images of `sem.scene`: particles alone, in pairs, in clusters of five, and every preset. True are the
masks of particles whose signal-to-noise ratio is at least 5 (Rose 1948); a fainter one that is found is neither right nor wrong.
Diameters are those of particles that lie in the frame and are seen nearly whole.

--leave-one-out: the defaults were chosen with these SEM images in sight. Here five thresholds, each lowered and raised in
turn, are chosen anew on all images but one, and the one left out is counted with the choice.
"""

import argparse
import os
import time
from pathlib import Path

import numpy as np
from results import write
from scipy import ndimage as ndi
from scipy.optimize import linear_sum_assignment

from microgen.count import neighbour
from microgen.count.detect import Detector, detect
from microgen.sem.preset import PRESETS, Scene, scene_preset
from microgen.sem.scene import simulate_scene


def matched(truth, label, iou=0.5):
    "Pairs (true, found) of masks that overlap by more than `iou`."
    n, m = truth.max() + 1, label.max() + 1
    both = (
        np.bincount((truth.astype(np.int64) * m + label).ravel(), minlength=n * m)
        .reshape(n, m)
        .astype(float)
    )
    j = both / np.maximum(both.sum(1, keepdims=True) + both.sum(0, keepdims=True) - both, 1)
    return np.argwhere(j[1:, 1:] > iou)


def centred(boxes, y, x):
    "Pairs (box, found): each centre in at most one box, each box with at most one centre."
    if not len(y):
        return np.zeros((0, 2), int)
    dy, dx = y[None] - boxes[:, :1], x[None] - boxes[:, 1:2]
    inside = (np.abs(dy) <= boxes[:, 2:3] / 2) & (np.abs(dx) <= boxes[:, 3:4] / 2)
    i, j = linear_sum_assignment(np.where(inside, np.hypot(dy, dx), 1e6))
    return np.stack([i, j], 1)[inside[i, j]]


def discs(seed, shape=(512, 512), n=125, median=14.0, gsd=1.45, touching=0, electrons=40, blur=1.0):
    "A textured ground with bright-rimmed discs, touching in pairs where asked: image, label, diameters in px."
    rng = np.random.default_rng(seed)
    yy, xx = np.mgrid[: shape[0], : shape[1]]
    rows, tries = [], 0
    while len(rows) < n and tries < 200 * n:
        tries += 1
        r = 0.5 * median * gsd ** rng.normal()
        if r < 2.5:
            continue
        pair = touching and rows and len(rows) % 2
        if pair:
            a = rng.uniform(0, 2 * np.pi)
            y, x = (
                rows[-1][0] + (rows[-1][2] + r) * np.sin(a),
                rows[-1][1] + (rows[-1][2] + r) * np.cos(a),
            )
        else:
            y, x = (rng.uniform(r + 2, s - r - 2) for s in shape)
        if not (r < y < shape[0] - r and r < x < shape[1] - r):
            continue
        others = rows[:-1] if pair else rows
        if all(np.hypot(y - b, x - c) > r + d + 4 for b, c, d in others):
            rows.append((y, x, r))
    label, image = (
        np.zeros(shape, int),
        0.35 + 0.03 * ndi.gaussian_filter(rng.normal(size=shape), 6) * 20,
    )
    for k, (y, x, r) in enumerate(rows, 1):
        d = np.hypot(yy - y, xx - x)
        cover = np.clip(r - d + 0.5, 0, 1)
        image = image * (1 - cover) + cover * (0.75 + 0.25 * np.exp(-(r - d) / 2).clip(0, 1))
        label[cover > 0.5] = k
    image = rng.poisson(electrons * np.clip(ndi.gaussian_filter(image, blur), 0, None)) / electrons
    return image.astype(np.float32), label, 2 * np.array([r for *_, r in rows])


def report(name, images):
    "One line per image and the pooled line; F1 of each image, F1 and deviation of the median diameter of all, %."
    tp = n_true = n_found = 0
    ratios, each = [], []
    for tag, image, label, diameter in images:
        found = detect(image)
        pairs = matched(label, found.labels)
        t, f = label.max(), len(found.particles)
        ratio = found.particles["diameter_px"].to_numpy()[pairs[:, 1]] / diameter[pairs[:, 0]]
        tp, n_true, n_found, ratios = tp + len(pairs), n_true + t, n_found + f, [*ratios, *ratio]
        each.append(2 * len(pairs) / max(t + f, 1))
        print(
            f"{name:10} {tag:12} true {t:4d} found {f:4d} F1 {2 * len(pairs) / max(t + f, 1):.3f} diameter {100 * (np.median(ratio) - 1) if len(ratio) else 0:+.1f} % "
            f"{found.summary['polarity']} {found.summary['support']}",
            flush=True,
        )
    print(
        f"{name:10} {'POOLED':12} true {n_true:4d} found {n_found:4d} F1 {2 * tp / max(n_true + n_found, 1):.3f} median diameter {100 * (np.median(ratios) - 1):+.2f} %\n",
        flush=True,
    )
    return each, 2 * tp / max(n_true + n_found, 1), 100 * (np.median(ratios) - 1)


def saved(case, n, f1, off=None):
    "F1 and, where it is known, deviation of the median diameter as rows of the results."
    rows = [{"what": "F1", "case": case, "value": f1, "unit": "1", "n": n}]
    if off is not None:
        what = "median diameter, deviation"
        rows.append({"what": what, "case": case, "value": off, "unit": "%", "n": n})
    return rows


def sem(folder):
    from skimage.io import imread

    for p in sorted((folder / "images").glob("*.png")):
        label = imread(folder / "masks" / p.name).astype(int)
        yield (
            p.stem,
            imread(p)[..., :3],
            label,
            2 * np.sqrt(np.bincount(label.ravel(), minlength=label.max() + 1)[1:] / np.pi),
        )


def catalysts(folder):
    "One line per image and the pooled line; number of images and pooled centre F1."
    from skimage.io import imread

    tp = n_true = n_found = n_images = 0
    for p in sorted((folder / "images").glob("*.jpg")):
        image = imread(p)
        high, wide = image.shape[:2]
        b = np.loadtxt(folder / "labels" / f"{p.stem}.txt")[:, [2, 1, 4, 3]] * [
            high,
            wide,
            high,
            wide,
        ]
        b = b[(b[:, 2] > 0) & (b[:, 3] > 0)]
        found = detect(image)
        pairs, f = (
            centred(b, found.particles["y_px"].to_numpy(), found.particles["x_px"].to_numpy()),
            len(found.particles),
        )
        tp, n_true, n_found = tp + len(pairs), n_true + len(b), n_found + f
        n_images += 1
        print(
            f"{'catalyst':10} {p.stem:12} true {len(b):4d} found {f:4d} centre F1 {2 * len(pairs) / max(len(b) + f, 1):.3f} {found.summary['polarity']} {found.summary['support']}",
            flush=True,
        )
    print(
        f"{'catalyst':10} {'POOLED':12} true {n_true:4d} found {n_found:4d} centre F1 {2 * tp / max(n_true + n_found, 1):.3f}\n",
        flush=True,
    )
    return n_images, 2 * tp / max(n_true + n_found, 1)


GRID = dict(
    accept=(0.3, 0.5),
    ray_quantile=(0.2, 0.4),
    roundness=(2.0, 4.0),
    overlap=(0.25, 0.45),
    hidden=(0.1875, 0.3125),
)


def with_setting(image, hidden=neighbour._HIDDEN, **setting):
    "Detection with a setting, and with the share of an outline that one neighbour may hide."
    usual, neighbour._HIDDEN = neighbour._HIDDEN, hidden
    try:
        return detect(image, None, Detector(**setting))
    finally:
        neighbour._HIDDEN = usual


def leave_one_out(folder):
    "F1 of each image with the setting that is best on the others."
    settings = [{}, *({k: v} for k, values in GRID.items() for v in values)]
    names, count = [], []  # pairs and particles, (image, setting, 2)
    for name, image, label, _ in sem(folder):
        found = [with_setting(image, **s) for s in settings]
        names.append(name)
        count.append(
            [(len(matched(label, f.labels)), label.max() + len(f.particles)) for f in found]
        )
    count = np.array(count)
    best = [np.delete(count, i, 0).sum(0) for i in range(len(names))]
    best = [int((2 * b[:, 0] / b[:, 1]).argmax()) for b in best]
    held = np.array([count[i, b] for i, b in enumerate(best)])
    for name, b, (pairs, both), (own, total) in zip(names, best, held, count[:, 0]):
        print(
            f"{'held out':10} {name:12} F1 {2 * pairs / both:.3f} with {settings[b] or 'the defaults'} (defaults: {2 * own / total:.3f})"
        )

    def f1(c):
        return 2 * c[..., 0] / c[..., 1]

    print(
        f"{'held out':10} {'POOLED':12} F1 {f1(held.sum(0)):.3f}, worst {f1(held).min():.3f}; "
        f"defaults {f1(count[:, 0].sum(0)):.3f}; settings between {f1(count.sum(0)).min():.3f} and {f1(count.sum(0)).max():.3f}\n",
        flush=True,
    )


SCENES = {
    "alone": Scene(size=512),
    "in pairs": Scene(size=512, clustering=1.0, cluster_size=2.0),
    "clusters of five": Scene(size=512, clustering=1.0, cluster_size=5.0),
} | {name: scene_preset(name, size=512) for name in PRESETS}


def scored(scene, seed):
    "Right ones, true ones, found ones, and found over true diameters, of one simulated image."
    s = simulate_scene(scene, seed)
    found, t = detect(s.image), s.table
    i, j = matched(s.labels, found.labels).T
    bright, whole = (t.snr >= 5).to_numpy(), (t.visible > 0.9).to_numpy()
    ratio = found.particles["diameter_nm"].to_numpy()[j] / t.diameter_nm.to_numpy()[i]
    return (
        bright[i].sum(),
        (bright & (t.area_px > 0)).sum(),
        len(found.particles) - (~bright[i]).sum(),
        ratio[bright[i] & whole[i]],
    )


def scenes(n):
    "Table in Markdown of n images of each kind of scene; the same as rows of the results."
    rows = []
    print(
        "| scene of `sem.scene`, 512 x 512 | true | found | F1 | of single images | median diameter |\n|---|---|---|---|---|---|"
    )
    for name, scene in SCENES.items():
        right, true, found, ratios = zip(*(scored(scene, seed) for seed in range(n)))
        each = 2 * np.array(right) / np.maximum(np.add(true, found), 1)
        ratio = np.concatenate(ratios)
        off = f"{100 * (np.median(ratio) - 1):+.1f} %" if len(ratio) else "none found"
        print(
            f"| {name} | {sum(true)} | {sum(found)} | {2 * sum(right) / max(sum(true) + sum(found), 1):.3f} | {each.min():.2f} to {each.max():.2f} | {off} |",
            flush=True,
        )
        f1 = 2 * sum(right) / max(sum(true) + sum(found), 1)
        count = {"case": name, "unit": "particles", "n": n}
        rows.append(count | {"what": "true particles", "value": sum(true)})
        rows.append(count | {"what": "found particles", "value": sum(found)})
        judged = saved(name, n, f1, 100 * (np.median(ratio) - 1) if len(ratio) else None)
        judged[0] |= {"low": each.min(), "high": each.max()}
        rows += judged
    return rows


def main():
    a = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    a.add_argument("--quick", action="store_true", help="simulated images only, two of each")
    a.add_argument("--scenes", action="store_true", help="images of sem.scene only")
    a.add_argument("--leave-one-out", action="store_true", help="real SEM images only")
    a.add_argument(
        "--save",
        action="store_true",
        help="put the results into benchmarks/results (not with --leave-one-out)",
    )
    a.add_argument("--data", default=os.environ.get("MICROGEN_TEST_DATA"))
    a = a.parse_args()
    if a.leave_one_out:
        if not a.data:
            raise SystemExit(
                "--leave-one-out needs real images: give --data or set MICROGEN_TEST_DATA."
            )
        return leave_one_out(Path(a.data) / "particles" / "sem")
    n = 2 if a.quick else 6
    if a.scenes:
        rows = scenes(n)
        if a.save:
            write("counting_scenes", rows)
        return
    isolated = report("isolated", ((f"seed {s}", *discs(s)) for s in range(n)))
    touching = report("touching", ((f"seed {s}", *discs(100 + s, touching=1)) for s in range(n)))
    rows = saved("isolated discs, simulated", n, *isolated[1:])
    rows += saved("touching discs, simulated", n, *touching[1:])
    image, label, _ = discs(7, (1024, 1024), 500)
    times = []
    for _ in range(3):
        t, c = time.perf_counter(), time.process_time()
        found = detect(image)
        times.append((time.perf_counter() - t, time.process_time() - c))
    wall, cpu = min(times)[0], min(t[1] for t in times)
    print(
        f"1024 x 1024, {label.max()} particles, {len(found.particles)} found: {wall:.2f} s wall, {cpu:.2f} s CPU\n",
        flush=True,
    )
    spent = {"case": "1024 × 1024, 500 particles", "unit": "s", "n": len(times)}
    rows.append(spent | {"what": "time, wall", "value": wall})
    rows.append(spent | {"what": "time, processor", "value": cpu})
    if a.data and not a.quick:
        each, pooled, off = report("sem", sem(Path(a.data) / "particles" / "sem"))
        rows += saved("published SEM images, pooled", len(each), pooled, off)
        rows += saved("published SEM images, worst", len(each), min(each))
        n_images, f1 = catalysts(Path(a.data) / "particles" / "catalysts")
        row = {"what": "centre F1", "case": "catalysts in TEM and STEM, pooled", "unit": "1"}
        rows.append(row | {"value": f1, "n": n_images})
    if a.save:
        write("counting", rows)


if __name__ == "__main__":
    main()
