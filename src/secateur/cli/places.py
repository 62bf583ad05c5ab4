"""Checks of output places before hours of work."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from secateur.core.atomic import require_new, require_room
from secateur.core.errors import OutputExists, UsageError
from secateur.drive.pruned import Pruned
from secateur.formats.bundle import FACTS, MODEL, RECIPE, SURGERY
from secateur.frontends.onnx import require_onnx


def require_new_file(path: Path, *, overwrite: bool = False) -> None:
    """Fail early where writing ``path`` would fail, or would replace something, at the end.

    Raises:
        OutputExists: It is there and ``overwrite`` is false, or it is a folder.
        FileError: Its folder cannot be written.

    Example:
        >>> require_new_file(Path("no-such-file.onnx"))
    """
    asked = f"writing to {str(path)!r}"
    if os.path.isdir(path):  # noqa: PTH112 - Path.is_dir raises for a name that is too long
        raise OutputExists(asked, "it is a folder", "a file is written", "name a file")
    if os.path.exists(path) and not overwrite:  # noqa: PTH110 - as above
        raise OutputExists(
            asked,
            "it already exists",
            "a result is never overwritten by accident",
            "choose another name, remove it, or ask for overwriting (--overwrite)",
        )
    require_room(path)


def require_places(
    output: Path,
    onnx: Path | None,
    data: str | None,
    *,
    pretrained: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Fail now where writing a bundle, and what was asked for beside it, would fail at the end.

    Raises:
        OutputExists: One of them is there and ``overwrite`` is false.
        UsageError: An ONNX file needs data, and there is none.
        MissingExtra: What writes ONNX files is not installed.

    Example:
        >>> require_places(Path("no-such-folder"), None, None)
    """
    require_new(output, {MODEL, RECIPE, FACTS, SURGERY}, overwrite=overwrite)
    if onnx is not None:
        if data is None:
            raise UsageError(
                f"--onnx {onnx}", "no data was given", "exporting runs an example", "add --data"
            )
        require_new_file(onnx, overwrite=overwrite)
        require_onnx()
    if pretrained is not None:
        require_new(pretrained, None, overwrite=overwrite)


@contextmanager
def kept(pruned: Pruned, output: Path, *, overwrite: bool = False) -> Iterator[None]:
    """Write the bundle after the block; also where the block fails, for it may have cost hours.

    Example:
        >>> import secateur, tempfile
        >>> from torch import nn
        >>> pruned = secateur.prune(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)))
        >>> folder = Path(tempfile.mkdtemp()) / "small"
        >>> with kept(pruned, folder):
        ...     raise ValueError("measuring fails")
        Traceback (most recent call last):
            ...
        ValueError: measuring fails
        >>> sorted(file.name for file in folder.iterdir())
        ['facts.json', 'model.safetensors', 'recipe.yaml']
    """
    try:
        yield
    except BaseException:
        pruned.save(output, overwrite=overwrite)
        sys.stderr.write(f"The result was written to {output}; what followed was not finished.\n")
        raise
    pruned.save(output, overwrite=overwrite)
