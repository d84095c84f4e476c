"""What users get: the built wheel, and their first minutes with it."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from house import LIB, ROOT, settings, tracked

SMOKE = Path(__file__).parent / "smoke" / "user_smoke.py"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "The wheel built from a clean copy of the project, as pip builds it from a clone."
    top = tmp_path_factory.mktemp("wheel")
    for f in tracked():
        to = top / "src" / f.relative_to(ROOT)
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(f, to, follow_symlinks=False)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", top, top / "src"]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = top.glob("*.whl")
    return zipfile.ZipFile(path)


def test_wheel_holds_code_and_data(wheel):
    inside = {n for n in wheel.namelist() if n.startswith("microgen/")}
    expected = {
        f.relative_to(ROOT).as_posix() for f in tracked() if LIB in f.parents and f.suffix != ".pyc"
    }
    assert expected == inside, (
        f"missing {sorted(expected - inside)}, unasked {sorted(inside - expected)}: see package_data in setup.py"
    )
    assert sum(n.endswith(".cif") for n in inside) >= 18, "the shipped structures"


def test_wheel_states_what_settings_say(wheel):
    from email.parser import Parser

    (name,) = [n for n in wheel.namelist() if n.endswith("METADATA")]
    meta, cfg = Parser().parsestr(wheel.read(name).decode()), settings()
    assert (meta["Name"], meta["Version"], meta["Requires-Python"]) == (
        cfg["lib_name"],
        cfg["version"],
        f">={cfg['min_python']}",
    )
    extras = {k.removesuffix("_requirements") for k in cfg if k.endswith("_requirements")} | {"all"}
    assert set(meta.get_all("Provides-Extra")) == extras
    plain = [r for r in meta.get_all("Requires-Dist") if "extra ==" not in r]
    assert len(plain) == len(cfg["requirements"].split())
    assert not [r for r in plain if "<" in r.split(";")[0] or "==" in r.split(";")[0]], (
        "runtime requirements carry no upper limit"
    )
    text = meta.get_payload()
    assert "](nbs/" not in text and 'src="nbs/' not in text, "PyPI shows no relative picture"
    (points,) = [n for n in wheel.namelist() if n.endswith("entry_points.txt")]
    assert "microgen = microgen.cli:main" in wheel.read(points).decode().replace(
        "=", " = "
    ).replace("  ", " ")


def test_first_minutes_of_a_user(tmp_path):
    "In the environment that MICROGEN_USER_PYTHON names (.ci/run makes it without the dev extra), else in this one."
    python = os.environ.get("MICROGEN_USER_PYTHON", sys.executable)
    if not Path(python).with_name("microgen").exists():
        pytest.skip(
            f"no microgen command beside {python}: pip install -e . to run the user's first minutes"
        )
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [python, SMOKE, tmp_path], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
