"""Weights of an ONNX model that lie in other files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any


def load_external_(model: Any, folder: Path) -> None:
    """Read into a model what it keeps in other files.

    Links are followed, as ONNX Runtime follows them, because caches of downloads are made of links;
    the loader of the package onnx refuses them.

    Args:
        model: Of ONNX; it holds all of its tensors afterwards.
        folder: Where its file lies.

    Raises:
        OSError: A file cannot be read.
        ValueError: A file is too short, or lies outside of the folder.
    """
    import onnx

    for tensor in _tensors(model, onnx.TensorProto):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            tensor.raw_data = _content(tensor, folder)
            tensor.ClearField("data_location")
            tensor.ClearField("external_data")


def _tensors(message: Any, kind: Any) -> Iterator[Any]:
    """Every tensor in a message, also in the branches of its nodes."""
    if isinstance(message, kind):
        yield message
        return
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            for part in (value,) if hasattr(value, "ListFields") else value:
                yield from _tensors(part, kind)


def _content(tensor: Any, folder: Path) -> bytes:
    about = {entry.key: entry.value for entry in tensor.external_data}
    place = Path(about.get("location", ""))
    if place.is_absolute() or ".." in place.parts:
        raise ValueError(f"{str(place)!r} is not inside its folder")
    if not (folder / place).is_file():  # a device would have no end
        raise ValueError(f"there is no file {str(place)!r}")
    offset, length = int(about.get("offset") or 0), int(about.get("length") or -1)
    with (folder / place).open("rb") as file:
        file.seek(offset)
        content = file.read(length)
    if len(content) < length:
        raise ValueError(f"{str(place)!r} ends {length - len(content)} bytes too early")
    return content
