"""A trial before a cut: does the network still run with the chosen widths, and is the cut proved?"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from secateur.core.batches import forward, to_device
from secateur.core.errors import DataError, SecateurError, UsageError, first_line
from secateur.core.failing import on_example
from secateur.core.randomness import own_random
from secateur.core.slots import device_of
from secateur.drive.structural.cutting import as_batch, proved
from secateur.structure import Structure, apply_, cuts_for
from secateur.structure.outputs import require_predictions


def require_runs(model: nn.Module, example: Any) -> None:
    """Run a copy of the uncut network, so that what is wrong with the example is told as such.

    A trace without values does not see all of it, e.g. a token beyond the vocabulary.

    Raises:
        UsageError: It fails, or returns no number at all.

    Example:
        >>> require_runs(nn.Embedding(3, 2), torch.tensor([7]))
        Traceback (most recent call last):
            ...
        secateur.core.errors.UsageError: running Embedding on the example: its own forward fails
        (IndexError: index out of range in self). ...
    """
    with on_example(model, "it is run to find what is cut together, and to prove the cut"):
        output = _run(copy.deepcopy(model), example, training=False)
    if all(x.numel() == 0 for x in require_predictions(output, model)):
        raise UsageError(
            f"running {type(model).__name__} on the example",
            "its outputs are empty",
            "a cut is proved by comparing them",
            "pass example inputs with at least one sample",
        )


def unrunnable(
    model: nn.Module, structure: Structure, keep: Mapping[str, Tensor], example: Any
) -> dict[str, str]:
    """Widths that cannot be cut as chosen, since the network would not run: name -> its error.

    The code of a network can have sizes of its own that no operator shows, such as heads in fours,
    and parts that run in training mode only, such as an auxiliary classifier. The trial is made in
    both modes, unless the uncut network itself does not run on the example in training mode.

    Raises:
        UsageError: It does not run if all are cut, and does if each is cut alone.

    Example:
        >>> from secateur.structure import couple
        >>> class Fours(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.one, self.two = nn.Linear(2, 8), nn.Linear(8, 2)
        ...     def forward(self, x):
        ...         assert self.one.out_features % 4 == 0, "not in fours"
        ...         return self.two(self.one(x))
        >>> net, x = Fours(), torch.zeros(1, 2)
        >>> unrunnable(net, couple(net, x), {"one": torch.arange(8) < 4}, x)
        {}
        >>> unrunnable(net, couple(net, x), {"one": torch.arange(8) < 5}, x)
        {'one': 'AssertionError: not in fours'}
    """
    trains = _failure(model, structure, {}, example, training=True) is None

    def failure(chosen: Mapping[str, Tensor]) -> str | None:
        why = _failure(model, structure, chosen, example, training=False)
        if why is None and trains:
            why = _failure(model, structure, chosen, example, training=True)
            return why and f"{why} (in training mode)"
        return why

    whole = failure(keep)
    if whole is None:
        return {}
    cut = [name for name, flags in keep.items() if not bool(flags.all())]
    alone = {name: failure({name: keep[name]}) for name in cut}
    found = {name: why for name, why in alone.items() if why is not None}
    if not found:
        raise UsageError(
            f"cutting {len(cut)} widths together",
            f"the network does not run afterwards ({whole}), and does with each cut alone",
            "its code ties sizes to one another in a way that no operator shows",
            "leave some of them out with ignore=; secateur inspect MODEL --structure lists them",
        )
    return found


def _failure(
    model: nn.Module,
    structure: Structure,
    keep: Mapping[str, Tensor],
    example: Any,
    *,
    training: bool,
) -> str | None:
    """What the cut or a forward pass after it raises, in a line; ``None`` if it runs."""
    small = copy.deepcopy(model)
    try:
        apply_(small, cuts_for(small, structure, keep))
        _run(small, example, training=training)
    except SecateurError:
        raise
    except Exception as error:
        return first_line(error)
    return None


def _run(net: nn.Module, example: Any, *, training: bool) -> Any:
    """The output of a network that is not needed afterwards; random states stay as they are."""
    net.train(training)
    for module in net.modules():
        if isinstance(module, _BatchNorm):
            module.eval()  # an example of one sample has no statistics of its own
    device = device_of(net)
    with torch.no_grad(), own_random(net):
        return forward(net, to_device(as_batch(example), device))


def unproved(
    model: nn.Module, structure: Structure, keep: Mapping[str, Tensor], example: Any
) -> dict[str, str]:
    """Widths whose cut does not compute what the masked network does: name -> how far it is off.

    They are found by halves: where few of many are wrong, few proofs tell which.

    Raises:
        DataError: That holds only if several are cut together, or if nothing is cut.

    Example:
        >>> from secateur.structure import couple
        >>> class Scaled(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.a, self.b, self.c = nn.Linear(2, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        ...     def forward(self, x):
        ...         return self.c(self.b(self.a(x)) / self.b.weight.shape[0])
        >>> net, x, keep = Scaled(), torch.zeros(1, 2), torch.arange(8) < 4
        >>> unproved(net, couple(net, x), {"a": keep}, x)
        {}
        >>> list(unproved(net, couple(net, x), {"a": keep, "b": keep}, x))
        ['b']
    """

    def failure(names: Sequence[str]) -> DataError | None:
        chosen = {name: keep[name] for name in names}
        try:
            proved(model, cuts_for(model, structure, chosen), structure, chosen, example)
        except DataError as error:
            return error
        return None

    def search(names: Sequence[str], why: DataError) -> dict[str, str]:
        if len(names) == 1:
            reason = structure.doubt(names[0]) or why.why
            return {names[0]: f"{why.found.removeprefix('the cut network ')}; {reason}"}
        found: dict[str, str] = {}
        for half in (names[: len(names) // 2], names[len(names) // 2 :]):
            if (error := failure(half)) is not None:
                found |= search(half, error)
        return found

    cut = [name for name, flags in keep.items() if not bool(flags.all())]
    whole = failure(cut)
    if whole is None:
        return {}
    if failure([]) is not None:
        why = "two runs of the uncut network differ as well, or its outputs are no numbers"
        do = "remove noise that is not drawn with torch, and see that its outputs are not NaN"
        raise DataError(whole.asked, whole.found, why, do)
    found = search(cut, whole)
    if not found:
        raise whole
    return found
