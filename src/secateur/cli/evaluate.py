"""``secateur evaluate``: accuracy, cost and latency of one model."""

from __future__ import annotations

from rich.text import Text

from secateur.cli import options
from secateur.cli.screen import screen
from secateur.core.facts import environment
from secateur.evaluate import measure
from secateur.frontends import load_data, load_model
from secateur.report import measurement_table
from secateur.report.jsonreport import measurement_json


def evaluate(
    model: options.Model,
    data: options.Data = None,
    weights: options.Weights = None,
    architecture: options.Architecture = None,
    threads: options.Threads = None,
    json: options.Json = False,
) -> None:
    """Measure MODEL: accuracy and loss on the test data, size, multiply-adds and latency.

    secateur evaluate small --data data.py:load
    """
    with screen("evaluate", json=json, threads=threads) as out:
        loaded = out.noting(load_model(model, weights=weights, model=architecture))
        batches = None if data is None else load_data(data)
        with out.watching(batches) as watched:
            found = measure(loaded.model, watched, masks=loaded.masks)
        out.text.print(measurement_table(found))
        if batches is None:
            out.show(Text("Accuracy, multiply-adds and latency need --data file.py:function."))
        out.finish({"measurement": measurement_json(found), "environment": environment()})
