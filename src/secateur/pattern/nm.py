"""N:M sparsity: a fixed number of weights stay in every run of inputs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from secateur.core.errors import FoldError, UsageError
from secateur.core.weight import Axes


@dataclass(frozen=True)
class NM:
    """``keep`` of every ``of`` consecutive inputs stay; ``rows`` output rows share the choice.

    The string form ``"2:4"`` means kept:of, as NVIDIA, vLLM and ModelOpt write it. Runs lie along
    the *input* axis, for convolutions at each kernel position. With ``rows`` from 4 to 16 it is
    vector-wise N:M (the same choice for that many neighbouring rows), which CPUs like.

    **formula** pools of ``of`` consecutive inputs, of which ``keep`` stay
    **Shapes** ``(out / rows * taps * in / of, of, rows)``
    **Units** none
    **Needs** nothing
    **Source** Mishra et al., arXiv 2104.08378 (2:4); Zhou et al., arXiv 2102.04010 (N:M)

    Example:
        >>> import torch
        >>> from secateur.core.weight import LINEAR
        >>> NM(2, 4).fold(torch.zeros(2, 8), LINEAR).shape
        torch.Size([4, 4, 1])
        >>> NM(2, 4, rows=2).fold(torch.zeros(2, 8), LINEAR).shape
        torch.Size([2, 4, 2])
        >>> NM(2, 4).fold(torch.zeros(2, 10), LINEAR)
        Traceback (most recent call last):
            ...
        secateur.core.errors.FoldError: NM(2:4): its 'in' axis is 10. 10 is not a multiple of 4 (8 and
        12 are). Leave this weight out with ignore=, or use the pattern 'elements'.
    """

    keep: int = 2
    of: int = 4
    rows: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.keep <= self.of or self.rows < 1:
            raise UsageError(
                f"NM(keep={self.keep}, of={self.of}, rows={self.rows})",
                "keep must lie from 1 to of, and rows be positive",
                "N:M means N kept of M",
                'write "2:4" for two kept of four',
            )

    def span(self, taps: int) -> int:
        return taps * self.of

    @property
    def sparsity(self) -> float:
        """The sparsity that the pattern itself fixes."""
        return 1 - self.keep / self.of

    def fold(self, x: Tensor, axes: Axes) -> Tensor:
        out, inn, taps = self._check(tuple(x.shape), axes)
        y = axes.cube(x).reshape(out // self.rows, self.rows, inn // self.of, self.of, taps)
        return y.permute(0, 4, 2, 3, 1).reshape(-1, self.of, self.rows)

    def unfold(self, folded: Tensor, shape: tuple[int, ...], axes: Axes) -> Tensor:
        out, inn, taps = self._check(shape, axes)
        y = folded.reshape(out // self.rows, taps, inn // self.of, self.of, self.rows)
        return axes.uncube(y.permute(0, 4, 2, 3, 1).reshape(out, inn, taps), shape)

    def quota(self, groups: int, sparsity: float) -> int:
        # On the way to the target a schedule asks for less than the pattern's own sparsity.
        return max(self.keep, min(groups, int(groups * (1 - sparsity) + 0.5 + 1e-9)))

    def _check(self, shape: tuple[int, ...], axes: Axes) -> tuple[int, int, int]:
        out, inn, taps = axes.cube_shape(shape)
        what = f"NM({self.keep}:{self.of}" + (f", rows={self.rows})" if self.rows > 1 else ")")
        rows = axes.together(out)
        for axis, size, step in (("in", inn, self.of), ("out", rows, self.rows)):
            if size % step:
                raise FoldError(
                    what,
                    f"its {axis!r} axis is {size}",
                    multiple(size, step),
                    "leave this weight out with ignore=, or use the pattern 'elements'",
                )
        return out, inn, taps


def multiple(size: int, step: int) -> str:
    """The arithmetic of a shape that does not divide, with the nearest that would.

    Example:
        >>> multiple(10, 4)
        '10 is not a multiple of 4 (8 and 12 are)'
    """
    below, above = size // step * step, -(-size // step) * step
    near = f"{below} and {above} are" if below else f"{above} is"
    return f"{size} is not a multiple of {step} ({near})"
