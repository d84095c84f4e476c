"""Write the project's address, which stands once in settings.ini, everywhere else: links, badges, install cells.

python .ci/address.py          rewrites what differs
python .ci/address.py --check  names what differs, and exits with 1

A tutorial gets a line of badges under the comment <!-- badges --> and a cell that installs the package (its
extras are kept); nbs/index.ipynb gets the badges alone. Links to the site, to the
repository and to its files on GitHub, Colab and Kaggle get the account of settings.ini.
"""

import json
import re
import subprocess
import sys
from configparser import ConfigParser
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BADGES = "<!-- badges -->"


@dataclass(frozen=True)
class Address:
    "Where the project lives."

    user: str  # account on GitHub
    repo: str  # name of the repository
    branch: str  # that readers see
    git_url: str  # page of the repository
    site: str  # first page of the documentation, without a slash at its end

    def colab(self, notebook):
        "Link that opens a notebook of the repository in Colab."
        place = f"{self.user}/{self.repo}/blob/{self.branch}/{notebook}"
        return f"https://colab.research.google.com/github/{place}"

    def kaggle(self, notebook):
        "Link that opens a notebook of the repository in Kaggle."
        return (
            f"https://kaggle.com/kernels/welcome?src={self.git_url}/blob/{self.branch}/{notebook}"
        )


def read_address(root=ROOT):
    "The address that settings.ini states."
    config = ConfigParser(delimiters=["="])
    config.read(root / "settings.ini", encoding="utf-8")
    cfg = config["DEFAULT"]
    site = cfg["doc_host"] + cfg["doc_baseurl"]
    return Address(cfg["user"], cfg["repo"], cfg["branch"], cfg["git_url"], site)


def badge(label, picture, target):
    "One picture that is a link."
    return f"[![{label}]({picture})]({target})"


def badge_line(
    address,
    notebook,  # that Colab and Kaggle open, from the top of the project
    page,  # that the first badge leads to, a link
):
    "Documentation, tests, Open in Colab, Open in Kaggle."
    tests = f"{address.git_url}/actions/workflows/test.yml"
    badges = [
        badge("Documentation", "https://img.shields.io/badge/docs-read-blue", page),
        badge("Tests", f"{tests}/badge.svg", tests),
        badge(
            "Open in Colab",
            "https://colab.research.google.com/assets/colab-badge.svg",
            address.colab(notebook),
        ),
        badge(
            "Open in Kaggle",
            "https://kaggle.com/static/images/open-in-kaggle.svg",
            address.kaggle(notebook),
        ),
    ]
    return f"{BADGES}\n{' '.join(badges)}"


def install_cell(address, extras=""):
    "Source of the cell that installs the package in a notebook on a server."
    return (
        "#| eval: false\n"
        "# Colab and Kaggle: run this cell once. At home: run the line in a shell, without the exclamation mark.\n"
        f'!pip install -q "{address.repo}{extras} @ git+{address.git_url}"'
    )


def page_of(path):
    "Name of the page that nbdev makes of a notebook: 'tutorials/01_walls.ipynb' gives 'tutorials/walls.html'."
    path = Path(path)
    name = re.sub(r"^\d+[a-zA-Z0-9]*_", "", path.name)
    return path.with_name(name).with_suffix(".html").as_posix()


def relink(text, address):
    "Every link to the site and to the repository, whatever account it names, with the one of settings.ini."
    repo = re.escape(address.repo)
    owner, end = r"[\w.-]+", r"(?![\w-])"
    place = f"{address.user}/{address.repo}"
    for pattern, link in {
        rf"https://github\.com/{owner}/{repo}{end}": address.git_url,
        rf"https://{owner}\.github\.io/{repo}{end}": address.site,
        rf"(?<=colab\.research\.google\.com/github/){owner}/{repo}{end}": place,
        rf"(?<=raw\.githubusercontent\.com/){owner}/{repo}{end}": place,
    }.items():
        text = re.sub(pattern, lambda _, link=link: link, text)
    return text


def source(cell):
    "Text of a cell of a notebook's JSON."
    return "".join(cell["source"])


def new_cell(kind, name, text):
    "A cell as nbformat 4.5 writes it."
    cell = {"cell_type": kind, "id": name, "metadata": {}, "source": text}
    return cell | ({"execution_count": None, "outputs": []} if kind == "code" else {})


def set_badges(cells, line):
    "Write the badges under the comment, whose cell may hold more; without one, into a new cell under the title."
    old = re.compile(rf"^{BADGES}$(\n\[!\[.*)?", re.M)
    for cell in cells:
        if cell["cell_type"] == "markdown" and old.search(source(cell)):
            text = old.sub(lambda _: line, source(cell))
            cell["source"] = text.splitlines(keepends=True)
            return
    cells.insert(1, new_cell("markdown", "badges", line.splitlines(keepends=True)))


def set_install(cells, address):
    "Write the cell that installs the package; without one, before the first code cell."
    pattern = rf"pip install .*{address.repo}(\[[\w,]+\])? @ git"
    for cell in cells:
        found = re.search(pattern, source(cell)) if cell["cell_type"] == "code" else None
        if found:
            text = install_cell(address, found[1] or "")
            cell["source"] = text.splitlines(keepends=True)
            return
    first = next(k for k, cell in enumerate(cells) if cell["cell_type"] == "code")
    text = install_cell(address)
    cells.insert(first, new_cell("code", "install", text.splitlines(keepends=True)))


def derived_notebook(path, text, address, root=ROOT):
    "A notebook with its links, badges and install cell."
    where = path.relative_to(root / "nbs")
    is_tutorial = where.parts[0] == "tutorials"
    text = relink(text, address)
    if not is_tutorial and BADGES not in text:
        return text
    notebook = json.loads(text)
    opened = path.relative_to(root) if is_tutorial else Path("nbs/tutorials/01_quick_start.ipynb")
    page = f"{address.site}/{page_of(where)}" if is_tutorial else address.site
    set_badges(notebook["cells"], badge_line(address, opened.as_posix(), page))
    if is_tutorial:
        set_install(notebook["cells"], address)
    return json.dumps(notebook, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def files(root=ROOT):
    "Files that may name the address: papers, notebooks, the site's and the workflows' settings."
    call = ["git", "ls-files", "-co", "--exclude-standard"]
    done = subprocess.run(call, cwd=root, capture_output=True, text=True)
    names = done.stdout.splitlines()
    if done.returncode != 0:  # a copy without git
        names = [p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()]
    kinds = {".md", ".cff", ".yml", ".yaml", ".ipynb", ".qmd", ".toml", ".txt"}
    paths = [root / name for name in dict.fromkeys(names)]
    skipped = {"_proc", "_docs", "build"}
    return [
        path
        for path in sorted(paths)
        if path.suffix in kinds
        and path.is_file()
        and not path.is_symlink()
        and not skipped & set(path.relative_to(root).parts)
    ]


def derived(path, address, root=ROOT):
    "What a file should hold."
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        return derived_notebook(path, text, address, root)
    return relink(text, address)


def main():
    "Rewrite or check every place."
    address = read_address()
    differing = [path for path in files() if derived(path, address) != path.read_text("utf-8")]
    names = [path.relative_to(ROOT).as_posix() for path in differing]
    if "--check" in sys.argv and names:
        sys.exit(
            "These files do not have the address of settings.ini: "
            + ", ".join(names)
            + ". Run `python .ci/address.py` and commit what it writes."
        )
    for path in differing:
        path.write_text(derived(path, address), encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
