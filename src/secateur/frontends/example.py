"""Example inputs for a model that comes without data."""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.errors import UsageError, kind_of

_TOKENS = 16
_WRITTEN = re.compile(r"(?:(?P<name>\w+)=)?(?P<kind>tokens:)?(?P<shape>\d+(?:x\d+)*)")


def example_inputs(model: nn.Module, text: str | None = None) -> Any:
    """Inputs on which a model runs, from a description or from a Transformers configuration.

    Args:
        model: The model.
        text: Shapes, separated by commas: ``1x3x224x224`` for numbers, ``tokens:1x16`` for token
            numbers, each optionally with the name of the argument in front (``input_ids=tokens:1x8``).

    Raises:
        UsageError: The text cannot be read, or there is none and the model does not say what it reads.

    Example:
        >>> example_inputs(nn.Linear(4, 2), "1x4").shape
        torch.Size([1, 4])
        >>> example_inputs(nn.Linear(4, 2))
        Traceback (most recent call last):
            ...
        secateur.core.errors.UsageError: example inputs for a Linear: nothing says what it reads. ...
    """
    if text is None:
        return _from_configuration(model)
    given: dict[str, Tensor] = {}
    positional: list[Tensor] = []
    for piece in text.split(","):
        match = _WRITTEN.fullmatch(piece.strip())
        if match is None:
            raise UsageError(
                f"--input {text!r}",
                f"{piece!r} is not a shape",
                "shapes are written 1x3x224x224, or tokens:1x16",
                "separate several by commas, and put name= before one that goes by name",
            )
        shape = tuple(int(size) for size in match["shape"].split("x"))
        x = _tokens(shape) if match["kind"] else torch.randn(shape, generator=_generator())
        if match["name"]:
            given[match["name"]] = x
        else:
            positional.append(x)
    if given and positional:
        names = [n for n in inspect.signature(model.forward).parameters if n not in given]
        given |= dict(zip(names, positional, strict=False))
    return given or (positional[0] if len(positional) == 1 else tuple(positional))


def _from_configuration(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    name = getattr(model, "main_input_name", "")
    if name == "pixel_values" and getattr(config, "num_channels", None):
        size = getattr(config, "image_size", None) or 224
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        shape = (1, int(config.num_channels), int(height), int(width))
        return {name: torch.randn(shape, generator=_generator())}
    if name == "input_ids" and config is not None:
        ids = _tokens((1, _TOKENS))
        if getattr(config, "is_encoder_decoder", False):
            return {name: ids, "decoder_input_ids": ids}
        return {name: ids}
    raise UsageError(
        f"example inputs for {kind_of(model)}",
        "nothing says what it reads",
        "the network is run once on them, to see what it does",
        "give --input, e.g. --input 1x3x224x224, or --data",
    )


def _tokens(shape: tuple[int, ...]) -> Tensor:
    # Small numbers are in every vocabulary; 0 to 3 are often special.
    return torch.randint(4, 20, shape, generator=_generator())


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
