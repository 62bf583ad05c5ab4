"""Cholesky factors of second moments, which rounding may have left slightly indefinite."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.core.errors import NonFinite

_LEAST, _TRIES = 1e-6, 9


def cholesky(matrices: Tensor) -> Tensor:
    """Lower Cholesky factors of symmetric matrices ``(..., n, n)``.

    Sums of products in float32 have eigenvalues that are a little below zero where their rank is
    low: by 1e-6 of the mean diagonal for a few dozen rows and samples, by 1e-4 for thousands. To the
    diagonal of such a matrix, and of no other, 1e-6 of its mean is added, then tenfold, until it has
    a factor.

    Raises:
        NonFinite: A hundred times the mean does not help: there is a NaN or an infinity.

    Example:
        >>> cholesky(torch.tensor([[[4.0]], [[9.0]]])).flatten().tolist()
        [2.0, 3.0]
        >>> lower = cholesky(torch.tensor([[1.0, 1.0 + 1e-5], [1.0 + 1e-5, 1.0]]).double())
        >>> round(float(lower[0, 0]), 4)
        1.0
    """
    lower: Tensor
    lower, failed = torch.linalg.cholesky_ex(matrices)
    more = _LEAST * matrices.diagonal(dim1=-2, dim2=-1).mean(-1)
    eye = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    for attempt in range(_TRIES):
        if not bool(failed.any()):
            return lower
        raised = torch.where(failed > 0, more * 10**attempt, 0.0)
        again, still = torch.linalg.cholesky_ex(matrices + raised[..., None, None] * eye)
        lower = torch.where((failed > 0)[..., None, None], again, lower)
        failed = still
    raise NonFinite(
        "factorizing second moments",
        f"{int((failed > 0).sum())} of {failed.numel()} matrices have no Cholesky factor",
        "sums of squares are infinite, or were made from NaN",
        "check the calibration data and the loss: gradients or activations are very large",
    )
