"""Draw nbs/images/wall.png, the picture of README.md: a simulated micrograph, its truth, and what is measured in it.

python .ci/picture.py
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from scipy.spatial import cKDTree  # noqa: E402

import microgen  # noqa: E402

SITE = Path(__file__).resolve().parent.parent / "nbs" / "images"
FOV, RANGE = 5.0, 30


def dots(ax, image, table, column, title):
    "The image, and on it every yttrium column in the colour of its displacement."
    microgen.show(image, ax=ax, title=title)
    return ax.scatter(
        table.x_nm,
        table.y_nm,
        c=table[column],
        cmap="coolwarm",
        vmin=-RANGE,
        vmax=RANGE,
        s=20,
        edgecolors="none",
    )


def main():
    "Simulate, measure, draw."
    columns = microgen.displace(
        microgen.columns(microgen.load_structure("YMnO3"), fov=(FOV, FOV)),
        microgen.wall("typeC", fov=(FOV, FOV)),
    )
    image = microgen.acquire(microgen.haadf(columns, pixel_size=0.02), "typical", rng=0)
    found = microgen.measure(image, "YMnO3").columns.query("element == 'Y'")
    truth = columns.table.query("element == 'Y' and 0 <= y_nm <= @FOV and 0 <= x_nm <= @FOV")
    near, at = cKDTree(truth[["y_nm", "x_nm"]]).query(found[["y_nm", "x_nm"]])
    same = near < 0.08  # nm, half the distance of two columns
    error = np.sqrt(np.mean((found.disp_pm.to_numpy() - truth.disp_pm.to_numpy()[at])[same] ** 2))
    fig, axes = plt.subplots(
        1, 3, figsize=(11, 3.9), dpi=100, layout="constrained", facecolor="white"
    )
    microgen.show(image, ax=axes[0], title="simulated micrograph")
    dots(axes[1], image, truth, "disp_pm", "true displacement of Y")
    marks = dots(axes[2], image, found, "disp_pm", f"measured: {error:.1f} pm rms from the truth")
    fig.colorbar(marks, ax=axes[1:], label="along c (pm)", shrink=0.85)
    SITE.mkdir(exist_ok=True)
    fig.savefig(SITE / "wall.png", pil_kwargs={"optimize": True})
    print(
        f"{same.sum()} of {len(found)} columns beside a true one, {error:.2f} pm rms; wrote {SITE.name}/wall.png, {(SITE / 'wall.png').stat().st_size / 1000:.0f} kB"
    )


if __name__ == "__main__":
    main()
