"""Copy the picture that opens a tutorial from the outputs of that tutorial to nbs/images.

python .ci/first_pictures.py          copies the pictures
python .ci/first_pictures.py --check  exits with 1 when one is not what its tutorial shows
"""

import base64
import sys
from pathlib import Path

import nbformat

NBS = Path(__file__).resolve().parent.parent / "nbs"
PICTURES = {  # tutorial: the cell whose picture opens it
    "03_count_nanoparticles": "2175a5e2",
    "04_what_is_missed": "daab2b09",
    "05_from_counts_to_ecsa": "c232379d",
    "06_make_a_dataset": "0add95d7",
    "07_walls_from_maps": "d10c0556",
    "08_are_they_alike": "95c2779a",
    "09_your_own_microscope": "4da8c7a3",
    "11_first_dm4": "77933055",
}


def image_of(tutorial):
    "The file that opens a tutorial."
    name = tutorial.partition("_")[2]
    return NBS / "images" / f"{name}.png"


def picture_in(tutorial):
    "The picture among the stored outputs of its cell, as bytes."
    notebook = nbformat.read(NBS / "tutorials" / f"{tutorial}.ipynb", as_version=4)
    cell = next(c for c in notebook.cells if c.id == PICTURES[tutorial])
    stored = [o.data["image/png"] for o in cell.outputs if "image/png" in o.get("data", {})]
    return base64.b64decode(stored[-1])


def main():
    "Copy or check the pictures."
    old = []
    for tutorial in PICTURES:
        path, picture = image_of(tutorial), picture_in(tutorial)
        if not path.exists() or path.read_bytes() != picture:
            old.append(path.name)
            if "--check" not in sys.argv:
                path.write_bytes(picture)
    if old and "--check" in sys.argv:
        names = ", ".join(old)
        sys.exit(
            f"nbs/images/{names}: not what the tutorial shows; run `python .ci/first_pictures.py`"
        )
    if old:
        print("wrote", *old)


if __name__ == "__main__":
    main()
