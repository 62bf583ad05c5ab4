"""Weights and bias of a layer, and what can be folded into them: batch normalisation and the like.

Sums are made in double precision and rounded to float32 once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class Affine:
    """``y = weight x + bias``.

    Args:
        weight: ``(outputs, ...)``, float64.
        bias: ``(outputs,)``, float64.

    Example:
        >>> layer = Affine.of(np.ones((2, 3)), None).scaled(np.array([2.0, 1.0])).shifted(np.ones(2))
        >>> layer.weight.tolist(), layer.bias.tolist()
        ([[2.0, 2.0, 2.0], [1.0, 1.0, 1.0]], [1.0, 1.0])
    """

    weight: np.ndarray
    bias: np.ndarray

    @staticmethod
    def of(weight: np.ndarray, bias: np.ndarray | None) -> Affine:
        """From arrays of any floating type; no bias is zeros."""
        if bias is None:
            bias = np.zeros(weight.shape[0])
        return Affine(weight.astype(np.float64), bias.astype(np.float64))

    def scaled(self, factor: np.ndarray) -> Affine:
        """Every output times its factor. Zeros stay zeros."""
        shape = (-1,) + (1,) * (self.weight.ndim - 1)
        return Affine(self.weight * factor.reshape(shape), self.bias * factor)

    def shifted(self, term: np.ndarray) -> Affine:
        """Every output plus its term."""
        return replace(self, bias=self.bias + term)

    def normalised(
        self,
        scale: np.ndarray,
        shift: np.ndarray,
        mean: np.ndarray,
        variance: np.ndarray,
        epsilon: float,
    ) -> Affine:
        """Batch normalisation with fixed statistics.

        **formula** ``(y - mean) * scale / sqrt(variance + epsilon) + shift``

        Example:
            >>> one = np.ones(1)
            >>> Affine.of(np.full((1, 1), 3.0), one).normalised(one, one, one, 3 * one, 1.0).bias
            array([1.])
        """
        factor = scale.astype(np.float64) / np.sqrt(variance.astype(np.float64) + epsilon)
        return self.shifted(-mean.astype(np.float64)).scaled(factor).shifted(shift)

    @property
    def usable(self) -> bool:
        """Whether all numbers are finite as float32."""
        limit = float(np.finfo(np.float32).max)
        parts = (self.weight, self.bias)
        return all(bool((np.abs(part) <= limit).all()) for part in parts)


def per_output(value: np.ndarray, outputs: int, axis: int, rank: int) -> np.ndarray | None:
    """A constant that differs along the output axis only, as ``(outputs,)``; None if it is not so.

    Args:
        value: As it stands in the graph, to be broadcast.
        outputs: Size of the output axis.
        axis: The output axis of the value that it meets, counted from the end: -1 for the last.
        rank: Number of axes that this value surely has; a constant with more may add one.

    Example:
        >>> per_output(np.ones((4, 1, 1)), 4, axis=-3, rank=4)
        array([1., 1., 1., 1.])
        >>> per_output(np.ones(4), 4, axis=-3, rank=4) is None
        True
        >>> per_output(np.float32(2), 3, axis=-1, rank=2)
        array([2., 2., 2.])
    """
    value = np.asarray(value, np.float64)
    if value.ndim > rank:
        return None
    full = value.reshape((1,) * (rank - value.ndim) + value.shape)
    if full.size != full.shape[axis] or full.size not in (1, outputs):
        return None
    return np.broadcast_to(full.reshape(-1), (outputs,)).copy()
