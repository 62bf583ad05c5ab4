"""``secateur evaluate``: accuracy, cost and latency of one model."""

from __future__ import annotations

from rich.text import Text

from secateur.cli import options
from secateur.cli.batches import example_from
from secateur.cli.screen import screen
from secateur.core.facts import environment
from secateur.evaluate import measure
from secateur.frontends import load_data, load_model
from secateur.report import measurement_table
from secateur.report.jsonreport import measurement_json


def evaluate(  # noqa: PLR0913, PLR0917 - a parameter for each option
    model: options.Model,
    data: options.Data = None,
    weights: options.Weights = None,
    architecture: options.Architecture = None,
    inputs: options.Input = None,
    threads: options.Threads = None,
    json: options.Json = False,
) -> None:
    """Measure MODEL: accuracy and loss on the test data, size, multiply-adds and latency.

    Without data, multiply-adds and latency are measured on random numbers of the shapes in --input.

    secateur evaluate small --data data.py:load
    """
    with screen("evaluate", json=json, threads=threads) as out:
        loaded = out.noting(load_model(model, weights=weights, model=architecture))
        batches = None if data is None else load_data(data)
        example = example_from(inputs, data, loaded.model)
        with out.watching(batches) as watched:
            found = measure(loaded.model, watched, masks=loaded.masks, example=example)
        out.text.print(measurement_table(found))
        if batches is None:
            text = "Accuracy needs --data file.py:function."
            if example is None:
                text += " Multiply-adds and latency need that, or --input."
            out.show(Text(text))
        out.finish({"measurement": measurement_json(found), "environment": environment()})
