"""Atomic writes: an interrupted run leaves the old file or folder, or the new one.

What is written lies beside its place meanwhile, under a name of its own, and is locked. A process that
is killed leaves it behind without a lock, and the next one that writes there removes it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from secateur.core.errors import FileError, OutputExists

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
_UNFINISHED = ".unfinished"


@contextmanager
def new_file(path: str | Path) -> Iterator[Path]:
    """Write to the yielded path; it becomes ``path`` only if the block ends without an error.

    Raises:
        FileError: Nothing can be written there, or writing broke off, as on a full disk.

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
    if os.path.isdir(path):  # noqa: PTH112 - Path.is_dir raises for a name that is too long
        raise FileError(
            f"writing to {str(path)!r}",
            "it is a folder",
            "the result is one file",
            "give the name of a file, perhaps in that folder",
        )
    with _beside(path, _new_file) as temporary:
        try:
            yield temporary
            _sync(temporary)
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(path)
            _sync(path.parent)
        except OSError as error:
            raise _broken_off(path, error) from error


@contextmanager
def new_folder(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Fill the yielded folder; it becomes ``path`` only if the block ends without an error.

    An existing folder is only ever replaced by one that has all of its entries: whatever else a
    user keeps there would be lost. Where ``path`` is a link, it stays one: what it leads to is written.

    Raises:
        OutputExists: ``path`` exists and ``overwrite`` is false, or it holds other things.
        FileError: Nothing can be written there, or writing broke off, as on a full disk.
    """
    path = _followed(Path(path))
    _require_replaceable(path, overwrite, None)
    _require_parent(path)
    with _beside(path, tempfile.mkdtemp) as temporary:
        try:
            yield temporary
            entries = {entry.name for entry in temporary.iterdir()}
            _require_replaceable(path, overwrite, entries)
            for entry in (*temporary.iterdir(), temporary):
                _sync(entry)
            temporary.chmod(0o777 & ~_umask())
            _put(temporary, path, overwrite)
            _sync(path.parent)
        except OSError as error:
            raise _broken_off(path, error) from error


def sweep(folder: Path, name: str | None = None) -> None:
    """Remove what writers that were killed left in a folder: of one result, or of all.

    What somebody still writes is locked, and stays. Where a file system has no locks, all stays.

    Example:
        >>> import tempfile, pathlib
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> (folder / ".a.txt.0123abcd.unfinished").touch()
        >>> sweep(folder, "a.txt")
        >>> list(folder.iterdir())
        []
    """
    which = ".+" if name is None else re.escape(name)
    unfinished = re.compile(rf"\.{which}\.[a-z0-9_]{{8}}{re.escape(_UNFINISHED)}", re.DOTALL)
    with suppress(OSError):  # a folder that cannot be listed
        for left in [entry for entry in folder.iterdir() if unfinished.fullmatch(entry.name)]:
            with suppress(OSError):  # locked, of another user, or somebody else was faster
                handle = os.open(left, os.O_RDONLY | os.O_NOFOLLOW)
                try:
                    _lock(handle, wait=False)
                    _remove(left)
                finally:
                    os.close(handle)


def require_new(path: str | Path, entries: set[str] | None, *, overwrite: bool = False) -> None:
    """Fail early, before hours of work, where :func:`new_folder` would fail at the end.

    Args:
        path: The folder that will be written.
        entries: Names of the files that it will hold; None if they are not known yet.
        overwrite: As for :func:`new_folder`.
    """
    path = _followed(Path(path))
    _require_replaceable(path, overwrite, entries)
    require_room(path)


def require_room(path: Path) -> None:
    """Fail early where nothing can be written to ``path``: it is tried, beside the place.

    Raises:
        FileError: Nothing can be written there, or not under so long a name.

    Example:
        >>> require_room(Path("a" * 300))
        Traceback (most recent call last):
            ...
        secateur.core.errors.FileError: writing to ...: nothing can be written into . (File name too
        long). ...
    """
    _require_parent(path)
    with _beside(path, tempfile.mkdtemp):
        pass


def require_writable(path: str | Path) -> None:
    """Fail early where files are to be written into a folder later; it is made if it is not there.

    Raises:
        FileError: The path is a file, or nothing can be written there.

    Example:
        >>> require_writable(__file__)
        Traceback (most recent call last):
            ...
        secateur.core.errors.FileError: writing to ...: nothing can be written into ...
    """
    _require_parent(Path(path) / "file")


@contextmanager
def _beside(path: Path, make: Callable[[str, str, Path], str]) -> Iterator[Path]:
    """A new file or folder beside ``path``, locked until it is moved to its place or removed."""
    sweep(path.parent, path.name)
    try:
        temporary, handle = _locked(path, make)
    except (OSError, ValueError) as error:  # a name cannot hold the character 0
        raise _unwritable(path, error) from error
    try:
        yield temporary
    finally:
        _remove(temporary)
        os.close(handle)


def _locked(path: Path, make: Callable[[str, str, Path], str]) -> tuple[Path, int]:
    while True:
        temporary = Path(make(_UNFINISHED, f".{path.name}.", path.parent))
        with suppress(FileNotFoundError):  # swept before it was locked
            handle = os.open(temporary, os.O_RDONLY)
            with suppress(OSError):  # no locks on this file system: nobody sweeps there
                _lock(handle, wait=True)
            if temporary.exists():
                return temporary, handle
            os.close(handle)


def _lock(handle: int, *, wait: bool) -> None:
    """Take the lock of an open file or folder; an OSError if somebody has it, or there are none."""
    try:
        import fcntl
    except ImportError as error:  # Windows
        raise OSError("no locks here") from error
    fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


def _new_file(suffix: str, prefix: str, folder: Path) -> str:
    handle, name = tempfile.mkstemp(suffix, prefix, folder)
    os.close(handle)
    return name


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _require_replaceable(path: Path, overwrite: bool, entries: set[str] | None) -> None:
    if not path.exists():
        return
    others, found = [], "it is a file"
    if path.is_dir() and entries is not None:
        others = sorted(entry.name for entry in path.iterdir() if entry.name not in entries)
        found = f"it holds {', '.join(others[:4])}" + (", ..." if len(others) > 4 else "")
    if others or not path.is_dir():  # it is no result: to ask for overwriting would not help
        raise OutputExists(
            f"{'overwriting' if overwrite else 'writing to'} {str(path)!r}",
            found,
            "only a folder of an earlier result is ever replaced",
            "choose another folder",
        )
    if not overwrite:
        raise _exists(path)


def _exists(path: Path) -> OutputExists:
    return OutputExists(
        f"writing to {str(path)!r}",
        "it already exists",
        "a result is never overwritten by accident",
        "choose another folder, remove it, or ask for overwriting (--overwrite)",
    )


def _followed(path: Path) -> Path:
    """Where a link leads: a folder cannot be renamed to the name of a link."""
    try:
        return path.resolve() if path.is_symlink() else path
    except OSError as error:
        raise _unwritable(path, error) from error


def _put(temporary: Path, path: Path, overwrite: bool) -> None:
    try:
        temporary.rename(path)
        return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    if not overwrite:  # another process has made it since it was looked for
        raise _exists(path)
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


def _unwritable(path: Path, error: OSError | ValueError) -> FileError:
    return FileError(
        f"writing to {str(path)!r}",
        f"nothing can be written into {path.parent} ({getattr(error, 'strerror', None) or error})",
        "the result is built beside its place, under a longer name, and moved there whole",
        "choose a folder that you may write to, or a shorter name",
    )


def _broken_off(path: Path, error: OSError) -> OSError:
    """What to raise where writing fails half-way; an error that says so already stays as it is."""
    if isinstance(error, FileError):
        return error
    return FileError(
        f"writing to {str(path)!r}",
        f"it broke off ({error.strerror or error})",
        "the disk is full perhaps, or a quota is used up; nothing half-written was left",
        "make room, or choose another place",
    )


def _sync(entry: Path) -> None:
    """Bring a file or folder to the disk, so that a power cut cannot undo what was promised."""
    handle = os.open(entry, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
