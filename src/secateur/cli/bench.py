"""``secateur bench``: a model densely and sparsely, timed side by side."""

from __future__ import annotations

from typing import Annotated

import typer

from secateur.cli import options
from secateur.cli.screen import screen
from secateur.cli.sparse_options import Batch, File, Shape, Threads, sample_of
from secateur.core.facts import environment
from secateur.report.runtime import bench_json, bench_layers, bench_table, notes_lines
from secateur.runtime.bench import bench as run_bench
from secateur.runtime.machine import cores, float32_rate

_OWN = "dense"


def bench(
    model: File,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.ONNX",
            help="The dense file to compare with. By default, or with the word dense: MODEL.ONNX "
            "itself, made dense again if it is compiled.",
            show_default=False,
        ),
    ] = None,
    threads: Threads = None,
    batch: Batch = None,
    shape: Shape = None,
    json: options.Json = False,
) -> None:
    """Time MODEL.ONNX densely in ONNX Runtime and in our form, in turn, and compare the outputs.

    A dense model is compiled first, to a file that is not kept. Then some ten seconds of runs.

        secateur bench model.onnx --threads 2
    """
    with screen("bench", json=json) as out:
        with out.progress() as progress:
            found = run_bench(
                model,
                against=None if against == _OWN else against,
                threads=threads,
                sample=sample_of(batch, shape),
                # More threads than processors do not make the machine faster.
                peak=lambda: float32_rate(min(threads or cores(), cores()))[0],
                progress=progress,
            )
        out.text.print(bench_layers(found))
        out.show(bench_table(found))
        if found.notes:
            out.show(notes_lines(found.notes))
        out.finish({**bench_json(found), "environment": environment()})
