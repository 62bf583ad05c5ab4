"""What every structural run does the same way: its example, its scope, and its proof."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from secateur.core.batches import Batch, Data, inputs_of
from secateur.core.errors import DataError, UsageError
from secateur.core.selectors import matches, require_hits
from secateur.core.widths import Width
from secateur.drive.recipe import Scope
from secateur.structure import Proof, Structure

# The largest error of a proof, by the type of the weights. Sums are taken in another order.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}


def example_of(given: Any, data: Data | None) -> Any:
    """The example inputs that were given, or those of the first batch.

    Raises:
        UsageError: There is neither.

    Example:
        >>> example_of(None, Data(train=[(torch.zeros(2, 3), torch.zeros(2))]))[0].shape
        torch.Size([2, 3])
    """
    if given is not None:
        return given
    if data is None or data.train is None:
        raise UsageError(
            "shrinking without example inputs",
            "neither example_inputs nor data was given",
            "what is cut together is found by running the network once",
            "pass example_inputs=, e.g. torch.zeros(1, 3, 224, 224)",
        )
    positional, named = inputs_of(next(iter(data.train)))
    return named or positional


def as_batch(example: Any) -> Batch:
    """Example inputs as a batch, whose last element is the target.

    Example:
        >>> as_batch((1, 2)), as_batch({"x": 1})
        ((1, 2, None), {'x': 1})
    """
    return (*example, None) if isinstance(example, (tuple, list)) else example


def widths_in(structure: Structure, scope: Scope) -> list[Width]:
    """The widths that a scope leaves, by their names or those of the parameters that they cut.

    Raises:
        SelectorError: A selector matches nothing.

    Example:
        >>> from secateur.structure import couple
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 2))
        >>> structure = couple(net, torch.zeros(1, 4))
        >>> [w.name for w in widths_in(structure, Scope(ignore=("0",)))]
        ['1']
    """
    named = [(n, "") for w in structure.widths for n in (w.name, *w.parameters())]
    require_hits((*scope.include, *scope.ignore), named, "the width selector")

    def hit(width: Width, selectors: tuple[str, ...]) -> bool:
        names = (width.name, *width.parameters())
        return any(matches(s, n, "") for s in selectors for n in names)

    return [
        w
        for w in structure.widths
        if (not scope.include or hit(w, scope.include)) and not hit(w, scope.ignore)
    ]


def telling(example: Any) -> Any:
    """The example, with random numbers in place of floating-point inputs that are constant.

    Many people trace with zeros. On zeros much of a network is silent, and a proof would see little.

    Example:
        >>> telling(torch.zeros(1, 3)).unique().numel(), telling((torch.tensor([1, 2]),))
        (3, (tensor([1, 2]),))
    """
    generator = torch.Generator().manual_seed(0)

    def lively(x: Tensor) -> Tensor:
        if not x.is_floating_point() or x.numel() < 2 or bool((x != x.reshape(-1)[0]).any()):
            return x
        return torch.randn(x.shape, generator=generator).to(x)

    return tree_map_only(Tensor, lively, example)


def require_proved(proof: Proof, model: nn.Module) -> None:
    """Raise if a cut network does not compute what the masked one does.

    Raises:
        DataError: With the difference, and what is allowed for the type of the weights.

    Example:
        >>> require_proved(Proof(1e-7, 10), nn.Linear(1, 1))
    """
    worst = max((_TOLERANCE.get(p.dtype, 1e-4) for p in model.parameters()), default=1e-4)
    if not proof.error <= worst:
        raise DataError(
            "the proof of the cut",
            f"the cut network differs from the masked one by {proof.error:.2g} of its largest "
            f"output, and {worst:g} is allowed",
            "an operator of the network is not understood",
            "leave widths out with ignore= until it holds, and report the network, please; the "
            "model is as before this cut",
        )
