"""``secateur compile``: write a model whose sparse layers skip their zeros."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli import options
from secateur.cli.places import require_new_file
from secateur.cli.screen import screen
from secateur.cli.sparse_options import Batch, File, Shape, Threads, sample_of
from secateur.report.runtime import compiled_json, compiled_layers, compiled_text
from secateur.runtime.compiler.compile import compile_onnx, require_known
from secateur.runtime.session import require_threads


def compile_model(  # noqa: PLR0913, PLR0917 - a parameter for each option
    model: File,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE.ONNX", help="The file to write.")
    ],
    threads: Threads = None,
    batch: Batch = None,
    shape: Shape = None,
    precision: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="float32, or float16: layers may multiply float16, where the machine can and "
            "where that is faster.",
        ),
    ] = "float32",
    choose: Annotated[
        str,
        typer.Option(
            metavar="HOW",
            help="measure: time the kernels on each layer, then the whole model. first: take the "
            "first kernel that suits, untimed.",
        ),
    ] = "measure",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", metavar="", help="Replace the file.")
    ] = False,
    json: options.Json = False,
) -> None:
    """Compile MODEL.ONNX for the sparse runtime: fuse, choose kernels by measuring, pack, check.

    It takes seconds, or two minutes for a large model. secateur.runtime.session opens the result.

        secateur compile model.onnx -o model.sparse.onnx
    """
    with screen("compile", json=json) as out:
        require_known(precision, choose)
        require_threads(threads)
        require_new_file(output, overwrite=overwrite)
        with out.progress() as progress:
            done = compile_onnx(
                model,
                output,
                threads=threads,
                precision=precision,
                choose=choose,
                sample=sample_of(batch, shape),
                progress=progress,
            )
        out.text.print(compiled_layers(done))
        out.show(compiled_text(done))
        out.finish(compiled_json(done))
