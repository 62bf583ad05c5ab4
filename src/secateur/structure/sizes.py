"""Sizes that the code of a network states: they must shrink with its weights.

``x.view(b, t, self.num_heads, self.head_dim)`` fails, or is wrong, after heads were removed. The
trace sees the size as a number; the attribute it came from is looked for in the modules that were
running, innermost first.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

# Numbers of these kinds never count channels, heads or features.
_OTHER = (
    "kernel", "stride", "dilation", "padding", "window", "patch", "layer_idx", "layer_id", "shift",
    "training", "version", "max_", "position", "vocab", "seq", "image", "num_layers", "eps",
    "depth", "dropout", "_idx", "chunk", "num_labels", "input_dimensions", "bucket", "hidden_layers",
)  # fmt: skip
_LEVELS = 3


@dataclass(frozen=True)
class Site:
    """Attributes of one module that hold a size.

    Args:
        module: Path of the module.
        attributes: Names; ``config.name`` for one in the module's configuration, and ``name[0]``
            for an entry of a tuple.
    """

    module: str
    attributes: tuple[str, ...]


@dataclass(frozen=True)
class SizeUse:
    """A size that was used while the network ran.

    Args:
        site: Where it is stated.
        old: Its value.
        units: ``(old, others)``: an index stays while any of its units does.
        sure: False if it may also be a mere number in the code.
        named: Whether the attribute itself was seen there, not only a number of its value.
        given: Whether the code gave a plain number there.
    """

    site: Site
    old: int
    units: Tensor
    sure: bool = True
    named: bool = False
    given: bool = False

    def new(self, alive: Tensor) -> int:
        """The size when only units with ``alive[unit]`` are left."""
        kept = alive[self.units.clamp(min=0)] | (self.units < 0)
        return int(kept.any(1).sum())


def find_site(model: nn.Module, stack: Sequence[str], size: int) -> Site | None:
    """The innermost running module with an attribute of this value.

    Example:
        >>> find_site(nn.Sequential(nn.Linear(5, 7)), ["", "0"], 7)
        Site(module='0', attributes=('out_features',))
    """
    if size < 2:
        return None
    for path in list(reversed(stack))[:_LEVELS]:
        module = model.get_submodule(path)
        names = tuple(_holding(vars(module), size))
        if not names and (config := getattr(module, "config", None)) is not None:
            names = tuple(f"config.{name}" for name in _holding(stated_values(config), size))
        if names:
            return Site(path, names)
    return None


def stated_values(config: Any) -> dict[str, Any]:
    """What a configuration holds, to be read and written."""
    values: dict[str, Any] = getattr(config, "__dict__", {})
    return values


def counts_units(name: str) -> bool:
    """Whether an attribute of this name may count channels, heads or features.

    Example:
        >>> counts_units("num_heads"), counts_units("kernel_size")
        (True, False)
    """
    return not name.startswith("_") and not any(part in name for part in _OTHER)


def _holding(values: dict[str, Any], size: int) -> list[str]:
    found = []
    for name, value in values.items():
        if not counts_units(name):
            continue
        if isinstance(value, int) and not isinstance(value, bool) and value == size:
            found.append(name)
        elif isinstance(value, (tuple, list)) and all(type(v) is int for v in value):
            found += [f"{name}[{i}]" for i, v in enumerate(value) if v == size]
    return found


def set_attribute_(module: nn.Module, name: str, value: int) -> None:
    """Write a size. A configuration is copied first, because modules share it.

    Example:
        >>> layer = nn.LayerNorm(4)
        >>> set_attribute_(layer, "normalized_shape[0]", 3)
        >>> layer.normalized_shape
        (3,)
    """
    holder: Any = module
    if name.startswith("config."):
        module.config = copy.copy(module.config)
        holder, name = module.config, name.removeprefix("config.")
    name, _, entry = name.partition("[")
    written: Any = value
    if entry:
        old = getattr(holder, name)
        values = list(old)
        values[int(entry.rstrip("]"))] = value
        written = getattr(old, "_make", type(old))(values)  # named tuples take no list
    if holder is module:
        setattr(holder, name, written)
    else:
        vars(holder)[name] = written  # a configuration may be frozen
