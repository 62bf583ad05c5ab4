"""Checks of what a caller passes. Each raises an error that says what was given and what to write."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from os import PathLike
from typing import Any

from torch import nn

from secateur.core.errors import UsageError, kind_of


def is_number(value: object) -> bool:
    """Whether something is a finite number; ``True`` is none, and neither is ``"3"``.

    Example:
        >>> is_number(0.5), is_number("0.5"), is_number(float("nan")), is_number(True)
        (True, False, False, False)
    """
    return type(value) is not bool and isinstance(value, Real) and math.isfinite(value)


def plain_integer(value: Any) -> Any:
    """An integer of NumPy, which is no ``int``, as one; all else as it is.

    Example:
        >>> import numpy as np
        >>> repr(plain_integer(np.int64(3))), plain_integer(0.5), plain_integer("70%")
        ('3', 0.5, '70%')
    """
    return int(value) if isinstance(value, Integral) else value


def odd_number(part: object, names: Sequence[str]) -> str:
    """Which of the named settings of a part is no finite number, in words; ``""`` if all are.

    Example:
        >>> from types import SimpleNamespace
        >>> odd_number(SimpleNamespace(lr="fast", steps=3), ("steps", "lr"))
        "lr is a finite number, not 'fast'"
    """
    odd = next((name for name in names if not is_number(getattr(part, name))), None)
    return "" if odd is None else f"{odd} is a finite number, not {getattr(part, odd)!r}"


def require_numbers(part: object, names: Sequence[str]) -> None:
    """Raise unless all of the named settings of a part are finite numbers.

    Raises:
        UsageError: One is not.

    Example:
        >>> from types import SimpleNamespace
        >>> require_numbers(SimpleNamespace(lr=0.1), ("lr",))
    """
    odd = odd_number(part, names)
    if odd:
        raise UsageError(
            f"{type(part).__name__}(...)",
            odd,
            "nothing can be computed with it",
            "correct the value",
        )


def require_amounts(part: object, names: Sequence[str]) -> None:
    """Raise unless all of the named settings of a part are 0 or more; they are numbers.

    Raises:
        UsageError: One is negative.

    Example:
        >>> from types import SimpleNamespace
        >>> require_amounts(SimpleNamespace(lr=0.1), ("lr",))
    """
    for name in names:
        if getattr(part, name) < 0:
            raise UsageError(
                f"{type(part).__name__}({name}={getattr(part, name):g})",
                "it is negative",
                "0 turns it off, and below 0 it would work the other way round",
                "write 0 or more",
            )


def require_place(asked: str, value: object) -> None:
    """Raise unless a value names a folder.

    Raises:
        UsageError: It does not.

    Example:
        >>> require_place("folder", "runs")
    """
    write = "e.g. folder='runs'"
    require_kind(asked, value, (str, PathLike), what="the name of a folder", write=write)


def require_kind(
    asked: str, value: object, kind: type | tuple[type, ...], *, what: str, write: str
) -> None:
    """Raise unless a value is of a type.

    Args:
        asked: The argument, as an error names it.
        value: What was given.
        kind: Type, or types.
        what: What is expected, in words.
        write: An example that would do.

    Raises:
        UsageError: It is not. ``True`` is no integer here.

    Example:
        >>> require_kind("seed", "a", int, what="an integer", write="seed=0")
        Traceback (most recent call last):
            ...
        secateur.core.errors.UsageError: seed: 'a', a str, was given. It should be an integer. Write seed=0.
    """
    expected = kind if isinstance(kind, tuple) else (kind,)
    truth = isinstance(value, bool) and bool not in expected
    if truth or not isinstance(value, expected):
        _refuse(asked, value, what, write)


def require_count(asked: str, value: object, *, what: str, write: str) -> None:
    """Raise unless a value is a whole number of at least 1.

    Args:
        asked: The argument, as an error names it.
        value: What was given.
        what: What it counts, in words.
        write: An example that would do.

    Raises:
        UsageError: It is not.

    Example:
        >>> require_count("ColumnSweep(block=...)", 0, what="how many columns", write="block=128")
        Traceback (most recent call last):
            ...
        secateur.core.errors.UsageError: ColumnSweep(block=...): 0 was given. It should be how many columns, \
1 or more. Write block=128.
    """
    what = f"{what}, 1 or more"
    require_kind(asked, value, Integral, what=what, write=write)
    if isinstance(value, Integral) and int(value) < 1:
        raise UsageError(asked, f"{value} was given", f"it should be {what}", f"write {write}")


def require_network(asked: str, value: object) -> None:
    """Raise unless a value is a network.

    Raises:
        UsageError: It is none; of a result of pruning, the network is its ``model``.

    Example:
        >>> require_network("accelerate(module)", "net")
        Traceback (most recent call last):
            ...
        secateur.core.errors.UsageError: accelerate(module): a str was given. A network is a \
torch.nn.Module. Pass the module itself.
    """
    if isinstance(value, nn.Module):
        return
    found = "None" if value is None else kind_of(value)
    if isinstance(value, type):
        found = f"the class {value.__name__}"
    elif type(value).__name__ == "function":
        found = f"the function {getattr(value, '__name__', '')}, and not its result,"
    inside = isinstance(getattr(value, "model", None), nn.Module)
    do = "pass its .model" if inside else "pass the module itself"
    raise UsageError(asked, f"{found} was given", "a network is a torch.nn.Module", do)


def require_dense(asked: str, model: nn.Module) -> None:
    """Raise if layers of a network keep their weights packed, as accelerated ones do.

    Args:
        asked: What was asked, as an error names it.
        model: The network. Packed layers are known by an attribute of their class, ``is_packed``,
            because they are made upstairs.

    Raises:
        UsageError: There are such layers.

    Example:
        >>> require_dense("the model", nn.Linear(1, 1))
        >>> class Packed(nn.Module):
        ...     is_packed = True
        >>> require_dense("the model", nn.Sequential(Packed()))
        Traceback (most recent call last):
            ...
        secateur.core.errors.UsageError: the model: it is accelerated ('0' is a Packed). Its weights are \
packed, and cannot be seen or changed one by one. Call secateur.runtime.restore() first.
    """
    for name, module in model.named_modules():
        if getattr(type(module), "is_packed", False):
            raise UsageError(
                asked,
                f"it is accelerated ({repr(name) if name else 'it'} is a {type(module).__name__})",
                "its weights are packed, and cannot be seen or changed one by one",
                "call secateur.runtime.restore() first",
            )


def require_part(asked: str, value: object, has: Sequence[str], *, what: str, write: str) -> None:
    """Raise unless a value is an object with the given attributes, and not a class of such objects.

    Args:
        asked: The argument, as an error names it.
        value: What was given.
        has: Attributes that it must have.
        what: What is expected, in words.
        write: An example that would do.

    Raises:
        UsageError: It is not.

    Example:
        >>> require_part("pattern", "2:4", ("fold", "unfold"), what="a pattern", write="NM(2, 4)")
        Traceback (most recent call last):
            ...
        secateur.core.errors.UsageError: pattern: '2:4', a str, was given. It should be a pattern. \
Write NM(2, 4).
    """
    if isinstance(value, type) or not all(hasattr(value, name) for name in has):
        _refuse(asked, value, what, write)


def _refuse(asked: str, value: object, what: str, write: str) -> None:
    kind = f"{value!r:.60}, {kind_of(value)}," if value is not None else "None"
    if isinstance(value, type):
        kind = f"the class {value.__name__}, and not an object of it,"
    elif type(value).__name__ == "function":
        kind = f"the function {getattr(value, '__name__', '')}, and not its result,"
    raise UsageError(asked, f"{kind} was given", f"it should be {what}", f"write {write}")
