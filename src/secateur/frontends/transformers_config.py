"""Looking for the configuration of a Transformers model that was cut.

Nothing is believed about the meaning of a key. A key may take values that the cut suggests (its own
value, in the proportion in which some axis was shortened); every candidate is built without memory
and its names, shapes and stated sizes are compared.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

Key = tuple[str | int, ...]
Values = Mapping[Key, int]
Shapes = Mapping[str, tuple[int, ...]]

#: Differences of shapes; of sizes that the cut edited; of sizes that it left.
Score = tuple[int, int, int]

_WORST = (10**9, 10**9, 10**9)
_ALTERNATIVES = 8
_STEPS = 8
_FRONT = 4
# A model of 7 billion parameters is built in a tenth of a second.
_TRIES = 500


@dataclass(frozen=True)
class Wanted:
    """What a configuration must build.

    Args:
        shapes: Name of a parameter or buffer -> its shape.
        stated: (module, attribute) -> a size that the cut edited, or that it left.
        edited: Those of ``stated`` that the cut edited; they must agree.
        ratios: (before, after): how axes and sizes were shortened.
        under: Only names that begin like this count ...
        outside: ... and only names that do not begin like this.
    """

    shapes: Shapes
    stated: Mapping[tuple[str, str], int]
    edited: frozenset[tuple[str, str]]
    ratios: frozenset[tuple[int, int]]
    under: str = ""
    outside: str | None = None

    def counts(self, name: str) -> bool:
        """Whether a name is compared."""
        away = self.outside is None or not name.startswith(self.outside)
        return name.startswith(self.under) and away


@dataclass
class Search:
    """Configurations of one class, tried one after the other.

    Args:
        cls: The class of the model.
        config: The configuration of the uncut model.
    """

    cls: type[nn.Module]
    config: Any
    _plain: dict[str, Any] = field(init=False)
    _built: dict[str, Any] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._plain = self.config.to_dict()

    def find(self, wanted: Wanted) -> list[dict[Key, int]]:
        """Configurations that build what is wanted, likeliest first; none, if none was found."""
        seen = self._explore(wanted, {})
        good = [values for score, values in seen if score[0] == 0]
        return good[:_ALTERNATIVES]

    def nearest(self, wanted: Wanted, start: Values) -> tuple[dict[Key, int], Score]:
        """The configuration with the fewest differences, and how many they are."""
        score, values = self._explore(wanted, start)[0]
        return values, score

    def needed(self, wanted: Wanted, values: Values) -> dict[Key, int]:
        """Those values without which more shapes would differ."""
        left = dict(values)
        for key in values:
            fewer = {k: v for k, v in left.items() if k != key}
            if self.score(wanted, fewer)[0] <= self.score(wanted, left)[0]:
                left = fewer
        return left

    def score(self, wanted: Wanted, values: Values) -> Score:
        """How far what these values build is from what is wanted; all zero if it is that.

        Sizes decide between configurations that build the same shapes. They cannot be required:
        code states some that it never uses, and those stay as they were when a model is cut.
        """
        built = self._build(values)
        if built is None:
            return _WORST
        shapes, stated = built
        names = {n for n in {*shapes, *wanted.shapes} if wanted.counts(n)}
        wrong = sum(shapes.get(name) != wanted.shapes.get(name) for name in names)
        other = [
            place in wanted.edited
            for place, size in wanted.stated.items()
            if wanted.counts(f"{place[0]}.") and stated.get(place) != size
        ]
        return wrong, sum(other), len(other) - sum(other)

    def _explore(self, wanted: Wanted, start: Values) -> list[tuple[Score, Any]]:
        """Change key after key from the best so far; all that was tried, best first."""
        seen: dict[str, tuple[Score, dict[Key, int]]] = {}

        def rank(pair: tuple[Score, Values]) -> tuple[Any, ...]:
            return (*pair[0], len(pair[1]), _mark(pair[1]))

        def add(values: dict[Key, int]) -> None:
            mark = _mark(values)
            if mark not in seen and len(seen) < _TRIES:
                seen[mark] = (self.score(wanted, values), values)

        add(dict(start))
        front = list(seen.values())
        for _ in range(_STEPS):
            best = known = min(seen.values(), key=rank)[0]
            for steps in (1, 2):  # two keys that only fit together are changed together
                for _, values in front:
                    for new in self._near(wanted, values, steps):
                        add(new)
                best = min(seen.values(), key=rank)[0]
                if best < known or best[0] == 0:
                    break
            if best == known:
                break
            front = sorted(seen.values(), key=rank)[:_FRONT]
        return sorted(seen.values(), key=rank)

    def _near(self, wanted: Wanted, now: Values, steps: int) -> Iterator[dict[Key, int]]:
        options = [
            (key, value)
            for key, old in keys_of(self._plain).items()
            for value in sorted(_candidates(old, wanted.ratios) - {now.get(key, old)})
        ]
        for chosen in itertools.combinations(options, steps):
            if len({key for key, _ in chosen}) == steps:
                yield {**now, **dict(chosen)}

    def _build(self, values: Values) -> tuple[Shapes, Mapping[tuple[str, str], int]] | None:
        mark = _mark(values)
        if mark not in self._built:
            try:
                with torch.device("meta"):
                    model = self.cls(self.configuration(values))
                self._built[mark] = (shapes_of(model), stated_by(model))
            # Whatever a configuration makes a constructor do, it is not the one we look for.
            except Exception:
                self._built[mark] = None
        found: tuple[Shapes, Mapping[tuple[str, str], int]] | None = self._built[mark]
        return found

    def configuration(self, values: Values) -> Any:
        """The configuration with other values at some keys."""
        return type(self.config).from_dict(with_values(self._plain, values))


def keys_of(plain: Mapping[str, Any]) -> dict[Key, int | None]:
    """Keys of a configuration that can hold a size, with their values.

    Example:
        >>> keys_of({"width": 8, "sizes": [16, 32], "pad_token_id": 3, "inner": None, "rate": 0.1})
        {('width',): 8, ('sizes', 0): 16, ('sizes', 1): 32, ('inner',): None}
    """
    found: dict[Key, int | None] = {}
    for name, value in plain.items():
        if name.endswith(("_token_id", "_version", "_idx")) or name in _shared_keys():
            continue
        if value is None or type(value) is int:
            found[name,] = value
        elif isinstance(value, (list, tuple)) and all(type(v) is int for v in value):
            found |= {(name, i): v for i, v in enumerate(value)}
        elif isinstance(value, Mapping):
            found |= {(name, *key): v for key, v in keys_of(value).items() if v is not None}
    return found


def with_values(plain: Mapping[str, Any], values: Values) -> dict[str, Any]:
    """A configuration as plain data, with other values at some keys.

    Example:
        >>> with_values({"sizes": [16, 32], "width": 8}, {("sizes", 1): 24, ("width",): 4})
        {'sizes': [16, 24], 'width': 4}
    """
    new: Any = copy.deepcopy(dict(plain))
    for key, value in values.items():
        holder = new
        for part in key[:-1]:
            if isinstance(holder[part], tuple):
                holder[part] = list(holder[part])
            holder = holder[part]
        holder[key[-1]] = value
    result: dict[str, Any] = new
    return result


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of a ``state_dict``."""
    return {name: tuple(x.shape) for name, x in model.state_dict().items()}


def stated_by(model: nn.Module) -> dict[tuple[str, str], int]:
    """Sizes that modules hold as plain attributes."""
    found = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if type(value) is int and not name.startswith("_"):
                found[path, name] = value
            elif isinstance(value, tuple) and all(type(v) is int for v in value):
                found |= {(path, f"{name}[{i}]"): v for i, v in enumerate(value)}
    return found


def layers_of(model: Any) -> tuple[str, nn.ModuleList]:
    """The list of layers of a Transformers model, and its path: the one with most parameters.

    Example:
        >>> net = nn.Sequential(nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]))
        >>> layers_of(net)[0]
        '0'
    """
    lists = [(p, m) for p, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    alike = [(p, m) for p, m in lists if len({type(x) for x in m}) == 1] or lists
    if not alike:
        return "", nn.ModuleList()
    return max(
        alike, key=lambda pair: (sum(p.numel() for p in pair[1].parameters()), -len(pair[0]))
    )


def _mark(values: Values) -> str:
    return json.dumps(sorted((".".join(map(str, key)), value) for key, value in values.items()))


def _candidates(old: int | None, ratios: frozenset[tuple[int, int]]) -> set[int]:
    if old is None:
        return {after for _, after in ratios}
    if old < 2:
        return set()
    return {
        old * after // before
        for before, after in ratios
        if before % old == 0 and (old * after) % before == 0
    }


def _shared_keys() -> frozenset[str]:
    """Keys that every configuration has: none is a width."""
    import transformers

    return frozenset(transformers.PreTrainedConfig().to_dict())
