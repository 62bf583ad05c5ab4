"""How a layer's inputs look as rows that multiply its weight matrix.

Each function has the signature ``(module, inputs, output, draw) -> (groups, rows, fan_in)``; ``draw``
picks rows out of as many as there are, or is None. Columns are in the order of
:meth:`secateur.core.weight.Weight.matrix`, so that for every layer kind ``rows @ matrix.T`` (plus
bias) is the layer's output, which is how the tests check them.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.core.slots import Draw


def linear(
    module: nn.Module, inputs: tuple[object, ...], output: object, draw: Draw | None = None
) -> Tensor:
    """Linear layers and GPT-2's ``Conv1D``: one row per token."""
    x = inputs[0]
    assert isinstance(x, Tensor)
    return _drawn(x.detach().reshape(1, -1, x.shape[-1]), draw)


def convolution(
    module: Any, inputs: tuple[object, ...], output: object, draw: Draw | None = None
) -> Tensor:
    """Convolutions in any dimension, with stride, dilation, padding modes and groups."""
    x = inputs[0]
    assert isinstance(x, Tensor)
    x = x.detach()
    if x.ndim == len(module.kernel_size) + 1:  # no batch axis
        x = x[None]
    if module.padding_mode == "zeros":
        x = F.pad(x, _zero_padding(module))
    else:
        x = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)
    return _windows(_moving(module, x), module.groups, draw)


def transposed_convolution(
    module: Any, inputs: tuple[object, ...], output: object, draw: Draw | None = None
) -> Tensor:
    """Transposed convolutions: an ordinary one with flipped taps on a zero-stuffed input."""
    x = inputs[0]
    assert isinstance(x, Tensor)
    assert isinstance(output, Tensor)
    x = x.detach()
    dims = len(module.kernel_size)
    if x.ndim == dims + 1:
        x = x[None]
        output = output[None]
    stuffed = x.new_zeros(
        *x.shape[:2], *((n - 1) * s + 1 for n, s in zip(x.shape[2:], module.stride, strict=True))
    )
    stuffed[:, :, *(slice(None, None, s) for s in module.stride)] = x
    pads: list[int] = []
    for axis in reversed(range(dims)):
        reach = module.dilation[axis] * (module.kernel_size[axis] - 1)
        left = reach - module.padding[axis]
        right = output.shape[2 + axis] + reach - left - stuffed.shape[2 + axis]
        pads += [left, right]
    windows = _moving(module, F.pad(stuffed, pads), (1,) * dims)
    return _windows(windows.flip(tuple(range(2 + dims, 2 + 2 * dims))), module.groups, draw)


def _zero_padding(module: Any) -> list[int]:
    if isinstance(module.padding, str):  # "same" or "valid"
        return list(module._reversed_padding_repeated_twice) if module.padding == "same" else [0, 0]
    return [p for size in reversed(module.padding) for p in (size, size)]


def _moving(module: Any, x: Tensor, stride: tuple[int, ...] | None = None) -> Tensor:
    """All windows of ``x (N, C, *spatial)``, as a view ``(N, C, *positions, *taps)``."""
    sizes = zip(module.kernel_size, stride or module.stride, module.dilation, strict=True)
    for axis, (k, s, d) in enumerate(sizes):
        x = x.unfold(2 + axis, d * (k - 1) + 1, s)[..., ::d]
    return x


def _windows(x: Tensor, groups: int, draw: Draw | None) -> Tensor:
    """Windows as rows, ``(groups, N * positions, C / groups * taps)``."""
    dims = x.ndim // 2 - 1
    # Reordered as a view first, so that the overlapping windows are copied once.
    x = x.unflatten(1, (groups, -1))  # (N, groups, C / groups, positions, taps)
    x = x.permute(1, 0, *range(3, 3 + dims), 2, *range(3 + dims, 3 + 2 * dims))
    if draw is not None:
        places = x.shape[1 : 2 + dims]
        picked: tuple[Any, ...] = torch.unravel_index(draw(math.prod(places)), places)
        return x[:, *picked].flatten(2)
    return x.flatten(2 + dims).flatten(1, -2)


def _drawn(rows: Tensor, draw: Draw | None) -> Tensor:
    return rows if draw is None else rows.index_select(1, draw(rows.shape[1]))


class Projected:
    """Rows of a weight that makes queries, keys or values of PyTorch's attention, or all three.

    One that makes all three has rows if they are made of the same input. In cross-attention they are
    not, and one statistic cannot describe them.

    Args:
        places: Of its inputs among those of the module.
    """

    def __init__(self, *places: int) -> None:
        self.places = places

    def __call__(
        self, module: Any, inputs: tuple[object, ...], output: object, draw: Draw | None = None
    ) -> Tensor | None:
        first, *others = (inputs[place] for place in self.places)
        if not all(_alike(first, other) for other in others):
            return None
        return linear(module, (first,), output, draw)


class Routed:
    """Rows of the weight of stacked experts: for each the tokens that it is given, and zeros below.

    The module's own code is run once more, and its products with the weight are watched. ``None`` if
    it does not multiply the matrices of the experts one by one or all at once.

    Args:
        parameter: Name of the weight in its module.
    """

    def __init__(self, parameter: str) -> None:
        self.parameter = parameter

    @torch.no_grad()
    def __call__(
        self, module: Any, inputs: tuple[object, ...], output: object, draw: Draw | None = None
    ) -> Tensor | None:
        watch = _Products(getattr(module, self.parameter).detach())
        # Transformers wraps the code of experts to choose between it and fused kernels.
        with watch:
            inspect.unwrap(type(module).forward)(module, *inputs)
        if not watch.found or watch.lost:
            return None
        each = [torch.cat(parts) for parts in watch.found.values()]
        size = max(map(len, each)), each[0].shape[1]
        stacked = each[0].new_zeros(watch.count, *size)
        for expert, own in zip(watch.found, each, strict=True):
            stacked[expert, : len(own)] = own
        return _drawn(stacked, draw)


class _Products(TorchDispatchMode):
    """Collects what is multiplied with the matrices in a parameter ``(count, ...)``.

    Args:
        parameter: The matrices.
    """

    def __init__(self, parameter: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._parameter, self._storage = parameter, parameter.untyped_storage().data_ptr()
        self.count = len(parameter)
        self.found: dict[int, list[Tensor]] = {}
        self.lost = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in ("mm", "bmm"):
            self._see(*args)
        elif name in ("addmm", "baddbmm"):
            self._see(*args[1:])
        return func(*args, **(kwargs or {}))

    def _see(self, x: Tensor, matrices: Tensor) -> None:
        if x.untyped_storage().data_ptr() == self._storage:
            self.lost = True
        if matrices.untyped_storage().data_ptr() != self._storage:
            return
        each = matrices if matrices.ndim == 3 else matrices[None]
        rows = x if x.ndim == 3 else x[None]
        start = matrices.storage_offset() - self._parameter.storage_offset()
        first = start // self._parameter.stride(0)
        if each[0].numel() != self._parameter[0].numel():
            self.lost = True  # a part of a matrix: its rows would count twice
            return
        for expert, own in enumerate(rows.detach(), first):
            self.found.setdefault(expert, []).append(own)


def _alike(one: Any, other: Any) -> bool:
    return one is other or (one.shape == other.shape and torch.equal(one, other))


_CELLS = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN_TANH": nn.RNN, "RNN_RELU": nn.RNN}


class Recurrent:
    """Rows of one weight of an LSTM, GRU or RNN: its layer's inputs or its previous hidden states.

    Args:
        layer: Which layer of a stack.
        reverse: The backward direction of a bidirectional network.
        hidden: True for ``weight_hh``, False for ``weight_ih``.
    """

    def __init__(self, layer: int, reverse: bool, hidden: bool) -> None:
        self.layer, self.reverse, self.hidden = layer, reverse, hidden

    def __call__(
        self, module: Any, inputs: tuple[object, ...], output: object, draw: Draw | None = None
    ) -> Tensor:
        state = inputs[1] if len(inputs) > 1 else None
        x, lengths = _padded(module, inputs[0])
        with torch.no_grad():
            for layer in range(self.layer):
                ways = range(2 if module.bidirectional else 1)
                both = [self._run(module, layer, bool(w), (x, lengths), state) for w in ways]
                x = torch.cat([_turned(s[1:], lengths, w) for w, s in enumerate(both)], -1)
            if self.hidden:
                states = self._run(module, self.layer, self.reverse, (x, lengths), state)
                x = _turned(states[:-1], lengths, self.reverse)
        steps = torch.arange(len(x), device=x.device)[:, None]
        return _drawn(x[steps < lengths.to(x.device)][None], draw)

    def _run(
        self, module: Any, layer: int, reverse: bool, x: tuple[Tensor, Tensor], state: Any
    ) -> Tensor:
        """Start state and outputs of one layer, ``(1 + steps, N, hidden)``, in its own direction."""
        suffix = f"l{layer}" + ("_reverse" if reverse else "")
        # On the meta device first: initial values would move the caller's random state.
        steps = _turned(*x, reverse)
        cell = _CELLS[module.mode](
            steps.shape[-1], module.hidden_size, bias=module.bias, device="meta"
        )
        single = cell.to_empty(device=steps.device).to(steps.dtype)
        single.nonlinearity = getattr(module, "nonlinearity", "tanh")
        single.mode = module.mode
        for kind in ("weight_ih", "weight_hh", *(("bias_ih", "bias_hh") if module.bias else ())):
            getattr(single, f"{kind}_l0").copy_(getattr(module, f"{kind}_{suffix}"))
        index = layer * (2 if module.bidirectional else 1) + int(reverse)
        start = _start(state, index)
        outputs, _ = single(steps, start)
        first = start[0] if isinstance(start, tuple) else start
        if first is None:
            first = steps.new_zeros(1, steps.shape[1], module.hidden_size)
        return torch.cat([first, outputs])


def _padded(module: Any, x: object) -> tuple[Tensor, Tensor]:
    """The input as ``(steps, N, features)``, and how many steps each of the sequences has."""
    if isinstance(x, PackedSequence):
        return pad_packed_sequence(x._replace(data=x.data.detach()))
    assert isinstance(x, Tensor)
    x = x.detach()
    if x.ndim == 2:
        x = x[:, None] if not module.batch_first else x[None]
    if module.batch_first:
        x = x.transpose(0, 1)
    return x, torch.full(x.shape[1:2], len(x))


def _turned(x: Tensor, lengths: Tensor, reverse: object) -> Tensor:
    """The steps of each sequence from its last to its first, if ``reverse``; padding stays behind."""
    if not reverse:
        return x
    steps = torch.arange(len(x))[:, None]
    places = torch.where(steps < lengths, lengths - 1 - steps, steps).to(x.device)
    return x.gather(0, places[..., None].expand_as(x))


def _start(state: Any, index: int) -> Any:
    if state is None:
        return None
    if isinstance(state, (tuple, list)):
        return tuple(_start(s, index) for s in state)
    return state[index : index + 1] if state.ndim == 3 else state[index][None, None]
