"""What operators do to units: one function an operator, registered by its decorator.

A rule reads the labels of a call's arguments, ties or pins units in the ledger, and puts labels on
the call's outputs. Element-wise operators (PyTorch tags them) share one rule. An operator without a
rule pins what it touches.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from secateur.structure.tracer import Rule

__all__ = ["Entry", "rule", "rule_for"]


@dataclass(frozen=True)
class Entry:
    """A rule, and whether it also runs where no argument has a label."""

    apply: Rule
    always: bool = False


_RULES: dict[Any, Entry] = {}
_FILES = ("elementwise", "views", "products", "norms", "reductions", "lookups", "spatial")


def rule(*names: str, always: bool = False) -> Callable[[Rule], Rule]:
    """Register a rule for operators, by their names as in ``torch.ops``.

    Args:
        names: E.g. ``"aten.relu"`` or ``"mylib.myop"``. Names that this PyTorch lacks are left out.
        always: Run it also for calls none of whose arguments has a label.

    Example:
        >>> @rule("mylib.identity")
        ... def identity(tracer, call):
        ...     tracer.put(call.out, tracer.labels(call.args[0]))
    """

    def register(apply: Rule) -> Rule:
        for name in names:
            space, _, operator = name.partition(".")
            packet = getattr(getattr(torch.ops, space), operator, None)
            if packet is not None:
                if packet in _RULES:
                    warnings.warn(f"the structural rule of {name} is replaced", stacklevel=2)
                _RULES[packet] = Entry(apply, always)
        return apply

    return register


def rule_for(func: Any) -> Entry | None:
    """The rule of an operator; the element-wise one if PyTorch tags it so."""
    if not _RULES or "elementwise" not in _loaded:
        for name in _FILES:
            _loaded[name] = importlib.import_module(f"{__name__}.{name}")
    found = _RULES.get(func.overloadpacket)
    if found is None and _is_elementwise(func):
        return Entry(_loaded["elementwise"].elementwise)
    return found


def _is_elementwise(func: Any) -> bool:
    """By its tag. Of some operators that work in place (``mish_``) only the other form has it."""
    space, _, name = func._schema.name.partition("::")
    packet = getattr(getattr(torch.ops, space), name.removesuffix("_"), None)
    plain = getattr(packet, func._overloadname, func)
    return torch.Tag.pointwise in func.tags or torch.Tag.pointwise in plain.tags


_loaded: dict[str, Any] = {}
