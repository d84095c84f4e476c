"""Progress as a terminal, a notebook and a log show it."""

import os
import subprocess
import sys

import nbformat
import pytest
from house import ROOT

WORK = """
from microgen import progress
from time import sleep
with progress.progress_bar(20, "counting", {shown}, "images") as advance:
    for k in range(20):
        sleep({seconds})
        advance()
"""
ENV = {**os.environ, "PYTHONPATH": str(ROOT)}


def output(text, **kwargs):
    done = subprocess.run(
        [sys.executable, "-c", text], env=ENV, capture_output=True, text=True, timeout=60, **kwargs
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_log_gets_lines_on_the_way():
    lines = output(WORK.format(shown=True, seconds=0.3)).splitlines()
    assert 3 <= len(lines) <= 5 and lines[-1].startswith("counting 20/20 images, 100 %")
    assert all("images/s" in line and "so far" in line for line in lines)
    assert all(line.endswith("left") for line in lines[:-1])
    assert output(WORK.format(shown=None, seconds=0.01)) == ""


def test_a_terminal_gets_a_bar():
    pty = pytest.importorskip("pty")  # of POSIX
    ours, theirs = pty.openpty()
    text = WORK.format(shown=True, seconds=0.01)
    done = subprocess.run([sys.executable, "-c", text], env=ENV, stdout=theirs, timeout=60)
    os.close(theirs)
    said = os.read(ours, 2**16).decode()
    os.close(ours)
    assert done.returncode == 0 and "━" in said and "20/20" in said


def test_a_notebook_gets_one_line_that_changes():
    nbclient = pytest.importorskip("nbclient")
    cells = [
        nbformat.v4.new_code_cell(WORK.format(shown=shown, seconds=seconds))
        for shown, seconds in ((True, 0.05), (None, 0.15), (None, 0.01))
    ]
    notebook = nbformat.v4.new_notebook(cells=cells)
    nbclient.NotebookClient(notebook, kernel_name="python3").execute(env=ENV)
    asked, slow, quick = (cell.outputs for cell in notebook.cells)
    assert len(asked) == len(slow) == 1 and not quick
    for (one,) in (asked, slow):
        assert one["data"]["text/plain"].startswith("counting 20/20 images, 100 %")
