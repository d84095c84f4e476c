"""The laws of the package, one section each. A failure names the cell that breaks one, and how to mend it."""

import ast
import dataclasses
import filecmp
import importlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from functools import cache
from pathlib import Path

import nbformat
import pytest
from fastcore.docments import docments
from house import (
    FOREIGN_TO_SIMULATION,
    GPL,
    LIB,
    NBS,
    ROOT,
    code,
    dotted,
    notebooks,
    report,
    rooms,
    scripts,
    settings,
    tracked,
)

ROOMS = rooms()
each_room = pytest.mark.parametrize("room", ROOMS, ids=lambda r: r.name)


def run_python(text, **env):
    "Run code in a fresh interpreter that sees this checkout; its standard output."
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "", **env}
    done = subprocess.run(
        [sys.executable, "-c", text], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def imports(tree):
    "Pairs (node, absolute module) of every import statement; `from a import b` gives a and a.b."
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node, node.module
            yield from ((node, f"{node.module}.{alias.name}") for alias in node.names)


def bound(tree):
    "What each imported name of a module stands for: {'np': 'numpy', 'randn': 'torch.randn'}."
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(
                {
                    (a.asname or a.name.split(".")[0]): (
                        a.name if a.asname else a.name.split(".")[0]
                    )
                    for a in node.names
                }
            )
        elif isinstance(node, ast.ImportFrom):
            names.update(
                {
                    a.asname or a.name: f"{'.' * node.level}{node.module or ''}.{a.name}"
                    for a in node.names
                }
            )
    return names


@cache
def module_names(name):
    "Imported names of one room, over all its exported cells."
    room = next(r for r in ROOMS if r.name == name)
    return {k: v for _, _, tree in room.exported for k, v in bound(tree).items()}


def resolved(node, names):
    "The dotted name behind an expression, imports resolved: `np.random.rand` is numpy.random.rand."
    head, _, rest = dotted(node).partition(".")
    return f"{names.get(head, head)}.{rest}" if rest else names.get(head, head)


def test_there_are_rooms():
    assert len(ROOMS) >= 10, f"found only {[r.name for r in ROOMS]} in {NBS}"


# --- 1. A library notebook imports only modules of lower number

# Methods of a low room that reach up through the lazy package, at the moment of the call.
BRIDGES = {
    "microgen.core": {"microgen.plot", "microgen.io.files"}
}  # Micrograph.show, Micrograph.save


def comes_before(low, high):
    "Is `low` a module that `high` may import: of lower number, or earlier in the same folder where they share one?"
    if low.order != high.order:
        return low.order < high.order
    same_folder = low.module.rpartition(".")[0] == high.module.rpartition(".")[0]
    return same_folder and low.name < high.name


@each_room
def test_law_1_imports_flow_forward(room):
    known = {r.module: r for r in ROOMS}
    folders = {m.rsplit(".", n)[0] for m in known for n in range(1, m.count(".") + 1)}
    bridges = BRIDGES.get(room.module, ())
    found = []
    for cell, _, tree in room.exported:
        for node, module in imports(tree):
            if module.split(".")[0] != "microgen" or module in bridges:
                continue
            if module in known and not comes_before(known[module], room):
                found.append(
                    f"{room.at(cell, node)} imports {module} (number {known[module].order})"
                )
            elif (
                module not in known
                and module.rsplit(".", 1)[0] not in known
                and module not in folders | {"microgen.__version__"}
            ):
                found.append(
                    f"{room.at(cell, node)}: {module} is no module; name the one that holds it"
                )
        for node in ast.walk(tree):  # `import microgen`, then microgen.plot.show(...)
            name = dotted(node) if isinstance(node, ast.Attribute) else ""
            if name in known and name not in bridges and not comes_before(known[name], room):
                found.append(f"{room.at(cell, node)} uses {name} (number {known[name].order})")
    report(
        found,
        "move the code to a module of higher number, or patch the method onto our class where the higher one is defined.",
    )


@each_room
def test_law_1_no_private_name_crosses_a_module(room):
    found = [
        f"{room.at(cell, node)}: {alias.name}"
        for cell, _, tree in room.exported
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.name.startswith("_") and not alias.name.startswith("__")
    ]
    report(
        found, "make it public where it is defined, with its comments, or move what needs it there."
    )


# --- 2. Export and clean leave no difference; format, ids and size


def test_law_2_export_and_clean_leave_no_difference(tmp_path):
    files = [
        f
        for f in tracked()
        if f.relative_to(ROOT).parts[0] in {"nbs", "microgen"} or f.parent == ROOT
    ]
    for f in files:
        to = tmp_path / f.relative_to(ROOT)
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(f, to, follow_symlinks=False)
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
    for tool in ("nbdev_export", "nbdev_clean"):
        call = f"import sys; sys.argv=['{tool}']; from nbdev.{'doclinks' if 'export' in tool else 'clean'} import {tool}; {tool}()"
        done = subprocess.run(
            [sys.executable, "-c", call], cwd=tmp_path, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{tool} failed: {done.stderr[-2000:]}"
    ours, theirs = (
        {f.relative_to(ROOT) for f in files},
        {f.relative_to(tmp_path) for f in tmp_path.rglob("*") if f.is_file()},
    )
    generated = {
        p
        for p in theirs - ours
        if p.parts[0] in {"nbs", "microgen"} and "__pycache__" not in p.parts
    }
    found = [f"{p} is written by nbdev_export but not in the tree" for p in sorted(generated)]
    found += [
        f"{p} differs from what nbdev writes"
        for p in sorted(ours & theirs)
        if not filecmp.cmp(ROOT / p, tmp_path / p, shallow=False)
    ]
    report(
        found,
        "run nbdev_export and nbdev_clean at the top of the project and commit what they change; never edit microgen/*.py.",
    )


@pytest.mark.parametrize("words", [("check",), ("format", "--check")], ids=" ".join)
def test_law_2_ruff_leaves_no_difference(words):
    pytest.importorskip("ruff", reason="pip install ruff")
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *words, "."], cwd=ROOT, capture_output=True, text=True
    )
    report(
        done.stdout.splitlines()[-30:] if done.returncode else [],
        "run `ruff check --fix .` and `ruff format .`, then nbdev_export.",
    )


def test_law_2_every_module_comes_from_a_notebook():
    known = {ROOT / (r.module.replace(".", "/") + ".py") for r in ROOMS}
    found = [
        str(p.relative_to(ROOT))
        for p in LIB.rglob("*.py")
        if p not in known and p.name not in {"__init__.py", "_modidx.py"}
    ]
    report(found, "write it as a notebook under nbs/, or delete the leftover of a renamed one.")


@pytest.mark.parametrize("path", notebooks(), ids=lambda p: str(p.relative_to(NBS)))
def test_law_2_notebook_format(path):
    raw, where = json.loads(path.read_text(encoding="utf-8")), f"nbs/{path.relative_to(NBS)}"
    found = []
    if (raw["nbformat"], raw["nbformat_minor"]) != (4, 5):
        found.append(f"{where} is nbformat {raw['nbformat']}.{raw['nbformat_minor']}")
    ids = [c.get("id") for c in raw["cells"]]
    found += [f"{where} cell {n} has no id" for n, i in enumerate(ids) if not i]
    found += [
        f"{where} uses the cell id {i} twice"
        for i in sorted({i for i in ids if i and ids.count(i) > 1})
    ]
    if (size := path.stat().st_size) > 500_000:
        found.append(
            f"{where} has {size / 1000:.0f} kB, of which outputs {sum(len(json.dumps(c.get('outputs', []))) for c in raw['cells']) / 1000:.0f} kB"
        )
    found += [
        f"{where} [cell {c['id']}] stores the error {o['ename']}"
        for c in raw["cells"]
        for o in c.get("outputs", [])
        if o["output_type"] == "error"
    ]
    report(
        found,
        "save as nbformat 4.5 (nbdev_clean), draw at dpi 72 with at most 4 panels, run the notebook to its end.",
    )
    nbformat.validate(nbformat.from_dict(raw))


# --- 3. No star imports, no patching of foreign classes, no global random state


@each_room
def test_law_3_no_star_import(room):
    found = [
        room.at(cell, node)
        for cell, _, tree in room.exported
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and any(a.name == "*" for a in node.names)
    ]
    report(found, "name what you import.")


@each_room
def test_law_3_no_patching_of_foreign_classes(room):
    names = module_names(room.name)
    foreign = {k for k, v in names.items() if not v.startswith(("microgen", "."))}
    found = []
    for cell, _, tree in room.exported:
        for node in ast.walk(tree):
            targets = (
                node.targets
                if isinstance(node, ast.Assign)
                else [node.target]
                if isinstance(node, (ast.AugAssign, ast.AnnAssign))
                else []
            )
            found += [
                f"{room.at(cell, node)} assigns to {dotted(t)}"
                for t in targets
                if isinstance(t, ast.Attribute) and dotted(t).split(".")[0] in foreign
            ]
            if (
                isinstance(node, ast.Call)
                and dotted(node.func) == "setattr"
                and node.args
                and dotted(node.args[0]).split(".")[0] in foreign
            ):
                found.append(f"{room.at(cell, node)} sets an attribute of {dotted(node.args[0])}")
            if isinstance(node, ast.FunctionDef):
                for d in node.decorator_list:
                    kind = dotted(d.func if isinstance(d, ast.Call) else d).split(".")[-1]
                    on = (
                        (d.args[0] if kind == "patch_to" else node.args.args[0].annotation)
                        if kind in {"patch", "patch_to"}
                        else None
                    )
                    bad = (
                        [n.id for n in ast.walk(on) if isinstance(n, ast.Name) and n.id in foreign]
                        if on is not None
                        else []
                    )
                    found += [
                        f"{room.at(cell, node)} patches {n}, a class of {names[n]}" for n in bad
                    ]
    report(
        found,
        "write a function, or a class of our own; other people's classes and modules stay as they are.",
    )


SEEDED = {
    "default_rng",
    "Generator",
    "SeedSequence",
    "PCG64",
    "Philox",
    "BitGenerator",
    "RandomState",
}
TORCH_DRAWS = {
    "rand",
    "randn",
    "randint",
    "randperm",
    "normal",
    "poisson",
    "bernoulli",
    "multinomial",
    "rand_like",
    "randn_like",
    "randint_like",
}


def draws_globally(call, names):
    "Why this call uses global random state, or ''."
    name, has = resolved(call.func, names), {k.arg for k in call.keywords}
    *_, last = name.split(".")
    if name.startswith("numpy.random.") and last not in SEEDED:
        return "numpy's global generator"
    if name.startswith("random.") and last not in {"Random", "SystemRandom"}:
        return "Python's global generator"
    if name in {
        "torch.manual_seed",
        "torch.seed",
        "torch.cuda.manual_seed",
        "torch.cuda.manual_seed_all",
    } or name.startswith("torch.random."):
        return "torch's global generator"
    if name.startswith("torch.") and last in TORCH_DRAWS and "generator" not in has:
        return "torch's global generator (no generator=)"
    if (
        isinstance(call.func, ast.Attribute)
        and call.func.attr in {"normal_", "uniform_", "random_", "bernoulli_", "exponential_"}
        and "generator" not in has
    ):
        return "torch's global generator (no generator=)"
    if last == "rvs" and "random_state" not in has:
        return "scipy's global generator (no random_state=)"
    return ""


@each_room
def test_law_3_no_global_random_state(room):
    names = module_names(room.name)
    found = [
        f"{room.at(cell, node)}: {why}"
        for cell, _, tree in room.exported
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and (why := draws_globally(node, names))
    ]
    report(
        found,
        "take `rng`, make `as_rng(rng)` of it, and draw from that (or pass generator= / random_state=).",
    )


# --- 4. Import is light; simulating loads neither fastai nor diffusers

WATCH = """
import sys, importlib.abc
class Watch(importlib.abc.MetaPathFinder):
    seen = set()
    def find_spec(self, name, path=None, target=None): self.seen.add(name.split('.')[0])
sys.meta_path.insert(0, Watch())
"""


def test_law_4_import_takes_at_most_300_ms():
    text = "import time; t = time.perf_counter(); import microgen; print(time.perf_counter() - t)"
    times = [float(run_python(text)) for _ in range(7)]
    assert min(times) <= 0.3, (
        f"import microgen took {min(times):.3f} s at best of {len(times)}. How to mend it: keep microgen/__init__.py lazy."
    )


def test_law_4_import_loads_no_library():
    seen = set(run_python(WATCH + "import microgen; print(*Watch.seen)").split())
    heavy = seen & {
        "numpy",
        "torch",
        "pandas",
        "scipy",
        "skimage",
        "matplotlib",
        "pymatgen",
        "fastai",
        "diffusers",
        "dask",
        "joblib",
    }
    assert not heavy, (
        f"import microgen loads {sorted(heavy)}. How to mend it: attach names in microgen/__init__.py through lazy_loader."
    )


def test_law_4_core_needs_only_numpy():
    out = run_python(
        "import sys, microgen.core; print(*(m for m in ('torch', 'pandas', 'scipy', 'matplotlib', 'skimage', 'pymatgen') if m in sys.modules))"
    )
    assert not out.split(), (
        f"microgen.core loads {out.split()}. How to mend it: import them inside the functions that need them."
    )


def test_law_4_every_lazy_name_exists():
    out = run_python(
        "import microgen\nfor n in microgen.__all__: getattr(microgen, n)\nprint(len(microgen.__all__))"
    )
    assert int(out) >= 10


SIMULATE = """
import socket
def no_network(*a, **k): raise AssertionError('the network was used')
socket.socket.connect = socket.socket.connect_ex = no_network
import importlib
for name in %r: importlib.import_module(name)
import microgen
from microgen.stem.wall import displace
cols = microgen.columns(microgen.load_structure('YMnO3'), fov=(2, 2))
image = microgen.haadf(displace(cols, microgen.wall('UP', fov=(2, 2))), pixel_size=0.05)
microgen.acquire(image, 'typical', rng=0)
print(*Watch.seen)
"""


def test_law_4_simulation_needs_no_fastai_and_no_network():
    simulating = [r.module for r in ROOMS if r.order < "50"]
    seen = set(run_python(WATCH + SIMULATE % simulating).split()) & set(FOREIGN_TO_SIMULATION)
    assert not seen, (
        f"importing {simulating} and simulating looks for {sorted(seen)}. How to mend it: find the import and move it to a training room."
    )


# --- 5. GPL packages stay outside


@each_room
def test_law_5_gpl_only_through_require(room):
    found = []
    for cell, _, tree in room.exported:
        found += [
            f"{room.at(cell, node)} imports {module}, a GPL package"
            for node, module in imports(tree)
            if module.split(".")[0] in GPL
        ]
        inside = {
            id(n)
            for f in ast.walk(tree)
            if isinstance(f, (ast.FunctionDef, ast.Lambda))
            for n in ast.walk(f)
        }
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Call)
                and dotted(node.func).split(".")[-1] == "require"
                and id(node) not in inside
            ):
                found.append(f"{room.at(cell, node)} calls require at import")
    report(found, 'write `rsciio = require("rsciio", "gpl")` inside the function that needs it.')


def test_law_5_no_module_loads_gpl_packages():
    text = (
        WATCH
        + f"import importlib\nfor name in {[r.module for r in ROOMS]!r}: importlib.import_module(name)\nprint(*Watch.seen)"
    )
    seen = set(run_python(text).split()) & set(GPL)
    assert not seen, (
        f"importing the rooms looks for {sorted(seen)}. How to mend it: import them inside functions, through require."
    )


def test_law_5_extras_of_require_exist():
    extras = {k.removesuffix("_requirements") for k in settings() if k.endswith("_requirements")}
    packages = {re.match(r"[\w-]+", need).group() for need in settings()["requirements"].split()}
    found = []
    for room in ROOMS:
        for cell, _, tree in room.exported:
            for node in ast.walk(tree):
                if (
                    isinstance(node, ast.Call)
                    and dotted(node.func).split(".")[-1] == "require"
                    and len(node.args) == 2
                ):
                    extra = node.args[1].value if isinstance(node.args[1], ast.Constant) else None
                    # a GPL package that users bring along themselves is named as it is
                    if extra is not None and extra not in extras | packages | set(GPL):
                        found.append(
                            f"{room.at(cell, node)}: no extra {extra!r} in settings.ini ({sorted(extras)})"
                        )
    report(found, "add NAME_requirements to settings.ini, or name an extra that exists.")


def test_law_5_missing_extra_names_the_packages():
    from microgen.core import MissingExtra, require

    with pytest.raises(MissingExtra, match="pip install ncempy h5py$"):
        require("a_module_that_nobody_has", "em")


def test_law_5_core_knows_the_extras_of_settings():
    from microgen.core import EXTRAS

    cfg = settings()
    stated = {
        key.removesuffix("_requirements"): tuple(cfg[key].split())
        for key in cfg
        if key.endswith("_requirements") and key != "dev_requirements"
    }
    assert EXTRAS == stated, "write the extras of settings.ini into EXTRAS of nbs/00_core.ipynb"


# What tells somebody to install microgen from PyPI, where the name belongs to another project:
# `pip install microgen`, `pip install "microgen[em]"`, `uv add microgen`, but not `microgen @ git+https://...`
FROM_PYPI = re.compile(
    r"(pip3? install|uv add|uvx|pipx install|conda install)\s"  # a command of an installer,
    r"([^\n`|;&]*\s)?"  # its options and other packages,
    r"[\"'\\]*microgen(\[[\w,]+\])?[\"'\\]*"  # the bare name, with or without an extra,
    r"(?!\s*@)(?=[\s\"'`.,;)]|$)"  # and no address behind it
)


def test_law_5_nothing_installs_microgen_from_pypi():
    found = []
    for path in [*tracked()]:
        if path.suffix not in {".py", ".ipynb", ".md", ".yml", ".yaml", ".cff", ".ini", ""}:
            continue
        if path == Path(__file__).resolve() or not path.is_file():
            continue
        for n, line in enumerate(
            path.read_text(encoding="utf-8", errors="replace").splitlines(), 1
        ):
            place = f"{path.relative_to(ROOT)}:{n}"
            # A page may warn of it: `pip install microgen` beside the words "another project".
            warned = re.search("another project|mesh|of the same name", line)
            if len(line) < 5000 and FROM_PYPI.search(line) and not warned:
                found.append(f"{place}: {line.strip()[:100]}")
    report(
        found,
        "name the packages (`pip install ncempy h5py`), or the repository (`pip install .`): "
        "the name microgen on PyPI belongs to another project.",
    )


@pytest.mark.parametrize(
    "line, bad",
    [
        ("pip install microgen", True),
        ('pip install "microgen[em]"      # reads .dm4', True),
        ('%pip install -q "microgen[metrics]"', True),
        ("pip install -U microgen.", True),
        ('pip install -q "microgen @ git+https://github.com/o/microgen"', False),
        ("pip install . && microgen tour --out tour", False),
        ('pip install ".[em]"', False),
        ("pip install ncempy h5py", False),
    ],
)
def test_law_5_sees_an_install_from_pypi(line, bad):
    assert bool(FROM_PYPI.search(line)) is bad, line


def test_law_5_gpl_stays_out_of_the_requirements():
    cfg = settings()
    needs = " ".join(
        [
            cfg["requirements"],
            *(
                cfg[k]
                for k in cfg
                if k.endswith("_requirements") and k.split("_")[0] not in {"gpl", "dev", "ebsd"}
            ),
        ]
    )
    bad = re.findall(r"\b(rosettasciio|hyperspy|orix|abtem|py4dstem)\b", needs, re.I)
    assert not bad, (
        f"{bad} stand outside the extras gpl, ebsd and dev in settings.ini; microgen is MIT."
    )


# --- 6. No pickle, eval, shell or network

CALLS = {
    "eval": "eval runs text as code",
    "exec": "exec runs text as code",
    "os.system": "a shell",
    "os.popen": "a shell",
    "torch.load": "unpickles",
    "torch.save": "pickles",
    "joblib.load": "unpickles",
    "joblib.dump": "pickles",
    "yaml.load": "builds objects; use yaml.safe_load",
    "pandas.read_pickle": "unpickles",
    "subprocess.getoutput": "a shell",
    "__import__": "use importlib",
}
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal"}
NETWORK = {
    "urllib.request",
    "requests",
    "httpx",
    "aiohttp",
    "http.client",
    "ftplib",
    "socket",
    "pooch",
    "huggingface_hub",
}
NETWORKED = re.compile(r"download|upload|fetch|url|push|pull|hub|pretrained|serve|scheduler", re.I)


def unsafe(tree, names):
    "Pairs (node, why) of what law 6 forbids."
    for node, module in imports(tree):
        if module.split(".")[0] in MODULES:
            yield node, f"imports {module}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = resolved(node.func, names)
            if name in CALLS:
                yield node, f"{name}: {CALLS[name]}"
            if isinstance(node.func, ast.Attribute) and node.func.attr in {
                "to_pickle",
                "read_pickle",
            }:
                yield node, "pickles"
            for k in node.keywords:
                value = getattr(k.value, "value", None)
                if (k.arg, value) in {
                    ("shell", True),
                    ("allow_pickle", True),
                    ("weights_only", False),
                }:
                    yield node, f"{k.arg}={value}"


def networked(tree):
    "Imports of network modules outside a function whose name says so."
    said = {
        id(n)
        for f in ast.walk(tree)
        if isinstance(f, ast.FunctionDef) and NETWORKED.search(f.name)
        for n in ast.walk(f)
    }
    return [
        (node, f"imports {module}")
        for node, module in imports(tree)
        if id(node) not in said and any(module == m or module.startswith(m + ".") for m in NETWORK)
    ]


@each_room
def test_law_6_no_pickle_eval_shell_network(room):
    names = module_names(room.name)
    found = [
        f"{room.at(cell, node)}: {why}"
        for cell, _, tree in room.exported
        for node, why in [*unsafe(tree, names), *networked(tree)]
    ]
    report(
        found,
        "weights are safetensors, settings JSON, tables CSV or Parquet; commands are lists; network only where the name says so.",
    )


def test_law_6_holds_for_scripts():
    found = []
    for path in scripts():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found += [
            f"{path.relative_to(ROOT)}:{node.lineno}: {why}"
            for node, why in unsafe(tree, bound(tree))
        ]
    report(
        found, "weights are safetensors, settings JSON, tables CSV or Parquet; commands are lists."
    )


def test_law_6_finds_what_it_forbids():
    for text in (
        "import pickle",
        "eval('1')",
        "import torch; torch.load('x')",
        "import subprocess; subprocess.run('ls', shell=True)",
        "import numpy as np; np.load('x', allow_pickle=True)",
        "from os import system; system('ls')",
        "df.to_pickle('x')",
    ):
        tree = ast.parse(text)
        assert list(unsafe(tree, bound(tree))), f"the scan does not see: {text}"
    for text in (
        "import numpy as np; np.random.rand(3)",
        "import torch; torch.randn(3)",
        "from numpy.random import rand; rand(2)",
        "t.normal_()",
    ):
        tree = ast.parse(text)
        assert any(
            draws_globally(n, bound(tree)) for n in ast.walk(tree) if isinstance(n, ast.Call)
        ), f"the scan does not see: {text}"
    assert networked(ast.parse("def read():\n    import requests")) and not networked(
        ast.parse("def download():\n    import requests")
    )


# --- 7. Documented parameters and returns


def documented(obj):
    "What is missing in the documentation of one function or class."
    doc = (inspect.getdoc(obj) or "").strip()
    if not doc or doc.startswith(
        f"{obj.__name__}("
    ):  # a dataclass without a docstring repeats its signature
        yield "no docstring"
    silent = {"self", "cls"} | (
        {"return"} if inspect.isclass(obj) or returns_nothing(obj) else set()
    )
    try:
        parameters = docments(obj, full=True, args_kwargs=True)
    except ValueError:  # fastcore compares defaults with ==
        yield "a default that is an array, which nbdev cannot show: write None and make it inside"
        return
    inherited = comments_of_parents(obj)  # a dataclass has the fields of its parents
    for name, d in parameters.items():
        if name not in silent and not (d.docment or inherited.get(name) or "").strip():
            yield "no comment on what it returns" if name == "return" else f"no comment on {name}"


def comments_of_parents(obj):
    "Comments of the fields that a dataclass has from its parents."
    if not dataclasses.is_dataclass(obj):
        return {}
    parents = [base for base in obj.__mro__[1:] if dataclasses.is_dataclass(base)]
    return {name: c for base in reversed(parents) for name, c in docments(base).items() if c}


def returns_nothing(function):
    "Is the function annotated `-> None`, or without any `return value` or `yield`?"
    stated = inspect.signature(function).return_annotation
    if stated is not inspect.Signature.empty:
        return stated in (None, "None")
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    return not any(
        isinstance(n, (ast.Yield, ast.YieldFrom))
        or isinstance(n, ast.Return)
        and n.value is not None
        for n in ast.walk(tree)
    )


def public_objects(room):
    "Public functions, classes and methods of a room: (label, function or class, is it a property?)."
    module = importlib.import_module(room.module)
    for name in room.public:
        obj = getattr(module, name)
        if inspect.isfunction(obj):
            yield name, obj, False
        if not inspect.isclass(obj):
            continue
        if dataclasses.is_dataclass(obj) or "__init__" in vars(obj):
            yield name, obj, False
        for n, m in vars(obj).items():
            kind = isinstance(m, property)
            m = m.__func__ if isinstance(m, (classmethod, staticmethod)) else m.fget if kind else m
            inherited = any(
                hasattr(base, n) for base in obj.__mro__[1:]
            )  # said once, where it is first defined
            if (
                not n.startswith("_")
                and inspect.isfunction(m)
                and m.__module__.startswith("microgen")
                and not inherited
            ):
                yield f"{name}.{n}", m, kind


@each_room
def test_law_7_every_public_function_is_documented(room):
    found = sorted(
        {
            f"{room.module}.{label}: {what}"
            for label, obj, is_property in public_objects(room)
            for what in documented(obj)
            if not is_property or what == "no docstring"
        }
    )
    report(
        found,
        "one parameter a line, each with a comment that gives its shape and unit; `) -> float: # what it returns, nm` "
        "(the site shows the comment on a return value only beside an annotation); a one-line docstring.",
    )


@each_room
def test_law_7_comments_hold_no_backticks(room):
    found = []
    for cell, source, _ in room.exported:
        for line in source.splitlines():
            comment = re.search(r"[,(:=)\w]\s+# (.*)$", line)
            if comment and "`" in comment.group(1):
                found.append(f"{room.at(cell)} `{line.strip()[:90]}`")
    report(
        found,
        "write the name without backticks: the comment stands inside the signature on the site, where no mark-up is read.",
    )


@each_room
def test_law_7_raises_is_written(room):
    found = []
    for cell, _, tree in room.exported:
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                own = [n for n in ast.walk(node) if isinstance(n, ast.Raise) and n.exc is not None]
                if own and "Raises:" not in (ast.get_docstring(node) or ""):
                    found.append(f"{room.at(cell, node)} raises, its docstring does not say so")
    report(found, "add a line `Raises: InputError if ...` to the docstring.")


# --- 8. Every exported name is used by an assertion in its own notebook


def is_assertion(node):
    "An assert statement, a call of a test_* or assert_* function, or a with-block that expects an error."
    if isinstance(node, ast.Assert):
        return True
    if isinstance(node, ast.With):
        return any(
            "Expected" in dotted(i.context_expr.func) or "raises" in dotted(i.context_expr.func)
            for i in node.items
            if isinstance(i.context_expr, ast.Call)
        )
    call = node.value if isinstance(node, ast.Expr) else None
    return isinstance(call, ast.Call) and bool(
        re.match(
            r"_?(test_|assert_|allclose|check_grad|gradcheck)", dotted(call.func).split(".")[-1]
        )
    )


def names_in(*nodes):
    "Every name and attribute that a piece of code mentions."
    walked = [n for node in nodes for n in ast.walk(node)]
    return {n.id for n in walked if isinstance(n, ast.Name)} | {
        n.attr for n in walked if isinstance(n, ast.Attribute)
    }


def asserted(trees):
    "Names that an assertion depends on, through assignments, loops and helper functions of the notebook."
    feeds, used = [], set()
    for tree in trees:
        for node in ast.walk(tree):
            if is_assertion(node):
                used |= names_in(node)
            elif (
                isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.NamedExpr))
                and node.value is not None
            ):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                feeds.append((names_in(*targets), names_in(node.value)))
            elif isinstance(node, (ast.For, ast.comprehension)):
                feeds.append((names_in(node.target), names_in(node.iter)))
            elif isinstance(node, ast.With):
                feeds.append(
                    (
                        set().union(
                            *(names_in(i.optional_vars) for i in node.items if i.optional_vars)
                        ),
                        names_in(*(i.context_expr for i in node.items)),
                    )
                )
            elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                feeds.append(({node.name}, names_in(node)))
    while True:
        more = set().union(*(needs for made, needs in feeds if made & used)) - used
        if not more:
            return used
        used |= more


def commands(room):
    "Functions that a test calls by name, on the command line."
    return {
        node.name
        for _, _, tree in room.exported
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        and any(
            dotted(d.func if isinstance(d, ast.Call) else d).split(".")[-1] == "command"
            for d in node.decorator_list
        )
    }


@each_room
def test_law_8_every_exported_name_is_asserted(room):
    trees = [tree for _, _, tree in room.shown]
    words = {
        n.value
        for tree in trees
        for n in ast.walk(tree)
        if isinstance(n, ast.Constant) and isinstance(n.value, str)
    }
    missing = sorted(
        set(room.public)
        - asserted(trees)
        - (commands(room) & {w for text in words for w in text.split()})
    )
    report(
        [f"nbs/{room.path.name}: {name}" for name in missing],
        "add an assertion that uses it to the notebook, or make it private (_name).",
    )


def test_law_8_sees_through_assignments():
    assert asserted([code("x = make()\ny = x.sum()\nassert y > 0\nshow(z)")]) >= {"make", "x", "y"}
    assert "show" not in asserted([code("show(z)\nassert 1")])


# --- 9. What is general names no kind of image

GENERAL = ("data", "train", "nets", "gan", "diffusion", "metrics", "models", "enough")
PARTICULAR = ("stem", "sem", "ebsd", "count", "kinds")
KIND_WORDS = re.compile(
    r"(?<![a-z])(wall|particle|grain|atom)s?(?![a-z])", re.I
)  # a column is one of a table too


@each_room
def test_law_9_what_is_general_names_no_kind(room):
    if room.module.split(".")[1] not in GENERAL:
        return
    found = []
    for cell, source, tree in room.exported:
        for node, module in imports(tree):
            if module.startswith("microgen.") and module.split(".")[1] in PARTICULAR:
                found.append(f"{room.at(cell, node)} imports {module}")
        for line in source.splitlines():
            if m := KIND_WORDS.search(line):
                found.append(f"{room.at(cell)} says {m[0]!r}: `{line.strip()[:90]}`")
    report(
        found,
        "ask the kind (microgen.kind.Kind) for what is particular; say it there, not in what all kinds share.",
    )


# --- Habits: nothing private in the project


def private_paths():
    "Absolute paths of this machine that must not stand in the project."
    here = {str(ROOT), str(Path.home()), sys.prefix} | (
        {str(ROOT.parent)} if len(ROOT.parts) > 2 else set()
    )
    return [
        re.escape(p) + r"\b"
        for p in here
        if len(p) > 3 and p not in {"/root", "/usr", "/usr/local"}
    ] + [r"/home/[a-z]\w+/", r"/Users/\w+/", r"[A-Z]:\\\\?Users\\"]


def test_no_private_paths():
    pattern = re.compile("|".join(private_paths()))
    found = []
    for path in tracked():
        if (
            path.suffix in {".png", ".gif", ".webp", ".parquet", ".npz", ".tif"}
            or path == Path(__file__).resolve()
        ):
            continue
        for n, line in enumerate(
            path.read_text(encoding="utf-8", errors="replace").splitlines(), 1
        ):
            found += [
                f"{path.relative_to(ROOT)}:{n}: {m.group()}" for m in [pattern.search(line)] if m
            ]
    report(
        found, "use relative paths; write to a temporary folder and print names, not whole paths."
    )


def test_tracked_files_are_small():
    found = [
        f"{p.relative_to(ROOT)} {p.stat().st_size / 1e6:.1f} MB"
        for p in tracked()
        if p.is_file() and p.stat().st_size > 5e6
    ]
    report(found, "data live outside the project; shrink the file or make it when needed.")
