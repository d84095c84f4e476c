"""The documentation site, without Quarto: nbdev's processing, pages by nbconvert, and every link followed.

Quarto prints a warning for a broken link and still exits with 0; here it is a failure.
"""

import ast
import builtins
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from html import unescape
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest
import yaml
from house import NBS, ROOT, code, dotted, notebooks, report, settings, tracked

SITE = settings()["doc_host"] + settings()["doc_baseurl"]
FORGE = settings()["git_url"]


def load(path):
    "A Python file as a module."
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


readme = load(ROOT / ".ci" / "readme.py")
address = load(ROOT / ".ci" / "address.py")
site = load(ROOT / ".ci" / "site_processors.py")


def sidebar_entries(node):
    "Every file that the sidebar names, in order."
    if isinstance(node, str):
        return [node] if not re.match(r"[a-z]+:", node) else []
    if isinstance(node, list):
        return [e for n in node for e in sidebar_entries(n)]
    return sidebar_entries(node.get("href", [])) + sidebar_entries(node.get("contents", []))


def read_yaml(name):
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


# --- The site's own files


def test_quarto_yml_is_the_one_true_file():
    link = NBS / "_quarto.yml"
    assert link.is_symlink() and os.readlink(link) == "../_quarto.yml", (
        "nbs/_quarto.yml is a link: ln -sf ../_quarto.yml nbs/_quarto.yml"
    )
    site = read_yaml("_quarto.yml")
    assert site["project"]["type"] == "website" and site["metadata-files"] == [
        "nbdev.yml",
        "sidebar.yml",
    ]
    missing = [
        f
        for f in [*site["metadata-files"], site["format"]["html"]["css"]]
        if not (NBS / f).exists()
    ]
    assert not missing, f"_quarto.yml names nbs/{missing}"
    bar = site["website"]["navbar"]
    assert site["website"]["page-navigation"] is True, (
        "each page leads to the previous and the next"
    )
    assert (NBS / site["website"]["favicon"]).exists()
    missing = [
        e["href"]
        for e in bar["left"] + bar["right"]
        if not re.match("https?:", e["href"]) and not (NBS / e["href"]).exists()
    ]
    assert not missing, f"the navigation bar of _quarto.yml names nbs/{missing}"


def test_nbdev_yml_follows_settings():
    cfg, site = settings(), read_yaml("nbs/nbdev.yml")
    assert site["project"]["output-dir"] == cfg["doc_path"]
    expected = {
        "title": cfg["title"],
        "site-url": SITE,
        "description": cfg["description"],
        "repo-branch": cfg["branch"],
        "repo-url": FORGE,
    }
    assert site["website"] == expected, (
        "run `python -c 'from nbdev.quarto import refresh_quarto_yml as r; r()'`"
    )


def luminance(colour):
    "Relative luminance of a colour '#rrggbb' as WCAG 2 defines it."
    channels = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    "Contrast of two colours, 1 to 21."
    dark, light = sorted([luminance(one), luminance(other)])
    return (light + 0.05) / (dark + 0.05)


def test_the_bar_is_readable():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    bar = read_yaml("_quarto.yml")["website"]["navbar"]
    got = contrast(bar["background"], bar["foreground"])
    assert got >= 4.5, f"the navigation bar has a contrast of {got:.1f}; WCAG asks for 4.5"


def test_nothing_is_cut_at_the_edge():
    style = (NBS / "styles.css").read_text(encoding="utf-8")
    rules = re.findall(r"([^{}]+)\{([^{}]+)\}", re.sub(r"/\*.*?\*/", "", style, flags=re.S))
    wanted = [
        (".cell-output pre", "white-space: pre-wrap"),
        ("main table", "overflow-x: auto"),
        (".math.display", "overflow-x: auto"),
    ]
    for selector, declaration in wanted:
        assert any(selector in s and declaration in d for s, d in rules), (selector, declaration)


def test_a_missing_page_leads_on():
    text = (NBS / "404.qmd").read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert "index.ipynb" in targets and all((NBS / target).exists() for target in targets)


# --- One address


def test_every_place_has_the_address_of_settings():
    here = address.read_address()
    found = [
        path.relative_to(ROOT).as_posix()
        for path in address.files()
        if address.derived(path, here) != path.read_text(encoding="utf-8")
    ]
    report(found, "run `python .ci/address.py`; the account stands in settings.ini alone.")


def test_no_other_address_of_ours():
    "Any link to a repository, a site or a package called microgen is made from settings.ini."
    places = r"github\.com|github\.io|githubusercontent\.com|pypi\.org|kaggle\.com|readthedocs\.io|anaconda\.org"
    link = re.compile(rf"https?://[\w.-]*(?:{places})[^\s)\"'<>`\\]*microgen[^\s)\"'<>`\\]*")
    here = address.read_address()
    ours = (here.git_url, here.site, here.colab(""), here.kaggle(""))
    ours += (f"https://raw.githubusercontent.com/{here.user}/{here.repo}",)
    found = []
    for path in tracked():
        if path.suffix in {".png", ".tif", ".parquet", ".npz"} or path == Path(__file__).resolve():
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        found += [
            f"{path.relative_to(ROOT)}: {m.group()}"
            for m in link.finditer(text)
            if not m.group().startswith(ours)
            and not any(other in m.group() for other in ("%(user)s", "/o/microgen", "{"))
        ]
    report(found, "write it from settings.ini: a link of this form in .ci/address.py.")


def test_settings_derive_the_address():
    raw = (ROOT / "settings.ini").read_text(encoding="utf-8")
    here = address.read_address()
    assert raw.count(here.user) == 1, "the account stands once in settings.ini, as user"
    assert here.git_url == f"https://github.com/{here.user}/{here.repo}"
    assert here.site == f"https://{here.user}.github.io/{here.repo}"


def test_address_rewrites_what_it_should():
    here = address.Address("me", "microgen", "main", "https://github.com/me/microgen", "https://s")
    text = (
        "https://github.com/old/microgen/blob/x https://old-one.github.io/microgen/a.html "
        "https://colab.research.google.com/github/old/microgen/blob/ https://github.com/old/microgen-data"
    )
    assert address.relink(text, here) == (
        "https://github.com/me/microgen/blob/x https://s/a.html "
        "https://colab.research.google.com/github/me/microgen/blob/ https://github.com/old/microgen-data"
    )
    cells = [address.new_cell("markdown", "t", ["# T"]), address.new_cell("code", "c", ["1"])]
    address.set_badges(cells, address.badge_line(here, "nbs/tutorials/01_a.ipynb", "https://s/a"))
    address.set_install(cells, here)
    assert [c["id"] for c in cells] == ["t", "badges", "install", "c"]
    cells[2]["source"] = ['!pip install -q "microgen[em] @ git+https://github.com/x/microgen"']
    before = [address.source(c) for c in cells]
    address.set_badges(cells, before[1])
    address.set_install(cells, here)
    cells[1]["source"] = ["Before.\n\n", "<!-- badges -->\n", "[![old](a)](b)\n", "\n", "After."]
    address.set_badges(cells, before[1])
    assert address.source(cells[1]) == f"Before.\n\n{before[1]}\n\nAfter."
    assert len(cells) == 4 and "microgen[em] @ git+https://github.com/me/" in address.source(
        cells[2]
    )


@pytest.mark.parametrize("path", sorted((NBS / "tutorials").glob("*.ipynb")), ids=lambda p: p.stem)
def test_a_tutorial_opens_in_colab_and_installs(path):
    cells = nbformat.read(path, as_version=4).cells
    here, name = address.read_address(), path.relative_to(ROOT).as_posix()
    assert address.BADGES in cells[1].source, "the badges stand under the title"
    assert here.colab(name) in cells[1].source and here.kaggle(name) in cells[1].source
    for cell in cells:
        badges = (
            re.search(r"^\[!\[.*$", cell.source, re.M) if cell.cell_type == "markdown" else None
        )
        after = cell.source[badges.end() :] if badges else ""
        assert not after or after.startswith("\n\n"), "a paragraph begins after an empty line"
    first = next(c for c in cells if c.cell_type == "code")
    assert f"@ git+{here.git_url}" in first.source and "eval: false" in first.source, (
        "the first code cell installs the package: run `python .ci/address.py`"
    )
    assert not re.search(r"^\s*%", first.source, re.M), "nbdev drops magics from the page"


# --- What runs in public


def steps_of(job):
    "Commands of a job of a workflow, in order."
    return [step["run"] for step in job["steps"] if "run" in step]


def readme_line(word):
    "README's command line that ends with a word, as its parts."
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (line,) = re.findall(rf"^(pip install .*{word}.*)$", text, re.M)
    return line.split(" && ")


def test_the_test_workflow_runs_what_readme_says():
    flow = read_yaml(".github/workflows/test.yml")
    said = " ".join(steps_of(flow["jobs"]["tests"]))
    for command in [*readme_line("nbdev_test"), "ruff check .", "ruff format --check ."]:
        assert command in said, f"test.yml does not run `{command}`"
    versions = flow["jobs"]["tests"]["strategy"]["matrix"]["python"]
    assert versions[0] == settings()["min_python"] and versions == ["3.11", "3.12", "3.13"]
    said = steps_of(flow["jobs"]["tour"])
    for command in readme_line("microgen tour"):
        assert command in said, f"test.yml does not run `{command}`"


def test_the_documentation_workflow_builds_this_site():
    flow = read_yaml(".github/workflows/docs.yml")
    job = flow["jobs"]["site"]
    said = " ".join(steps_of(job))
    assert readme_line("nbdev_test")[0] in said and "nbdev_docs" in said
    assert job["env"]["PYTHONPATH"] == ".ci" and flow["permissions"]["pages"] == "write"
    with_ = [step.get("with", {}) for step in job["steps"]]
    assert any(str(w.get("version", "")).startswith("1.7.") for w in with_), "Quarto 1.7"
    assert any(w.get("path") == settings()["doc_path"] for w in with_)


# --- The sidebar


def test_every_sidebar_entry_exists():
    missing = [
        f"nbs/sidebar.yml names {e}"
        for e in sidebar_entries(read_yaml("nbs/sidebar.yml")["website"]["sidebar"]["contents"])
        if not (NBS / e).exists()
    ]
    report(missing, "write the notebook, or take the line out.")


def test_every_notebook_is_in_the_sidebar():
    entries = sidebar_entries(read_yaml("nbs/sidebar.yml")["website"]["sidebar"]["contents"])
    assert len(entries) == len(set(entries)), "a notebook stands twice in nbs/sidebar.yml"
    found = [
        str(p.relative_to(NBS)) for p in notebooks() if p.relative_to(NBS).as_posix() not in entries
    ]
    report(found, "add it to nbs/sidebar.yml where a reader looks for it.")


def test_metadata_agrees():
    cfg, cite = settings(), read_yaml("CITATION.cff")
    assert (
        cite["version"] == cfg["version"]
        and cite["repository-code"] == FORGE
        and cite["url"] == SITE
    )
    assert f'__version__ = "{cfg["version"]}"' in (ROOT / "microgen/__init__.py").read_text()
    news = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert "## [Unreleased]" in news or f"## [{cfg['version']}]" in news


@pytest.mark.parametrize("path", notebooks(), ids=lambda p: str(p.relative_to(NBS)))
def test_title_cell(path):
    first = nbformat.read(path, as_version=4).cells[0]
    lines = [line for line in first.source.strip().splitlines() if line.strip()]
    assert first.cell_type == "markdown" and lines and lines[0].startswith("# "), (
        f"{path.name} begins with `# Title` and `> one line`"
    )
    assert len(lines) > 1 and lines[1].startswith("> "), (
        f"{path.name}: the second line is `> what the page gives, in one line`"
    )
    extra = [line for line in lines[2:] if not re.match(r"- \S+:\s", line)]
    assert not extra, (
        f"{path.name}: nbdev drops what follows title and summary in the first cell, begin a new cell: {extra[0][:80]!r}"
    )


def bound_names(tree):
    "Names that a piece of code makes: by import, definition, assignment, loop, argument."
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {(a.asname or a.name).split(".")[0] for a in node.names}
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            names.add(node.name)
        elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            names.add(node.id)
    return names


@pytest.mark.parametrize("path", sorted(NBS.glob("[0-9]*.ipynb")), ids=lambda p: p.stem)
def test_cells_that_import_run_alone(path):
    "Building the site runs a library notebook's exported cells and those with an import, and no others."
    known, found = set(dir(builtins)) | {"__name__", "display", "get_ipython"}, []
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type != "code" or re.search(r"^#\|\s*eval:\s*false", cell.source, re.M):
            continue
        tree = code(cell.source)
        is_exported = re.search(r"^#\|\s*export", cell.source, re.M)
        imports = any(isinstance(n, (ast.Import, ast.ImportFrom)) for n in ast.walk(tree))
        if not is_exported and not imports:
            continue
        known |= bound_names(tree)
        if is_exported:
            continue
        used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
        found += [f"nbs/{path.name} [cell {cell.id}] needs {name}" for name in used - known]
    report(found, "give the imports a cell of their own.")


def draws(tree):
    "Does a cell end in a statement that shows a picture?"
    last = tree.body[-1] if tree.body else None
    call = last.value if isinstance(last, ast.Expr) else None
    return isinstance(call, ast.Call) and bool(
        re.match(r"show(_(?!doc)|$)", dotted(call.func).split(".")[-1])
    )


@pytest.mark.parametrize("path", notebooks(), ids=lambda p: str(p.relative_to(NBS)))
def test_pictures_are_stored(path):
    found = []
    for c in nbformat.read(path, as_version=4).cells:
        if c.cell_type != "code" or re.search(
            r"^#\|\s*(export|hide|eval:\s*false)", c.source, re.M
        ):
            continue
        if draws(code(c.source)) and not any("image/png" in o.get("data", {}) for o in c.outputs):
            found.append(
                f"nbs/{path.relative_to(NBS)} [cell {c.id}] `{c.source.strip().splitlines()[-1][:80]}` has no picture"
            )
    report(found, "run the notebook again and store its outputs; the site shows what is stored.")


# --- README


def test_readme_is_fresh():
    subprocess.run(
        [sys.executable, ROOT / ".ci" / "readme.py", "--check"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
    )


def test_readme_pictures_are_files():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    pictures = re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", text) + re.findall(
        r'<img[^>]+src="([^"]+)"', text
    )
    pictures = [p for p in pictures if not p.startswith("https://")]  # badges
    assert pictures, "README shows a picture of the result first"
    known = {p.relative_to(ROOT).as_posix() for p in tracked()}
    bad = [p for p in pictures if not p.startswith("nbs/images/") or p not in known]
    report(
        bad,
        "save the picture under nbs/images/ and commit it: GitHub shows it from there, setup.py points PyPI at it.",
    )
    assert text.index(pictures[0]) < text.index("\n## "), (
        "the picture comes before the first heading"
    )


def test_link_of_readme():
    give = lambda text: re.sub(r"(\]) ?\(([^)\s]+)\)", lambda m: readme.link(m, "https://s"), text)  # noqa: E731
    assert give("[a](tutorials/01_walls.ipynb#x)") == "[a](https://s/tutorials/walls.html#x)"
    assert give("![a](images/b.png)") == "![a](nbs/images/b.png)"
    assert give("[a](https://b/c) [d](#e)") == "[a](https://b/c) [d](#e)"


# --- The pages


@pytest.fixture(scope="session")
def processed(tmp_path_factory):
    "The project copied, its notebooks processed by nbdev as for the site: the folder _proc."
    top = tmp_path_factory.mktemp("site")
    for f in tracked():
        if f.relative_to(ROOT).parts[0] in {"nbs", "microgen", ".ci"} or f.parent == ROOT:
            to = top / f.relative_to(ROOT)
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(f, to, follow_symlinks=False)
    info = (
        top / "microgen-0.dist-info"
    )  # what an installed package tells nbdev about the symbols that backticks link to
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: microgen\nVersion: {settings()['version']}\n"
    )
    (info / "entry_points.txt").write_text("[nbdev]\nmicrogen = microgen._modidx:d\n")
    text = "from nbdev.serve import proc_nbs\nif __name__ == '__main__': proc_nbs(n_workers=2)"
    (top / "proc.py").write_text(text)
    done = subprocess.run(
        [sys.executable, "proc.py"],
        cwd=top,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(top), str(top / ".ci")])},
    )
    why = [
        line
        for line in done.stderr.splitlines()
        if re.match(r"(\w+\.)*\w*(Error|Exception)\b", line)
    ]
    assert done.returncode == 0, (
        "nbdev cannot process the notebooks:\n"
        + "\n".join(dict.fromkeys(why))
        + "\nHow to mend it: building the site runs the cells that import or export; keep imports in a cell of their own, before any use."
    )
    shutil.rmtree(info)
    return top / "_proc"


@pytest.fixture(scope="session")
def pages(processed):
    "HTML of every page by its name on the site."
    from nbconvert import HTMLExporter

    to_html = HTMLExporter(template_name="basic")
    sources = [p for p in processed.rglob("*.ipynb")]
    return {
        readme.page_of(p.relative_to(processed)): to_html.from_filename(str(p))[0] for p in sources
    }


def test_every_notebook_becomes_a_page(pages):
    expected = {readme.page_of(p.relative_to(NBS)) for p in notebooks()}
    assert expected == set(pages), "two notebooks may not become the same page"
    short = [name for name, html in pages.items() if len(re.sub(r"<[^>]+>|\s", "", html)) < 400]
    report(short, "a page of a few words: is its text in the title cell, where nbdev drops it?")


def test_no_page_shows_an_error(pages):
    found = [
        f"{name}: {m.group(0)[:120]}"
        for name, html in pages.items()
        for m in re.finditer(
            r"Traceback \(most recent call last\)|ModuleNotFoundError|\bNameError\b: name", html
        )
    ]
    report(found, "run the notebook to its end; errors that teach are shown with test_fail.")


def anchors(html):
    "Names that a link may point to on a page: headings as Pandoc names them, show_doc's symbols, ids."
    ids = {unquote(unescape(i)) for i in re.findall(r'\bid="([^"]+)"', html)}
    heads = [
        unescape(re.sub(r"<a class=\"anchor-link.*?</a>|<[^>]+>", "", h))
        for h in re.findall(r"<h[1-6][^>]*>(.*?)</h[1-6]>", html, re.S)
    ]
    pandoc = {
        re.sub(r"[^\w\s.-]", "", re.sub(r"^[^a-zA-Z]+", "", h.strip().lower())).replace(" ", "-")
        for h in heads
    }
    return {i.lower() for i in ids} | pandoc | {h.strip().lower() for h in heads}


def test_every_link_resolves(pages, processed):
    known, found = {name: anchors(html) for name, html in pages.items()}, []
    links = 0
    for name, html in pages.items():
        html = re.sub(r"<(pre|code)\b.*?</\1>", "", html, flags=re.S)
        for target in re.findall(r'<(?:a|img|source|iframe)\b[^>]*?\b(?:href|src)="([^"]+)"', html):
            target = unquote(unescape(target))
            if target.startswith(SITE):
                target = os.path.relpath(
                    target.removeprefix(SITE).lstrip("/") or "index.html", Path(name).parent
                )
            if re.match(r"(https?|mailto|data|attachment):", target):
                continue
            links += 1
            file, _, anchor = target.partition("#")
            if not file:
                page = name
            elif file.endswith((".ipynb", ".html")):
                page = os.path.normpath(
                    Path(name).parent / (readme.page_of(file) if file.endswith(".ipynb") else file)
                )
                real = file.endswith(".html") or (processed / Path(name).parent / file).exists()
                if page not in pages or not real:
                    found.append(f"{name} links to {target}: no such page")
                    continue
            else:
                if not (processed / Path(name).parent / file).exists():
                    found.append(f"{name} shows or links to {target}: no such file under nbs/")
                continue
            if anchor and anchor.lower() not in known[page]:
                found.append(f"{name} links to {target}: no such heading on {page}")
    report(
        sorted(set(found)),
        "write links relative to the notebook, with its file name: [walls](../19_stem.wall.ipynb#names).",
    )
    assert links > len(pages), "the pages hardly link to each other: was the HTML read?"


# --- What a name in backticks links to


@pytest.mark.parametrize(
    "word, page, imported, expected",
    [
        ("measure", "", {}, None),  # the word of another page may be the command, or a verb
        ("train", "", {}, None),
        ("score", "", {}, None),
        ("wall", "count.size", {}, None),
        ("wall", "stem.wall", {}, "stem.wall.wall"),  # on its own page
        ("wall", "", {"wall": "stem.wall"}, "stem.wall.wall"),  # where it is imported
        ("wall()", "", {}, "stem.wall.wall"),
        ("microgen.measure", "", {}, "stem.measure.measure"),
        ("stem.wall", "", {}, "stem.wall."),
        ("microgen.core", "", {}, "core."),
        ("core", "", {}, None),
        ("Micrograph", "", {}, "core.Micrograph"),
        ("Micrograph.crop", "", {}, "core.Micrograph.crop"),
        ("count_sample", "", {}, "count.sample.count_sample"),
        ("stem.wall.displace", "", {}, "stem.wall.displace"),
        ("compare", "cli", {}, "cli.compare"),
        ("pixel_size", "", {}, None),
        ("metadata.csv", "", {}, None),
        ("--out", "", {}, None),
    ],
)
def test_a_name_links_to_what_it_means(word, page, imported, expected):
    found = site.find_symbol(word, page, imported)
    assert (found and f"{found.module}.{found.name}") == expected


def links_of(notebook):
    "Pairs (word, target) of the links that a processed notebook makes of names in backticks."
    for cell in notebook.cells:
        texts = [cell.source] if cell.cell_type == "markdown" else []
        for output in cell.get("outputs", []):
            texts.append("".join(output.get("data", {}).get("text/markdown", "")))
        for text in texts:
            yield from re.findall(r"\[`([^`]+)`\]\(([^)\s]+)\)", text)


@pytest.fixture(scope="session")
def processed_notebooks(processed):
    "Every processed notebook by its path."
    paths = sorted(processed.rglob("*.ipynb"))
    read = nbformat.v4.reads  # nbdev leaves marks of its own, which a validation would report
    return {p.relative_to(processed).as_posix(): read(p.read_text(encoding="utf-8")) for p in paths}


def test_links_of_names_lead_to_these_names(processed_notebooks):
    found, n = [], 0
    for path, notebook in processed_notebooks.items():
        for word, target in links_of(notebook):
            file, _, anchor = target.partition("#")
            if not file.endswith(".ipynb"):
                continue
            n += 1
            name = word.removesuffix("()").lower()
            module = re.sub(r"^\d+_|\.ipynb$", "", Path(file).name)
            fits = name.endswith(anchor.split(".")[-1]) or name.startswith(f"{anchor}.")
            fits = fits if anchor else module.endswith(name.removeprefix("microgen."))
            if not fits:
                found.append(f"nbs/{path}: `{word}` links to {target}")
            if module == "cli" and "cli" not in path + word:
                found.append(f"nbs/{path}: `{word}` links to the command line")
    report(found, "see find_symbol in .ci/site_processors.py.")
    assert n > 200, f"only {n} names became links"


def test_signatures_hold_no_links(processed_notebooks):
    found = []
    for path, notebook in processed_notebooks.items():
        for cell in notebook.cells:
            for output in cell.get("outputs", []):
                text = "".join(output.get("data", {}).get("text/markdown", ""))
                for block in re.findall(r"```python\n(.*?)```", text, re.S):
                    if re.search(r"\]\([^)]*\.(ipynb|html)", block):
                        found.append(f"nbs/{path}: {block[:80]}")
    report(found, "links belong into docstrings; in a comment of a parameter write no backticks.")


def test_a_class_shows_its_fields(processed_notebooks):
    cells = processed_notebooks["98_doctor.ipynb"].cells
    (cell,) = [c for c in cells if c.source.endswith("show_doc(Check)")]
    text = "".join(cell.outputs[0].data["text/markdown"])
    assert "| `state: str = 'ok'` | " in text and "\n### Check\n" in text
    shown = [
        "".join(output.get("data", {}).get("text/markdown", ""))
        for notebook in processed_notebooks.values()
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if cell.cell_type == "code" and "show_doc(" in cell.source
    ]
    here = address.read_address()
    sourced = [f"[source]({here.git_url}/blob/{here.branch}/microgen/" in text for text in shown]
    assert sum(sourced) > 0.95 * len(sourced) > 100, "show_doc leads to the source"


def test_no_page_shows_the_file_of_a_notebook(pages):
    found = []
    for name, html in pages.items():
        prose = re.sub(r"<pre\b.*?</pre>|<[^>]+>", " ", html, flags=re.S)
        found += [f"{name}: {m}" for m in re.findall(r"\b\d\d_[a-z][\w.]*\.ipynb", unescape(prose))]
    report(
        found,
        "run `python .ci/names.py`, or name the module (`scan.acquire`): the site makes a link of it, and numbers change.",
    )


def test_every_picture_has_an_alternative_text(processed_notebooks):
    found, n = [], 0
    for path, notebook in processed_notebooks.items():
        for cell in notebook.cells:
            where = f"nbs/{path} [cell {cell.get('id')}]"
            if cell.cell_type == "markdown":
                found += [f"{where} {m}" for m in re.findall(r"!\[\s*\]\([^)]*\)", cell.source)]
                continue
            for output in cell.get("outputs", []):
                html = "".join(output.get("data", {}).get("text/html", ""))
                found += [f"{where} {m}" for m in re.findall(r"<img(?![^>]*alt=)[^>]{0,60}", html)]
            if any("image/png" in o.get("data", {}) for o in cell.get("outputs", [])):
                n += 1
                text = re.match(r'#\| fig-(?:alt|cap): "?(.+?)"?$', cell.source, re.M)
                if not text or len(text[1]) < 15:
                    found.append(f"{where} has no fig-alt")
                elif '"' in text[1] or "\\" in text[1]:
                    found.append(f"{where} fig-alt {text[1]!r} is no valid YAML")
    report(found, "write `#| fig-alt: what the picture shows` into the cell.")
    assert n > 50


def test_tests_of_library_pages_are_folded(processed_notebooks):
    folded_by_us = '#| code-summary: "Show the test"'
    folded = {
        path: sum(folded_by_us in cell.source for cell in notebook.cells)
        for path, notebook in processed_notebooks.items()
    }
    assert sum(folded.values()) > 150
    assert not [path for path, n in folded.items() if n and not re.match(r"\d\d_", path)], (
        "what a tutorial asserts is part of what it says"
    )
    for path, notebook in processed_notebooks.items():
        for cell in notebook.cells:
            if folded_by_us in cell.source:
                assert "quarto-exclude-from-search-index" in cell.source, path


def test_is_test_knows_a_test():
    def cell(source, outputs=()):
        return nbformat.v4.new_code_cell(source, outputs=list(outputs))

    assert site.is_test(cell("x = make()\ntest_eq(x, 1)"))
    assert site.is_test(cell("for x in (1, 2):\n    assert x"))
    assert not site.is_test(cell("x = make()"))
    assert not site.is_test(cell("assert x\nx.show()"))
    shown = nbformat.v4.new_output("stream", text="1")
    assert not site.is_test(cell("print(1)\nassert True", [shown]))
    assert not site.is_test(cell("%matplotlib inline\nassert x"))


def test_the_reference_opens_with_every_public_name(processed_notebooks):
    import types

    import microgen

    notebook = processed_notebooks["reference.ipynb"]
    text = "\n".join(cell.source for cell in notebook.cells)
    rows = re.findall(r"^\| \[`(\w+)`\]\([^)]+\) \| (.+) \|$", text, re.M)
    names = [
        name
        for name in microgen.__all__
        if not isinstance(getattr(microgen, name), types.ModuleType)
    ]
    listed = [name for name, _ in rows]
    assert sorted(listed) == sorted(names), set(listed) ^ set(names)
    assert all(what.strip() for _, what in rows), "a public name without a docstring"
    sidebar = sidebar_entries(read_yaml("nbs/sidebar.yml")["website"]["sidebar"]["contents"])
    first = next(entry for entry in sidebar if re.match(r"reference|\d\d_", entry))
    assert first == "reference.ipynb", "the reference opens with the public names"
    heads = re.findall(r"^## (.+)$", text, re.M)
    assert len(heads) == len(set(heads)) and all(heads)


# --- Links of the papers


def test_readme_links_resolve(pages):
    text, found = (ROOT / "README.md").read_text(encoding="utf-8"), []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(SITE):
            name = target.removeprefix(SITE).strip("/").partition("#")[0] or "index.html"
            found += [f"README.md links to {target}: no such page"] if name not in pages else []
        elif not re.match(r"https?:|#", target) and not (ROOT / target).exists():
            found.append(f"README.md links to {target}: no such file")
    report(found, "mend the link in nbs/index.ipynb and run `python .ci/readme.py`.")


def test_every_paper_of_the_project_links_to_what_exists():
    found = []
    for path in ROOT.glob("*.md"):
        for target in re.findall(r"\]\(([^)\s#]+)", path.read_text(encoding="utf-8")):
            if not re.match(r"[a-z]+:", target) and not (ROOT / target).exists():
                found.append(f"{path.name} links to {target}")
    report(found, "mend the link.")
