"""What follows the units through every operator while a network runs.

Operators are seen below autograd, where few remain. Those that only move data are executed on the
labels themselves; all others have a rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from secateur.core.errors import SecateurError, first_line
from secateur.structure.counted import Counted, Sizes, Source, follow, rows_along
from secateur.structure.counted import plain as plain_number
from secateur.structure.labels import NONE, along, fill, narrowed, own_shape, varying
from secateur.structure.named import Named
from secateur.structure.named_sizes import count_named, names_in
from secateur.structure.running import Call, run_plainly
from secateur.structure.seen import Seen
from secateur.structure.sizes import SizeUse, find_site
from secateur.structure.units import Ledger, Meet

__all__ = ["Call", "Execute", "Labels", "Rule", "Tracer"]

Labels = tuple[Tensor, ...]
#: (tracer, call) -> nothing: sets the labels of the call's outputs.
Rule = Callable[["Tracer", "Call"], None]
#: How an operator is executed; the default runs it as it is.
Execute = Callable[["Tracer", Any, tuple[Any, ...], dict[str, Any]], Any]


class Tracer(TorchDispatchMode):
    """Labels of all live tensors, updated at every operator."""

    def __init__(self, model: nn.Module, execute: Execute | None = None) -> None:
        # A dispatch mode cannot work without its parent's state.
        super().__init__()  # type: ignore[no-untyped-call]
        self.model, self.ledger, self.seen = model, Ledger(), Seen()
        self.axes: dict[tuple[str, int], Tensor] = {}
        self.stack: list[str] = []
        self._labels: Any = WeakTensorKeyDictionary()
        self._names: Any = WeakTensorKeyDictionary()
        self._owed: Any = WeakTensorKeyDictionary()
        self._wider: Any = WeakTensorKeyDictionary()
        self._execute = execute or run_plainly
        self._busy = False
        self._stated: Sizes | None = None

    # -- labels ---------------------------------------------------------------------------------

    def labels(self, x: Any) -> Labels:
        """The labels of a tensor; none for anything else."""
        return self._labels.get(x, ()) if isinstance(x, Tensor) else ()

    def put(self, x: Tensor, labels: Iterator[Tensor] | Labels | list[Tensor]) -> None:
        """Give a tensor its labels; those that never change along an axis are dropped."""
        kept = tuple(label for label in labels if varying(label))
        for label in kept:
            assert label.shape == x.shape, (label.shape, x.shape)
        self._labels[x] = kept

    def own(self, name: str, x: Tensor) -> None:
        """Give every axis of a parameter its own units."""
        labels = []
        for axis, size in enumerate(x.shape):
            ids = self.ledger.new(size)
            self.axes[name, axis] = ids
            labels.append(along(ids, axis, tuple(x.shape)))
        self._names[x] = name
        self.put(x, labels)

    def meet(self, shape: tuple[int, ...], operands: list[Tensor], reason: str) -> list[Tensor]:
        """Labels of an element-wise result: what lies at the same place is tied.

        Args:
            shape: Of the result.
            operands: Tensors that broadcast to it.
            reason: Why an axis keeps its size where one operand has no units along it.
        """
        seen = [(own_shape(x), self.labels(x)) for x in operands]
        return self.meet_labels(shape, seen, reason)

    def meet_labels(
        self, shape: tuple[int, ...], operands: list[tuple[tuple[int, ...], Labels]], reason: str
    ) -> list[Tensor]:
        """:meth:`meet` for operands given as shapes and labels."""
        merged: list[Tensor] = []
        for _, labels in operands:
            for label in labels:
                self._merge(merged, label.expand(shape), reason)
        for size, labels in operands:
            lead = len(shape) - len(size)
            known = {axis for label in labels for axis in varying(label.expand(shape))}
            for axis in range(lead, len(shape)):
                if size[axis - lead] > 1 and axis not in known:
                    merged = self.fixed(merged, axis, reason)
        return merged

    def fixed(self, labels: list[Tensor] | Labels, axis: int, reason: str) -> list[Tensor]:
        """Keep the size of ``axis`` for every label that changes along it."""
        found = []
        for label in labels:
            left: Tensor | None = label
            if axis in varying(label):
                left = self.ledger.whole(label, axis, reason)
            if left is not None:
                found.append(left)
        return found

    def _merge(self, merged: list[Tensor], label: Tensor, reason: str) -> None:
        mine = set(varying(label))
        for index, other in enumerate(merged):
            theirs = set(varying(other))
            if not mine & theirs:
                continue
            wide, narrow = (label, other) if len(mine) > len(theirs) else (other, label)
            if mine != theirs and (mine <= theirs or theirs <= mine):
                shared = tuple(sorted(mine & theirs))
                self.ledger.meet(Meet(wide, narrow, shared, reason))
            else:
                self.ledger.join(label, other, reason)
            merged[index] = wide
            return
        if mine:
            merged.append(label)

    # -- sizes and reductions -------------------------------------------------------------------

    def size(
        self, label: Tensor, axis: int, *, value: int | None = None, sure: bool = True
    ) -> SizeUse | None:
        """Note that the code may state the size of ``axis``; ``None`` if no attribute has it."""
        units = rows_along(label, axis)
        rows = units[:, 0].unique(return_inverse=True)[1]
        if len(units) > 1 and 1 < int(rows.max()) + 1 < len(units) and value is None:
            # The axis also counts something else, e.g. batch times heads.
            first = torch.full((len(units),), len(units)).scatter_reduce(
                0, rows, torch.arange(len(units)), "amin"
            )
            units = units[first[: int(rows.max()) + 1]]
        old = len(units) if value is None else value
        site = find_site(self.model, self.stack, old)
        if site is None:
            return None
        use = SizeUse(site, old, units, sure)
        self.seen.sizes.append(use)
        return use

    def stated(self, count: int) -> Sizes | None:
        """The sizes that the code of the network gave to an operator, if it gave so many."""
        sizes = self._stated
        return None if sizes is None or len(sizes) != count else sizes

    def said(self, value: int) -> int:
        """A number as the code gave it to the operator."""
        return next((size for size in self._stated or () if size == value), value)

    def picked(self, count: int) -> list[int]:
        """The positions that the code listed in the brackets, if it listed so many."""
        places = (self._stated or [])[-count:]
        return [p for p in places if p is not None] if len(places) == count else []

    def state(self, sizes: Sizes | None) -> None:
        """Note the sizes that the operator to come was given."""
        if not self._busy:  # the rules themselves reshape labels
            self._stated = sizes
            self.seen.names.update(*(names_in(size, self.stack) for size in sizes or ()))

    def used(self, number: int) -> None:
        """Note that the code computes with a size: what it computes changes with a cut."""
        if self._busy:
            return
        if isinstance(number, Counted) and number.source:
            self.doubt(number.source.rows, f"its code computes with their number, {number}")
        self.seen.valued |= names_in(number, self.stack)

    def literal(self, value: int) -> bool:
        """Whether the code gave a size as a plain number."""
        return any(type(size) is int and size == value for size in self._stated or ())

    def doubt(self, label: Tensor, reason: str) -> None:
        """Note what may be wrong with a cut, to be told if the proof of it fails."""
        with torch.utils._python_dispatch._disable_current_modes():
            self.seen.doubts.append((narrowed(label).reshape(-1).unique(), reason))

    def counted(self, x: Tensor) -> dict[int, Source]:
        """The units along the axes of a tensor, if it is the network that asks for its sizes."""
        if self._busy:
            return {}
        labels = self.labels(x)
        return {axis: Source(v, axis, self._agreed) for v in labels for axis in varying(v)}

    def _agreed(self, label: Tensor, axis: int, given: int) -> None:
        if not self._busy:
            with torch.utils._python_dispatch._disable_current_modes():
                if not isinstance(given, Named) or count_named(self, label, axis, given) is None:
                    self.size(label, axis)

    def sized(self, label: Tensor, axis: int, given: int | None) -> Tensor:
        """Make the number of units along ``axis`` follow what the code says about it.

        Args:
            label: Of a result.
            axis: One along which it changes.
            given: The size as the code gave it; ``None`` or -1 where it gave none.

        Returns:
            The label, without units along ``axis`` where nothing could change the size.
        """
        if given is None or given == -1:
            return label
        if isinstance(given, Counted):
            follow(self.ledger, label, axis, given)
            return label
        if isinstance(given, Named) and (left := count_named(self, label, axis, given)) is not None:
            return left
        # Of (batch, tokens, 3, 3, 8) one of the 3 may be the number of heads, the other a number.
        once = sum(plain_number(size) and size == given for size in self._stated or ()) < 2
        use = self.size(label, axis, sure=once)
        if use is not None:
            self.seen.sizes[-1] = replace(use, given=True)
            return label
        reason = f"its code gives the size {int(given)} as a number"
        left = self.ledger.whole(label, axis, reason)
        return fill(tuple(label.shape)) if left is None else left

    def owe(self, x: Tensor, labels: list[Tensor], axis: int, reason: str) -> None:
        """Keep the size of ``axis`` as soon as an operator uses ``x``."""
        if labels:
            owed = self._owed.setdefault(x, [])
            owed += [(label, axis, reason) for label in labels]

    def pay(self, x: Tensor) -> None:
        """What :meth:`owe` noted for ``x`` comes true."""
        for label, axis, reason in self._owed.pop(x, ()):
            self.ledger.whole(label, axis, reason)

    def part_of(self, x: Tensor, whole: Tensor, label: Tensor | None = None, axis: int = 0) -> None:
        """Note that ``x`` lies in the memory of ``whole``, or is a part of its ``axis``."""
        wider = self._wider.get(whole, ())
        if label is not None:
            wider = (*wider, (label, axis))
        if wider:
            self._wider[x] = wider

    def wider(self, x: Tensor) -> Iterator[tuple[Tensor, int]]:
        """The axes of which ``x`` is a part."""
        yield from self._wider.get(x, ())

    def reduces(self, what: str, label: Tensor) -> None:
        """Note an operator whose value depends on how many of some units there are."""
        with torch.utils._python_dispatch._disable_current_modes():
            units = narrowed(label).reshape(-1).unique()
        where = self.stack[-1] if self.stack else ""
        self.seen.reductions.append((where, what, units[units != NONE]))

    # -- the mode itself ------------------------------------------------------------------------

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        self._busy = True
        try:
            return self._dispatch(func, args, kwargs or {})
        finally:
            self._busy = False

    def _dispatch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        from secateur.structure.rules import rule_for

        out = self._execute(self, func, args, kwargs)
        self.seen.operators += 1
        call = Call(func, args, kwargs, out)
        tensors = call.tensors
        for x in tensors:
            if x in self._names:
                self.seen.reached.add(self._names[x])
            self.pay(x)
        rule = rule_for(func)
        if rule is not None and (rule.always or any(self.labels(x) for x in tensors)):
            self._apply(rule, call)
        elif any(self.labels(x) for x in tensors):
            self.refuse(call, f"no rule for the operator {call.name}")
        return out

    def _apply(self, rule: Any, call: Call) -> None:
        try:
            rule.apply(self, call)
        except SecateurError:
            raise
        except Exception as error:  # a case that the rule does not know is as good as no rule
            self.refuse(call, f"the rule for {call.name} fails ({first_line(error, 120)})")
            for x in call.outputs:
                self.put(x, [])

    def refuse(self, call: Call, reason: str) -> None:
        """Pin everything that an operator touches."""
        for x in call.tensors:
            for label in self.labels(x):
                self.ledger.pin(label, reason)
