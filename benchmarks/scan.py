"""How well the table of a scanned image agrees with the columns in it: motion of each preset, no noise.

    python benchmarks/scan.py           # some seconds
    python benchmarks/scan.py --save    # the same, put into benchmarks/results

Columns of Y are fitted in the scanned image, and in the still one to take off the bias of the fit. *Smooth* is drift,
flyback and distortion; *all* adds line and dwell jitter, random walk and mains.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from results import write

from microgen.scan.acquire import rim_px
from microgen.stem.crystal import columns
from microgen.stem.render import haadf
from microgen.stem.wall import displace, truth_maps, wall

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import test_scan


def specimen():
    "A wall as the tests have it: columns, ideal image, truth maps, rim in pixels."
    rim = rim_px("poor", test_scan.SHAPE, test_scan.PX)
    shape = tuple(n + 2 * rim for n in test_scan.SHAPE)
    fov = tuple(n * test_scan.PX for n in shape)
    field = wall("typeC", fov=fov)
    displaced = displace(columns("YMnO3", fov=fov, thickness=8), field)
    ideal = haadf(displaced, test_scan.PX, shape=shape)
    return displaced, ideal, truth_maps(displaced, field, shape, test_scan.PX), rim


def table_errors():
    "Rms distance per axis between table and fitted columns, as rows of the results."
    scene = specimen()
    motions = {
        "smooth motion": test_scan.SMOOTH,
        "all motion": test_scan.SMOOTH + test_scan.SHAKY,
    }
    for preset in ("good", "typical", "poor"):
        for motion, effects in motions.items():
            error, _ = test_scan.table_error_pm(scene, preset, effects)
            rms = float(np.sqrt(np.mean(error**2)))
            print(f"{preset:8} {motion:14} {rms:.3f} pm rms per axis", flush=True)
            yield {
                "what": f"table against fitted columns, {motion}",
                "case": preset,
                "value": rms,
                "unit": "pm rms",
                "n": 1,
            }


def main():
    ask = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ask.add_argument("--save", action="store_true", help="put the results into benchmarks/results")
    chosen = ask.parse_args()
    rows = list(table_errors())
    if chosen.save:
        write("scan", rows)


if __name__ == "__main__":
    main()
