"""Selectors: how users point at parts of a network."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

from secateur.core.errors import SelectorError

T = TypeVar("T")


def specificity(selector: str, name: str, kind: str) -> tuple[int, int]:
    """How precisely ``selector`` names this parameter; ``(0, 0)`` means not at all.

    An exact parameter or module name beats a glob, a glob beats ``re:``, ``re:`` beats a class name.
    Among equals the longer selector is the more specific one.

    Example:
        >>> specificity("layer1.conv", "layer1.conv.weight", "Conv2d")[0]
        4
        >>> specificity("layer1.*", "layer1.conv.weight", "Conv2d")[0]
        3
        >>> specificity("re:.*conv", "layer1.conv.weight", "Conv2d")[0]
        2
        >>> specificity("Conv2d", "layer1.conv.weight", "Conv2d")[0]
        1
        >>> specificity("fc", "layer1.conv.weight", "Conv2d")
        (0, 0)
    """
    module = name.rpartition(".")[0]
    if selector in (name, module):
        return 4, len(selector)
    if selector.startswith("re:"):
        return (2, len(selector)) if _expression(selector).match(name) else (0, 0)
    if any(c in selector for c in "*?["):
        hit = fnmatch.fnmatchcase(name, selector) or fnmatch.fnmatchcase(module, selector)
        return (3, len(selector)) if hit else (0, 0)
    return (1, len(selector)) if selector == kind else (0, 0)


def matches(selector: str, name: str, kind: str) -> bool:
    """Whether ``selector`` names this parameter."""
    return specificity(selector, name, kind) > (0, 0)


def pick(table: Mapping[str, T], name: str, kind: str) -> T | None:
    """The entry of the most specific selector that matches, or ``None``.

    Example:
        >>> pick({"Linear": 0.5, "head": 0.0}, "head.weight", "Linear")
        0.0
    """
    best = max(table, key=lambda selector: specificity(selector, name, kind), default=None)
    return table[best] if best is not None and matches(best, name, kind) else None


def require_hits(
    selectors: Iterable[str], parameters: Iterable[tuple[str, str]], what: str
) -> None:
    """Raise if a selector names nothing among the ``(name, kind)`` pairs."""
    known = list(parameters)
    for selector in selectors:
        if not any(matches(selector, name, kind) for name, kind in known):
            names = ", ".join(name for name, _ in known[:6]) + (", ..." if len(known) > 6 else "")
            raise SelectorError(
                f"{what} {selector!r}",
                f"it matches none of the {len(known)} parameters ({names})",
                "a selector that does nothing is nearly always a typing error",
                "use a name, a glob like 'layer1.*', 're:' and an expression, or a class name",
            )


def _expression(selector: str) -> re.Pattern[str]:
    try:
        return re.compile(selector.removeprefix("re:"))
    except re.error as error:
        raise SelectorError(
            f"selector {selector!r}",
            f"the expression cannot be read: {error}",
            "what follows 're:' is a Python regular expression",
            "correct it, or use a glob",
        ) from None
