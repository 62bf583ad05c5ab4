"""Closed-form repair of the layers that read what was cut."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.core.errors import UsageError


class Moments:
    """Sums over the inputs of a layer in the dense network, *x*, and in the cut one, *z*.

    Args:
        groups: Convolution groups.
        dense: Columns of the dense layer (one group).
        kept: Columns that are left.

    Example:
        >>> moments = Moments(1, 2, 1)
        >>> x = torch.tensor([[[1.0, 2.0], [3.0, 6.0]]])
        >>> moments.add(x, x[..., :1])
        >>> moments.count, moments.mean_dense.tolist()
        (2, [[2.0, 4.0]])
    """

    def __init__(self, groups: int, dense: int, kept: int, device: torch.device | None = None):
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(groups, *shape, dtype=torch.float64, device=device)

        self.count = 0
        self._shift_x, self._shift_z = zeros(dense), zeros(kept)
        self._x, self._z = zeros(dense), zeros(kept)
        self._xz, self._zz = zeros(dense, kept), zeros(kept, kept)

    def add(self, x: Tensor, z: Tensor) -> None:
        """Rows ``(groups, rows, columns)`` of both networks for the same samples."""
        if not self.count:
            self._shift_x, self._shift_z = _middle(x), _middle(z)
        self.count += x.shape[1]
        # Products in single precision (a batch is short), sums in double. Where means are large
        # beside deviations, the latter would be lost in products: about a mean they are not.
        x, z = _about(self._shift_x, x), _about(self._shift_z, z)
        self._x += x.sum(1)
        self._z += z.sum(1)
        self._xz += (x.mT @ z).double()
        self._zz += (z.mT @ z).double()

    @property
    def alike(self) -> bool:
        """Whether both networks give this layer the very same inputs."""
        same = self._xz.shape == self._zz.shape and torch.equal(self._shift_x, self._shift_z)
        return same and torch.equal(self._xz, self._zz) and torch.equal(self._x, self._z)

    @property
    def mean_dense(self) -> Tensor:
        """``(groups, dense)``."""
        return self._shift_x + self._x / self.count

    @property
    def mean_kept(self) -> Tensor:
        """``(groups, kept)``."""
        return self._shift_z + self._z / self.count

    def covariances(self, *, centred: bool) -> tuple[Tensor, Tensor]:
        """``E[x z^T]`` and ``E[z z^T]``, with the means taken out if ``centred``."""
        x, z = self._x / self.count, self._z / self.count
        cross = self._xz / self.count - _outer(x, z)
        own = self._zz / self.count - _outer(z, z)
        if not centred:
            cross = cross + _outer(self.mean_dense, self.mean_kept)
            own = own + _outer(self.mean_kept, self.mean_kept)
        return cross, own


def _middle(x: Tensor) -> Tensor:
    """Means of the rows of a batch, as single precision holds them."""
    return x.double().mean(1).float().double()


def _about(shift: Tensor, x: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.to(wide) - shift[:, None].to(wide)).float()


def _outer(a: Tensor, b: Tensor) -> Tensor:
    return a[..., :, None] * b[..., None, :]


@dataclass(frozen=True)
class Compensation:
    r"""Refit every consumer of a cut width, so that its output changes least.

    Layer after layer: *x* is what the layer reads in the dense network, *z* what is left of it in
    the network as cut and repaired so far.

    **formula** :math:`W' = W\, \Sigma_{xz} (\Sigma_{zz} + \lambda I)^{-1}` and
    :math:`b' = b + W \mu_x - W' \mu_z`, with :math:`\lambda` = ``damping`` times the mean of
    :math:`\operatorname{diag} \Sigma_{zz}`
    **Shapes** matrix ``(out, kept columns)``
    **Units** those of the weight
    **Needs** forward passes over calibration data
    **Source** Pruning with Compensation, arXiv 2108.13728
    **Differs** inputs are those of the network as repaired so far, which the paper's code measures
    once; no rescaling of variances; without a bias and without a BatchNorm behind it, a layer is
    fitted through the origin; ``refit`` is ours

    Args:
        damping: Relative to the mean of the diagonal.
        rows: A layer is fitted on at most about so many rows (an image gives one per position); a
            sample gives at most 128 of them, drawn at random.
        refit: At the end fit all layers, not only those that read what was cut, to what they gave in
            the uncut network.

    Example:
        >>> w = torch.tensor([[1.0, 1.0]])
        >>> moments = Moments(1, 2, 1)
        >>> x = torch.randn(1, 100, 1)
        >>> moments.add(x.expand(1, 100, 2), x)  # the second input is a copy of the first
        >>> new, _, _ = Compensation(damping=0).solve(w[None], moments, centred=True)
        >>> [round(v, 4) for v in new.flatten().tolist()]
        [2.0]
    """

    damping: float = 1e-3
    rows: int = 65536
    refit: bool = True

    def __post_init__(self) -> None:
        if self.damping < 0 or self.rows < 1:
            raise UsageError(
                f"Compensation(damping={self.damping:g}, rows={self.rows})",
                "damping is negative, or there are no rows",
                "damping is added to the diagonal of a covariance that the rows give",
                "give a damping of 0 or more, and thousands of rows",
            )

    def solve(
        self, weight: Tensor, moments: Moments, *, centred: bool
    ) -> tuple[Tensor, Tensor, float]:
        """The new columns, the bias shift, and the damping that was used.

        Args:
            weight: ``(groups, out of a group, dense columns)``.
            moments: Of the same layer.
            centred: Whether a bias can take up the means.

        Returns:
            ``(groups, out, kept)``, ``(groups, out)`` and the relative damping: more than was asked
            for where the covariance was singular.
        """
        cross, own = moments.covariances(centred=centred)
        w = weight.double()
        target = w @ cross
        scale = own.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-30)
        eye = torch.eye(own.shape[-1], dtype=own.dtype, device=own.device)
        damping = self.damping
        while True:
            factor, info = torch.linalg.cholesky_ex(own + damping * scale[:, None, None] * eye)
            if not bool(info.any()):
                break
            damping = max(damping * 10, 1e-8)
        new = torch.cholesky_solve(target.mT, factor).mT
        shift = torch.zeros(w.shape[:2], dtype=w.dtype, device=w.device)
        if centred:
            shift = (w @ moments.mean_dense[..., None] - new @ moments.mean_kept[..., None])[..., 0]
        return new, shift, damping
