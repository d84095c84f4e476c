"""What the page about the house says of itself: its own kind and model pass both registry tests, as they stand there."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

TOP = Path(__file__).parent.parent
PAGE = TOP / "nbs/explanations/house.ipynb"


def definitions():
    "Source of the cells of the page that define the kind and the model, without those that use them."
    cells = [cell.source for cell in nbformat.read(PAGE, 4).cells if cell.cell_type == "code"]
    said = [text for text in cells if text.startswith(("from dataclasses", "@dataclass", "class "))]
    model = [text for text in cells if 'MODELS["squeeze"] = ' in text]
    assert len(said) >= 4 and len(model) == 1, "the page no longer shows both"
    return "\n\n".join(dict.fromkeys(said + model))


@pytest.fixture(scope="module")
def of_the_page(tmp_path_factory):
    "A folder with a module of what the page defines."
    folder = tmp_path_factory.mktemp("page")
    (folder / "of_the_page.py").write_text(definitions(), encoding="utf-8")
    return folder


@pytest.mark.parametrize("registry", ["test_kinds", "test_models"])
def test_the_examples_of_the_page_pass_the_registry_tests(registry, of_the_page):
    paths = [str(of_the_page), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"MICROGEN_PLUGS": "of_the_page", "PYTHONPATH": os.pathsep.join(paths)}
    chosen = "lamellae or squeeze"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", chosen, f"tests/{registry}.py"]
    done = subprocess.run(command, cwd=TOP, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
