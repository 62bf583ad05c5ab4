"""Options that the commands about ONNX files have, and what they mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from secateur.core.errors import UsageError
from secateur.runtime.compiler.sample import Sample

File = Annotated[
    str, typer.Argument(metavar="MODEL.ONNX", help="An ONNX file.", show_default=False)
]
Threads = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Threads of ONNX Runtime, up to 256; by default it decides.",
        show_default=False,
    ),
]
Batch = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Size of the batch, where the model leaves it open; 1 by default.",
        show_default=False,
    ),
]
Shape = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=1x128",
        help="Shape of an input with open axes. Repeatable.",
        show_default=False,
    ),
]


def sample_of(batch: int | None, shapes: Sequence[str] | None) -> Sample:
    """The sample that the flags describe.

    Raises:
        UsageError: A shape is not written NAME=1x128, or an input has two.

    Example:
        >>> sample_of(1, ["ids=1x128", "image=1x3x224x224"]).shapes["image"]
        (1, 3, 224, 224)
    """
    found: dict[str, tuple[int, ...]] = {}
    for text in shapes or ():
        name, _, sizes = text.rpartition("=")
        parts = sizes.split("x")
        if not name or not all(part.isdigit() and int(part) > 0 for part in parts):
            raise UsageError(
                f"--shape {text}",
                "it is not NAME=SIZExSIZE",
                "a shape is a name and whole numbers above 0",
                "write --shape input=1x3x224x224",
            )
        if name in found:
            raise UsageError(
                f"--shape {text}",
                f"{name!r} was given the shape {'x'.join(map(str, found[name]))} before",
                "an input has one shape",
                "give one of them",
            )
        found[name] = tuple(map(int, parts))
    return Sample(batch=batch, shapes=found)
