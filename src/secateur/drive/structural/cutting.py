"""What every structural run does the same way: its example, its scope, and its proof."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader

from secateur.core.batches import Batch, Data, first_of, inputs_of
from secateur.core.errors import DataError, UsageError, kind_of
from secateur.core.selectors import matches, require_hits
from secateur.core.widths import Width
from secateur.drive.recipe import Scope
from secateur.drive.training.held import masks_of
from secateur.learn.masked import learned_weights
from secateur.structure import Cuts, Proof, Structure, apply_, prove

# The largest error of a proof, by the type of the weights. Sums are taken in another order.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
_HALF = (torch.bfloat16, torch.float16)
_MANY = 1_000_000_000


def require_unmasked(asked: str, model: nn.Module) -> None:
    """Raise if weights of a network that is to be cut are masked.

    Raises:
        UsageError: They carry masks, or learned ones.

    Example:
        >>> require_unmasked("shrinking", nn.Linear(2, 1))
    """
    masked, learned = list(masks_of(model)), learned_weights(model)
    if masked or learned:
        kind, do = ("learned masks", "call harden()") if learned else ("masks", "call detach_")
        raise UsageError(
            asked,
            f"the network carries {kind}, e.g. of {(learned or masked)[0]!r}",
            "a cut would leave the masks behind",
            f"{do} first (the zeros stay), or finalize one pruner before the other begins",
        )


def example_of(given: Any, data: Data | None) -> Any:
    """The example inputs that were given, or those of the first batch.

    Raises:
        UsageError: There is neither, or data were given as the example.
        DataError: There is no first batch.

    Example:
        >>> example_of(None, Data(train=[(torch.zeros(2, 3), torch.zeros(2))]))[0].shape
        torch.Size([2, 3])
    """
    if isinstance(given, (Data, DataLoader)):
        raise UsageError(
            "example_inputs",
            f"{kind_of(given)} was given",
            "they are what the network is called with, once",
            "pass batches as data=",
        )
    if given is not None:
        return given
    if data is None or data.train is None:
        raise UsageError(
            "shrinking without example inputs",
            "neither example_inputs nor training batches were given",
            "what is cut together is found by running the network once",
            "pass example_inputs=, e.g. torch.zeros(1, 3, 224, 224)",
        )
    positional, named = inputs_of(first_of(data.train))
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


def proved(
    model: nn.Module, cuts: Cuts, structure: Structure, keep: Mapping[str, Tensor], example: Any
) -> Proof:
    """Cut a copy of a network, and compare it with the masked network.

    A network in half precision is compared in single precision, where an error of a cut cannot pass
    for rounding; unless it has over a billion parameters, or does not run so.

    Args:
        model: Left as it is.
        cuts: From :func:`~secateur.structure.cuts_for`.
        structure: From :func:`~secateur.structure.couple`.
        keep: The choice of groups.
        example: What the network was traced with.

    Raises:
        DataError: The cut network computes something else.

    Example:
        >>> from secateur.structure import couple, cuts_for
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).bfloat16()
        >>> structure = couple(net, torch.zeros(1, 4).bfloat16())
        >>> keep = {"0": torch.tensor([True, False, True])}
        >>> x = torch.randn(5, 4).bfloat16()
        >>> proved(net, cuts_for(net, structure, keep), structure, keep, x).error < 1e-5
        True
    """
    lively = telling(example)
    if _is_half(model) and sum(p.numel() for p in model.parameters()) <= _MANY:
        single = tree_map_only(Tensor, lambda x: x.float() if x.dtype in _HALF else x, lively)
        # Some networks fix types in their code, and do not run in others.
        with suppress(RuntimeError, TypeError):
            return _proved(copy.deepcopy(model).float(), cuts, structure, keep, single)
    return _proved(model, cuts, structure, keep, lively)


def _proved(
    model: nn.Module, cuts: Cuts, structure: Structure, keep: Mapping[str, Tensor], example: Any
) -> Proof:
    small = copy.deepcopy(model)
    apply_(small, cuts)
    proof = prove(model, small, structure, keep, example)
    require_proved(proof, model)
    return proof


def _is_half(model: nn.Module) -> bool:
    return any(p.dtype in _HALF for p in model.parameters())


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
            "an operator, or a number that the code computes from a size, is not understood",
            "leave widths out with ignore= until it holds, and report the network, please; the "
            "model is as before this cut",
        )
