"""How fast datasets of nanoparticles are made: images of each preset in one process, and the command with all cores.

python benchmarks/particles.py [--quick] [--size 512]
"""

import argparse
import os
import tempfile
import time

import pandas as pd

from microgen.data.build import build
from microgen.kinds.particles.recipe import ParticleRecipe
from microgen.sem.preset import PRESETS


def one_process(size, n):
    "Simulate and write n images of each preset; one row each."
    for preset in PRESETS:
        recipe = ParticleRecipe(preset, n=n + 1, size=size)
        with tempfile.TemporaryDirectory() as folder:
            recipe.make(folder, n)  # warm: libraries are loaded
            wall, cpu = time.perf_counter(), time.process_time()
            for index in range(n):
                recipe.make(folder, index)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            particles = pd.DataFrame(
                [recipe.row(folder, index) for index in range(n)]
            ).particles.mean()
        yield {"preset": preset, "particles": particles, "images/s": n / wall, "per CPU-s": n / cpu}


def all_cores(size, n):
    "Build a dataset of every preset, with the start of the workers; images/s."
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        build(ParticleRecipe(tuple(PRESETS), n=n, size=size), f"{folder}/set")
        return n / (time.perf_counter() - start)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="fewer images, for continuous integration"
    )
    parser.add_argument("--size", type=int, default=512, help="pixels along each side")
    args = parser.parse_args()
    n = 3 if args.quick else 20
    print(
        pd.DataFrame(one_process(args.size, n)).to_string(
            index=False, float_format=lambda v: f"{v:.3g}"
        )
    )
    print(
        f"all presets, {os.cpu_count()} processes: {all_cores(args.size, 10 * n):.3g} images/s, start included"
    )
    print("`per CPU-s` counts all threads. On a busy machine wall times mean little.")


if __name__ == "__main__":
    main()
