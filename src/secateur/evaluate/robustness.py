"""Accuracy against the size of adversarial perturbations, for one network or several."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from secateur.core.arguments import require_network, require_part
from secateur.core.batches import Batch, Data, Loss, as_data, evaluating, size_of, to_device
from secateur.core.errors import DataError, NeedsData, UsageError
from secateur.core.losses import default_loss
from secateur.core.slots import device_of
from secateur.drive.pruned import Pruned
from secateur.evaluate.accuracy import answer
from secateur.learn.attacks import Attack


@dataclass(frozen=True)
class Curve:
    """Accuracy of one network under one attack.

    Args:
        model: Name of the network.
        attack: Name of the attack.
        sizes: Of the perturbations, in the units of the attack, rising.
        accuracy: Share of right answers at each size, 0 to 1.
        natural: Share of right answers on the inputs as they are.

    Example:
        >>> Curve("dense", "Fgsm", (0.1,), (0.5,), 0.9).lost
        (0.4,)
    """

    model: str
    attack: str
    sizes: tuple[float, ...]
    accuracy: tuple[float, ...]
    natural: float

    @property
    def lost(self) -> tuple[float, ...]:
        """How much accuracy each size costs."""
        return tuple(self.natural - found for found in self.accuracy)

    @property
    def area(self) -> float:
        """Mean accuracy over the range of sizes from 0 on (trapezoids): one number a curve."""
        xs = (0.0, *self.sizes)
        ys = (self.natural, *self.accuracy)
        corners = list(zip(xs, ys, strict=True))
        areas = [(x2 - x1) * (y1 + y2) / 2 for (x1, y1), (x2, y2) in itertools.pairwise(corners)]
        return sum(areas) / xs[-1] if xs[-1] else self.natural


@dataclass(frozen=True)
class RobustnessFacts:
    """All curves of a measurement, as plain data.

    Args:
        curves: One for each network and attack.
        units: Answers that were judged (samples, tokens, pixels) at each point.

    Example:
        >>> facts = RobustnessFacts((Curve("dense", "Fgsm", (0.1,), (0.5,), 0.9),), units=10)
        >>> facts.curve("dense", "Fgsm").accuracy, facts.rows()[1]
        ((0.5,), ('dense', 'Fgsm', 0.1, 0.5))
    """

    curves: tuple[Curve, ...]
    units: int

    def curve(self, model: str, attack: str) -> Curve:
        """The curve of a network under an attack."""
        for found in self.curves:
            if (found.model, found.attack) == (model, attack):
                return found
        known = ", ".join(f"{c.model}/{c.attack}" for c in self.curves)
        raise UsageError(
            f"the curve of {model!r} under {attack!r}",
            "it was not measured",
            f"there are {known}",
            "name one of them",
        )

    def rows(self) -> list[tuple[str, str, float, float]]:
        """(network, attack, size, accuracy), natural accuracy as size 0: the rows of a CSV."""
        return [
            (c.model, c.attack, size, accuracy)
            for c in self.curves
            for size, accuracy in zip((0.0, *c.sizes), (c.natural, *c.accuracy), strict=True)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries and lists, ready for JSON."""
        return dataclasses.asdict(self)


def robustness(
    models: nn.Module | Pruned | Mapping[str, nn.Module | Pruned],
    data: Any,
    attacks: Attack | Mapping[str, Attack] | Sequence[Attack],
    *,
    sizes: float | Sequence[float],
) -> RobustnessFacts:
    """Measure accuracy against the size of perturbations.

    Each network is attacked with its own gradients (white box), on the same batches. Networks,
    their modes and the caller's random state stay as they are.

    Args:
        models: A network or a result of pruning, or several by name, e.g. ``{"dense": ...,
            "pruned": ...}``.
        data: :class:`~secateur.core.batches.Data`, whose ``test`` batches are used (``train`` if it
            has none), or an iterable of batches with targets. Attacks follow the loss of the network, or
            cross-entropy; ``Data(loss=...)`` where there is neither.
        attacks: An attack, or several; each is measured at all sizes. Their names are those of a
            mapping, else of their classes.
        sizes: Of the perturbations, positive, in the units of the attack (ε or δ).

    Raises:
        NeedsData: There are no batches, or they have no targets.
        UsageError: A size is not positive, two attacks have one name, or something is no network or
            no attack.

    Example:
        >>> import torch
        >>> from secateur.learn import Fgsm
        >>> net = nn.Linear(1, 2, bias=False)
        >>> _ = net.weight.data.copy_(torch.tensor([[1.0], [-1.0]]))
        >>> batch = (torch.tensor([[0.1], [0.4]]), torch.tensor([0, 0]))
        >>> facts = robustness(net, [batch], Fgsm(0, low=-1.0), sizes=[0.2, 0.5])
        >>> facts.curves[0].natural, facts.curves[0].accuracy
        (1.0, (0.5, 0.0))
    """
    named = _networks(models)
    tried = _named(attacks)
    listed = sizes if isinstance(sizes, Iterable) else (sizes,)
    steps = tuple(sorted(float(size) for size in listed))
    if not steps or steps[0] <= 0:
        raise UsageError(
            f"sizes={list(steps)}",
            "there is none, or one is not positive",
            "size 0 is the natural accuracy, which is measured anyway",
            "write e.g. [0.05, 0.1, 0.2]",
        )
    given = as_data(data) or Data()
    batches = _batches(given)
    curves = []
    units = 0
    for name, model in named.items():
        natural, units = _accuracy(model, batches)
        loss = _followed(model, batches[0], given.loss)
        for kind, attack in tried.items():
            sized = (attack.sized(size) for size in steps)
            found = tuple(_accuracy(model, batches, each, loss)[0] for each in sized)
            curves.append(Curve(name, kind, steps, found, natural))
    return RobustnessFacts(tuple(curves), units)


def _accuracy(
    model: nn.Module,
    batches: Sequence[Batch],
    attack: Attack | None = None,
    loss: Loss | None = None,
) -> tuple[float, int]:
    right = total = 0
    for batch in batches:
        moved = to_device(batch, device_of(model))
        with evaluating(model):
            judged = answer(model, moved if attack is None else attack(model, moved, loss)).right
        if judged is None:
            raise NeedsData(
                "robustness(...)",
                "the batches carry no class targets",
                "accuracy compares answers with targets",
                "yield (inputs, classes)",
            )
        right, total = right + int(judged.sum()), total + len(judged)
    if not total:
        raise DataError(
            "robustness(...)", "no answer counts", "every target is ignored (-100)", "check them"
        )
    return right / total, total


@torch.no_grad()
def _followed(model: nn.Module, batch: Batch, own: Loss | None) -> Loss | None:
    """The user's loss, where there is no other; it may hold more than the task, e.g. a distillation."""
    try:
        with evaluating(model):
            default_loss(model, to_device(batch, device_of(model)))
    except NeedsData:
        return own
    return None


def _batches(data: Data) -> list[Batch]:
    source = data.test if data.test is not None else data.train
    batches = [] if source is None else [batch for batch in source if size_of(batch)]
    if not batches:
        raise NeedsData(
            "robustness(...)", "no batches", "accuracy is measured on some", "pass test batches"
        )
    return batches


def _networks(models: Any) -> dict[str, nn.Module]:
    given = models if isinstance(models, Mapping) else {"model": models}
    found = {n: m.model if isinstance(m, Pruned) else m for n, m in given.items()}
    for name, model in found.items():
        require_network(f"robustness(models=...), {name!r}", model)
    return found


def _named(attacks: Attack | Mapping[str, Attack] | Sequence[Attack]) -> dict[str, Attack]:
    asked, has, write = "robustness(attacks=...)", ("sized", "__call__"), "e.g. Fgsm(0.1)"
    listed: list[Any] = list(attacks) if isinstance(attacks, (list, tuple)) else [attacks]
    for attack in attacks.values() if isinstance(attacks, Mapping) else listed:
        require_part(asked, attack, has, what="an attack", write=write)
    if isinstance(attacks, Mapping):
        return dict(attacks)
    names = [type(attack).__name__ for attack in listed]
    if len(set(names)) < len(names) or not names:
        raise UsageError(
            "attacks=",
            f"{len(names)} attacks, named {', '.join(names) or 'nothing'}",
            "each curve needs a name of its own",
            "pass a mapping, e.g. {'pgd-7': Pgd(0.1), 'pgd-20': Pgd(0.1, steps=20)}",
        )
    return dict(zip(names, listed, strict=True))
