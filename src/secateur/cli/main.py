"""The console entry point and what all commands share."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from secateur.cli import (
    bench,
    compare,
    doctor,
    evaluate,
    export,
    inspect,
    plot,
    prune,
    shrink,
    ticket,
)
from secateur.cli import compile as compiling
from secateur.cli.screen import INTERRUPTED, UNREAD, version
from secateur.core.errors import UsageError
from secateur.report import error_document

_EXIT_CODES = """Exit codes: 0 done; 1 internal error; 2 usage; 3 unusable data or weights;
4 a file is missing, damaged or in the way; 5 an extra is missing, or not built yet;
6 a gain asked for with --require is missing; 130 interrupted (Ctrl-C);
141 nobody read the output to its end, as with head."""


class _Command(TyperCommand):
    """A command whose help shows no type behind ``--help``, as behind no other flag."""

    def get_help_option(self, ctx: Any) -> Any:
        return _bare(super().get_help_option(ctx))


class _Group(TyperGroup):
    """The same of all commands together."""

    def get_help_option(self, ctx: Any) -> Any:
        return _bare(super().get_help_option(ctx))


def _bare(option: Any) -> Any:
    if option is not None:
        option.metavar = ""
    return option


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",
    epilog=_EXIT_CODES.replace("\n", " "),
)
app.command("inspect", cls=_Command)(inspect.inspect)
app.command("prune", cls=_Command)(prune.prune)
app.command("shrink", cls=_Command)(shrink.shrink)
app.command("evaluate", cls=_Command)(evaluate.evaluate)
app.command("compare", cls=_Command)(compare.compare)
app.command("export", cls=_Command)(export.export)
app.command("compile", cls=_Command)(compiling.compile_model)
app.command("bench", cls=_Command)(bench.bench)
app.command("ticket", cls=_Command)(ticket.ticket)
app.command("plot", cls=_Command)(plot.plot)
app.command("doctor", cls=_Command)(doctor.doctor)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"secateur {version()}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            metavar="",
            callback=_show_version,
            is_eager=True,
            help="Show the version.",
        ),
    ] = False,
) -> None:
    """Prune neural networks, and prove what was gained.

    MODEL is file.py:function (without arguments, returns a torch module), a Transformers folder,
    or a bundle that prune wrote. --data is file.py:function, too.

    Start with: secateur inspect MODEL
    """


def run() -> None:
    """Run the command line; the entry point of the console script."""
    _open_closed_streams()
    try:
        try:
            _run()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        _unread()
    except SystemExit as error:
        # What rich and typer make of a closed pipe.
        if isinstance(error.__context__, BrokenPipeError):
            _unread()
        raise


def _open_closed_streams() -> None:
    """What goes to a stream that was closed by whoever started this (``>&-``) goes nowhere."""
    for name in ("stdin", "stdout", "stderr"):  # in their order: each takes the lowest free number
        if getattr(sys, name) is None:
            nowhere = os.open(os.devnull, os.O_RDONLY if name == "stdin" else os.O_WRONLY)
            setattr(sys, name, os.fdopen(nowhere, "r" if name == "stdin" else "w"))


def _unread() -> NoReturn:
    """End as other programs do whose reader went away, e.g. ``head``: at once, and without a word."""
    with contextlib.suppress(OSError):  # what is left in the buffer is written when Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(UNREAD)


def _run() -> None:
    if "--json" not in sys.argv[1:]:
        try:
            app(prog_name="secateur")
        except KeyboardInterrupt:  # outside any command
            sys.stderr.write("Interrupted.\n")
            sys.exit(INTERRUPTED)
        return
    _keep_stdout()
    # Wrong options are found before any command runs; they must give a document, too.
    try:
        code = app(prog_name="secateur", standalone_mode=False)
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        command = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
        wrong = UsageError(
            "the command line",
            error.format_message(),
            "each command takes its own arguments and options",
            f"see secateur {command} --help",
        )
        sys.stdout.write(error_document(version(), command, wrong, UsageError.exit_code) + "\n")
        sys.exit(UsageError.exit_code)
    sys.exit(code if isinstance(code, int) else 0)


def _keep_stdout() -> None:
    """From here on ``sys.stdout`` alone is the real one: what writes below Python reaches stderr.

    Programs that the user's own functions start, libraries in C, and ``sys.__stdout__`` would else
    spoil the document.
    """
    with contextlib.suppress(OSError):
        kept = os.dup(1)
        os.dup2(2, 1)
        sys.stdout = os.fdopen(kept, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)
