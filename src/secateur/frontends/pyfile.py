"""Functions in the user's own Python files, named as ``file.py:function``."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from secateur.core.errors import FileError, UnknownName, UsageError, kind_of

# Modules that files of one folder imported from that folder. They are put back when the folder is
# used again and taken away afterwards, so that two projects may both have a network.py.
_SIBLINGS: dict[Path, dict[str, ModuleType]] = {}


def split(spec: str) -> tuple[Path, str]:
    """The file and the function of ``file.py:function``.

    Example:
        >>> split("nets/network.py:build")
        (PosixPath('nets/network.py'), 'build')
    """
    file, _, name = spec.rpartition(":")
    if not file.endswith(".py") or not name.isidentifier():
        raise UsageError(
            f"{spec!r}",
            "it does not name a function in a Python file",
            "such a name has a file, a colon and a function",
            "write e.g. network.py:build",
        )
    return Path(file), name


def call(spec: str, purpose: str) -> Any:
    """Run the function that ``spec`` names, without arguments, and return what it returns.

    The file's folder is importable meanwhile, so ``import data`` finds a ``data.py`` beside it.

    Args:
        spec: ``file.py:function``.
        purpose: What it should give, for error messages, e.g. ``"a model"``.

    Raises:
        FileError: There is no such file.
        UsageError: The file cannot be imported, has no such function, or the function raises.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "mine.py"
        >>> _ = file.write_text("def build(): return 7")
        >>> call(f"{file}:build", "a number")
        7
    """
    path, name = split(spec)
    if not path.is_file():
        raise FileError(
            f"{purpose} from {spec!r}",
            f"there is no file {str(path)!r}",
            "the function is looked up in that file",
            "check the path",
        )
    with _folder(path.resolve().parent):
        function = _function(_imported(path.resolve(), spec), name, spec)
        try:
            return function()
        except Exception as error:
            raise UsageError(
                f"{purpose} from {spec!r}",
                f"{name}() raised {type(error).__name__}: {error}",
                f"the error comes from {_place(error, path)}",
                "correct the function, or name another",
            ) from error


def _imported(path: Path, spec: str) -> ModuleType:
    # The name carries the path: two files of the same name are two modules.
    tag = hashlib.sha256(str(path).encode()).hexdigest()[:8]
    name = f"_secateur_{path.stem}_{tag}"
    if name in sys.modules:
        return sys.modules[name]
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None, path
    assert found.loader is not None, path
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module
    try:
        found.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if not isinstance(error, Exception):
            raise
        raise UsageError(
            f"importing {str(spec)!r}",
            f"the file raised {type(error).__name__}: {error}",
            f"the error comes from {_place(error, path)}",
            "correct the file; it must be importable",
        ) from error
    return module


def _function(module: ModuleType, name: str, spec: str) -> Callable[[], Any]:
    function = getattr(module, name, None)
    if function is None:
        known = [
            n
            for n, value in vars(module).items()
            if callable(value) and getattr(value, "__module__", "") == module.__name__
        ]
        raise UnknownName("function", name, known)
    if not callable(function):
        raise UsageError(
            f"{spec!r}",
            f"{name} is {kind_of(function)}",
            "it is called to get the result",
            "name a function that takes no arguments",
        )
    required = [
        p.name
        for p in inspect.signature(function).parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if required:
        raise UsageError(
            f"{spec!r}",
            f"{name}() needs the arguments {', '.join(required)}",
            "it is called without arguments",
            "give them defaults, or write a function without them",
        )
    return function  # type: ignore[no-any-return]


@contextmanager
def _folder(folder: Path) -> Iterator[None]:
    """Make the modules of ``folder`` importable, and only inside this block."""
    before = dict(sys.modules)
    sys.modules.update(_SIBLINGS.get(folder, {}))
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        mine = {
            name: module
            for name, module in sys.modules.items()
            if name not in before and _lies_in(module, folder) and not name.startswith("_secateur_")
        }
        for name in mine:
            del sys.modules[name]
        _SIBLINGS[folder] = mine


def _lies_in(module: ModuleType, folder: Path) -> bool:
    file = getattr(module, "__file__", None)
    if not file:
        return False
    path = Path(file)
    # An environment inside the project's folder is not part of the project.
    return path.is_relative_to(folder) and "site-packages" not in path.parts


def _place(error: BaseException, path: Path) -> str:
    if isinstance(error, SyntaxError) and error.lineno:
        return f"{Path(error.filename or path).name}, line {error.lineno}"
    trace, line, file = error.__traceback__, 0, path
    while trace is not None:
        code = Path(trace.tb_frame.f_code.co_filename)
        if code.resolve() == path.resolve():
            line, file = trace.tb_lineno, code
        trace = trace.tb_next
    return f"{file.name}, line {line}" if line else str(file)
