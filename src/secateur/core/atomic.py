"""Atomic writes: an interrupted run leaves the old file or folder, or the new one."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from secateur.core.errors import FileError, OutputExists

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


@contextmanager
def new_file(path: str | Path) -> Iterator[Path]:
    """Write to the yielded path; it becomes ``path`` only if the block ends without an error.

    Example:
        >>> import tempfile, pathlib
        >>> target = pathlib.Path(tempfile.mkdtemp()) / "a.txt"
        >>> with new_file(target) as temporary:
        ...     _ = temporary.write_text("whole")
        >>> target.read_text()
        'whole'
    """
    path = Path(path)
    _require_parent(path)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        _sync(temporary)
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Fill the yielded folder; it becomes ``path`` only if the block ends without an error.

    Raises:
        OutputExists: ``path`` exists and ``overwrite`` is false.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise OutputExists(
            f"writing to {str(path)!r}",
            "it already exists",
            "a result is never overwritten by accident",
            "choose another folder, remove it, or ask for overwriting (--overwrite)",
        )
    _require_parent(path)
    try:
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise _unwritable(path, error) from error
    try:
        yield temporary
        for file in temporary.iterdir():
            _sync(file)
        temporary.chmod(0o777 & ~_umask())
        _put(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def require_new(path: str | Path, *, overwrite: bool = False) -> None:
    """Fail early, before hours of work, where :func:`new_folder` would fail at the end."""
    path = Path(path)
    with new_folder(path.with_name(path.name + ".probe"), overwrite=True):
        pass
    shutil.rmtree(path.with_name(path.name + ".probe"), ignore_errors=True)
    if path.exists() and not overwrite:
        with new_folder(path):
            pass


def _put(temporary: Path, path: Path) -> None:
    try:
        temporary.rename(path)
        return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EISDIR):
            raise
    if not _exchange(temporary, path):
        # No atomic exchange on this system: the old folder survives under another name
        # until the new one is in place.
        old = path.with_name(f".{path.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
        temporary.rename(path)
        shutil.rmtree(old, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        call = libc.renameat2
    except (OSError, AttributeError):
        return False
    done = call(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE)
    return bool(done == 0)


def _require_parent(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from error
    if not os.access(path.parent, os.W_OK):
        raise _unwritable(path, PermissionError("permission denied"))


def _unwritable(path: Path, error: OSError) -> FileError:
    return FileError(
        f"writing to {str(path)!r}",
        f"{path.parent} cannot be written ({error.strerror or error})",
        "the result is built beside its place and moved there whole",
        "choose a folder that you may write to",
    )


def _sync(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
