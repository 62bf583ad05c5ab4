"""Accelerated modules as PyTorch treats modules: restored, copied, saved, compiled, exported."""

from __future__ import annotations

import copy
import gc
import io
import subprocess
import sys
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch_runtime_cases import net, prune_, relative

from secateur.formats.layouts import same_bits
from secateur.runtime import library, torch_packed
from secateur.runtime.torch_layers import SparseLayer, accelerate, consider, restore

pytestmark = pytest.mark.skipif(not library.available(), reason="the native library is not built")


# ---- what comes back


def test_restore_gives_every_bit_back() -> None:
    module = prune_(net())
    with torch.no_grad():
        weight = module.get_submodule("3").get_parameter("weight")
        weight.view(-1)[:4] = torch.tensor([-0.0, float("nan"), float("inf"), 1e-40])
        weight[1] = 0
    module.get_submodule("6").get_parameter("weight").requires_grad_(False)
    last = module.get_submodule("3").get_parameter("weight")
    last.data = last.data.contiguous(memory_format=torch.channels_last)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    names = [n for n, _ in module.named_parameters()]
    strides = [p.stride() for p in module.parameters()]
    ours = accelerate(module)
    assert ours is module
    assert isinstance(module.get_submodule("3"), SparseLayer)
    assert restore(module) is module
    assert [n for n, _ in module.named_parameters()] == names
    assert [p.stride() for p in module.parameters()] == strides
    assert type(module.get_submodule("3")) is nn.Conv2d
    assert not module.get_submodule("6").get_parameter("weight").requires_grad
    assert module.get_submodule("3").get_parameter("weight").requires_grad
    assert all(same_bits(before[k], v) for k, v in module.state_dict().items())
    assert repr(module) == repr(net())


def test_restore_takes_hooks_along() -> None:
    module = prune_(nn.Sequential(nn.Linear(9, 9)))
    calls: list[str] = []
    with_old = module[0].register_state_dict_pre_hook(lambda *_: calls.append("old"))
    layer = accelerate(module)[0]
    after = layer.register_forward_hook(lambda *_: calls.append("after"))
    layer.register_forward_pre_hook(
        lambda _m, _args, _kwargs: calls.append("before"), with_kwargs=True
    )
    layer.register_full_backward_hook(lambda *_: calls.append("back"))
    layer.register_state_dict_pre_hook(lambda *_: calls.append("saved"))
    x = torch.randn(2, 9)
    with torch.no_grad():
        module(x)
        assert calls == ["before", "after"]
        restore(module)
        module(x)
        assert calls == ["before", "after"] * 2
    calls.clear()
    after.remove()
    module(x.requires_grad_()).sum().backward()
    assert calls == ["before", "back"]
    calls.clear()
    module.state_dict()
    assert sorted(calls) == ["old", "saved"]
    with_old.remove()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("part", ["module", "layer", "parameters"])
def test_restore_keeps_what_was_frozen_meanwhile(part: str, bias: bool) -> None:
    for flag in (False, True):
        module = prune_(nn.Sequential(nn.Linear(9, 9, bias=bias))).requires_grad_(not flag)
        numbers = 9 if bias else 0
        accelerate(module)
        assert "trainable" not in str(list(module.state_dict()))
        assert sum(p.numel() for p in module.parameters()) == numbers
        module.load_state_dict(module.state_dict())
        module.load_state_dict(module.state_dict(), assign=True)
        assert all(p.requires_grad is not flag for p in module.parameters())
        copied = copy.deepcopy(module)
        for each in (module, copied):
            if part == "parameters":
                for parameter in each.parameters():
                    parameter.requires_grad_(flag)
            else:
                (each if part == "module" else each[0]).requires_grad_(flag)
            assert all(p.requires_grad is flag for p in restore(each).parameters())
            assert len(list(each.parameters())) == 1 + bias


def test_the_state_dict_is_that_of_the_dense_module() -> None:
    module = prune_(net())
    dense = {k: v.clone() for k, v in module.state_dict().items()}
    ours = accelerate(module)
    sparse = ours.state_dict()
    assert list(sparse) == list(dense)
    assert all(same_bits(sparse[k], v) for k, v in dense.items())
    other = prune_(net(), 0.6)
    x = torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        ours(x)  # packed for the old weights
        ours.load_state_dict(other.state_dict())
        assert relative(ours(x), other(x)) < 1e-5
    other.load_state_dict(dense)
    with torch.inference_mode():
        assert relative(other(x), restore(accelerate(copy.deepcopy(other)))(x)) == 0.0
    with pytest.raises(RuntimeError, match=r"Missing key.*6\.weight"):
        ours.load_state_dict({k: v for k, v in dense.items() if k != "6.weight"})
    with pytest.raises(RuntimeError, match=r"size mismatch for 6\.weight"):
        ours.load_state_dict({**dense, "6.weight": torch.zeros(3, 3)})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        ours.load_state_dict({**dense, "6.other": torch.zeros(3, 3)})


def test_copies_are_independent() -> None:
    ours = accelerate(prune_(net()), choose="first")
    x = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        before = ours(x)
        twin = copy.deepcopy(ours)
        assert torch.equal(twin(x), before)
        layer = twin.get_submodule("6")
        assert isinstance(layer, SparseLayer)
    layer.values.zero_()
    with torch.inference_mode():
        assert torch.equal(ours(x), before)
        assert not torch.equal(twin(x), before)  # a change in place is seen


@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")
def test_without_memory_shapes_are_known_and_weights_can_be_assigned() -> None:
    ours = accelerate(prune_(nn.Sequential(nn.Conv2d(4, 6, 3), nn.Flatten(2), nn.Linear(36, 300))))
    state, x = ours.state_dict(), torch.randn(2, 4, 8, 8)
    hollow = copy.deepcopy(ours).to("meta")
    assert hollow(x.to("meta")).shape == (2, 6, 300)
    assert {k: v.shape for k, v in hollow.state_dict().items()} == {
        k: v.shape for k, v in state.items()
    }
    hollow.load_state_dict(state)
    assert hollow[0].weight.is_meta
    emptied = copy.deepcopy(hollow).to_empty(device="cpu")
    emptied.load_state_dict(state)
    hollow.load_state_dict(state, assign=True)
    for filled in (emptied, hollow):
        assert all(same_bits(v, state[k]) for k, v in filled.state_dict().items())
        with torch.inference_mode():
            assert relative(filled(x), ours(x)) < 1e-5


def test_the_weight_can_be_read() -> None:
    layer = prune_(nn.Linear(9, 9))
    ours = accelerate(copy.deepcopy(layer))
    assert isinstance(ours, SparseLayer)
    assert same_bits(ours.weight, layer.get_parameter("weight").detach())
    assert "Linear, weight=(9, 9), sparsity=0." in repr(ours)


def _forms() -> int:
    return len(torch_packed._PACKED)


@pytest.fixture
def none_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_packed, "_PACKED", {})


@pytest.mark.usefixtures("none_packed")
@pytest.mark.parametrize("cycle", [False, True])
def test_packed_forms_go_with_their_modules(cycle: bool) -> None:
    ours = accelerate(prune_(net()), choose="first")
    x = torch.randn(20, 3, 16, 16)
    with torch.inference_mode():
        ours(x)
        assert _forms() == 3
        copied = copy.deepcopy(ours)
        copied(x)
        assert _forms() == 6
        if cycle:
            ours.itself = [ours]
        gone = weakref.ref(ours)
        del ours
        gc.collect()
        assert gone() is None
        assert _forms() == 3
        copied(x)
        assert _forms() == 3
    del copied
    gc.collect()
    assert _forms() == 0


@pytest.mark.usefixtures("none_packed")
def test_packed_forms_go_when_other_weights_are_loaded_and_when_restored() -> None:
    ours, x = accelerate(prune_(net()), choose="first"), torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        ours(x)
        ours.load_state_dict(prune_(net()).state_dict())
        assert _forms() == 0
        ours(x)
        assert _forms() == 3
        restore(ours)
    assert _forms() == 0


def test_an_exported_program_outlives_its_module() -> None:
    module = prune_(net())
    x = torch.randn(2, 3, 16, 16)
    ours = accelerate(copy.deepcopy(module), choose="first")
    program = torch.export.export(ours, (x,)).module()
    with torch.no_grad():
        ours(x)
        del ours
        gc.collect()
        assert relative(program(x), module(x)) < 1e-5


def test_a_process_ends_quietly_with_an_accelerated_module() -> None:
    code = """
import torch
from torch import nn
from secateur.runtime import accelerate
class Kept:
    net = accelerate(nn.Sequential(nn.Linear(40, 40)).eval(), choose="first", minimum_sparsity=0)
with torch.no_grad():
    Kept.net(torch.ones(1, 40))
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stderr == ""


# ---- compile and export


def test_the_operators_pass_the_checks_of_torch() -> None:
    linear, conv = accelerate(prune_(nn.Linear(20, 6))), accelerate(prune_(nn.Conv2d(4, 6, 3)))
    assert isinstance(linear, SparseLayer)
    assert isinstance(conv, SparseLayer)
    assert linear.bias is not None
    assert conv.bias is not None
    assert conv.geometry is not None
    torch.library.opcheck(
        torch.ops.secateur.sparse_linear,
        (torch.randn(3, 20), linear.values, linear.index, linear.bias.detach(), 6, 20, 1, False),
    )
    torch.library.opcheck(
        torch.ops.secateur.sparse_conv,
        (
            torch.randn(2, 4, 7, 9),
            *(conv.values, conv.index, conv.bias.detach(), conv.shape, *conv.geometry, 1, False),
        ),
    )
    torch.library.opcheck(
        torch.ops.secateur.dense_weight, (linear.values, linear.index, None, (6, 20), (1, 6))
    )


def test_compile_whole_graph() -> None:
    module = prune_(net())
    ours = accelerate(copy.deepcopy(module), choose="first")
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 16, 16)
        with torch.no_grad():
            assert relative(compiled(x), module(x)) < 1e-5
    held = len(torch_packed._PACKED)
    with torch.no_grad():
        compiled(torch.randn(7, 3, 16, 16))
    assert len(torch_packed._PACKED) == held  # nothing was packed again


def test_export_and_save() -> None:
    module = prune_(net())
    ours = accelerate(copy.deepcopy(module), choose="first")
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(ours, (torch.randn(2, 3, 16, 16),), dynamic_shapes=({0: batch},))
    held = io.BytesIO()
    torch.export.save(program, held)
    held.seek(0)
    again = torch.export.load(held).module()
    for count in (1, 3):
        x = torch.randn(count, 3, 16, 16)
        with torch.no_grad():
            assert relative(program.module()(x), module(x)) < 1e-5
            assert relative(again(x), module(x)) < 1e-5


# ---- real architectures


def test_bert() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
    )
    module = prune_(transformers.BertForMaskedLM(config))
    ours = accelerate(copy.deepcopy(module), choose="first")
    assert sum(isinstance(m, SparseLayer) for m in ours.modules()) >= 12
    # The head's weight is the embedding's.
    assert {c.name: c.reason for c in consider(module)}["cls.predictions.decoder"] != ""
    for shape in ((1, 3), (2, 17)):
        tokens = torch.randint(50, shape)
        with torch.inference_mode():
            assert relative(ours(tokens).logits, module(tokens).logits) < 1e-5


def test_resnet() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 32],
        depths=[1, 2],
        layer_type="bottleneck",
        num_labels=5,
    )
    module = prune_(transformers.ResNetForImageClassification(config))
    ours = accelerate(copy.deepcopy(module))
    for size in (32, 47):
        x = torch.randn(2, 3, size, size)
        with torch.inference_mode():
            assert relative(ours(x).logits, module(x).logits) < 1e-5
    restore(ours)
    assert all(
        same_bits(a, b)
        for a, b in zip(ours.state_dict().values(), module.state_dict().values(), strict=True)
    )


def test_functional_weight_of_a_parent_still_works() -> None:
    class Parent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return functional.linear(x, self.inner.weight, self.inner.bias)

    module = prune_(Parent())
    x = torch.randn(3, 6)
    with torch.inference_mode():
        wanted = module(x)
        assert torch.equal(accelerate(module)(x), wanted)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), wanted)
