"""`microgen tour` from end to end, in small: one page that needs nothing else, made again, and never lost."""

import re
import sys

import pytest
from typer.testing import CliRunner

import microgen.chapters
import microgen.tour as room
from microgen.chapters.base import CHAPTERS, Chapter
from microgen.cli import app
from microgen.core import MicrogenError
from microgen.report import Section


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    "A quick tour."
    folder = tmp_path_factory.mktemp("tour")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["/somewhere/microgen", "tour", "--seed", "3"])
        room.tour(folder, seed=3, workers=1, quick=True)
    return folder


def test_the_report_is_one_page_with_its_origin(out):
    page = (out / "report.html").read_text(encoding="utf-8")
    assert re.findall(r"<h2[^>]*>([^<:]+)", page) == [
        "Walls in YMnO3",
        "Nanoparticles",
        "Training",
        "How to make this page again",
    ]
    assert "This chapter stopped" not in page
    assert "microgen tour --seed 3" in page and "seed 3" in page
    assert re.search(r"microgen \d+\.\d+", page) and re.search(r"torch \d+\.\d+", page)
    assert page.count('<img alt="') == 5
    assert page.count("<table") >= 1
    assert all(
        link.startswith(("data:image/png;base64,", "#"))
        for link in re.findall(r'(?:src|href)="([^"]*)"', page)
    )
    assert not re.search(r"<script|<link|<iframe|@import|url\(", page)


def test_a_tour_of_another_seed_fits_into_the_same_folder(out, monkeypatch):
    training = CHAPTERS["Training: walls generated from their maps"]
    monkeypatch.setattr(room, "chapters", lambda: [training])
    for seed in (4, 3):  # another, and the first once more
        page = room.tour(out, seed=seed, workers=1, quick=True).read_text(encoding="utf-8")
        assert (
            f"seed {seed}" in page
            and "This chapter stopped" not in page
            and page.count("<img") == 1
        )


def test_a_chapter_that_fails_costs_the_others_nothing(tmp_path, monkeypatch, capsys):
    good = Chapter("Good", lambda tour: Section("Good").text("It works."), 2, 1)
    bad = Chapter("Bad", lambda tour: [].pop(), 1, 1)
    monkeypatch.setattr(room, "chapters", lambda: [bad, good])
    with pytest.raises(
        MicrogenError, match="report.html is written without the chapter 'Bad': IndexError"
    ):
        room.tour(tmp_path, progress=True)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "This chapter stopped: IndexError: pop from empty list" in page and "It works." in page
    assert re.findall(r"(\d)/2 (\w+); about \d+ s left", capsys.readouterr().out) == [
        ("1", "Bad"),
        ("2", "Good"),
    ]
    done = CliRunner().invoke(app, ["tour", "--out", str(tmp_path / "again")])
    assert (
        done.exit_code == 1
        and "Traceback" not in done.output
        and (tmp_path / "again" / "report.html").exists()
    )


def test_a_new_room_is_found_without_an_edit(tmp_path, monkeypatch):
    (tmp_path / "weather.py").write_text(
        "from microgen.chapters.base import chapter\n"
        "from microgen.report import Section\n"
        "@chapter('Weather', place=15)\n"
        "def weather(tour): return Section('Weather').text('dry')\n"
    )
    monkeypatch.setattr(microgen.chapters, "__path__", [*microgen.chapters.__path__, str(tmp_path)])
    try:
        titles = [c.title.split(":")[0] for c in room.chapters()]
        assert titles == ["Walls in YMnO3", "Weather", "Nanoparticles", "Training", "Your image"]
    finally:
        CHAPTERS.pop("Weather", None)
        sys.modules.pop("microgen.chapters.weather", None)


@pytest.mark.parametrize("where", ["a file", "below a file", "/proc/x"])
def test_a_folder_that_cannot_be_is_one_sentence(tmp_path, where):
    (tmp_path / "file").write_text("mine")
    out = {
        "a file": tmp_path / "file",
        "below a file": tmp_path / "file" / "x",
        "/proc/x": "/proc/x",
    }[where]
    done = CliRunner().invoke(app, ["tour", "--out", str(out)])
    assert done.exit_code == 1 and isinstance(done.exception, SystemExit)
    assert len(done.output.strip().splitlines()) == 1 and str(out) in done.output
    assert (tmp_path / "file").read_text() == "mine"
