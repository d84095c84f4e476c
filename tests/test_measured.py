"""The results of the benchmarks and the page that shows them: complete rows, real commands, no number from elsewhere."""

import csv
import math
import re
import shlex
import sys

import nbformat
import pytest
import typer
from house import NBS, ROOT

from microgen.cli import app

sys.path.insert(0, str(ROOT / "benchmarks"))
import results

PAGE = NBS / "explanations" / "measured.ipynb"
AREAS = sorted(path.stem for path in results.FOLDER.glob("*.csv"))
NUMBER = r"\d+(?:,\d{3})*(?:\.\d+)?"


def of_page(kind):
    "Cells of the page, of one type."
    return [c for c in nbformat.read(PAGE, as_version=4).cells if c.cell_type == kind]


def shown():
    "What the code cells of the page show, as Markdown."
    texts = []
    for cell in of_page("code"):
        for output in cell.outputs:
            assert output.output_type == "display_data", f"[cell {cell.id}] {output}"
            texts.append("".join(output.data["text/markdown"]))
    return texts


def with_minus(text):
    return text.replace("-", "−")


def numbers(text):
    return set(re.findall(NUMBER, text))


def test_there_are_results():
    assert {"stem", "measure", "scan", "structure", "counting", "pix2pix", "training"} <= set(AREAS)


@pytest.mark.parametrize("area", AREAS)
def test_rows_are_complete(area):
    with (results.FOLDER / f"{area}.csv").open(encoding="utf-8", newline="") as file:
        assert next(csv.reader(file)) == list(results.COLUMNS)
    rows = results.read(area)
    keys = [(row["what"], row["case"]) for row in rows]
    assert len(set(keys)) == len(keys), "one row for each quantity and case"
    for row in rows:
        assert None not in row and None not in row.values(), row
        for name in ("what", "case", "value", "unit", "machine", "command"):
            assert row[name] == row[name].strip() != "", (name, row)
        assert math.isfinite(float(row["value"])), row
        assert re.fullmatch(r"[0-9a-f]{7,40}(-dirty)?", row["commit"]), row
        assert row["n"] == "" or int(row["n"]) > 0, row


@pytest.mark.parametrize("area", AREAS)
def test_intervals_hold_their_value(area):
    for row in results.read(area):
        assert bool(row["low"]) == bool(row["high"]), row
        if row["low"]:
            assert float(row["low"]) <= float(row["value"]) <= float(row["high"]), row


def commands(area):
    return sorted({row["command"] for row in results.read(area)})


def options(script):
    "Options of a benchmark, as its source states them."
    source = (ROOT / script).read_text(encoding="utf-8")
    return set(re.findall(r'"(--[\w-]+)"', source))


@pytest.mark.parametrize("area", AREAS)
def test_commands_exist(area):
    for command in commands(area):
        program, *words = shlex.split(command)
        if program == "microgen":
            subcommand = typer.main.get_command(app).commands[words[0]]
            params = subcommand.params
            known = {option for p in params for option in (*p.opts, *p.secondary_opts)}
            assert {w for w in words if w.startswith("--")} <= known, command
            continue
        assert program in ("python", "nbdev_test"), command
        files = [word for word in words if word.endswith((".py", ".ipynb"))]
        assert len(files) == 1 and (ROOT / files[0]).exists(), command
        if files[0].startswith("benchmarks/"):
            assert {w for w in words if w.startswith("--")} <= options(files[0]), command


def test_the_page_names_every_command():
    text = "\n".join(cell.source for cell in of_page("markdown"))
    named = {line.split("  #")[0].rstrip() for line in text.splitlines()}
    missing = [c for area in AREAS for c in commands(area) if c not in named]
    assert not missing, f"{PAGE.name}: name the commands {missing}"


def test_tables_come_from_the_results():
    assert not [c.id for c in of_page("markdown") if re.search(r"^\|", c.source, re.M)]
    for cell in of_page("code"):
        if "display(" not in cell.source:
            assert cell.source.startswith("#| echo: false\n") and cell.outputs, cell.id


def test_every_number_shown_is_a_result():
    held = [text for area in AREAS for row in results.read(area) for text in row.values()]
    known = set().union(*map(numbers, held))
    for text in shown():
        assert numbers(text) <= known, f"{numbers(text) - known} is in no file of results"


def test_every_result_is_shown():
    "A file that changed after the page was executed would show here."
    text = "\n".join(shown())
    for area in AREAS:
        for row in results.read(area):
            for name in ("value", "low", "high", "commit", "machine"):
                assert with_minus(row[name]) in with_minus(text), f"execute {PAGE.name}: {row}"


def test_the_first_lines_are_expectations():
    first = shown()[0].splitlines()
    lines = [line for line in first if line.startswith("- ")]
    assert first[0] == "**For your image expect:**" and len(lines) == 10
    assert all(re.match(r"- \*\*[^*]+:\*\* \S.*\d.*\.$", line) for line in lines)


# --- write


ROW = {"what": "speed", "case": "renderer", "value": 367.4, "unit": "images/s"}


def test_a_row_is_completed(tmp_path):
    results.write("stem", [ROW], "python benchmarks/stem.py", tmp_path)
    (row,) = results.read("stem", tmp_path)
    assert row["value"] == "367.4" and row["low"] == "" and row["unit"] == "images/s"
    assert row["command"] == "python benchmarks/stem.py" and "Python" in row["machine"]
    assert re.fullmatch(r"[0-9a-f]{7,40}(-dirty)?", row["commit"])


def test_a_row_replaces_its_own_and_no_other(tmp_path):
    other = ROW | {"case": "another", "note": "by hand"}
    results.write("stem", [ROW | {"aim": "≥ 300"}, other], "first", tmp_path)
    results.write("stem", [ROW | {"value": 12, "low": 11.0, "high": 13.5}], "second", tmp_path)
    one, two = results.read("stem", tmp_path)
    assert (one["value"], one["low"], one["command"]) == ("12", "11.00", "second")
    assert one["aim"] == "≥ 300", "a new run keeps the aim"
    assert (two["case"], two["command"], two["note"]) == ("another", "first", "by hand")
    assert [path.name for path in tmp_path.iterdir()] == ["stem.csv"]


def test_what_is_no_result_is_refused(tmp_path):
    with pytest.raises(ValueError, match="leave the row out"):
        results.write("stem", [ROW | {"value": math.nan}], "command", tmp_path)
    with pytest.raises(ValueError, match="no such column"):
        results.write("stem", [ROW | {"median": 1}], "command", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "value, text",
    [(2.6e-6, "0.000002600"), (-0.27, "-0.2700"), (0.0, "0"), (7, "7"), (1234.56, "1235")],
)
def test_numbers_are_plain(value, text):
    assert results.text_of(value) == text


# --- What the benchmarks save replaces what the page shows


def keys_of(rows):
    return {(row["what"], row["case"]) for row in rows}


def test_saved_walls_are_those_of_the_page():
    import measure
    import pandas as pd

    ideal = pd.DataFrame(1.0, index=measure.KINDS, columns=list(measure.SAVED)[:10])
    ideal["walls"] = ["0 of 0" if kind == "UP" else "20 of 20" for kind in measure.KINDS]
    scans = pd.DataFrame(1.0, index=["good", "typical", "poor"], columns=list(measure.SAVED)[10:])
    scans["pull, least and most of an image"] = "0.90 to 1.10"
    rows = measure.saved(ideal, 20) + measure.saved(scans, 12, "{} scan")
    held = [r for r in results.read("measure") if "measure.py" in r["command"]]
    assert keys_of(rows) == keys_of(held)


def test_saved_trainings_are_those_of_the_page():
    import training

    times = [(part, 1.0, 1.0, 1.0, 0.9, 1.1) for part in training.PARTS]
    rows = training.saved_overhead(times, "64 px", 30)
    rows += training.saved_memory({"bare": 1e3, "microgen": 1e3, "ema": 1e3}, "64 px")
    rows += training.saved_kills(20, 40, 20)
    counts = dict.fromkeys(training.STEPS, (858, 600, 2))
    rows += training.saved_step(counts, dict.fromkeys(training.CUT, 1e-6))
    assert keys_of(rows) == keys_of(results.read("training"))


def test_saved_intervals_are_those_of_the_page():
    import intervals

    shape = {
        (d, m, n): (0.9, 1.0)
        for d in intervals.DISTRIBUTIONS
        for m in intervals.METHODS
        for n in intervals.SIZES
    }
    chances = {(chance, n): 0.9 for chance in intervals.CHANCES for n in intervals.SIZES}
    assert keys_of(intervals.saved(shape, chances, 10)) == keys_of(results.read("intervals"))


def test_the_interval_of_the_package_holds_what_it_says():
    for row in results.read("intervals"):
        if row["what"] == "coverage, n = 16" and row["case"].endswith(": outer"):
            assert 0.93 <= float(row["value"]) <= 0.97, row


def test_intervals_of_generated_walls_hold_what_they_say():
    import numpy as np
    import pix2pix

    from microgen.core import mean_interval

    rng = np.random.default_rng(0)
    table = rng.lognormal(size=(3, 12))  # seeds, scenes
    _, *ends = pix2pix.over_scenes(lambda v: pix2pix.aim(v, "mean"), table)
    assert ends == pytest.approx([float(end) for end in mean_interval(table.mean(0))])
    assert math.isnan(pix2pix.over_scenes(np.mean, table[:, :2])[1])  # two scenes have no interval

    rms_held, median_held, n_sets = 0, 0, 300
    for _ in range(n_sets):
        scenes = rng.normal(size=(1, 20))
        _, low, high = pix2pix.over_scenes(pix2pix.aim, scenes)
        rms_held += low <= 1 <= high
        value, low, high = pix2pix.median_over_scenes(scenes)
        assert low <= value <= high
        median_held += low <= 0 <= high
    assert 0.91 <= rms_held / n_sets <= 0.99 and 0.93 <= median_held / n_sets <= 0.99


def test_what_the_adversary_is_worth_is_shown_for_every_training_that_was_measured():
    cases = {r["case"] for r in results.read("pix2pix") if "--part adversary" in r["command"]}
    whats = {r["what"] for r in results.read("pix2pix") if r["case"].startswith("as it is,")}
    assert any(case.startswith("as it is, 64 px") for case in cases)
    assert any(case.startswith("plain U-Net + L1, 64 px") for case in cases)
    assert any(case.startswith("scans without noise") for case in cases)
    asked = {"displacement error", "p of the two-sample test"}
    rim = {"difference to scans in the outer 0.25 nm", "column error in the outer 0.25 nm"}
    assert asked | rim <= whats
