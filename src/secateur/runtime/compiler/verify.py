"""Whether two models compute the same, in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from secateur.core import difference
from secateur.core.errors import DataError, first_line
from secateur.runtime.compiler.graph import Graph
from secateur.runtime.compiler.sample import Sample, not_running, shapes_text
from secateur.runtime.race import open_session

#: Largest difference that a compiled model may have, relative to the largest output.
TOLERANCE = 1e-3
#: The same where layers may multiply float16, whose numbers have eleven bits.
HALF_TOLERANCE = 3e-2
# Samples that predictions are compared on.
_SAMPLES = 8


def largest_error(expected: Sequence[Any], got: Sequence[Any]) -> float:
    """Largest difference of any output; see :func:`secateur.core.difference.largest_error`.

    Example:
        >>> largest_error([np.array([1.0, -4.0])], [np.array([1.0, -4.2])])
        0.05
        >>> largest_error([np.ones(3)], [np.ones(4)])
        inf
    """
    return difference.largest_error(_numbers(expected), _numbers(got))


def _numbers(outputs: Sequence[Any]) -> list[Tensor]:
    """All that can be compared: arrays of numbers, those in sequences too, and the values of maps.

    Text is left out: a number that is written out differs by its last digit.
    """
    found: list[Tensor] = []
    for y in outputs:
        if isinstance(y, list):
            found += _numbers(y)
        elif y is not None:
            array = np.asarray(list(y.values()) if isinstance(y, dict) else y)
            found += [torch.from_numpy(array)] if array.dtype.kind in "bfiuc" else []
    return found


def compiled_error(
    graph: Graph, compiled: Any, sample: Sample, *, threads: int | None
) -> tuple[float, int]:
    """Error of a compiled model on a sample, and on larger ones if the model takes any size.

    Args:
        graph: The dense model.
        compiled: What should compute the same.
        sample: The first inputs.
        threads: Of ONNX Runtime.

    Returns:
        The error, and on how many samples it was measured.

    Raises:
        UsageError: The dense model does not run on the sample.
        DataError: The compiled model does not run, and the dense one does.
    """
    dense, sparse = open_session(graph.model, threads), open_session(compiled, threads)
    worst, count = 0.0, 0
    for inputs in (sample, sample.larger(graph), sample.wider(graph)):
        if inputs is None:
            continue
        feeds = inputs.feeds(graph)
        try:
            expected = dense.run(None, feeds)
        except Exception as error:
            if count:  # some models declare an axis open that is not
                continue
            raise not_running(feeds, error) from error
        worst = max(worst, largest_error(expected, _run(sparse, feeds)))
        count += 1
    return worst, count


def agreement(graph: Graph, compiled: Any, sample: Sample, *, threads: int | None) -> float:
    """Share of predictions that two models have in common, on random inputs.

    A prediction is where the largest number of the first output is along its last axis longer than
    one, for each sample and token; without any numbers in the outputs all are the same.

    Args:
        graph: The dense model.
        compiled: The other one.
        sample: Sizes of the inputs.
        threads: Of ONNX Runtime.
    """
    dense, sparse = open_session(graph.model, threads), open_session(compiled, threads)
    same: list[np.ndarray] = []
    for seed in range(_SAMPLES):
        feeds = replace(sample, seed=seed).feeds(graph)
        outputs = _numbers(dense.run(None, feeds)), _numbers(_run(sparse, feeds))
        if not outputs[0]:
            return 1.0
        a, b = (numbers[0].numpy() for numbers in outputs)
        axes = [i for i, n in enumerate(a.shape) if n > 1 and i]
        axis = axes[-1] if axes else -1
        same.append((a.argmax(axis) == b.argmax(axis)).ravel())
    return float(np.concatenate(same).mean())


def require_same(error: float, asked: str, tolerance: float = TOLERANCE) -> None:
    """Refuse a model that computes something else.

    Raises:
        DataError: The error is above the tolerance, or no number.

    Example:
        >>> require_same(1e-6, "compiling")
    """
    if not error <= tolerance:
        raise DataError(
            asked,
            f"the compiled model differs from the dense one by {error:.2g} of the largest output",
            f"rounding stays below {tolerance:g}",
            "unless the model draws random numbers, this is a defect: report it with the model. "
            "The file was not kept",
        )


def _run(session: Any, feeds: Mapping[str, np.ndarray]) -> list[Any]:
    try:
        return list(session.run(None, dict(feeds)))
    except Exception as error:
        raise DataError(
            f"running the compiled model on {shapes_text({k: x.shape for k, x in feeds.items()})}",
            f"it fails ({first_line(error)})",
            "the dense model runs on the same inputs",
            "this is a defect; report it with the model",
        ) from error
