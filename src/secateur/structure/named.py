"""Numbers that know which attribute they are: what ``self.num_heads`` gives while a network is traced.

``qkv[..., : self.num_heads * self.head_dim]`` states a size that must shrink with the heads. The
operator sees 32. Which attribute that was cannot be told from the number: another one of the same
value may stand for something else (Phi-2 has 32 heads and turns 32 places of each). So the integers
of the running modules and of their configurations are replaced by ones that remember where they are
from, and what was computed from them: sums of products, and quotients of two.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from secateur.structure.counted import Counted
from secateur.structure.sizes import counts_units, stated_values


@dataclass(frozen=True)
class Origin:
    """Where a number is from.

    Args:
        modules: Paths of the modules that have it; modules share configurations.
        attribute: Its name; ``config.name`` for one in the configuration.
    """

    modules: tuple[str, ...]
    attribute: str


@dataclass(frozen=True)
class Factor:
    """An attribute, or a number in the code.

    Args:
        value: What it contributes.
        origin: The attribute; ``None`` for a number.
        over: The attribute was divided by this.
    """

    value: int
    origin: Origin | None = None
    over: int = 1


Term = tuple[Factor, ...]


class Named(int):
    """A number from an attribute, or computed from such numbers.

    Args:
        value: The number.
        terms: It is the sum of these products; none if that is not known.
        ratios: Pairs whose quotients went into it.

    Example:
        >>> heads = Named.of(Origin(("attn",), "heads"), 4)
        >>> width = Named.of(Origin(("attn",), "size"), 8)
        >>> size = heads * width + 2 * width
        >>> size, [[factor.value for factor in term] for term in size.terms]
        (48, [[4, 8], [2, 8]])
    """

    terms: tuple[Term, ...]
    ratios: tuple[tuple[Named, Named], ...]

    def __new__(
        cls, value: int, terms: tuple[Term, ...], ratios: tuple[tuple[Named, Named], ...] = ()
    ) -> Named:
        self = int.__new__(cls, value)
        self.terms, self.ratios = terms, ratios
        return self

    @classmethod
    def of(cls, origin: Origin, value: int) -> Named:
        """The number that an attribute holds."""
        return cls(value, ((Factor(value, origin),),))

    def _times(self, other: Any, *, before: bool) -> Any:
        if isinstance(other, Counted):
            return NotImplemented
        product = int.__mul__(self, other)
        if product is NotImplemented:
            return product
        theirs = _terms(other)
        if len(self.terms) != 1 or len(theirs) != 1:
            return int(product)
        one, two = (theirs[0], self.terms[0]) if before else (self.terms[0], theirs[0])
        return Named(product, ((*one, *two),))

    def __mul__(self, other: Any) -> Any:
        return self._times(other, before=False)

    def __rmul__(self, other: Any) -> Any:
        return self._times(other, before=True)

    def _plus(self, other: Any, *, before: bool) -> Any:
        if isinstance(other, Counted):
            return NotImplemented
        total = int.__add__(self, other)
        if total is NotImplemented:
            return total
        if self.ratios or getattr(other, "ratios", ()):
            return Named(total, (), (*self.ratios, *getattr(other, "ratios", ())))
        theirs = _terms(other)
        if not self.terms or not theirs:
            return self if total == int(self) else int(total)
        return Named(total, (*theirs, *self.terms) if before else (*self.terms, *theirs))

    def __add__(self, other: Any) -> Any:
        return self._plus(other, before=False)

    def __radd__(self, other: Any) -> Any:
        return self._plus(other, before=True)

    def __floordiv__(self, other: Any) -> Any:
        if isinstance(other, int) and other == 1:
            return self
        quotient = int.__floordiv__(self, other)
        if not isinstance(other, int) or isinstance(other, Counted) or self != quotient * other:
            return quotient
        if isinstance(other, Named):
            return Named(quotient, (), ((self, other),))
        if len(self.terms) == 1 and len(self.terms[0]) == 1:
            mine = self.terms[0][0]
            return Named(quotient, ((Factor(quotient, mine.origin, mine.over * other),),))
        return quotient

    def __reduce__(self) -> Any:
        """A copy is a plain number."""
        return int, (int(self),)


def _terms(x: Any) -> tuple[Term, ...]:
    if isinstance(x, Named):
        return x.terms
    # A negative number or zero is no size of anything.
    return ((Factor(int(x)),),) if isinstance(x, int) and x > 0 else ()


@contextmanager
def naming(model: nn.Module) -> Iterator[None]:
    """Give the sizes among the attributes of all modules their names, and take them off again.

    Example:
        >>> layer = nn.Linear(2, 3)
        >>> with naming(layer):
        ...     layer.out_features.terms
        ((Factor(value=3, origin=Origin(modules=('',), attribute='out_features'), over=1),),)
        >>> type(layer.out_features)
        <class 'int'>
    """
    changed: list[tuple[dict[str, Any], str, Named, int]] = []
    configs: dict[int, tuple[Any, list[str]]] = {}
    for path, module in model.named_modules():
        _name(vars(module), "", (path,), changed)
        config = vars(module).get("config")
        if hasattr(config, "__dict__"):
            configs.setdefault(id(config), (config, []))[1].append(path)
    for config, paths in configs.values():
        _name(stated_values(config), "config.", tuple(paths), changed)
    try:
        yield
    finally:
        for values, name, named, before in changed:
            if values.get(name) is named:
                values[name] = before


def _name(
    values: dict[str, Any],
    prefix: str,
    paths: tuple[str, ...],
    changed: list[tuple[dict[str, Any], str, Named, int]],
) -> None:
    for name, value in list(values.items()):
        if type(value) is int and value > 1 and counts_units(name):
            named = Named.of(Origin(paths, prefix + name), value)
            changed.append((values, name, named, value))
            values[name] = named
