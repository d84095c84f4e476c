"""What the law and site tests share: the notebooks, their exported code, and how to name a place in it."""

import ast
import configparser
import re
import subprocess
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
NBS, LIB = ROOT / "nbs", ROOT / "microgen"
FOREIGN_TO_SIMULATION = ("fastai", "diffusers")
GPL = {
    "rsciio": "gpl",
    "hyperspy": "gpl",
    "orix": "ebsd",
    "abtem": "dev",
    "py4DSTEM": "gpl",
    "exspy": "gpl",
    "kikuchipy": "ebsd",
}


def settings():
    "settings.ini as a mapping."
    config = configparser.ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


@dataclass
class Room:
    "One library notebook: its exported cells as syntax trees, its other code cells as text."

    path: Path
    module: str
    exported: list = field(default_factory=list)  # (cell id, source, tree)
    shown: list = field(default_factory=list)  # (cell id, source, tree)

    @property
    def name(self):
        return self.path.stem

    @property
    def order(self):
        return self.name.split("_")[0]

    @property
    def n_lines(self):
        return sum(len(source.strip().splitlines()) - 1 for _, source, _ in self.exported)

    @property
    def public(self):
        "Names of `__all__`, as the exported module states them."
        path = ROOT / (self.module.replace(".", "/") + ".py")
        if not path.exists():
            path = path.with_suffix("") / "__init__.py"
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
                return ast.literal_eval(node.value)
        return []

    def at(self, cell, node=None):
        "Where: notebook, cell id, and the line of code."
        if node is None:
            return f"nbs/{self.path.relative_to(NBS)} [cell {cell}]"
        source = next(s for i, s, _ in self.exported + self.shown if i == cell).splitlines()
        return f"nbs/{self.path.relative_to(NBS)} [cell {cell}] `{source[node.lineno - 1].strip()[:100]}`"


def notebooks():
    "Every notebook that is not private or generated."
    return sorted(
        p
        for p in NBS.rglob("*.ipynb")
        if not any(part.startswith((".", "_")) for part in p.relative_to(NBS).parts)
    )


def code(source):
    "The syntax tree of a cell; magics become empty lines, so that line numbers stay."
    lines = ["" if re.match(r"\s*[%!]", line) else line for line in source.splitlines()]
    return ast.parse("\n".join(lines))


def rooms():
    "The library notebooks, in order."
    out = []
    for path in sorted(NBS.glob("[0-9]*.ipynb")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a missing id is law 2's to report
            cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
        found = [
            m.group(1)
            for c in cells
            for m in [re.search(r"^#\|\s*default_exp\s+(\S+)", c.source, re.M)]
            if m
        ]
        if not found:
            continue
        room = Room(path, f"microgen.{found[0]}")
        for c in cells:
            into = room.exported if re.search(r"^#\|\s*export", c.source, re.M) else room.shown
            into.append((c.get("id", "?"), c.source, code(c.source)))
        out.append(room)
    return out


def scripts():
    "Python that is not exported from a notebook: benchmarks, packaging, CI helpers."
    return sorted([*ROOT.glob("*.py"), *ROOT.glob("benchmarks/**/*.py"), *ROOT.glob(".ci/*.py")])


def tracked():
    "Files of the project: what git tracks or would add; without git, everything that is not generated."
    try:
        run = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        names = run.stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        skip = {
            ".git",
            "_proc",
            "_docs",
            "build",
            "dist",
            "__pycache__",
            ".pytest_cache",
            ".hypothesis",
        }
        names = [
            p.relative_to(ROOT)
            for p in ROOT.rglob("*")
            if p.is_file() and not skip & set(p.relative_to(ROOT).parts)
        ]
    return [ROOT / name for name in names if (ROOT / name).exists()]


def dotted(node):
    "`np.random.rand` of a chain of attributes, '' of anything else."
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def report(found, remedy):
    "Fail with one line per place, then how to mend it."
    assert not found, "\n  " + "\n  ".join(found) + f"\nHow to mend it: {remedy}"
