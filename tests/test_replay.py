"""Finished parts of a network answer from memory: the same results in far fewer forward passes."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur
from secateur.core.errors import NonFinite
from secateur.core.slots import Slot
from secateur.frontends import discover
from secateur.recover import Compensation
from secateur.stats import InputNorm, Replay, collect


class Residual(nn.Module):
    """Convolutions with activations that change their inputs in place."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.one, self.two = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.norm, self.act = nn.BatchNorm2d(width), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.two(self.act(self.one(x)))) + x)


class UNet(nn.Module):
    """What the first blocks give is read again at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(Residual() for _ in range(3))
        self.up = nn.ModuleList(Residual() for _ in range(3))
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        seen = []
        for block in self.down:
            x = block(x)
            seen.append(x)
        for block in self.up:
            x = block(x + seen.pop())
        return self.head(x).mean((2, 3))


class Meddler(nn.Module):
    """Changes its input in place, which its caller goes on with."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(0.5)
        return self.inner(x)


class Meddled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Meddler() for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        for block in self.blocks:
            x = x + block(x)
        return x


class Overwritten(nn.Module):
    """What a block gives is changed in place afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x).add_(1.0)
        return x


class Aside(nn.Module):
    """A layer reads the first block, and nothing of it is in the output."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(5)))
        self.aside = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        first = self.blocks[0](x)
        x = self.blocks[1:](first)
        self.aside(first)
        return x


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        for block in (*self.blocks, *self.blocks):
            x = torch.tanh(block(x))
        return x


class Noise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + torch.randn_like(x)


def plain() -> nn.Sequential:
    return nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(8)))


def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=32, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def mixtral() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, vocab_size=32, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config)


def numbers(count: int, *shape: int) -> list[Tensor]:
    return [torch.randn(shape) for _ in range(count)]


def tokens() -> list[dict[str, Tensor]]:
    found = [torch.randint(0, 32, (3, 10)) for _ in range(3)]
    return [{"input_ids": x, "labels": x} for x in found]


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], list[Any]]]] = {
    "plain": (plain, lambda: numbers(3, 5, 4)),
    "convolutions": (lambda: nn.Sequential(*(Residual() for _ in range(4))), lambda: numbers(2, 3, 6, 5, 5)),
    "u-net": (UNet, lambda: numbers(2, 3, 6, 5, 5)),
    "input in place": (Meddled, lambda: numbers(3, 5, 4)),
    "output in place": (Overwritten, lambda: numbers(3, 5, 4)),
    "aside": (Aside, lambda: numbers(3, 5, 4)),
    "twice": (Twice, lambda: numbers(3, 5, 4)),
    "llama": (llama, tokens),
    "mixtral": (mixtral, tokens),
}  # fmt: skip
ROOMS = {"plenty": 1e9, "tight": 4000.0, "none": 0.0}


@contextmanager
def room(most: float | None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Memory for outputs; None for a replay that remembers nothing and tries nothing."""
    with monkeypatch.context() as patch:
        if most is None:
            patch.setattr(Replay, "_begin", lambda self: None)
        else:
            patch.setattr("secateur.stats.replay._quarter", lambda device: most)
        yield


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("size", ROOMS)
@pytest.mark.parametrize("name", NETWORKS)
def test_sequential_runs_end_in_the_same_weights(
    name: str, size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, batches = NETWORKS[name]
    net, data = make().eval(), batches()
    recipe = secateur.recipes.sparsegpt(0.5)
    found = []
    for most in (None, ROOMS[size]):
        with room(most, monkeypatch):
            found.append(secateur.prune(net, recipe, data))
    assert equal(found[0].model, found[1].model)
    assert not equal(net, found[0].model)
    assert not any("forward" in vars(module) for module in found[1].model.modules())


@pytest.mark.parametrize("name", ["convolutions", "u-net", "llama"])
def test_fitting_after_a_cut_ends_in_the_same_weights(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, batches = NETWORKS[name]
    net, data = make().eval(), batches()
    recipe = secateur.ShrinkRecipe(
        target=secateur.Target("params", 0.7), recovery=(Compensation(),), align=1
    )
    found = []
    for most in (None, ROOMS["plenty"]):
        with room(most, monkeypatch):
            found.append(secateur.shrink(net, recipe, data[0], data).model)
    assert equal(*found)


def run(net: nn.Module, batches: list[Any], most: float) -> tuple[Replay, list[Slot]]:
    """All slots finished in order; the replay afterwards."""
    slots = [slot for slot in discover(net) if slot.rows is not None]
    replay = Replay(net, slots, batches, most=most)
    for slot in slots:
        replay.finish(slot)
    return replay, slots


def test_a_finished_network_computes_nothing_again() -> None:
    net, x = plain().eval(), torch.randn(5, 4)
    replay, _ = run(net, [x], 1e9)
    calls: Counter[str] = Counter()
    for path, module in net.named_modules():
        module.register_forward_hook(lambda *_, path=path: calls.update([path]))
    wanted = net(x)
    assert calls["7.0"] == 1
    with replay.serving(x):
        assert torch.equal(net(x), wanted)
    assert calls["7"] == 2
    assert calls["7.0"] == 1


def test_passes_are_linear_in_the_depth() -> None:
    """Multiply-adds of a sequential run, in whole forward passes of the network."""
    done = {}
    for depth in (8, 16):
        net = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(depth)))
        rows: list[int] = []
        for layer in net:
            layer[0].register_forward_hook(lambda _, args, __, rows=rows: rows.append(len(args[0])))
        secateur.prune_(net.eval(), secateur.recipes.sparsegpt(0.5), numbers(20, 50, 4))
        done[depth] = sum(rows) / (1000 * depth)
    assert done[16] < 1.1 * done[8] < 5


def test_no_room_no_answers() -> None:
    net, x = plain().eval(), torch.randn(5, 4)
    each = 4 * (1 + 5) * 4
    assert run(net, [x], each - 1)[0].remembered == []
    assert run(net, [x], each)[0].remembered == [str(i) for i in range(8)]


def test_answers_are_of_their_own_batch() -> None:
    net, batches = plain().eval(), numbers(3, 5, 4)
    replay, _ = run(net, batches, 1e9)
    for batch in (batches[2], batches[0], torch.randn(5, 4)):
        wanted = net(batch)
        with replay.serving(batch):
            assert torch.equal(net(batch), wanted)


def test_little_room_lets_go_of_what_nobody_reads_again() -> None:
    chain, x = plain().eval(), torch.randn(5, 4)
    each = 4 * (1 + 5) * 4  # bytes of a block's output, of the sample and of the batch
    replay, _ = run(chain, [x], 3 * each)
    assert replay.remembered == [str(i) for i in range(8)]
    held = [path for path, answers in replay._memory.items() if answers.bytes()]
    assert 0 < len(held) <= 2
    # In a U-Net the first blocks are read again: what would not fit is computed again.
    net, images = UNet().eval(), torch.randn(2, 6, 5, 5)
    each = 4 * 3 * 6 * 25
    replay, _ = run(net, [images], 3 * each)
    assert sum(answers.bytes() for answers in replay._memory.values()) <= 3 * each
    with replay.serving(images):
        assert torch.equal(net(images), net(images))


@pytest.mark.parametrize(
    "net", [Meddled(), Twice(), nn.Sequential(*(Noise() for _ in range(5)))], ids=type
)
def test_modules_that_cannot_be_replayed_are_computed(net: nn.Module) -> None:
    x = torch.randn(5, 4)
    replay, _ = run(net.eval(), [x], 1e9)
    blocks = {"blocks.0", "blocks.1", "0", "1"}
    assert not blocks & set(replay.remembered)
    torch.manual_seed(1)
    wanted = net(x)
    torch.manual_seed(1)
    with replay.serving(x):
        assert torch.allclose(net(x), wanted)


def test_a_wrong_answer_would_be_seen() -> None:
    """The comparison on the sample, with an answer that is off by a little."""
    from secateur.stats.replay import _same

    right = (torch.ones(3), {"logits": torch.arange(4.0)})
    assert _same(copy.deepcopy(right), right)
    wrong = copy.deepcopy(right)
    wrong[1]["logits"][3] += 1e-3
    assert not _same(wrong, right)
    assert not _same((torch.full((3,), torch.nan), right[1]), right)
    assert not _same((torch.ones(4), right[1]), right)


def test_nan_where_an_output_was_let_go_of_is_computed_again() -> None:
    net, x = Aside().eval(), torch.randn(5, 4)
    slots = [slot for slot in discover(net) if slot.rows is not None]
    replay = Replay(net, slots, [x], most=200.0)
    for slot in slots[:-1]:
        replay.finish(slot)
    aside = slots[-1]
    assert aside.name == "aside.weight"
    with pytest.raises(NonFinite):
        collect(net, [aside], [InputNorm()], [x], replay=replay)
    found = replay.trying(lambda: collect(net, [aside], [InputNorm()], [x], replay=replay))
    assert replay.remembered == []
    wanted = collect(net, [aside], [InputNorm()], [x])
    weight = aside.weight(net)
    assert torch.equal(found(InputNorm(), weight), wanted(InputNorm(), weight))


def test_nan_of_the_data_is_still_an_error() -> None:
    net = plain().eval()
    bad = torch.full((5, 4), torch.nan)
    with pytest.raises(NonFinite, match=r"0\.0\.weight"):
        secateur.prune(net, secateur.recipes.wanda(0.5), [bad])


def test_forward_methods_come_back() -> None:
    """Also one that somebody has put on the module itself, and after an error."""
    net, x = plain().eval(), torch.randn(5, 4)
    replay, _ = run(net, [x], 1e9)
    own = net[3].forward
    net[3].forward = own
    served: list[bool] = []

    def interrupted() -> None:
        with replay.serving(x):
            served.append(net[3].forward is not own)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert served == [True]
    assert vars(net[3])["forward"] is own
    assert "forward" not in vars(net[4])
