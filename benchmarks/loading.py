"""How many paired images a second one core reads from disk, against a plain PyTorch loop over the same files.

    python benchmarks/loading.py             # about two minutes
    python benchmarks/loading.py --quick     # few images

A dataset of domain walls is simulated into a temporary folder. The plain loop is a `torch.utils.data.DataLoader` whose
dataset reads an image and its maps with tifffile and scales the image; it makes no condition, mirrors nothing and reads no
table. The loaders give conditions, focus and class beside the image, mirror and turn. Both work in one process, one
thread, in turns of an epoch, so that a change of the machine's load meets both; the rate is that of the median of
processor seconds.
"""

import argparse
import os
import shutil
import tempfile
import time
import warnings
from pathlib import Path

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
warnings.filterwarnings("ignore")

import numpy as np
import tifffile
import torch
from results import write

from microgen.data.build import build
from microgen.data.cache import CACHE
from microgen.data.files import list_images
from microgen.data.load import paired_dls
from microgen.kinds.walls.recipe import Recipe

AIM = "≥ 500"  # images per second of one core, from disk


class Plain(torch.utils.data.Dataset):
    "Images and their maps, as anybody would read them."

    def __init__(self, folder):
        self.listed = list_images(folder).query("split == 'train'")

    def __len__(self):
        return len(self.listed)

    def __getitem__(self, i):
        row = self.listed.iloc[i]
        image = tifffile.imread(row["image"]).astype(np.float32)
        maps = tifffile.imread(row["maps"]).astype(np.float32)
        low, high = image.min(), image.max()
        scaled = (image - low) * (2 / (high - low)) - 1
        return torch.from_numpy(maps), torch.from_numpy(scaled[None])


def seconds_of(call):
    "Processor seconds of a call, and what it gives."
    begun = time.process_time()
    given = call()
    return time.process_time() - begun, given


def epoch(loader):
    "Read everything once; the number of images."
    return sum(len(batch[-1]) for batch in loader)


def rates(loaders, repeats):
    "Images a second of each loader: median, and a 95 % interval by resampling the epochs."
    seconds = {name: [] for name in loaders}
    for loader in loaders.values():
        epoch(loader)  # files into the memory of the system, which meets all of them
    for _ in range(repeats):
        for name, loader in loaders.items():
            took, n = seconds_of(lambda: epoch(loader))
            seconds[name].append(took / n)
    rng = np.random.default_rng(0)
    rows = {}
    for name, each in seconds.items():
        pick = rng.integers(0, repeats, (2000, repeats))
        low, high = np.percentile(np.median(np.array(each)[pick], 1), (97.5, 2.5))
        rows[name] = 1 / np.median(each), 1 / low, 1 / high
    return rows


def measure(n, size, bs, repeats):
    "Rates and times of the start, as rows of the results."
    setting = f"{size} px, batch {bs}, four condition channels, one thread"
    with tempfile.TemporaryDirectory() as folder:
        recipe = Recipe(n=n, size=size, preset="good", splits=(0.8, 0.2, 0))
        build(recipe, Path(folder, "walls"), progress=True)
        data = Path(folder, "walls")
        common = {"bs": bs, "num_workers": 0, "device": "cpu"}

        def from_disk():
            return paired_dls(data, memory_gb=0, **common)

        first, _ = seconds_of(from_disk)
        later, dls = seconds_of(from_disk)
        kept = paired_dls(data, **common)
        plain = torch.utils.data.DataLoader(Plain(data), bs, shuffle=True, drop_last=True)
        loaders = {
            "plain loop of torch, from disk": plain,
            "paired_dls, from disk": dls.train,
            "paired_dls, in memory": kept.train,
        }
        found = rates(loaders, repeats)
        size_mb = sum(f.stat().st_size for f in (data / CACHE).rglob("*.npy")) / 1e6
        shutil.rmtree(data / CACHE)
    rows = [
        {
            "what": "images read by one core",
            "case": name,
            "value": rate,
            "low": low,
            "high": high,
            "unit": "images/s",
            "n": repeats,
            "note": setting,
        }
        for name, (rate, low, high) in found.items()
    ]
    rows[1]["aim"] = AIM
    start = {"what": "start of a loader", "unit": "ms/image", "n": n, "note": setting}
    rows.append(start | {"case": "conditions are made and kept", "value": 1e3 * first / n})
    rows.append(start | {"case": "conditions are there", "value": 1e3 * later / n})
    rows.append(
        {
            "what": "size of the kept arrays",
            "case": "images and conditions",
            "value": size_mb / n,
            "unit": "MB/image",
            "n": n,
            "note": setting,
        }
    )
    return rows


if __name__ == "__main__":
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--quick", action="store_true", help="few images and repeats")
    p.add_argument("--save", action="store_true", help="put the results into benchmarks/results")
    p.add_argument("--size", type=int, default=256)
    p.add_argument("--bs", type=int, default=16)
    o = p.parse_args()
    torch.set_num_threads(1)
    found = measure(40 if o.quick else 120, o.size, o.bs, 5 if o.quick else 15)
    for row in found:
        print(f"{row['what']:26s} {row['case']:32s} {row['value']:9.3f} {row['unit']}")
    if o.save:
        write("loading", found)
