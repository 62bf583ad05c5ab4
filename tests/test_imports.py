"""What the package may import: little at the start, never a pickle, in core only torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import secateur

PACKAGE = Path(secateur.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))

# Slow to import, or part of an extra that may be missing.
HEAVY = ("accelerate", "matplotlib", "onnx", "onnxruntime", "optuna", "transformers")

# Names that read or write pickles. A pickle runs code when it is read.
PICKLES = {
    *("_pickle", "cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"),
    *("torch.load", "torch.save", "torch.package", "numpy.load.allow_pickle"),
}


def imported_roots(tree: ast.AST) -> set[str]:
    """First parts of the names of all imported modules, at the top and inside functions."""
    roots: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            roots |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            roots.add(node.module.partition(".")[0])
    return roots


def used_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and full name of everything imported or reached by a dotted name, aliases resolved."""
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
                aliases[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield node.lineno, name
                aliases[alias.asname or alias.name] = name
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            first, _, rest = ast.unparse(node).partition(".")
            yield node.lineno, f"{aliases.get(first, first)}.{rest}"
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            safe = isinstance(node.value, ast.Constant) and node.value.value is False
            yield node.value.lineno, "allow_pickle" if safe else "numpy.load.allow_pickle"


def pickles(source: str) -> list[str]:
    """Each use of a pickle in a source text, as ``line: name``."""
    return [
        f"{line}: {name}"
        for line, name in used_names(ast.parse(source))
        if any(name == bad or name.startswith(bad + ".") for bad in PICKLES)
    ]


def test_import_is_light() -> None:
    """``import secateur`` loads no framework and no plotting."""
    code = f"import secateur, sys; print(sorted(set(sys.modules) & set({HEAVY!r})))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize("file", SOURCES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_no_pickle(file: Path) -> None:
    assert pickles(file.read_text()) == []


@pytest.mark.parametrize(
    "planted",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('x')",
        "import torch as t\nt.load('x')",
        "from torch import load",
        "def f():\n    import joblib",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "import numpy as np\nnp.load('x', allow_pickle=flag)",
    ],
)
def test_pickle_check_finds_planted_uses(planted: str) -> None:
    assert pickles(planted)


@pytest.mark.parametrize(
    "harmless",
    [
        "'''Not torch.load, no pickle.'''",
        "import json\njson.load(stream)",
        "import numpy as np\nnp.load('x', allow_pickle=False)",
        "from safetensors.torch import load_file",
    ],
)
def test_pickle_check_leaves_the_rest_alone(harmless: str) -> None:
    assert pickles(harmless) == []


def test_every_folder_is_a_package() -> None:
    """Without ``__init__.py`` the import contract and the doctests would pass a folder by."""
    bare = {file.parent for file in SOURCES if not (file.parent / "__init__.py").exists()}
    assert sorted(str(folder.relative_to(PACKAGE)) for folder in bare) == []


@pytest.mark.parametrize("file", sorted((PACKAGE / "core").glob("*.py")), ids=lambda f: f.name)
def test_core_imports_only_torch(file: Path) -> None:
    """The import contract can only forbid names it lists; this allows the few that are right."""
    allowed = {"torch", "secateur", *sys.stdlib_module_names}
    assert imported_roots(ast.parse(file.read_text())) <= allowed
