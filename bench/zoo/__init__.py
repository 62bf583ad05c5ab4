"""Architectures of every kind that users prune, as small networks with random weights."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from bench.zoo import decoders, handmade, text, vision

Build = Callable[[], tuple[nn.Module, Any]]


def _read(name: str) -> tuple[nn.Module, Any]:
    return text.build(name), text.example_for(name)


def _decode(name: str) -> tuple[nn.Module, Any]:
    return decoders.build(name), decoders.example()


#: Name -> a function that builds the network and inputs for it.
ZOO: dict[str, Build] = {
    **vision.MODELS,
    **{name: functools.partial(_read, name) for name in text.ZOO},
    **{name: functools.partial(_decode, name) for name in decoders.ZOO},
    **handmade.NETWORKS,
}
