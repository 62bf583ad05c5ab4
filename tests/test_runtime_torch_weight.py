"""The weight of an accelerated layer, which others read: unpacked when its numbers are needed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch_runtime_cases import prune_, relative

from secateur.core.errors import UsageError
from secateur.formats.layouts import Bitmask, same_bits
from secateur.runtime import library
from secateur.runtime.torch_layers import accelerate

pytestmark = pytest.mark.skipif(not library.available(), reason="the native library is not built")


@pytest.fixture
def unpacked(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Grows by one whenever a weight is unpacked."""
    seen: list[object] = []
    unpack = Bitmask.unpack

    def counted(*given: Any) -> Any:
        seen.append(given)
        return unpack(*given)

    monkeypatch.setattr(Bitmask, "unpack", counted)
    return seen


def test_what_a_weight_is_can_be_asked_without_unpacking_it(unpacked: list[object]) -> None:
    layer = prune_(nn.Linear(9, 5)).half()
    dense = layer.get_parameter("weight").detach()
    ours = accelerate(copy.deepcopy(layer))
    weight = ours.weight
    assert isinstance(weight, Tensor)
    for ask in (
        lambda x: (x.dtype, x.device, x.layout, x.shape, x.size(), x.size(0), x.stride(), len(x)),
        lambda x: (x.ndim, x.dim(), x.numel(), x.element_size(), x.nbytes, x.is_contiguous()),
        lambda x: (x.requires_grad, x.is_floating_point(), torch.is_complex(x), x.is_meta),
    ):
        assert ask(weight) == ask(dense)
    assert not unpacked
    assert torch.equal(weight, dense)
    assert weight.dtype == torch.float16
    assert torch.equal(weight, dense)
    assert len(unpacked) == 1
    assert torch.equal(ours.weight, dense)
    assert len(unpacked) == 2


@pytest.mark.parametrize(
    "use",
    [
        lambda w: w.data,
        Tensor.detach,
        lambda w: w.float() * 2,
        lambda w: 2 - w,
        lambda w: w[1:, 2].clone(),
        lambda w: torch.cat([w, w]),
        lambda w: functional.linear(torch.ones(3, 9), w),
        torch.ops.aten.abs,
        lambda w: torch.tensor(w.tolist()),
        lambda w: torch.from_numpy(w.numpy().copy()),
        torch.from_dlpack,
        copy.copy,
        copy.deepcopy,
        lambda w: nn.Parameter(w.detach(), requires_grad=False),
        torch.vmap(lambda row: row.sum()),
        lambda w: torch.add(torch.ones(5, 9), 1, out=w),
        torch.compile(lambda x: x + 1, backend="eager"),
    ],
)
def test_a_weight_is_used_as_any_tensor(use: Callable[[Tensor], Tensor]) -> None:
    layer = prune_(nn.Linear(9, 5))
    found = use(accelerate(copy.deepcopy(layer)).weight)
    assert type(found) in (Tensor, nn.Parameter)
    assert same_bits(found, use(layer.get_parameter("weight").detach()))


def test_what_is_written_into_a_weight_stays_in_what_was_read() -> None:
    ours = accelerate(prune_(nn.Linear(9, 5)))
    with torch.inference_mode():
        weight = ours.weight
        before = ours.weight.clone()
        weight.add_(1)
        weight[0] = 7
    assert float(weight[0].min()) == 7
    assert torch.equal(weight[1:], before[1:] + 1)
    assert torch.equal(ours.weight, before)
    x = torch.ones(2, 5, requires_grad=True)
    (x @ weight).sum().backward()  # it is no tensor of inference mode
    old = ours.weight
    ours.load_state_dict(prune_(nn.Linear(9, 5)).state_dict())
    assert torch.equal(old, before)


def test_another_content_cannot_be_put_into_a_weight() -> None:
    # That is how PEFT merges an adapter, which takes no part from then on.
    ours = accelerate(prune_(nn.Linear(9, 5)))
    before = ours.weight.clone()
    with torch.no_grad():
        with pytest.raises(UsageError, match="no dense weight"):
            ours.weight.data += torch.ones(5, 9)
        read = ours.weight
        assert torch.equal(read, before)
        with pytest.raises(UsageError, match="restore"):
            read.data = torch.ones(5, 9)
    assert torch.equal(ours.weight, before)


def test_the_feed_forward_of_t5_unpacks_nothing(unpacked: list[object]) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        vocab_size=50, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2
    )
    module = prune_(transformers.T5EncoderModel(config))
    ours = accelerate(copy.deepcopy(module), choose="first")
    tokens = torch.randint(50, (1, 7))
    with torch.no_grad():
        assert relative(ours(tokens)[0], module(tokens)[0]) < 1e-5
        unpacked.clear()
        ours(tokens)
    assert not unpacked


class _Cautious(nn.Module):
    """Asks for the type of a weight, as T5 does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x.to(self.inner.weight.dtype))
        return y


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_code_that_asks_for_a_weight_compiles_and_exports(unpacked: list[object]) -> None:
    module = prune_(_Cautious())
    ours, x = accelerate(copy.deepcopy(module), choose="first"), torch.randn(3, 9)
    with torch.no_grad():
        wanted = module(x)
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        exported = torch.export.export(ours, (x,))
        for made in (compiled, exported.module(), torch.jit.trace(ours, x)):
            assert relative(made(x), wanted) < 1e-5
        unpacked.clear()
        compiled(x)
    assert not unpacked
