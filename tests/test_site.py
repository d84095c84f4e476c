"""The documentation site, without Quarto: nbdev's processing, pages by nbconvert, and every link followed.

Quarto prints a warning for a broken link and still exits with 0; here it is a failure.
"""

import ast
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
        if f.relative_to(ROOT).parts[0] in {"nbs", "microgen"} or f.parent == ROOT:
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
        env={**os.environ, "PYTHONPATH": str(top)},
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
            r"Traceback \(most recent call last\)|[Nn]o module named|\bNameError\b: name", html
        )
    ]
    report(found, "run the notebook to its end; errors that teach are shown with test_fail.")


def anchors(html):
    "Names that a link may point to on a page: headings as Pandoc names them, show_doc's symbols, ids."
    ids = set(re.findall(r'\bid="([^"]+)"', html))
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


def test_symbols_in_backticks_become_links(pages):
    found = re.findall(rf'href="{re.escape(SITE)}/([^"#]+)#', " ".join(pages.values()))
    assert len(found) > 20, (
        f"only {len(found)} symbols became links: is microgen/_modidx.py fresh (nbdev_export), the nbdev entry point in setup.py?"
    )


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
