"""ONNX Runtime's own session, with our operators registered."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from os import PathLike
from pathlib import Path
from typing import Any

from secateur.core.errors import FileError, FormatError, MissingExtra, UsageError
from secateur.runtime.operators import DOMAIN

#: Under this key of a session's options our operators find how many threads it has. ONNX Runtime
#: itself does not tell them; without it they ask the operating system for its processors.
THREADS_ENTRY = "secateur.threads"
#: More than that wait for each other, and very many never come to work.
MOST_THREADS = 256
_PROVIDERS = ("CPUExecutionProvider",)


def session(
    path: str | Path | bytes | bytearray | memoryview,
    threads: int | None = None,
    *,
    options: Any = None,
    providers: Sequence[Any] = _PROVIDERS,
) -> Any:
    """Open a compiled ONNX model in ONNX Runtime.

    What comes back is the stock ``onnxruntime.InferenceSession``. Models without operators of
    ours open as well.

    Args:
        path: The file, or its contents.
        threads: How many threads one run uses; None: as ``options`` say, and if they say nothing,
            as many as ONNX Runtime finds right.
        options: An ``onnxruntime.SessionOptions`` to start from. The library is registered there
            too, so the same options can open more models.
        providers: ONNX Runtime's execution providers. Our operators run on the CPU.

    Returns:
        ``onnxruntime.InferenceSession``

    Raises:
        FileError: There is no such file.
        FormatError: The file is truncated or altered, or it was written for another version of
            the operators. The message of ONNX Runtime is part of it.
        UsageError: ``threads`` is not 1 to 256.
        MissingExtra: ONNX Runtime is not installed.
        MissingNative: secateur was installed without its native part.

    Example:
        >>> session("missing.onnx")
        Traceback (most recent call last):
            ...
        secateur.core.errors.FileError: opening 'missing.onnx': there is no such file. A session ...
    """
    try:
        import onnxruntime
    except ImportError:
        raise MissingExtra("onnxruntime", "onnx", "opening a compiled ONNX model") from None
    options = session_options(threads, options)
    if isinstance(path, (bytearray, memoryview)):
        path = bytes(path)
    if not isinstance(path, bytes):
        if not isinstance(path, (str, PathLike)):
            raise UsageError(
                f"opening {path!r}",
                f"it is a {type(path).__name__}",
                "a session is made from a path, or from the bytes of a file",
                "give one of these",
            )
        if not Path(path).is_file():
            raise FileError(
                f"opening {str(path)!r}",
                "there is no such file",
                "a session is made from an ONNX file",
                "check the name, or write the file: secateur compile model.onnx -o FILE",
            )
        path = str(path)
    # Its fallback opens the file again after an error and prints a banner; here it cannot help.
    fallback = tuple(providers) != _PROVIDERS
    try:
        return onnxruntime.InferenceSession(
            path, options, providers=list(providers), enable_fallback=fallback
        )
    except Exception as error:
        # Its errors have no common class; it may also quote a damaged name, which is no text.
        if not type(error).__module__.startswith("onnxruntime") and not isinstance(
            error, UnicodeDecodeError
        ):
            raise
        raise FormatError(
            f"opening {'a model in memory' if isinstance(path, bytes) else repr(path)}",
            f"ONNX Runtime refuses it: {str(error).strip()}",
            *_reason(str(error)),
        ) from error


def _reason(said: str) -> tuple[str, str]:
    """Why ONNX Runtime refuses a file, and what to do."""
    if "max supported IR version" in said or "under development" in said:
        return (
            "the file is newer than this ONNX Runtime",
            "install a newer onnxruntime, or write the file for an older version",
        )
    # Ours are registered: one that is not known is of another version, or was altered.
    if "is not a registered function/op" in said and f" {DOMAIN}:" not in said:
        return (
            "the operator belongs to another library, which is not registered",
            "register it in the options of a session; only models without such operators compile",
        )
    if "SECATEUR_ISA" in said:
        return "the environment asks for other kernels", "unset SECATEUR_ISA, or name one of these"
    return (
        "the file is damaged, or this version does not know what it contains",
        "copy it again from where it came, or write it again: secateur compile",
    )


def require_threads(threads: int | None) -> None:
    """Refuse a number of threads that no session should have.

    Raises:
        UsageError: It is not 1 to 256.

    Example:
        >>> require_threads(2)
    """
    if threads is not None and not (is_whole(threads) and 1 <= threads <= MOST_THREADS):
        raise UsageError(
            f"threads={threads!r}",
            f"1 to {MOST_THREADS} are possible",
            "more than that wait for each other",
            "give as many threads as there are cores, or leave it to ONNX Runtime",
        )


def session_options(threads: int | None = None, options: Any = None) -> Any:
    """Options of a session that knows our operators, for those who open it themselves.

    Args:
        threads: How many threads one run uses; None: as ``options`` say.
        options: An ``onnxruntime.SessionOptions`` to complete; None: new ones.

    Returns:
        ``options``, or new ones

    Raises:
        UsageError: ``threads`` is not 1 to 256.
        MissingNative: secateur was installed without its native part.

    Example:
        >>> session_options(threads=2).intra_op_num_threads
        2
    """
    from onnxruntime import SessionOptions

    from secateur.runtime.library import library_path, load

    require_threads(threads)
    load()  # says what is wrong with a library that cannot be used
    options = SessionOptions() if options is None else options
    if threads is not None:
        options.intra_op_num_threads = int(threads)
    count, before = str(options.intra_op_num_threads), _threads_entry(options)
    if before != count:  # ONNX Runtime warns of an entry that is written again
        options.add_session_config_entry(THREADS_ENTRY, count)
    if before is None:  # else these options know the library, and must not be told twice
        options.register_custom_ops_library(str(library_path()))
    return options


def is_whole(value: object) -> bool:
    """Whether a value is a whole number, of Python or of numpy.

    Example:
        >>> is_whole(2), is_whole(2.5), is_whole("2")
        (True, False, False)
    """
    return isinstance(value, Integral)


def _threads_entry(options: Any) -> str | None:
    try:
        return str(options.get_session_config_entry(THREADS_ENTRY))
    except RuntimeError:
        return None
