"""Where a command writes: text or one JSON document on stdout, all else on stderr."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TextIO, cast

import torch
import typer
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from secateur.core.batches import Data, Watched
from secateur.core.errors import FileError, SecateurError, UsageError
from secateur.frontends import Loaded
from secateur.report import document, error_document

INTERRUPTED = 130
#: What a shell shows for a program that a closed pipe ended.
UNREAD = 141
INTERNAL = 1
#: A bar appears for what takes longer than this.
PATIENCE = 2.0
_UNBROKEN = 1 << 16
_LABELS = {"asked": "asked", "found": "found", "why": "why", "do": "do"}


def version() -> str:
    """The version of the package."""
    import secateur

    return secateur.__version__


@dataclass
class Screen:
    """What a command writes to.

    Args:
        command: Its name.
        json: Whether stdout gets one JSON document and nothing else.
        stdout: The real one; while the command runs with ``json``, ``sys.stdout`` is stderr, so
            that what the user's own functions print cannot spoil the document.
    """

    command: str
    json: bool
    stdout: TextIO
    text: Console = field(init=False)
    errors: Console = field(init=False)

    def __post_init__(self) -> None:
        self.errors = _console(sys.stderr)
        self.text = self.errors if self.json else _console(self.stdout)

    def show(self, *parts: RenderableType) -> None:
        """Show parts with an empty line before each."""
        for part in parts:
            self.text.print()
            self.text.print(part)

    def say(self, line: str) -> None:
        """One line of progress."""
        self.text.print(Text(line))

    def noting(self, loaded: Loaded) -> Loaded:
        """What was loaded, after a note if there is something to know of it."""
        if loaded.remark:
            self.say(f"Note: {loaded.remark}.")
        return loaded

    def finish(self, content: Mapping[str, Any]) -> None:
        """Write the JSON document, if one was asked for."""
        if self.json:
            self.stdout.write(document(version(), self.command, content) + "\n")
            self.stdout.flush()

    @contextmanager
    def progress(self) -> Iterator[Any]:
        """A function ``(stage, done, total)`` that draws a bar for what takes long."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeRemainingColumn(),
        )
        bar = Progress(*columns, console=self.errors, transient=True)
        tasks: dict[str, Any] = {}
        start, shown = time.monotonic(), False

        def report(stage: str, done: float, total: float | None) -> None:
            nonlocal shown
            if not self.errors.is_terminal:
                return
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done, total=total)
            if not shown and time.monotonic() - start > PATIENCE:
                bar.start()
                shown = True

        try:
            yield report
        finally:
            if shown:
                bar.stop()

    @contextmanager
    def watching(self, data: Data | None) -> Iterator[Data | None]:
        """Data whose batches for measuring draw a bar as they are read, where that takes long."""
        with self.progress() as report:
            if data is not None and data.test is not None:
                yield replace(data, test=Watched(data.test, "measuring", report))
            elif data is not None and data.train is not None:
                yield replace(data, train=Watched(data.train, "measuring", report))
            else:
                yield data

    @contextmanager
    def working(self, stage: str) -> Iterator[None]:
        """A sign of life for one long step that cannot say how far it is."""
        wheel = self.errors.status(f"{stage} ...") if self.errors.is_terminal else None
        with wheel or contextlib.nullcontext():
            yield


def _console(file: TextIO) -> Console:
    """One that breaks lines for a terminal, and else only if ``COLUMNS`` asks for it.

    What a pipe or file gets is searched line by line: a row stays one line, without spaces at its end.
    """
    console = Console(file=file, highlight=False)
    if not console.is_terminal:
        console.file = cast(TextIO, _Trimmed(file))
        if "COLUMNS" not in os.environ:
            console.width = _UNBROKEN
    return console


class _Trimmed:
    """A file that is given whole lines, and drops the spaces at their ends."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, text: str) -> int:
        self._file.write(re.sub(r" +$", "", text, flags=re.MULTILINE))
        return len(text)


@contextmanager
def screen(command: str, *, json: bool, threads: int | None = None) -> Iterator[Screen]:
    """The screen of a command. Errors inside are rendered, and end the command with their code."""
    found = Screen(command, json, sys.stdout)
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        with contextlib.redirect_stdout(sys.stderr) if json else contextlib.nullcontext():
            yield found
    except (typer.Exit, typer.Abort):
        raise
    except KeyboardInterrupt as error:
        if json:
            found.stdout.write(error_document(version(), command, error, INTERRUPTED) + "\n")
        sys.stderr.write("Interrupted. Nothing half-written was left.\n")
        raise typer.Exit(INTERRUPTED) from None
    except SystemExit as error:  # of the user's own code: a command ends with typer.Exit
        if isinstance(error.__context__, BrokenPipeError):  # rich's, when nobody reads any more
            raise
        raise typer.Exit(_failed(found, _left(error, command))) from None
    except BrokenPipeError:
        raise
    except Exception as error:
        raise typer.Exit(_failed(found, _too_long(error, command) or error)) from None


def _left(error: SystemExit, command: str) -> UsageError:
    """What to say of code that wanted to end the program."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return UsageError(
        f"secateur {command}",
        f"code that it ran called sys.exit({'' if error.code is None else repr(error.code)})",
        f"that would end the command half-way; the call is in {last.filename}, line {last.lineno}",
        "return there, or raise an error; what only a script does belongs under "
        "if __name__ == '__main__'",
    )


def _too_long(error: Exception, command: str) -> FileError | None:
    """What to say of a name that no file can have; None of other errors."""
    if not isinstance(error, OSError) or error.errno != errno.ENAMETOOLONG:
        return None
    name = str(error.filename)
    return FileError(
        f"secateur {command}",
        f"a path of {len(name):,} characters: {name[:40]}...",
        "the system refuses it: names have at most 255 bytes on most file systems",
        "check the path",
    )


def _failed(found: Screen, error: Exception) -> int:
    """Render an error and return its exit code."""
    known = isinstance(error, SecateurError)
    code = error.exit_code if isinstance(error, SecateurError) else INTERNAL
    if os.environ.get("SECATEUR_DEBUG") == "1":
        found.errors.print_exception()
    if found.json:
        found.stdout.write(error_document(version(), found.command, error, code) + "\n")
        return code
    if isinstance(error, SecateurError):
        found.errors.print(Text(f"error ({type(error).__name__})", "bold red"))
        lines = Table.grid(padding=(0, 2))
        for key, text in error.parts().items():
            if text:
                lines.add_row(Text(f"  {_LABELS[key]}", "bold"), Text(text))
        found.errors.print(lines)
    if not known:
        found.errors.print(Text("internal error", "bold red"))
        found.errors.print(Text(f"  {type(error).__name__}: {error}"))
        found.errors.print(
            "  This is a defect of secateur, or of code that it called. SECATEUR_DEBUG=1 shows "
            "where."
        )
    return code
