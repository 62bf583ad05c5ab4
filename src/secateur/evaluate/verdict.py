"""Which gains are real, in plain words."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from secateur.core.ratios import times
from secateur.evaluate.latency import Speed

if TYPE_CHECKING:
    from secateur.evaluate.measure import Measurement

_NOISE = 2.0  # standard errors
_COARSE = 0.01
_CERTAIN = 3.0
#: Zeros that a file or a runtime could use at all.
_SPARSE = 0.05


@dataclass(frozen=True)
class Gain:
    """One claim and whether it holds.

    Args:
        name: ``"smaller"``, ``"faster"`` or ``"accuracy"``.
        real: True: it holds (for accuracy: no loss beyond noise); False: it does not.
        text: The claim with its numbers, and what to do if it does not hold.
    """

    name: str
    real: bool
    text: str


def verdict(
    a: Measurement,
    b: Measurement,
    difference: float | None,
    error: float | None,
    speed: Speed | None,
    *,
    skips: bool = False,
) -> tuple[Gain, ...]:
    """Judge file size, accuracy and speed; what was not measured is left out.

    Args:
        a: The first network.
        b: The second network.
        difference: Of their accuracy or metric.
        error: Its standard error.
        speed: How many times faster the second is.
        skips: Whether the second already has layers that skip zeros.
    """
    gains = [_smaller(a, b)]
    if difference is not None:
        gains.append(_accuracy(difference, error, a, b))
    if speed is not None:
        gains.append(_faster(speed, b.cost.sparsity - a.cost.sparsity, skips))
    return tuple(gains)


def _smaller(a: Measurement, b: Measurement) -> Gain:
    ratio = a.cost.bytes / b.cost.bytes
    change = times(ratio, "smaller", "larger")
    if change.endswith("smaller"):
        return Gain("smaller", True, f"The file is {change}.")
    text = "The file is not smaller." if change == "same" else f"The file is {change}."
    if b.cost.sparsity - a.cost.sparsity > _SPARSE and b.cost.pruned_sparsity is None:
        text += (
            f" {b.cost.sparsity:.0%} of the weights are zeros, and they are stored as such: "
            "save it as a bundle, which stores only what was kept."
        )
    return Gain("smaller", False, text)


def _accuracy(difference: float, error: float | None, a: Measurement, b: Measurement) -> Gain:
    if a.metric == "accuracy":
        spread = "" if error is None else f" ± {100 * error:.2f}"
        change = f"{100 * difference:+.2f}{spread} points"
    else:
        change = f"{difference:+.4g}"
    name = a.metric.capitalize() if a.metric.islower() else a.metric  # mAP and IoU are names
    if not math.isfinite(difference):
        text = f"{name} of one of the networks is not finite, so there is no difference to judge."
        return Gain("accuracy", False, text)
    where = " (on training data)" if a.split == "train" else ""
    where += " (of one class only: are the data sorted?)" if a.one_class else ""
    if error is None:
        kept = difference >= 0
        tail = "" if kept else " How much of this is chance is not known for this metric."
        return Gain("accuracy", kept, f"{name}{where} changed by {change}.{tail}")
    if abs(difference) <= _NOISE * error or difference == 0:
        text = f"{name}{where} is kept: {change} (standard error), within noise."
        text += _unseen(error, a.samples)
        return Gain("accuracy", True, text)
    if difference > 0:
        return Gain("accuracy", True, f"{name}{where} is better: {change}.")
    text = f"{name}{where} is lost: {change}, more than noise. "
    if b.loss is not None and math.isnan(b.loss):
        text += "Its loss is not a number: training or a repair overflowed."
    else:
        text += "Fine-tune longer, or prune less."
    return Gain("accuracy", False, text)


def _unseen(error: float, samples: int) -> str:
    """What so few samples cannot show."""
    if error > _COARSE:
        return f" With {samples:,} samples, smaller losses cannot be seen."
    # No answer changed, so there is no spread to judge by. What happens to less than 3 in n goes
    # unseen in n samples once in twenty times ("rule of three", Hanley and Lippman-Hand 1983).
    hidden = _CERTAIN / samples if error == 0 and samples else 0.0
    if hidden <= _NOISE * _COARSE:
        return ""
    return f" With {samples:,} samples, a loss of up to {min(100, 100 * hidden):.0f} points can go unseen."


def _faster(speed: Speed, sparser: float, skips: bool) -> Gain:
    spread = f"{speed.ratio:.2f}x, 95 % range {speed.low:.2f} to {speed.high:.2f}"
    if speed.verdict == "faster":
        return Gain("faster", True, f"It is faster: {spread}.")
    none = speed.low <= 1 <= speed.high
    text = f"It is {'not faster' if none else speed.words}: {spread}."
    if skips:
        text += (
            " Its layers that skip zeros do not pay here: secateur doctor says from which "
            "sparsity on they do."
        )
    elif sparser > _SPARSE:
        text += (
            " PyTorch multiplies the zeros too. To skip them: secateur export, then secateur "
            "compile; or secateur.runtime.accelerate."
        )
    return Gain("faster", False, text)
