"""``secateur export``: write a model as ONNX."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from secateur.cli import options
from secateur.cli.places import require_new_file
from secateur.cli.screen import screen
from secateur.core.batches import first_of
from secateur.core.errors import UsageError
from secateur.drive.structural.cutting import as_batch
from secateur.evaluate.measure import batches_of
from secateur.frontends import export_onnx, load_data, load_model
from secateur.frontends.example import example_inputs
from secateur.report.units import size


def export(  # noqa: PLR0913, PLR0917 - a parameter for each option
    model: options.Model,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE.ONNX", help="The file to write.")
    ],
    data: options.Data = None,
    inputs: options.Input = None,
    weights: options.Weights = None,
    architecture: options.Architecture = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", metavar="", help="Replace the file.")
    ] = False,
    threads: options.Threads = None,
    json: options.Json = False,
) -> None:
    """Write MODEL as one ONNX file and check it with ONNX Runtime.

    It is run on an example: the first batch of --data, or random numbers of the shapes in --input. A
    Transformers model needs neither.

    secateur export small -o small.onnx --data data.py:load
    """
    with screen("export", json=json, threads=threads) as out:
        if output.suffix != ".onnx":
            raise UsageError(
                f"exporting to {str(output)!r}",
                f"its suffix is {output.suffix or 'missing'}",
                "the only format so far is ONNX",
                "write -o name.onnx",
            )
        require_new_file(output, overwrite=overwrite)
        loaded = out.noting(load_model(model, weights=weights, model=architecture))
        if inputs is None and data is not None:
            example = first_of(batches_of(load_data(data))[1])
        else:
            example = as_batch(example_inputs(loaded.model, inputs))
        with out.working("exporting"):
            done = export_onnx(loaded.model, example, output)
        out.say(
            f"Written to {done.path}: {size(done.bytes)}, opset {done.opset}; ONNX Runtime differs "
            f"from PyTorch by {done.error:.1g} of the largest output."
        )
        for note in done.notes:
            out.say(f"Note: {note}.")
        if loaded.masks:
            text = "ONNX stores and multiplies the zeros like any other number."
            compiled = output.with_suffix(".sparse.onnx")
            out.say(f"{text} To skip them: secateur compile {output} --output {compiled}")
        free = "any batch size and length" if done.lengths else "any batch size"
        out.text.print(Text(f"inputs: {', '.join(done.inputs)} ({free})"))
        out.finish({"onnx": dataclasses.asdict(done)})
