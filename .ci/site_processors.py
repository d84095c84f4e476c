"""What nbdev does to a notebook before it becomes a page, in our own way; settings.ini names these processors.

- LinkNames: a name in backticks links to what it means, and a word that may mean anything links to nothing;
  a class shows the fields that it holds.
- DescribePictures: every picture has an alternative text.
- FoldTests: tests in library pages are folded, and the site's search leaves them out.
- ListPublicNames: the page that opens the reference.

nbdev imports this file by name: PYTHONPATH=.ci nbdev_docs
"""

import ast
import os
import re
import textwrap
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import nbformat
import yaml
from nbdev.config import get_config
from nbdev.process import Processor

# --- What the package holds: read from its source, so that nothing is imported


@dataclass(frozen=True)
class Symbol:
    "A public function, class or method: where it is defined, and where its page shows it."

    module: str  # without the name of the package: "stem.wall"
    name: str  # "displace", "Micrograph.crop"
    anchor: str  # heading on the page: a method inside a class is shown with its class
    line: int  # of its definition
    summary: str  # first line of its docstring


@cache
def package():
    "Folder of the modules."
    return get_config().lib_path


def file_of(module):
    "Source file of a module."
    return package() / (module.replace(".", "/") + ".py")


@cache
def notebook_of():
    "Library notebook of each module: {'stem.wall': Path('19_stem.wall.ipynb')}."
    paths = sorted(get_config().nbs_path.glob("[0-9]*.ipynb"))
    named = {re.sub(r"^\d+[a-zA-Z0-9]*_", "", path.stem): Path(path.name) for path in paths}
    return {module: path for module, path in named.items() if file_of(module).exists()}


def summary(node):
    "First line of a docstring."
    return (ast.get_docstring(node) or "").strip().split("\n")[0]


def patched_class(function):
    "Name of the class that a function with @patch becomes a method of, or ''."
    names = [ast.unparse(decorator).split("(")[0] for decorator in function.decorator_list]
    if "patch" not in names or not function.args.args:
        return ""
    return ast.unparse(function.args.args[0].annotation)


@cache
def code_of(module):
    "Source of a module."
    return file_of(module).read_text(encoding="utf-8")


def symbols_of(module):
    "Public functions, classes and methods of one module."
    tree = ast.parse(code_of(module))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for node in tree.body:
        if not isinstance(node, kinds) or node.name.startswith("_"):
            continue
        owner = "" if isinstance(node, ast.ClassDef) else patched_class(node)
        name = f"{owner}.{node.name}" if owner else node.name
        yield Symbol(module, name, name.lower(), node.lineno, summary(node))
        if not isinstance(node, ast.ClassDef):
            continue
        for method in node.body:
            if isinstance(method, kinds) and not method.name.startswith("_"):
                full = f"{node.name}.{method.name}"
                yield Symbol(module, full, node.name.lower(), method.lineno, summary(method))


@cache
def symbols():
    "Every public symbol by module and name: {('stem.wall', 'displace'): Symbol}."
    found = [symbol for module in notebook_of() for symbol in symbols_of(module)]
    return {(symbol.module, symbol.name): symbol for symbol in found}


def is_record(node):
    "Is a class a dataclass or a NamedTuple, whose fields are its signature?"
    marks = [ast.unparse(mark) for mark in node.decorator_list + node.bases]
    return any(re.match(r"dataclass|NamedTuple", mark) for mark in marks)


def field_table(module, name):
    "Markdown table of the public fields of a dataclass or NamedTuple, with the comments beside them, or ''."
    lines = code_of(module).splitlines()
    rows = []
    for node in ast.parse(code_of(module)).body:
        if not isinstance(node, ast.ClassDef) or node.name != name or not is_record(node):
            continue
        for entry in node.body:
            if not isinstance(entry, ast.AnnAssign) or entry.target.id.startswith("_"):
                continue
            last = lines[entry.end_lineno - 1].encode()[entry.end_col_offset :].decode()
            comment = re.sub(r"^\s*#\s*", "", last).strip()
            comment = re.sub(r"([*~$^<\\])", r"\\\1", comment)  # plain text, no Markdown
            default = f" = {ast.unparse(entry.value)}" if entry.value else ""
            form = f"{entry.target.id}: {ast.unparse(entry.annotation)}{default}"
            row = [f"`{form}`", comment]
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
    return "\n".join(["| field | what it is |", "|---|---|", *rows]) if rows else ""


@cache
def public_names():
    "What `microgen.NAME` is, in the order of microgen/__init__.py: {'Micrograph': 'core'}."
    tree = ast.parse((package() / "__init__.py").read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    stated = [k.value for call in calls for k in call.keywords if k.arg == "submod_attrs"]
    places = ast.literal_eval(stated[0])
    return {name: module for module, names in places.items() for name in names}


# --- What a word in backticks means


@cache
def modules_with(name):
    "Modules that define a public name; the command line only repeats the names of others."
    return [module for module, known in symbols() if known == name and module != "cli"]


def find_dotted(word):
    "The symbol or module that `stem.wall`, `microgen.read`, `Micrograph.crop` or `count.size.fit_sizes` means."
    prefix = f"{package().name}."
    short = word.removeprefix(prefix)
    if short in notebook_of() and (short != word or "." in short):
        return Symbol(short, "", "", 1, "")
    if word.startswith(prefix) and short in public_names():
        return symbols().get((public_names()[short], short))
    parts = short.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        found = symbols().get((".".join(parts[:cut]), ".".join(parts[cut:])))
        if found:
            return found
    homes = modules_with(short) if short[:1].isupper() else []
    return symbols()[homes[0], short] if len(homes) == 1 else None


def find_symbol(
    word,  # what stands between backticks
    module,  # the page's own module, '' for a page without one
    imported,  # names that the notebook imports from the package, {name: module}
):
    """The symbol that a word means, or None.

    The page's own names come first, then those that it imports. A name of another page is recognised by its form
    (`fit_sizes`, `Micrograph`, `wall()`): a plain word such as `wall` or `score` may mean anything there.
    """
    name = word.removesuffix("()")
    if not re.fullmatch(r"[A-Za-z][\w.]*\w", name):
        return None
    own = symbols().get((module, name))
    if own:
        return own
    if name in imported:
        return symbols().get((imported[name], name))
    if "." in name:
        return find_dotted(name)
    looks_like_a_name = word.endswith("()") or "_" in name or name != name.lower()
    if not looks_like_a_name:
        return None
    if name in public_names():
        return symbols().get((public_names()[name], name))
    homes = modules_with(name)
    return symbols()[homes[0], name] if len(homes) == 1 else None


def imported_names(path):
    "Names that a notebook imports from the package: {'displace': 'stem.wall'}."
    names = {}
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type != "code":
            continue
        lines = ["" if re.match(r"\s*[%!]", line) else line for line in cell.source.splitlines()]
        for node in ast.walk(ast.parse("\n".join(lines))):
            if not isinstance(node, ast.ImportFrom) or not node.module:
                continue
            top, _, module = node.module.partition(".")
            if top == package().name:
                names.update({a.name: module or public_names().get(a.name) for a in node.names})
    return names


class LinkNames(Processor):
    "Names in backticks become links to the page that documents them; show_doc gets its link to the source."

    # an existing link or picture, code in several backticks, or one name in backticks
    pieces = re.compile(r"!?\[[^\]]*\]\([^)]*\)|``+.*?``+|(?<!`)`([^`\s]+)`(?!`)")

    def begin(self):
        self.path = Path(self.nb.path_)
        self.folder = self.path.parent.relative_to(get_config().nbs_path)
        self.module = re.sub(r"^\d+[a-zA-Z0-9]*_", "", self.path.stem)
        if notebook_of().get(self.module) != self.path.relative_to(get_config().nbs_path):
            self.module = ""
        self.imported = imported_names(self.path)

    def link(self, symbol):
        "Where a symbol is documented, as a link from this page."
        page = os.path.relpath(notebook_of()[symbol.module], self.folder)
        anchor = f"#{symbol.anchor}" if symbol.anchor else ""
        return Path(page).as_posix() + anchor

    def replace(self, match):
        word = match[1]
        symbol = find_symbol(word, self.module, self.imported) if word else None
        if symbol is None or symbol.name == self.described:
            return match[0]
        return f"[`{word}`]({self.link(symbol)})"

    def linkify(self, text, described=None):
        "Links in Markdown; code blocks, indented code and headings stay as they are."
        self.described = described  # a function does not link to itself
        lines, fenced = [], False
        for line in text.split("\n"):
            if line.lstrip().startswith("```"):
                fenced = not fenced
            elif not fenced and not line.startswith(("    ", "#")):
                line = self.pieces.sub(self.replace, line)
            lines.append(line)
        return "\n".join(lines)

    def document(self, text):
        "The output of show_doc with the link to its source and with links in its docstring."
        heading = re.search(r"^#+ (\S+)$", text, re.M)
        symbol = symbols().get((self.module, heading[1])) if heading else None
        if symbol is None:
            return self.linkify(text)
        cfg = get_config()
        file = f"{cfg.lib_path.name}/{self.module.replace('.', '/')}.py"
        url = f"{cfg.git_url}/blob/{cfg.branch}/{file}#L{symbol.line}"
        style = 'target="_blank" style="float:right; font-size:smaller"'
        text = re.sub(r"^\[source\]\(.*\n+", "", text, flags=re.M)
        text = text.replace("---\n\n", f"---\n\n[source]({url}){{{style}}}\n\n", 1)
        text = re.sub(r"^(Raises|Source):", r"\n**\1:**", text, flags=re.M)
        fields = field_table(self.module, symbol.name)
        text = self.linkify(text, symbol.name)
        return f"{text}\n\n{fields}" if fields else text

    def cell(self, cell):
        if cell.cell_type == "markdown":
            cell.source = self.linkify(cell.source)
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "text/markdown" in data:
                text = "".join(data["text/markdown"])
                is_doc = cell.source.rstrip().split("\n")[-1].startswith("show_doc(")
                data["text/markdown"] = self.document(text) if is_doc else self.linkify(text)


# --- Alternative texts


def plain(text):
    "Words of a piece of Markdown, without mark-up, formulas' signs and double quotes."
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)(\{[^}]*\})?", "", text)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"<[^>]+>", "", text)
    text = re.sub(r"\\([A-Za-z]+)", r" \1 ", text)  # \phi and other commands of formulas
    text = re.sub(r"[`*$\\{}^]|(?<!\w)_|_(?!\w)", "", text)
    return " ".join(text.replace('"', "'").split())


def first_sentence(text, limit=220):
    "The first sentence, cut between words when it is long."
    sentence = re.split(r"(?<=[.:;!?])\s+(?=[A-Z0-9('])", text)[0].rstrip(".:; ")
    return textwrap.shorten(sentence, limit, placeholder=" …")


def paragraphs(markdown):
    "Paragraphs of prose: no headings, code, formulas, tables, comments or fenced divisions."
    text = re.sub(r"```.*?```|\$\$.*?\$\$|<!--.*?-->", "", markdown, flags=re.S)
    blocks = [
        block.strip()
        for block in re.split(r"\n\s*\n", re.sub(r"^(#+ .*)$", r"\1\n", text, flags=re.M))
    ]
    return [block for block in blocks if block and not re.match(r"#|\||:::|---", block)]


class DescribePictures(Processor):
    "Every picture gets `fig-alt`: what the author wrote, or the heading and the sentence before it."

    def begin(self):
        head = yaml.safe_load(self.nb.cells[0].source.strip().strip("-")) or {}
        self.heading, self.sentence = head.get("title", ""), head.get("description", "")

    def listen(self, markdown):
        "Remember the last heading and the first sentence of the last paragraph."
        headings = re.findall(r"^#+ (.+)$", markdown, re.M)
        if headings:
            self.heading = plain(re.sub(r"\{[^}]*\}$", "", headings[-1]))
        prose = [plain(block) for block in paragraphs(markdown)]
        prose = [text for text in prose if text]
        if prose:
            self.sentence = first_sentence(prose[-1])

    def cell(self, cell):
        if cell.cell_type == "markdown":
            self.listen(cell.source)
        if cell.cell_type != "code":
            return
        outputs = cell.get("outputs", [])
        pictures = ["image/png" in output.get("data", {}) for output in outputs]
        if not any(pictures) or re.search(r"^#\|\s*fig-(alt|cap):", cell.source, re.M):
            return
        text = plain(f"{self.heading}: {self.sentence}" if self.sentence else self.heading)
        if sum(pictures) > 1:
            text += f" ({sum(pictures)} pictures)"
        cell.source = f'#| fig-alt: "{text}"\n{cell.source}'


# --- Tests of library pages


def is_assertion(node):
    "An assert statement, a call of a test function, or a block that expects an error."
    if isinstance(node, (ast.For, ast.With)):
        return any(is_assertion(inner) for inner in node.body) or "Expected" in ast.unparse(node)
    call = node.value if isinstance(node, ast.Expr) else None
    tested = isinstance(call, ast.Call) and ast.unparse(call.func).split(".")[-1].startswith(
        "test_"
    )
    return isinstance(node, ast.Assert) or tested


def is_test(cell):
    "Does a cell only test: it shows nothing, and ends in an assertion?"
    if cell.cell_type != "code" or cell.get("outputs") or "show_doc(" in cell.source:
        return False
    if re.search(r"^#\|\s*(eval|code-fold):", cell.source, re.M):
        return False
    try:
        body = ast.parse(cell.source).body
    except SyntaxError:  # a magic
        return False
    return bool(body) and is_assertion(body[-1])


class FoldTests(Processor):
    "Tests of library pages are folded, and kept out of the search."

    def begin(self):
        path = Path(self.nb.path_).relative_to(get_config().nbs_path)
        self.library = path in notebook_of().values()

    def cell(self, cell):
        if self.library and is_test(cell):
            options = [
                "#| code-fold: true",
                '#| code-summary: "Show the test"',
                "#| classes: quarto-exclude-from-search-index",
            ]
            cell.source = "\n".join([*options, cell.source])


# --- The page of public names


def sections():
    "Title of the sidebar's section that holds each library notebook: {'00_core.ipynb': 'Micrographs'}."
    sidebar = yaml.safe_load((get_config().nbs_path / "sidebar.yml").read_text(encoding="utf-8"))
    titles = {}

    def walk(entries, title):
        for entry in entries:
            if isinstance(entry, str):
                titles[entry] = title
            elif "contents" in entry:
                walk(entry["contents"], entry.get("section", title))

    walk(sidebar["website"]["sidebar"]["contents"], "")
    return titles


def public_table():
    "Markdown tables of every name that `microgen.NAME` gives, a section of the sidebar each, in the reader's order."
    rows, titles = {}, sections()
    for name, module in public_names().items():
        notebook = notebook_of()[module].name
        symbol = symbols().get((module, name))
        anchor = f"#{symbol.anchor}" if symbol else ""
        text = symbol.summary.replace("|", "\\|").rstrip(".") if symbol else ""
        title = titles.get(notebook, "")
        rows.setdefault(title, []).append(f"| [`{name}`]({notebook}{anchor}) | {text} |")
    parts = [
        f"## {title}\n\n| name | what it is |\n|---|---|\n" + "\n".join(some)
        for title, some in rows.items()
    ]
    return "\n\n".join(parts)


class ListPublicNames(Processor):
    "The comment `<!-- public names -->` becomes the tables of public names."

    def cell(self, cell):
        if cell.cell_type == "markdown" and "<!-- public names -->" in cell.source:
            cell.source = cell.source.replace("<!-- public names -->", public_table())
