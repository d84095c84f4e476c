"""The readers' pages: tables that are complete, messages that are real, calls and commands that exist, one English."""

import ast
import contextlib
import importlib.util
import inspect
import io
import re
import shlex
from functools import reduce

import nbformat
import pandas as pd
import pytest
import typer
import yaml
from house import NBS, ROOT, notebooks, report, settings
from samples import FORMATS as FILE_KINDS
from vendors import VENDORS

import microgen
from microgen.cli import app
from microgen.io.formats import READERS
from microgen.io.table import FORMATS, formats_markdown

WRITTEN_ELSEWHERE = {"explanations/house.ipynb", "reference.ipynb"}


def cells(name, kind=None):
    "Cells of a page, of one type or all."
    found = nbformat.read(NBS / name, as_version=4).cells
    return [c for c in found if kind is None or c.cell_type == kind]


def text(name):
    "All Markdown of a page."
    return "\n\n".join(c.source for c in cells(name, "markdown"))


def section(name, heading):
    "The Markdown between a heading and the next one."
    after = re.split(rf"^#+ {re.escape(heading)}$", text(name), flags=re.M)[1]
    return re.split(r"^#", after, flags=re.M)[0]


def table_rows(markdown):
    "Rows of the tables in a text, each a list of its cells; heads and rules are left out."
    lines = [line.strip().strip("|") for line in markdown.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.split(" | ")] for line in lines]
    rules = [i for i, row in enumerate(rows) if set("".join(row)) <= set("-|: ")]
    heads = {i - 1 for i in rules} | set(rules)
    return [row for i, row in enumerate(rows) if i not in heads]


def in_backticks(cell):
    return re.findall(r"`([^`]+)`", cell)


def readers_pages():
    "Pages that are not reference: without the library notebooks."
    names = [p.relative_to(NBS).as_posix() for p in notebooks()]
    return [n for n in names if not re.match(r"\d\d_", n) and n not in WRITTEN_ELSEWHERE]


# --- Your first .dm4: every column has its meaning

FIRST = "tutorials/11_first_dm4.ipynb"


def explained(file):
    "Columns that the page explains for a file."
    return {name for row in table_rows(section(FIRST, file)) for name in in_backticks(row[0])}


@pytest.fixture(scope="module")
def image():
    "A small scan of a wall."
    specimen = microgen.columns("YMnO3", fov=(3, 3), thickness=5)
    specimen = microgen.displace(specimen, microgen.wall("typeC", fov=(3, 3)))
    return microgen.acquire(microgen.haadf(specimen, pixel_size=0.02), "typical", rng=0)


@pytest.mark.parametrize("file", ["columns.csv", "walls.csv", "wall_rows.csv"])
def test_every_column_of_a_measurement_is_explained(image, file, tmp_path):
    written = set()
    for k, structure in enumerate(("YMnO3", None)):
        microgen.measure(image, structure).save(tmp_path / str(k))
        written |= set(pd.read_csv(tmp_path / str(k) / file))
    assert written == explained(file), f"{FIRST}: complete the table of {file}"


def test_every_column_of_a_count_is_explained(tmp_path):
    from microgen.count.detect import save
    from microgen.sem.preset import Scene
    from microgen.sem.scene import simulate_scene

    scene = Scene(size=256, pixel_size=0.6, median_nm=6, gsd=1.35, n=120, electrons=150.0)
    image = simulate_scene(scene, 0).image
    save(microgen.detect(image), tmp_path)
    written = set(pd.read_csv(tmp_path / "particles.csv"))
    image.save(tmp_path / "image.tif")
    sample = microgen.count_sample(tmp_path / "image.tif", tmp_path / "sample", n=200, workers=1)
    after = set(sample.particles()) - {"folder"}
    assert written <= after == explained("particles.csv"), f"{FIRST}: complete its last table"


def test_the_files_that_the_page_names_are_written(image, tmp_path):
    microgen.measure(image, "YMnO3").save(tmp_path)
    written = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.*")}
    missing = {name for name in written if name not in text(FIRST)}
    assert not missing, f"{FIRST} does not name {missing}"


# --- File formats


def test_the_page_shows_the_table_of_formats():
    shown = section("file_formats.ipynb", "What is read")
    assert formats_markdown() in shown, "file_formats: paste microgen.io.table.formats_markdown()"


def test_the_table_of_formats_names_what_the_readers_read():
    endings = {ending for row in FORMATS for ending in row.endings}
    assert endings == set(READERS)
    extras = {"ncempy": "em", "h5py": "em"}  # the other readers need nothing more
    for row in FORMATS:
        for ending in row.endings:
            assert row.extra == extras.get(READERS[ending][0], ""), (ending, row.extra)


def test_each_row_of_the_table_of_formats_has_its_tests():
    "The tests exist, run on that kind of file, and show what the row claims: an oracle, a real file."
    kinds = {*FILE_KINDS, *VENDORS}
    for row in FORMATS:
        sources = []
        for name in row.tests:
            file, function, kind = re.fullmatch(r"(\w+\.py)::(\w+)(?:\[(.+)\])?", name).groups()
            source = (ROOT / "tests" / file).read_text(encoding="utf-8")
            parts = re.split(r"^(?=def |@pytest)", source, flags=re.M)
            body = [part for part in parts if part.startswith(f"def {function}(")]
            assert body, f"{name} is no test"
            assert kind is None or kind in kinds or f'"{kind}"' in source, f"{name}: no such file"
            sources.append(body[0])
        claims_oracle = "oracle" in row.tested
        shows_oracle = any(re.search("rsciio|ncempy|tifffile.imread", body) for body in sources)
        assert not claims_oracle or shows_oracle, f"{row.made_by}: no test asks another program"
        claims_real = "real file" in row.tested
        assert claims_real == any(re.search(r"\(real\b", body) for body in sources), row.made_by


# --- Which function do I need


def calls():
    "Every Python snippet of the page."
    rows = table_rows(text("which_function.ipynb"))
    return [code for row in rows for code in in_backticks(row[1])]


def commands():
    "Every command of the page, split as a shell does."
    rows = table_rows(text("which_function.ipynb"))
    found = [code for row in rows for code in in_backticks(row[2])]
    return [shlex.split(code) for code in found if code.startswith("microgen ")]


@pytest.mark.parametrize("code", [c for c in calls() if c.startswith("microgen.")])
def test_a_call_of_the_table_exists(code):
    "The name resolves, and the function takes the arguments."
    for node in ast.walk(ast.parse(code, mode="eval")):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            function = reduce(getattr, name.split(".")[1:], microgen)
            settings = {k.arg: None for k in node.keywords}
            inspect.signature(function).bind(*node.args, **settings)
    name = re.match(r"[\w.]+", code)[0]
    assert reduce(getattr, name.split(".")[1:], microgen)


def inner_commands(command):
    "Commands of a group by name; none of a plain command."
    if not hasattr(command, "list_commands"):
        return {}
    context = typer.Context(command)
    names = command.list_commands(context)
    return {name: command.get_command(context, name) for name in names}


def command_of(words):
    "The command that the words name, and the words behind it."
    command = typer.main.get_command(app)
    for k, word in enumerate(words[1:], 1):
        inner = inner_commands(command)
        if word not in inner:
            return command, words[k:]
        command = inner[word]
    return command, []


@pytest.mark.parametrize("code", [c for c in calls() if c.startswith("from ")])
def test_an_import_of_the_table_works(code):
    exec(code, {})


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_a_command_of_the_table_exists(words):
    command, rest = command_of(words)
    assert command.name == words[1] or words[2] == command.name, f"{words} names no command"
    if words[1] == "sample":
        return  # its options are those of the run
    options = {o for p in command.params for o in (*p.opts, *p.secondary_opts)}
    assert {w for w in rest if w.startswith("--")} <= options, words


def test_every_command_and_every_call_at_the_top_is_in_the_table():
    used = {" ".join(words) + " " for words in commands()}
    missing = []
    for name, command in inner_commands(typer.main.get_command(app)).items():
        inner = [f"{name} {one}" for one in inner_commands(command)] or [name]
        named = [f"microgen {one} " for one in inner]
        missing += [one for one in named if not any(line.startswith(one) for line in used)]
    named = " ".join(calls())
    modules = {name for name in dir(microgen) if inspect.ismodule(getattr(microgen, name))}
    for name in set(microgen.__all__) - modules:
        if not re.search(rf"microgen\.{name}\b", named):
            missing.append(f"microgen.{name}")
    report(missing, "add a row to nbs/which_function.ipynb: the task in the reader's words.")


# --- Troubleshooting


def test_the_messages_are_those_that_the_code_prints(tmp_path, monkeypatch):
    "Each code cell that prints an error prints today what the page shows."
    monkeypatch.chdir(tmp_path)
    names, found, messages = {}, [], 0
    for cell in cells("troubleshooting.ipynb", "code"):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(cell.source, cell.id, "exec"), names)
        stored = "".join(o.text for o in cell.outputs if o.output_type == "stream")
        if "message(" in cell.source and "def message" not in cell.source:
            messages += 1
            if printed.getvalue().strip() != stored.strip() or not stored.strip():
                found.append(f"cell {cell.id} prints {printed.getvalue().strip()[:150]!r}")
    report(found, "run nbs/troubleshooting.ipynb again, and read what stands below the message.")
    assert messages >= 10


# --- Cite, changelog, pictures


def test_the_bib_entry_agrees_with_the_citation_file():
    cite = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    bib = re.search(r"```bibtex\n(.*?)```", text("cite.ipynb"), re.S)[1]
    fields = dict(re.findall(r"^\s*(\w+)\s*=\s*\{(.*)\},?$", bib, re.M))
    assert fields["title"] == cite["title"]
    assert fields["version"] == cite["version"] == settings()["version"]
    assert fields["url"] == cite["repository-code"]
    assert fields["license"] == cite["license"]
    authors = [a["name"] for a in cite["authors"]]
    assert fields["author"].strip("{}") == " and ".join(authors)
    assert f"microgen {cite['version']}" in text("cite.ipynb")


def test_the_changelog_page_shows_the_file():
    cell = cells("changelog.ipynb", "code")[-1]
    (shown,) = [o.data["text/markdown"] for o in cell.outputs if "text/markdown" in o.data]
    title, _, body = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").partition("\n")
    assert title == "# Changelog" and shown.strip() == body.strip(), (
        "run nbs/changelog.ipynb again: CHANGELOG.md has changed"
    )


def first_pictures():
    path = ROOT / ".ci" / "first_pictures.py"
    spec = importlib.util.spec_from_file_location("first_pictures", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_picture_that_opens_a_tutorial_is_one_of_its_own():
    module = first_pictures()
    for tutorial in module.PICTURES:
        path = module.image_of(tutorial)
        assert path.read_bytes() == module.picture_in(tutorial), (
            f"nbs/images/{path.name} is old: run `python .ci/first_pictures.py`"
        )


# --- Every page


@pytest.mark.parametrize("name", [n for n in readers_pages() if n.startswith("tutorials/")])
def test_a_tutorial_opens_with_runtime_and_picture(name):
    opening = cells(name)[1].source
    assert re.search(r"^(.*\s)?Runtime: ", opening, re.M), f"{name}: say how long it takes"
    assert "GPU" in opening or "CPU" in opening, f"{name}: say whether a GPU is needed"
    first = [c for c in cells(name, "code") if "eval: false" not in c.source][:3]
    shown = any("image/png" in o.get("data", {}) for c in first for o in c.outputs)
    assert "](../images/" in opening or shown, f"{name}: show a picture of the result first"


@pytest.mark.parametrize("name", [n for n in readers_pages() if n != "index.ipynb"])
def test_a_page_says_where_to_go_next(name):
    end = section(name, "Where to go next")
    assert len(re.findall(r"\]\([^)]+\.ipynb\)", end)) >= 1, name


HOUSE_WORDS = {
    r"\brooms?\b(?![ -]temperature)": "module",
    r"\bdraw(s|n|ings?)?\b": "generated images, sampled values, plotted figures, injected particles",
    r"\bthe same line\b": "run the same command again to resume",
    r"\bin words\b": "give the reason",
    r"\bmend(s|ed)?\b": "cure, correct",
}


@pytest.mark.parametrize("name", readers_pages())
def test_the_english_of_a_page(name):
    found = []
    for cell in cells(name, "markdown"):
        prose = re.sub(r"```.*?```|`[^`]*`", "", cell.source, flags=re.S)
        for word, better in HOUSE_WORDS.items():
            for hit in re.finditer(word, prose, re.I):
                found.append(f"nbs/{name} [cell {cell.id}] {hit[0]!r}: write {better}")
    report(found, "write as in a paper on microscopy.")


def test_the_library_says_how_to_resume_as_the_pages_do():
    found = [
        f"{path.relative_to(ROOT)}: {hit[0]!r}: write {HOUSE_WORDS[word]}"
        for path in sorted((ROOT / "microgen").rglob("*.py"))
        for word in (r"\bthe same line\b",)
        for hit in re.finditer(word, path.read_text(encoding="utf-8"), re.I)
    ]
    report(found, "the comments are what --help and the reference show.")


@pytest.mark.parametrize("name", readers_pages())
def test_what_a_page_does_not_run_shows_no_output(name):
    "An install cell is run at the reader's; what it said on the machine of an author is nobody's business."
    shown = [
        c.id for c in cells(name) if c.source.startswith("#| eval: false") and c.get("outputs")
    ]
    report([f"nbs/{name} [cell {i}]" for i in shown], "take the output of this cell away.")


@pytest.mark.parametrize("name", readers_pages())
def test_no_page_installs_another_project(name):
    "The name on PyPI is not ours."
    everything = "\n".join(c.source for c in cells(name))
    found = re.findall(
        r"pip install[^\n`&]*?[ \"']microgen(?:\[[\w,]*\])?[\"']?(?!\S| @)", everything
    )
    report([f"nbs/{name}: {line}" for line in found], "install from a clone: pip install .")
