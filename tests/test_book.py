"""The book's files, without building it: notebooks, skeleton, exercises, imports, figures, the map of the paper."""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser

from mrcnn_edu import cli

ROOT = Path(__file__).parent.parent
BOOK = ROOT / "book"
CHAPTERS = sorted((BOOK / "chapters").glob("*.ipynb"))
pytestmark = pytest.mark.skipif(not BOOK.exists(), reason="needs a checkout")

FIRST, LAST = (
    ["The question"],
    ["The paper and the codes", "Common mistakes", "Summary", "Exercises", "Further reading"],
)
TAGS = {"by-hand", "naive", "proof", "source", "look", "interactive", "experiment", "bootstrap", "measured"}
MACHINERY = {
    "check",
    "stub",
    "solution",
    "hide-input",
    "hide-output",
    "remove-cell",
    "remove-output",
    "raises-exception",
}
TOOLS = {"mrcnn_edu.notebook", "mrcnn_edu.widgets", "mrcnn_edu.exercises", "mrcnn_edu.canvas", "mrcnn_edu"}
LIBRARIES = {"mrcnn_edu", "torch", "numpy", "matplotlib", "__future__"}


def load(path):
    return json.loads(path.read_text(encoding="utf-8"))


def cells(path, kind="code"):
    """(source, tags, metadata) of every cell of a kind."""
    return [
        ("".join(cell["source"]), set(cell["metadata"].get("tags", [])), cell["metadata"])
        for cell in load(path)["cells"]
        if cell["cell_type"] == kind
    ]


def text(path):
    return "\n\n".join(source for source, _, _ in cells(path, "markdown"))


def code(path):
    return "\n".join(source for source, _, _ in cells(path) if "%pip" not in source)


def number(path):
    return int(path.stem[:2])


per_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def test_the_table_of_contents_is_complete():
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    listed = [toc["root"], *(chapter["file"] for part in toc["parts"] for chapter in part["chapters"])]
    for page in listed:
        assert any((ROOT / f"{page}{suffix}").exists() for suffix in (".md", ".ipynb")), page
    present = [
        path.relative_to(ROOT).with_suffix("").as_posix()
        for pattern in ("*.md", "*.ipynb")
        for path in BOOK.rglob(pattern)
        if ".ipynb_checkpoints" not in path.parts and "_static" not in path.parts
    ]
    assert sorted(listed) == sorted(present)
    chapters = [page for page in listed if "/chapters/" in page]
    assert chapters == sorted(chapters)


@per_chapter
def test_printed_commands_are_understood(path):
    """Every mrcnn-edu of a shell block, torchrun's own options included."""
    shell = "\n".join(re.findall(r"```sh\n(.*?)```", text(path), re.S)).replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in shell.splitlines() if re.search(r"\bmrcnn[-_]edu \w", line)]
    for words in lines:
        place = words.index("mrcnn-edu" if words[0] == "mrcnn-edu" else "mrcnn_edu")
        if place:
            launched = get_args_parser().parse_args(words[1 : place + 1])
            assert words[0] == "torchrun" and launched.module and launched.training_script == "mrcnn_edu"
        assert cli.parse(words[place + 1 :]) is not None
    assert lines or number(path) not in (18, 19)


@per_chapter
def test_notebooks_are_stripped_and_sound(path):
    notebook = load(path)
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert set(notebook["metadata"]) <= {"kernelspec", "language_info"}
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in notebook["cells"]:
        assert "".join(cell["source"]).strip(), f"cell {cell['id']} is empty"
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            assert set(cell["metadata"].get("tags", [])) <= TAGS | MACHINERY


def test_the_vendored_files_are_what_was_published():
    folder = BOOK / "_static/offline/mathjax"
    lines = [line.split("  ") for line in (folder / "SHA256SUMS").read_text().splitlines()]
    assert {name for _, name in lines} >= {"./tex-chtml.js", "./LICENSE"}
    for digest, name in lines:
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest, name
    files = {f"./{path.relative_to(folder).as_posix()}" for path in folder.rglob("*") if path.is_file()}
    assert files == {name for _, name in lines} | {"./SHA256SUMS", "./README.md"}


@per_chapter
def test_the_repository_has_one_address(path):
    spec = importlib.util.spec_from_file_location("repository", BOOK / "repository.py")
    repository = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(repository)
    found = [source for source, tags, _ in cells(path) if "bootstrap" in tags]
    assert found == [repository.bootstrap()]


# ---------------------------------------------------------------------------------------------------------------------
# What every chapter has
# ---------------------------------------------------------------------------------------------------------------------


@per_chapter
def test_chapters_have_the_skeleton(path):
    prose = re.sub(r"^```.*?^```", "", text(path), flags=re.M | re.S)  # comments in commands are no titles
    title = re.findall(r"^# (.+)$", prose, re.M)
    assert len(title) == 1 and title[0].startswith(f"{number(path)} "), (
        "one title that begins with the chapter's number"
    )
    assert prose.index(":class: goals") < prose.index(":class: before") < prose.index("## The question")
    headings = [heading.strip() for heading in re.findall(r"^## (.+)$", prose, re.M)]
    assert headings[:1] == FIRST
    assert headings[-len(LAST) :] == LAST
    used = set().union(*(tags for _, tags, _ in cells(path)))
    assert used >= TAGS, f"no cell is tagged {sorted(TAGS - used)}"
    for source, tags, _ in cells(path):
        if "proof" in tags:
            assert re.search(r"\bassert\b|assert_close", source), "a proof asserts something"
        if "source" in tags:
            assert re.search(r"show_(source|native)\(|inspect", source)
        if "interactive" in tags:
            assert re.search(r"\b(explore|frames)\(", source) or "widgets." in source


@per_chapter
def test_every_exercise_has_a_check_a_stub_and_a_solution(path):
    """One of each, in this order, and both the stub and the solution end in the same check."""
    labels = re.findall(r"^:::\{exercise\} .+\n:label: (\S+)", text(path), re.M)
    assert 3 <= len(labels) <= 6
    assert len(set(labels)) == len(labels)
    assert all(label.startswith(f"ex-{number(path):02d}-") for label in labels)
    order = []
    checks = {"check": [], "stub": [], "solution": []}
    for cell in load(path)["cells"]:
        source, tags = "".join(cell["source"]), set(cell["metadata"].get("tags", []))
        starts = re.match(r":::\{(exercise|solution-start|solution-end)\}(?: (\S+))?", source)
        if starts:
            order.append(starts[1])
            if starts[1] == "solution-start":
                assert starts[2] == labels[order.count("solution-start") - 1]
        for kind in checks:
            if kind in tags:
                order.append(kind)
                last = source.rstrip().splitlines()[-1]
                checks[kind].append(re.findall(r"def (check_\w+)", source) if kind == "check" else last.split("(")[0])
    assert order == ["exercise", "check", "stub", "solution-start", "solution", "solution-end"] * len(labels)
    assert checks["stub"] == checks["solution"]
    for defined, called in zip(checks["check"], checks["stub"]):
        assert called in defined


def test_the_bibliography_has_each_key_once_and_all_that_are_cited():
    keys = re.findall(r"^@\w+\{([^,]+),", (BOOK / "references.bib").read_text(encoding="utf-8"), re.M)
    assert sorted(set(keys)) == sorted(keys)
    pages = [text(path) for path in CHAPTERS] + [path.read_text(encoding="utf-8") for path in BOOK.glob("*.md")]
    assert set(re.findall(r"\{cite\w*\}`([^`]+)`", "\n".join(pages))) <= set(keys)


def test_the_instructors_page_names_exercises_by_their_titles():
    titles = {}
    for path in CHAPTERS:
        found = re.findall(r"^:::\{exercise\} (.+)\n:label: (\S+)", text(path), re.M)
        titles |= {label: title.split(" (open")[0] for title, label in found}
    named = re.findall(r"\[([^]]+)\]\(#(ex-[\w-]+)\)", (BOOK / "instructors.md").read_text(encoding="utf-8"))
    assert len(named) > 20
    assert [pair for pair in named if titles.get(pair[1]) != pair[0]] == []


@per_chapter
def test_figures_have_alt_text_caption_and_name(path):
    names = []
    for source, tags, metadata in cells(path):
        shown = metadata.get("mystnb", {})
        draws = re.search(r"(\.figure|\bdraw\w*\(.*|\bsheet\(.*)$", source.rstrip().splitlines()[-1])
        if "look" in tags or (draws and not {"interactive", "check", "stub", "solution"} & tags):
            assert len(shown.get("image", {}).get("alt", "")) > 20, f"no alt text: {source[-80:]}"
            assert shown.get("figure", {}).get("caption"), f"no caption: {source[-80:]}"
        if "figure" in shown:
            assert "image" in shown and len(shown["image"]["alt"]) > 20
            names.append(shown["figure"]["name"])
            assert names[-1].startswith(f"fig-{number(path):02d}-")
        if re.search(r"\b(explore|frames)\($", source, re.M) or "interactive" in tags:
            assert "alt=" in source or "widgets." in source
    assert len(set(names)) == len(names) > 0


@per_chapter
def test_chapters_use_only_what_was_introduced(path):
    """A module is introduced in the first chapter its docstring names."""
    for module in imported(ast.parse(code(path))):
        assert module.split(".")[0] in LIBRARIES | standard(), f"{module} is no library a chapter may use"
        if module.startswith("mrcnn_edu") and module not in TOOLS:
            assert introduced(module) <= number(path), f"{module} belongs to chapter {introduced(module)}"


def standard():
    import sys

    return set(sys.stdlib_module_names)


def imported(tree):
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                package = (
                    node.module.startswith("mrcnn_edu")
                    and importlib.util.find_spec(node.module).submodule_search_locations
                )
                found.add(inner if package and importlib.util.find_spec(inner) else node.module)
    return found


def introduced(module):
    docstring = ast.get_docstring(ast.parse(Path(importlib.util.find_spec(module).origin).read_text(encoding="utf-8")))
    return min(int(found) for found in re.findall(r"Chapter (\d+)", docstring))


@per_chapter
def test_included_source_exists(path):
    """Whatever show_source is given comes from an import and is there."""
    tree = ast.parse(code(path))
    names = {}
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            exec(compile(ast.Module([node], []), "imports", "exec"), names)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "show_source"]
    assert calls
    for argument in (argument for call in calls for argument in call.args):
        assert eval(ast.unparse(argument), names) is not None


@per_chapter
def test_results_in_the_text_are_glued(path):
    """Measured numbers come from cells; what is typed is a setting, an example, or cited."""
    glued = set(re.findall(r'glue\(\s*"([\w-]+)"', code(path))) | {"seconds", "memory"}
    prose = text(path)
    assert set(re.findall(r"\{glue:\w*\}`([\w-]+)", prose)) <= glued
    for paragraph in re.split(r"\n\s*\n", prose):
        if "{cite" in paragraph or "](http" in paragraph:
            continue
        plain = re.sub(r"```.*?```|`[^`]*`|\$\$.*?\$\$|\$[^$]*\$", " ", paragraph, flags=re.S)
        typed = re.search(
            r"\b\d+\.\d{2,}\b|\b\d+(\.\d+)? ?(ms|milliseconds|×(?! ?\d)|times (faster|slower))(?!\w)", plain
        )
        assert typed is None, f"a typed result: {typed[0]!r} in {paragraph[:80]!r}"


# ---------------------------------------------------------------------------------------------------------------------
# Modules and chapters, paper and code
# ---------------------------------------------------------------------------------------------------------------------


def modules():
    return [path for path in sorted((ROOT / "mrcnn_edu").rglob("*.py")) if not path.name.startswith("__")]


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.relative_to(ROOT / "mrcnn_edu").as_posix())
def test_every_module_names_its_chapter(path):
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    named = [int(found) for found in re.findall(r"Chapter (\d+)", docstring)]
    assert named or "every chapter" in docstring
    assert all(1 <= chapter <= 23 for chapter in named)


@per_chapter
def test_every_chapter_shows_a_module_of_its_own(path):
    """Some module names this chapter, and the chapter imports it."""
    mine = {
        ".".join(file.relative_to(ROOT).with_suffix("").parts)
        for file in modules()
        if re.search(rf"Chapter {number(path)}\b", ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))))
    }
    packages = {module.rpartition(".")[0] for module in mine} - {"mrcnn_edu"}
    assert imported(ast.parse(code(path))) & (mine | packages)


def test_the_reference_names_modules_that_exist():
    named = re.findall(r"automodule:: (\S+)", (BOOK / "api.md").read_text())
    assert len(set(named)) == len(named) > 20
    for name in named:
        assert importlib.util.find_spec(name) is not None, name
    homes = {f"mrcnn_edu.{home}" for home in importlib.import_module("mrcnn_edu")._HOME}
    assert homes <= set(named), "every name the package exports is in the reference"


SECTIONS = [
    "Abstract", "Section 1", "Section 2", "Section 3", "Section 3.1", "Section 4", "Section 4.1", "Section 4.2",
    "Section 4.3", "Section 4.4", "Section 5", "Appendix A", "Appendix B",
    *(f"Figure {n}" for n in range(1, 9)),
    *(f"Table {n}" for n in (1, "2a", "2b", "2c", "2d", "2e", 3, 4, 5, 6, 7, 8, 9)),
]  # fmt: skip


def map_rows():
    lines = (BOOK / "paper_map.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return [row for row in rows if not set("".join(row)) <= set("-: ") and row[0] != "Paper"]


def test_the_map_of_the_paper_is_complete():
    places = {place.strip() for row in map_rows() for place in row[0].split(",")}
    assert [section for section in SECTIONS if section not in places] == []


@pytest.mark.parametrize("row", map_rows(), ids=lambda row: row[0])
def test_the_map_of_the_paper_holds(row):
    """Place, what, chapters, symbols, tests: everything that is named exists."""
    assert len(row) == 5
    _, _, chapters, symbols, tests = row
    assert re.fullmatch(r"(\{chapter\}`([1-9]|1\d|2[0-3])`(, )?)+", chapters)
    for name in re.findall(r"`([^`]+)`", symbols):
        resolve(name)
    for name in re.findall(r"`([^`]+)`", tests):
        file, _, function = name.partition("::")
        assert re.search(rf"^def {function}\b", (ROOT / "tests" / file).read_text(encoding="utf-8"), re.M), name
    assert bool(symbols) == bool("no code" not in tests), "a place without code says so"


def resolve(name):
    """mrcnn_edu.a.b.C.d -> the thing, or an error that names it."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            thing = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            thing = getattr(thing, part)
        return thing
    raise AssertionError(f"{name} is nowhere")
