"""The documentation tells the truth: commands run, links lead somewhere, generated pages are fresh.

The examples in Python (`>>>`) run by themselves, since pytest collects every Markdown page.
"""

from __future__ import annotations

import importlib
import os
import re
import runpy
import shlex
import shutil
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from typer.main import get_command

import secateur
from secateur.cli.main import app
from secateur.drive.parts import CATALOGUES
from secateur.drive.recipe_file import read_recipe
from secateur.runtime import available
from secateur.runtime.breakeven import CASES, break_evens

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Made by `make demo`; the README shows it.
PICTURE = "docs/demo.svg"


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of one language on a page."""
    return [text for kind, text in BLOCK.findall(page.read_text("utf-8")) if kind == language]


def commands(block: str) -> list[str]:
    """The commands of a console block; a line that ends with a backslash goes on."""
    joined = block.replace("\\\n", " ")
    return [line[2:] for line in joined.splitlines() if line.startswith("$ ")]


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    kept = re.sub(r"[^\w\- ]", "", heading.strip().lower())
    return kept.replace(" ", "-")


def targets(text: str) -> list[str]:
    """Where the links and pictures of a page lead, without those into the web."""
    prose = BLOCK.sub("", text)
    prose = re.sub(r"`[^`\n]*`|\$[^$\n]*\$", "", prose)
    found = re.findall(r"\]\(([^)\s]+)\)", prose)
    return [link for link in found if "://" not in link]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script `docs/generate.py` as a module."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    return importlib.import_module("generate")


# --- commands ------------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A copy of the examples, and the files that README tells to write."""
    junk = shutil.ignore_patterns("__pycache__", ".*", "out")
    shutil.copytree(ROOT / "examples", tmp_path / "examples", ignore=junk)
    for block in blocks(ROOT / "README.md", "python"):
        if block.startswith("# few.py\n"):
            (tmp_path / "examples" / "fashion_mnist" / "few.py").write_text(block, "utf-8")
    return tmp_path


def run(line: str) -> int:
    """Run one command line in this process: starting Python and torch for each takes too long."""
    program, *words = shlex.split(line)
    if program == "cd":
        os.chdir(words[0])
        return 0
    assert program == "secateur", f"cannot run {line!r} here"
    try:
        code = app(words, prog_name="secateur", standalone_mode=False)
    except SystemExit as end:
        code = end.code
    return int(code or 0)


def scripts(page: Path) -> list[list[tuple[str, str]]]:
    """What is to run in one folder: each console block, with the plain Python that follows it.

    Python with a prompt runs as doctest; one that begins with the name of a file is written there.
    """
    found: list[list[tuple[str, str]]] = []
    for language, text in BLOCK.findall(page.read_text("utf-8")):
        if language == "console":
            found.append([(language, text)])
        elif language == "python" and found and ">>> " not in text and text[:2] != "# ":
            found[-1].append((language, text))
    return found


SCRIPTS = scripts(ROOT / "README.md")


def test_the_few_images_of_the_readme_are_of_all_classes(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every tenth, as it was once, is of one class: the test images go through all ten in turn."""
    folder = elsewhere / "examples" / "fashion_mnist"
    monkeypatch.syspath_prepend(folder)
    few = runpy.run_path(str(folder / "few.py"))["few"]
    del sys.modules["data"]  # the next copy has one of its own
    counts = torch.cat([labels for _, labels in few()["test"]]).bincount()
    assert counts.tolist() == [100] * 10


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little time for measuring: here commands are to run, not to be right about speed."""
    for module, names in {
        "compiler.compile": {"_LAYERS": 1.0, "_WHOLE": 0.5},
        "bench": {"_SECONDS": 0.2},
        "machine": {"_SECONDS": 0.02, "_WIDTH": 256},
    }.items():
        for name, value in names.items():
            monkeypatch.setattr(importlib.import_module(f"secateur.runtime.{module}"), name, value)
    few = partial(break_evens, cases=CASES[:1], seconds=0.0)
    monkeypatch.setattr("secateur.cli.doctor.break_evens", few)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("number", range(len(SCRIPTS)))
def test_readme_commands_run(
    number: int,
    elsewhere: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = "".join(text for _, text in SCRIPTS[number])
    if "secateur compile" in text and not available():
        pytest.skip("the native library is not built")
    monkeypatch.chdir(elsewhere)
    monkeypatch.syspath_prepend(elsewhere / "examples" / "fashion_mnist")
    before = set(sys.modules)
    try:
        for language, block in SCRIPTS[number]:
            if language == "python":
                exec(compile(block, "README.md", "exec"), {})  # noqa: S102 - our own page
                continue
            lines = commands(block)
            assert lines
            for line in lines:
                assert run(line) == 0, f"{line}\n{capsys.readouterr()}"
    finally:
        for name in {"data", "few", "network"} & (set(sys.modules) - before):
            del sys.modules[name]


def test_scripts_are_a_console_block_and_the_python_after_it(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    parts = ["python\na = 1", "console\n$ b", "python\n>>> c\n", "python\n# d.py\nd", "python\ne"]
    page.write_text("\n".join(f"```{part}\n```\ntext" for part in parts), "utf-8")
    assert scripts(page) == [[("console", "$ b\n"), ("python", "e\n")]]
    names = [line for script in SCRIPTS for language, text in script for line in text.splitlines()]
    assert sum("onnxruntime.InferenceSession(" in line for line in names) == 1


def test_a_command_that_fails_is_seen(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("secateur inspect no-such-file.py:build") == 4
    assert "no-such-file" in "".join(capsys.readouterr())


def test_readme_shows_every_command_of_the_program() -> None:
    shown = "\n".join(blocks(ROOT / "README.md", "console"))
    for command in app.registered_commands:
        assert f"secateur {command.name} " in shown, f"README does not show {command.name!r}"


def typed(page: Path) -> tuple[list[str], list[str]]:
    """The command lines of the program that a page shows: in blocks, and in sentences."""
    text = page.read_text("utf-8").replace("\\\n", " ")
    shown = "\n".join(
        body for language, body in BLOCK.findall(text) if language in ("sh", "console")
    )
    blocks_ = re.findall(r"^(?:\$ )?(secateur .*)$", shown, re.MULTILINE)
    return blocks_, re.findall(r"`(secateur [a-z]+ [^`]*-[^`]*)`", BLOCK.sub("", text))


def parsed(line: str) -> str:
    """The command of a line whose options all exist; what it takes besides is not looked at."""
    name, *words = shlex.split(line)[1:]
    command = get_command(app).commands[name]  # type: ignore[attr-defined]
    command.make_context(name, words)
    return name


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_commands_on_pages_have_options_that_exist(page: Path) -> None:
    in_blocks, in_sentences = typed(page)
    for line in in_blocks:
        parsed(line)
    for line in in_sentences:  # which may name an option alone
        try:
            parsed(line)
        except Exception as error:
            if type(error).__name__ != "MissingParameter":
                raise AssertionError(f"{line}: {error}") from error


def test_an_option_that_does_not_exist_is_seen() -> None:
    assert parsed("secateur evaluate small --data data.py:load") == "evaluate"
    with pytest.raises(Exception, match="--latency"):
        parsed("secateur evaluate small --latency")
    with pytest.raises(KeyError):
        parsed("secateur reduce small -o out")
    in_blocks, in_sentences = typed(ROOT / "README.md")
    assert len(in_blocks) > 10
    assert any("--target latency=2x" in line for line in in_sentences)


@pytest.mark.parametrize("page", PAGES[:2], ids=IDS[:2])
def test_make_targets_exist(page: Path) -> None:
    known = targets_of((ROOT / "Makefile").read_text("utf-8"))
    named = set(re.findall(r"\bmake ([a-z-]+)(?=[`\n ]|$)", "\n".join(blocks(page, "sh"))))
    assert named
    assert named <= known, f"no such targets: {sorted(named - known)}"


def targets_of(makefile: str) -> set[str]:
    """The named targets of a Makefile; a rule may have several."""
    rules = re.findall(r"^([a-z$][^:=\n]*):(?!=)", makefile, re.MULTILINE)
    return {word for rule in rules for word in rule.split() if re.fullmatch(r"[a-z-]+", word)}


def test_targets_are_found() -> None:
    text = "a-b: c\nnative $(LIBRARY): x y\n$(STAMP): d\nF := e\n.PHONY: p\n\tq: r\n"
    assert targets_of(text) == {"a-b", "native"}


def test_commands_are_joined_and_prompts_removed() -> None:
    assert commands("$ a b \\\n    c\nshown\n$ d\n") == ["a b      c", "d"]


# --- generated pages -----------------------------------------------------------------------------


def test_generated_pages_are_up_to_date(made: ModuleType) -> None:
    pages = made.pages()
    stale = [
        str(path.relative_to(ROOT))
        for path, text in pages.items()
        if not path.exists() or path.read_text("utf-8") != text
    ]
    assert stale == [], "run `make docs`, which calls docs/generate.py"
    there = set((ROOT / "docs" / "reference").glob("*.md"))
    assert there - set(pages) == set(), "pages of modules that are gone: run `make docs`"


def test_every_public_name_is_in_the_reference() -> None:
    text = (ROOT / "docs" / "reference" / "secateur.md").read_text("utf-8")
    missing = [name for name in secateur.__all__ if f"\n## `{name}`\n" not in text]
    assert missing == []


def test_every_part_is_on_the_methods_page() -> None:
    text = (ROOT / "docs" / "methods.md").read_text("utf-8")
    names = [name for catalogue in CATALOGUES.values() for name in catalogue]
    missing = [name for name in names if f"| `{name}` |" not in text]
    assert missing == []


def test_the_generator_reads_docstrings_as_markdown(made: ModuleType) -> None:
    doc = (
        "Sum.\n\n    **formula** :math:`a |b|`\n    **Needs** ``x``\n\n    Args:\n        a: One.\n"
    )
    expected = "Sum.\n\n- **formula** $a |b|$\n- **Needs** `x`\n\n**Args**\n\n- `a`: One.\n"
    assert made.markdown(doc) == expected
    assert made.cell(":math:`a |b|` | c") == r"$a \vert b\vert $ \| c"


# --- pages ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_lead_somewhere(page: Path) -> None:
    for link in targets(page.read_text("utf-8")):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() and target == ROOT / PICTURE:
            pytest.xfail(f"{PICTURE} is made by `make demo`")
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            text = BLOCK.sub("", target.read_text("utf-8"))
            headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
            assert anchor in map(slug, headings), f"{page.name}: no heading for {link}"


def test_links_are_found() -> None:
    text = "[a](b.md#c) `[x](y)`\n```sh\n[q](r)\n```\n![p](q.svg) [w](https://example.org)"
    assert targets(text) == ["b.md#c", "q.svg"]
    assert slug("Sparsity: of what?") == "sparsity-of-what"


def test_every_page_can_be_reached() -> None:
    seen: set[Path] = set()
    waiting = [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in seen or page.suffix != ".md":
            continue
        seen.add(page)
        links = (link.partition("#")[0] for link in targets(page.read_text("utf-8")))
        waiting += [(page.parent / link).resolve() for link in links if link]
    assert set(PAGES) - seen == set()


def machine_paths(text: str) -> list[str]:
    """Absolute paths that only exist on somebody's machine."""
    return re.findall(r"(?<![\w.])/(?:work|home|root|tmp|Users|mnt)\b\S*", text)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_no_page_names_a_machine_path(page: Path) -> None:
    assert machine_paths(page.read_text("utf-8")) == []


def test_machine_paths_are_found() -> None:
    assert machine_paths("in `/home/me/x` or docs/work/y, https://example.org/tmp/z") == [
        "/home/me/x`"
    ]


def recipe_files() -> list[tuple[str, str]]:
    """Every YAML block that the pages show as a recipe."""
    pages = [page for page in PAGES if "formats" not in page.parts]
    return [(page.name, text) for page in pages for text in blocks(page, "yaml")]


@pytest.mark.parametrize(("name", "text"), recipe_files())
def test_recipe_files_can_be_read(name: str, text: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text, "utf-8")
    assert read_recipe(file).target is not None, name


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_examples_leave_a_line_before_the_fence(page: Path) -> None:
    # Doctest reads the fence as output otherwise. (Generated pages are not run: they use `pycon`.)
    for text in blocks(page, "python"):
        if ">>> " in text:
            assert text.endswith("\n\n"), f"{page.name}: {text[-80:]!r}"
