"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

#: Panels of the help.
RECIPE, TRAIN = "What to do", "Training"

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="file.py:function, a Transformers folder, or a bundle.",
        show_default=False,
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        metavar="FILE.PY:FUNCTION",
        help="Returns Data, a mapping with train and test, or (train, test[, metric]). "
        "metric(model, batches) gives a number: larger is better.",
        show_default=False,
    ),
]
Input = Annotated[
    str | None,
    typer.Option(
        "--input",
        metavar="SHAPES",
        help="Example inputs: 1x3x224x224, tokens:1x16, or name=shape; several with commas.",
        show_default=False,
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(
        metavar="PATH",
        help="Weights for file.py:function: a .safetensors file or a bundle.",
        show_default=False,
    ),
]
Architecture = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="FILE.PY:FUNCTION",
        help="What to build for a bundle, if it does not say or the file moved.",
        show_default=False,
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Threads that PyTorch uses.", show_default=False),
]
Json = Annotated[
    bool,
    typer.Option(
        "--json", metavar="", help="Write one JSON document to stdout, all else to stderr."
    ),
]
Ignore = Annotated[
    list[str] | None,
    typer.Option(
        metavar="SELECTOR",
        help="Leave dense: a name, a glob, re:expression or a class name. Repeatable.",
        show_default=False,
    ),
]
Include = Annotated[
    list[str] | None,
    typer.Option(
        metavar="SELECTOR", help="Prune only what matches. Repeatable.", show_default=False
    ),
]
Output = Annotated[
    Path, typer.Option("--output", "-o", metavar="FOLDER", help="Where the bundle is written.")
]
RecipeFile = Annotated[
    str | None,
    typer.Option(metavar="FILE.YAML", help="Everything in a file.", rich_help_panel=RECIPE),
]
Lr = Annotated[
    float | None,
    typer.Option(
        metavar="RATE",
        help="Peak learning rate. Default: 0.01, or that of the method.",
        rich_help_panel=TRAIN,
    ),
]
Distill = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE",
        help="Share of the loss, 0 to 1, that follows the dense network.",
        rich_help_panel=TRAIN,
    ),
]
Calibration = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Samples that statistics are read from. Default: 1024."),
]
Onnx = Annotated[
    Path | None, typer.Option(metavar="PATH", help="Write an ONNX file too (needs --data).")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", metavar="", help="Replace the output.")]
