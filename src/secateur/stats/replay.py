"""Forward passes that do not compute again what is settled: finished parts answer from memory.

Sequential pruning looks at one layer after the other, each on the network as pruned so far. From
the first layer on, that is a forward pass for every layer, quadratic in the depth. But once all
weights of a block have their last values, it always gives the same output for the same batch.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only

from secateur.core.attention import open_attention
from secateur.core.batches import Batch, evaluating, forward, narrow, to_device
from secateur.core.errors import NonFinite
from secateur.core.slots import Slot, device_of

_T = TypeVar("_T")
_PLAIN = (Tensor, type(None), bool, int, float, str)
# What a network may raise on an answer that it cannot use.
_UNFIT = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError)
_LEAST, _UNKNOWN = 1 << 30, 4 << 30


class _Reached(Exception):
    """The module has answered; the rest of the forward pass is of no use."""


@dataclass(frozen=True)
class _Answers:
    """Outputs of a module: position of a batch -> output. Those of a hollow one are all NaN."""

    of: dict[int, Any]
    hollow: bool = False

    def bytes(self) -> int:
        return 0 if self.hollow else sum(x.numel() * x.element_size() for x in _numbers(self.of))


class Replay:
    """Outputs of the finished parts of a network, for a given list of batches.

    Tell it of each weight that has got its last value with :meth:`finish`. It then keeps the outputs
    of the largest module around it of which nothing will change any more, and forgets those of the
    modules within. Inside :meth:`serving` these modules answer from memory.

    Nothing is assumed of the network: each batch is run once to see how often it calls the modules, and
    every step is tried on one sample. A module that cannot be replayed (it runs twice, or more often in one
    batch than in another, changes its input, draws random numbers) is computed again as before. When half
    of the room is taken, the other remembered modules answer NaN: if the network still gives the same
    output, nobody reads them again, and they stay so.

    Args:
        model: The network.
        slots: The weights that will be finished, all before what reads them is.
        batches: What it will be run on, these very objects.
        most: Bytes that the outputs may take, and for moments twice as much; by default a quarter of
            the free memory.

    Example:
        >>> net = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(8)))
        >>> slots, x = [Slot(f"{i}.0.weight", "Linear", (4, 4)) for i in range(8)], torch.ones(2, 4)
        >>> replay = Replay(net, slots, [x])
        >>> wanted = net(x)
        >>> for slot in slots[:5]:
        ...     replay.finish(slot)
        >>> replay.remembered
        ['0', '1', '2', '3', '4']
        >>> calls, _ = [], [layer.register_forward_hook(lambda *_: calls.append(1)) for layer in net]
        >>> inner = [layer[0].register_forward_hook(lambda *_: calls.append(2)) for layer in net]
        >>> with replay.serving(x):
        ...     bool((net(x) == wanted).all()), calls.count(1), calls.count(2)
        (True, 8, 3)
    """

    def __init__(
        self,
        model: nn.Module,
        slots: Sequence[Slot],
        batches: Sequence[Batch],
        *,
        most: float | None = None,
    ) -> None:
        self._model = model
        self._batches = list({id(batch): batch for batch in batches}.values())
        self._most = _quarter(device_of(model)) if most is None else most
        self._open = Counter(path for slot in slots for path in _around(slot))
        self._memory: dict[str, _Answers] = {}
        self._sample: Batch | None = None
        self._calls: Counter[str] = Counter()
        # The sample is cheap, but not for free: two passes of it for a finished module.
        if len({slot.module for slot in slots}) > 3 and self._batches:
            self._begin()

    @property
    def remembered(self) -> list[str]:
        """Paths of the modules that answer from memory."""
        return list(self._memory)

    def ends(self, paths: Iterable[str]) -> Counter[str] | None:
        """Modules after which a pass has called all of these, with the number of their calls.

        What one batch calls more often than another ends with the module around it. None if only the
        end of the pass will do.
        """
        found: Counter[str] = Counter()
        for path in paths:
            steps = path.split(".")
            around = (".".join(steps[:i]) for i in range(len(steps), 0, -1))
            end = next((each for each in around if self._calls[each]), None)
            if end is None:
                return None
            found[end] = self._calls[end]
        return found

    def _begin(self) -> None:
        calls: list[Counter[str]] = []
        hooks = []
        for path in self._open:
            module = self._model.get_submodule(path)
            if path and not isinstance(module, torch.jit.ScriptModule):

                def note(_: nn.Module, __: Any, path: str = path) -> None:
                    calls[-1][path] += 1

                hooks.append(module.register_forward_pre_hook(note))
        try:
            for batch in self._batches:
                calls.append(Counter())
                self._run(batch)
            calls.append(Counter())
            sample = narrow(self._batches[0], 1)
            self._run(sample)
            self._batches.insert(0, sample)
            self._sample = sample
        except _UNFIT:  # e.g. a graph, of which one row is no sample
            calls.pop()
        finally:
            for hook in hooks:
                hook.remove()
        # Samples may be gone through one by one, and experts are called as the data will have it: what
        # one batch calls as often as every other is taken to be called so often always.
        same = dict.fromkeys(path for each in calls for path in each)
        self._calls = Counter({p: calls[0][p] for p in same if len({c[p] for c in calls}) == 1})

    @contextmanager
    def serving(self, batch: Batch) -> Iterator[None]:
        """Inside, finished modules answer as they did for this batch; unknown ones are computed."""
        place = next((i for i, known in enumerate(self._batches) if known is batch), None)
        changed: list[tuple[nn.Module, Any]] = []
        try:
            for path, answers in self._memory.items():
                if place in answers.of:
                    module = self._model.get_submodule(path)
                    changed.append((module, vars(module).get("forward")))
                    vars(module)["forward"] = _answering(answers.of[place], answers.hollow)
            yield
        finally:
            for module, before in changed:
                del vars(module)["forward"]
                if before is not None:
                    vars(module)["forward"] = before

    def finish(self, slot: Slot) -> None:
        """A weight has its last value."""
        around = _around(slot)
        self._open.subtract(around)
        for path in around:  # the largest first
            settled = self._open[path] == 0 and self._calls[path] == 1
            if (
                settled
                and self._sample is not None
                and (path in self._memory or self._remember(path))
            ):
                return

    def trying(self, work: Callable[[], _T]) -> _T:
        """Do something with answers from memory; if a NaN comes up, forget them all and do it again.

        Raises:
            NonFinite: It comes up without them, too.
        """
        try:
            return work()
        except NonFinite:
            if not self._memory:
                raise
            self._memory, self._sample = {}, None
            return work()

    def _remember(self, path: str) -> bool:
        """Keep the outputs of a module, if there is room and the network gives the same with them."""
        rest = {p: a for p, a in self._memory.items() if not p.startswith(f"{path}.")}
        with evaluating(self._model), torch.no_grad():
            answers = self._outputs(path)
            if answers is None:
                return False
            before, wanted = self._memory, self._answer()
            held = sum(each.bytes() for each in (answers, *rest.values()))
            tries = [rest] if held <= self._most else []
            if held > self._most / 2:
                tries.insert(0, {p: _hollow(a) for p, a in rest.items()})
            for others in tries:
                self._memory = {**others, path: answers}
                try:
                    if _same(self._answer(), wanted):
                        return True
                except _UNFIT:
                    continue
            self._memory = before
        return False

    def _outputs(self, path: str) -> _Answers | None:
        found: dict[int, Any] = {}
        used = 0

        def keep(_: nn.Module, __: Any, output: Any) -> None:
            found[place] = output
            raise _Reached

        handle = self._model.get_submodule(path).register_forward_hook(keep)
        try:
            for place, batch in enumerate(self._batches):
                with suppress(_Reached), self.serving(batch):
                    self._run(batch)
                if place not in found:  # the sample, or a batch that takes another way
                    continue
                if not all(isinstance(part, _PLAIN) for part in _parts(found[place])):
                    return None
                used += _Answers({place: found[place]}).bytes()
                if used > self._most:
                    return None
        finally:
            handle.remove()
        return _Answers(found) if 0 in found else None

    def _answer(self) -> Any:
        assert self._sample is not None
        with self.serving(self._sample):
            return self._run(self._sample)

    def _run(self, batch: Batch) -> Any:
        with evaluating(self._model), open_attention(self._model), torch.no_grad():
            return forward(self._model, to_device(batch, device_of(self._model)))


def _around(slot: Slot) -> list[str]:
    """Paths of the modules with a weight in them, the largest first, without the whole network."""
    paths = [name.split(".")[:-1] for name in (slot.name, *slot.aliases)]
    return list(dict.fromkeys(".".join(p[: i + 1]) for p in paths for i in range(len(p))))


def _answering(output: Any, hollow: bool) -> Callable[..., Any]:
    def answer(*_: Any, **__: Any) -> Any:
        # A copy, for what follows may change it in place; nothing hollow is of use to anyone.
        return output if hollow else tree_map_only(Tensor, torch.clone, output)

    return answer


def _hollow(answers: _Answers) -> _Answers:
    def empty(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        return torch.full((), torch.nan, dtype=x.dtype, device=x.device).expand(x.shape)

    return _Answers(tree_map_only(Tensor, empty, answers.of), hollow=True)


def _same(found: Any, wanted: Any) -> bool:
    """Whether two outputs are equal but for the rounding of another order of summation."""
    pairs = zip(*(_numbers(x) for x in (found, wanted)), strict=True)
    return all(_near(a, b) for a, b in pairs)


def _numbers(output: Any) -> list[Tensor]:
    return [x for x in _parts(output) if isinstance(x, Tensor)]


def _parts(output: Any) -> list[Any]:
    """What an output is made of. Objects stay whole: a cache of keys and values is none of ours."""
    inner = (tuple, list, Mapping)
    return tree_flatten(output, is_leaf=lambda x: not isinstance(x, inner))[0]


def _near(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point() or not a.numel():
        return torch.equal(a, b)
    return torch.allclose(a, b, rtol=0, atol=1e-5 * float(b.abs().max()))


def _quarter(device: torch.device) -> float:
    """A quarter of the memory that is free, or of a moderate guess."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 4
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # no such question on this system
        free = _UNKNOWN
    return max(_LEAST, free) / 4
