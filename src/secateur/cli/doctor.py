"""``secateur doctor``: what this machine does with sparse networks."""

from __future__ import annotations

from typing import Annotated

import typer

from secateur.cli import options
from secateur.cli.screen import screen
from secateur.core.facts import environment
from secateur.report.doctor import advice_lines, break_even_table, doctor_json, machine_table
from secateur.runtime.advice import advice
from secateur.runtime.breakeven import CASES, PATTERNS, break_evens
from secateur.runtime.machine import cores, machine


def doctor(
    threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Threads to measure with, up to the cores of this process; all of them by default.",
            show_default=False,
        ),
    ] = None,
    json: options.Json = False,
) -> None:
    """Measure this machine: its kernels, its speed, and from which sparsity on pruning pays.

    Takes some 20 seconds; other work on the machine spoils the figures.

        secateur doctor
    """
    with screen("doctor", json=json) as out:
        count = threads or cores()
        found = machine(count)
        out.text.print(machine_table(found))
        measured = []
        if found.isa:
            whole = sum(1 if c.positions == 1 else len(PATTERNS) for c in CASES)
            with out.progress() as progress:
                for result in break_evens(count):
                    measured.append(result)
                    progress("break-even", len(measured), whole)
            out.show(break_even_table(measured))
        said = advice(found, measured)
        out.show(advice_lines(said))
        out.finish({**doctor_json(found, measured, said), "environment": environment()})
