"""Write the name of a module where the text of a notebook names another notebook's file: `12_scan.acquire.ipynb`.

Numbers change, names stay, and the site makes a link of a name. Code cells and links are left alone.

python .ci/names.py                       every notebook
python .ci/names.py nbs/12_scan.acquire.ipynb ...
"""

import re
import sys
from pathlib import Path

import nbformat

NBS = Path(__file__).resolve().parent.parent / "nbs"
FILE = re.compile(r"`\d\d_([a-z][\w.]*?)\.ipynb`")


def module_name(match, modules):
    "`scan.acquire`, `microgen.tour`; a file that is no module stays as it is."
    module = match[1]
    if module not in modules:
        return match[0]
    return f"`{module}`" if "." in module else f"`microgen.{module}`"


def main():
    "Rewrite the Markdown cells of the notebooks given, or of all."
    modules = {path.stem.partition("_")[2] for path in NBS.glob("[0-9]*.ipynb")}
    paths = [Path(name) for name in sys.argv[1:]] or sorted(NBS.rglob("*.ipynb"))
    for path in paths:
        notebook = nbformat.read(path, as_version=4)
        changed = False
        for cell in notebook.cells:
            if cell.cell_type != "markdown":
                continue
            text = FILE.sub(lambda match: module_name(match, modules), cell.source)
            changed = changed or text != cell.source
            cell.source = text
        if changed:
            nbformat.write(notebook, path)
            print(f"wrote {path}")


if __name__ == "__main__":
    main()
