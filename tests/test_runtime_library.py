"""The native library: found or reported missing, in step with its header, built or left out."""

from __future__ import annotations

import _ctypes
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from secateur.core.errors import FormatError, MissingNative, SecateurError, UsageError
from secateur.runtime import library, native, stored

ROOT = Path(__file__).resolve().parent.parent
HEADER = (ROOT / "native" / "include" / "secateur.h").read_text()

SPEC, VARIANT = native.Spec("linear", 2, 2), native.Variant("list", 1, 4)
CALLS: dict[str, Callable[[], object]] = {
    "library_path": library.library_path,
    "load": library.load,
    "isas": native.isas,
    "isa": native.isa,
    "lanes": native.lanes,
    "pool": lambda: native.Pool(2),
    "candidates": lambda: native.candidates(SPEC, 8, 0.5),
    "layer": lambda: native.Layer.from_dense(np.eye(2, dtype=np.float32), SPEC, VARIANT),
}


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], None]]:
    """Puts another file in the place of the library for one test."""

    def place(path: Path) -> None:
        monkeypatch.setattr(library, "_PATH", path)
        library.load.cache_clear()

    yield place
    library.load.cache_clear()


# --- absent or unusable ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", CALLS)
def test_absent_library_is_named_with_what_to_do(
    name: str, other: Callable[[Path], None], tmp_path: Path
) -> None:
    other(tmp_path / "libsecateur.so")
    assert not library.available()
    with pytest.raises(MissingNative) as caught:
        CALLS[name]()
    assert caught.value.exit_code == 5
    assert isinstance(caught.value, ImportError)
    assert all(caught.value.parts().values())
    for part in (str(tmp_path), "compiler", "apt install g++", "make native"):
        assert part in str(caught.value)


def test_damaged_library(other: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "libsecateur.so"
    path.write_bytes(b"\x7fELF of some other machine")
    other(path)
    assert not library.available()
    with pytest.raises(MissingNative, match="cannot be used"):
        library.load()


def test_library_without_our_functions(other: Callable[[Path], None]) -> None:
    other(Path(_ctypes.__file__))
    with pytest.raises(MissingNative, match="secateur_abi"):
        library.load()


def test_library_of_another_version(
    other: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    other(library.library_path())
    monkeypatch.setattr(library, "ABI", library.ABI + 1)
    with pytest.raises(MissingNative, match="has interface 1, this package needs 2"):
        library.load()


def test_without_the_library_everything_else_works(tmp_path: Path) -> None:
    shutil.copytree(
        ROOT / "src" / "secateur",
        tmp_path / "secateur",
        ignore=shutil.ignore_patterns("*.so", "__pycache__"),
    )
    program = """
import torch, secateur, secateur.runtime
assert not secateur.runtime.available()
net = torch.nn.Linear(16, 16)
assert secateur.prune(net, secateur.recipes.magnitude(0.5)).facts.sparsity == 0.5
print(secateur.__file__)
"""
    # -S: what an editable install puts before PYTHONPATH stays out.
    packages = Path(np.__file__).parent.parent
    path = os.pathsep.join((str(tmp_path), str(packages)))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-S", "-W", "error", "-c", program],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "secateur" / "__init__.py")


# --- error codes -----------------------------------------------------------------------------------


class Failing:
    """Stands for a library whose last call failed."""

    def secateur_last_error(self) -> bytes:
        return b"rows is 0"


@pytest.mark.parametrize(
    ("code", "error"), [(1, UsageError), (2, FormatError), (3, MemoryError), (9, SecateurError)]
)
def test_error_codes(code: int, error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "load", Failing)
    library.check(0, "a layer")
    with pytest.raises(error) as caught:
        library.check(code, "a layer")
    assert type(caught.value) is error
    assert "a layer: rows is 0" in str(caught.value)


# --- the header and its Python side ----------------------------------------------------------------

BARE = re.sub(r"/\*.*?\*/", "", HEADER, flags=re.DOTALL)


def members(struct: str) -> list[str]:
    """Names of the members of a structure of the header, in order."""
    found = re.search(r"typedef struct \{([^}]*)\} " + struct + ";", BARE)
    assert found, struct
    body = re.sub(r"\[\d+\]|\*", "", found[1])
    names = []
    for statement in filter(str.strip, body.split(";")):
        first, *rest = statement.split(",")
        names += [first.split()[-1], *(name.strip() for name in rest)]
    return names


def numbers(prefix: str) -> dict[str, int]:
    """Constants of the header that are in the same enumeration as ``prefix``, by lower-case name."""
    for body in re.findall(r"enum \{([^}]*)\}", BARE):
        found = dict(re.findall(r"SECATEUR_(\w+) = (\d+)", body))
        if prefix in found:
            return {name.lower(): int(value) for name, value in found.items()}
    raise AssertionError(prefix)


@pytest.mark.parametrize(
    ("name", "structure"),
    [
        ("secateur_spec", library.CSpec),
        ("secateur_weights", library.CWeights),
        ("secateur_variant", library.CVariant),
        ("secateur_attention", library.CAttention),
    ],
)
def test_structures_are_those_of_the_header(name: str, structure: type) -> None:
    assert [field for field, _ in structure._fields_] == members(name)


def test_functions_are_those_of_the_header() -> None:
    declared = re.findall(r"SECATEUR_EXPORT\s+[\w *]+?\b(secateur_\w+)\(([^;]*)\);", BARE)
    assert {name for name, _ in declared} == set(library._SIGNATURES)
    for name, arguments in declared:
        # The commas of a function among the arguments are not ours.
        flat = re.sub(r"\(\*(\w+)\)\([^)]*\)", r"\1", arguments)
        count = 0 if flat.strip() == "void" else flat.count(",") + 1
        assert count == len(library._SIGNATURES[name][1]), name


def test_numbers_are_those_of_the_header() -> None:
    assert numbers("CONV") == native.KINDS
    assert numbers("NONE") == native.ACTIVATIONS
    assert numbers("LIST") == native.FAMILIES
    assert numbers("DENSE") == stored.LAYOUTS
    assert numbers("FLOAT32") == {
        str(dtype).removeprefix("torch."): number for dtype, number in stored.DTYPES.items()
    }
    assert numbers("OK") == {
        **{"ok": 0, "invalid": library.INVALID},
        **{"damaged": library._DAMAGED, "no_memory": library._NO_MEMORY},
    }
    assert re.search(rf"#define SECATEUR_ABI {library.ABI}\b", HEADER)


def exported(path: Path) -> str:
    """What ``nm`` lists as defined and visible."""
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    done = subprocess.run(
        ["nm", "-D", "--defined-only", str(path)], capture_output=True, text=True, check=True
    )
    return done.stdout


def test_nothing_but_the_interface_is_exported() -> None:
    names = {line.split()[-1] for line in exported(library.library_path()).splitlines()}
    assert names == set(library._SIGNATURES) | {"RegisterCustomOps"}


# --- built, or left out ----------------------------------------------------------------------------


def wheel(folder: Path, **environment: str) -> tuple[str, list[str]]:
    """Build a wheel of this checkout; its name and its files."""
    pytest.importorskip("scikit_build_core")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    # Without optimisation: this is about files.
    command += ["--config-settings=cmake.build-type=Debug", "--wheel-dir", str(folder), str(ROOT)]
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.iterdir()
    with zipfile.ZipFile(path) as archive:
        return path.name, archive.namelist()


def test_wheel_without_a_compiler_lacks_only_the_library(tmp_path: Path) -> None:
    name, files = wheel(tmp_path, CXX="/bin/false", CC="/bin/false")
    assert name.endswith("-py3-none-any.whl")
    assert "secateur/runtime/native.py" in files
    assert "secateur/py.typed" in files
    assert not [file for file in files if file.endswith(".so")]


def test_wheel_with_a_compiler_has_the_library_once(tmp_path: Path) -> None:
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("there is no C++ compiler")
    name, files = wheel(tmp_path)
    assert "-py3-none-" in name
    assert not name.endswith("-any.whl")
    assert [file for file in files if file.endswith(".so")] == ["secateur/runtime/libsecateur.so"]
    assert not [file for file in files if not file.startswith(("secateur/", "secateur-"))]
