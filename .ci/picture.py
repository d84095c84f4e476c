"""Draw nbs/images/wall.png, the picture of README.md: a simulated micrograph, its truth, and what is measured in it.

    python .ci/picture.py
"""
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

import microgen  # noqa: E402

SITE = Path(__file__).resolve().parent.parent / "nbs" / "images"
FOV, RANGE = 6.0, 45


def arrows(ax, image, table, column, title):
    "The image, faint, and on it every yttrium column in the colour of its displacement."
    microgen.show(image, ax=ax, title=title)
    ax.images[0].set_alpha(0.35)
    py, px = image.pixel_size
    y, x = table.y_nm / py, table.x_nm / px
    return ax.scatter(x, y, c=table[column], cmap="coolwarm", vmin=-RANGE, vmax=RANGE, s=34, edgecolors="none")


def main():
    "Simulate, measure, draw."
    columns = microgen.displace(microgen.columns(microgen.load_structure("YMnO3"), fov=(FOV, FOV)), microgen.wall("typeC", fov=(FOV, FOV)))
    image = microgen.acquire(microgen.haadf(columns, pixel_size=0.02), "typical", rng=0)
    found = microgen.measure(image, "YMnO3").columns.query("element == 'Y'")
    truth = columns.table.query("element == 'Y' and 0 <= y_nm <= @FOV and 0 <= x_nm <= @FOV")
    fig, axes = plt.subplots(1, 3, figsize=(11, 3.9), dpi=100, layout="constrained", facecolor="white")
    microgen.show(image, ax=axes[0], title="simulated micrograph")
    arrows(axes[1], image, truth, "disp_pm", "true displacement of Y")
    dots = arrows(axes[2], image, found, "disp_pm", "measured displacement of Y")
    fig.colorbar(dots, ax=axes[1:], label="along c (pm)", shrink=0.85)
    SITE.mkdir(exist_ok=True)
    fig.savefig(SITE / "wall.png", pil_kwargs={"optimize": True})
    print(f"wrote {SITE.name}/wall.png, {(SITE / 'wall.png').stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
