"""The results that the page "measured" shows: one CSV file an area, one number a row.

    from results import write
    write("stem", [{"what": "speed", "case": "renderer", "value": 367.0, "unit": "images/s"}], command)

A benchmark calls `write` behind its option `--save`. A row replaces the one with the same quantity (`what`) and case;
all others stay. The commit, the machine and the command are filled in here.
"""

import csv
import io
import math
import numbers
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path(__file__).resolve().parent / "results"
COLUMNS = (
    "what",  # quantity
    "case",  # image, method or setting
    "value",
    "low",  # lower end of its interval; empty without one
    "high",
    "unit",  # 1 for a ratio
    "n",  # images, runs or repeats behind the value
    "aim",
    "commit",  # of the project whose run printed the value
    "machine",
    "command",  # that printed it
    "note",
)
KEPT = ("aim", "note")  # written by a person: a new run keeps them
DIGITS = 4  # significant ones of a value


def read(area, folder=FOLDER):
    "Rows of an area, each a dict of text; an empty list when the file is missing."
    path = Path(folder) / f"{area}.csv"
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def text_of(value):
    "A number as the file holds it: four significant digits, never in powers of ten."
    if isinstance(value, str):
        return value
    if isinstance(value, numbers.Integral):
        return str(value)
    if not math.isfinite(value):
        raise ValueError(f"{value} is no result: leave the row out")
    if value == 0:
        return "0"
    places = DIGITS - 1 - math.floor(math.log10(abs(value)))
    return f"{float(value):.{max(places, 0)}f}"


def commit():
    "Short hash of the commit that runs; `-dirty` is added when files differ from it."
    told = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return told.stdout.strip()


def processor():
    "Name of the processor."
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def machine():
    "Processor, GPU, cores, and the versions that matter for speed."
    parts = [processor(), f"{os.cpu_count()} cores"]
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    return f"{', '.join(parts)}; Python {platform.python_version()}, torch {version('torch')}"


def this_command():
    "The command line of this process, relative to the project, without `--save`."
    script = Path(sys.argv[0]).resolve().relative_to(ROOT).as_posix()
    options = [word for word in sys.argv[1:] if word != "--save"]
    return " ".join(["python", script, *options])


def write(area, rows, command=None, folder=FOLDER):
    """Put rows into the file of an area: those with the same quantity and case are replaced, others appended.

    A row is a dict with `what`, `case`, `value`, `unit` and, where they apply, `low`, `high`, `n`, `aim`, `note`.
    The file is replaced as a whole: a run that is killed leaves the old one.
    """
    stamp = {"commit": commit(), "machine": machine(), "command": command or this_command()}
    held = {(row["what"], row["case"]): row for row in read(area, folder)}
    for row in rows:
        unknown = set(row) - set(COLUMNS)
        if unknown:
            raise ValueError(f"no such column: {sorted(unknown)}; there are {COLUMNS}")
        key = row["what"], row["case"]
        old = held.get(key, {})
        new = dict.fromkeys(COLUMNS, "")
        new.update({name: old.get(name, "") for name in KEPT})
        new.update({name: text_of(value) for name, value in row.items()})
        new.update(stamp)
        held[key] = new

    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(held.values())
    path = Path(folder) / f"{area}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(text.getvalue(), encoding="utf-8")
    os.replace(unfinished, path)
    return path
