"""The laws of roundings."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.recover import Rounding
from secateur.testing.law import require, same
from secateur.testing.samples import sample_weight


def check_rounding(rounding: Rounding, matrix: Tensor | None = None) -> None:
    """Check that a rounding keeps its laws on one matrix.

    Zero stays zero; rounding twice changes nothing; columns round alone as they do together; the
    sign does not matter; does not write.

    Raises:
        AssertionError: Naming the law.

    Example:
        >>> from secateur.recover import Integer
        >>> check_rounding(Integer(4))
    """
    if matrix is None:
        matrix = sample_weight("linear").matrix()
    matrix = matrix.clone()
    matrix[0] = 0.0  # a row that is zero throughout
    matrix[:, 1] = 0.0
    before = matrix.clone()
    grid = rounding.fit(matrix)
    every = slice(None)
    once = grid(matrix, every)
    require(bool((once[matrix == 0] == 0).all()), "zero stays zero", rounding, "it does not")
    require(bool(torch.isfinite(once).all()), "values are finite", rounding, "some are not")
    twice = grid(once, every)
    off = float((twice - once).abs().max())
    law = "rounding twice changes nothing"
    require(torch.allclose(twice, once, rtol=1e-6, atol=0), law, rounding, f"moves by {off:g}")
    alone = torch.cat(
        [grid(matrix[:, j : j + 1], slice(j, j + 1)) for j in range(matrix.shape[1])], 1
    )
    require(same(alone, once), "columns round alone as together", rounding, "they differ")
    law = "the sign does not matter"
    require(torch.equal(grid(-matrix, every), -once), law, rounding, "it does")
    require(same(matrix, before), "does not write", rounding, "values changed")
