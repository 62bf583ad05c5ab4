"""Inputs for a Transformers model, made up from its configuration."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.errors import UsageError, kind_of


def example_for(model: Any, example: Any = None) -> Any:
    """Inputs for a Transformers model: the caller's, or made-up texts or images.

    Raises:
        UsageError: The model takes something else.

    Example:
        >>> import transformers
        >>> config = transformers.BertConfig(hidden_size=8, num_hidden_layers=1, vocab_size=9,
        ...                                  num_attention_heads=2, intermediate_size=4)
        >>> example_for(transformers.BertModel(config))["input_ids"].shape
        torch.Size([2, 7])
    """
    if example is not None:
        return example
    generator = torch.Generator().manual_seed(0)
    config, name = model.config, model.main_input_name
    if name == "input_ids" and hasattr(config, "vocab_size"):
        made: Tensor = torch.randint(config.vocab_size, (2, 7), generator=generator).to(
            model.device
        )
        inputs = {name: made}
        if getattr(config, "is_encoder_decoder", False) and _takes(model, "decoder_input_ids"):
            inputs["decoder_input_ids"] = made[:, :5]
        return inputs
    size = getattr(config, "image_size", None)
    if name == "pixel_values" and size is not None:
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        shape = (2, getattr(config, "num_channels", 3), height, width)
        return {name: torch.randn(shape, generator=generator).to(model.device, model.dtype)}
    raise UsageError(
        f"example inputs for {kind_of(model)}",
        f"none can be made up for {name!r}",
        "the model has to run once",
        "pass example=: a tensor, a tuple, or a mapping of named inputs",
    )


def _takes(model: nn.Module, name: str) -> bool:
    return name in inspect.signature(model.forward).parameters
