"""A pruner beside other tools that work on the same network, or keep the state of its optimizer their way."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils._pytree import tree_map_only

import secateur
from secateur.core.errors import UsageError
from secateur.core.masks import Masks
from secateur.drive.training.gradual import Gradual
from secateur.drive.training.held import (
    Held,
    attach_,
    detach_,
    masks_of,
    require_free,
    reset_momentum_,
)
from secateur.formats.container import require_storable
from secateur.runtime.torch_layers import consider
from secateur.schedule import Polynomial
from secateur.score import Magnitude, Movement

LAST = 4
aten = torch.ops.aten


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, pruner: Gradual, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 6)).square().mean().backward()
        optimizer.step()
        pruner.step()


# -- the network is changed under a pruner ---------------------------------------------------------


CHANGES: dict[str, Callable[[nn.Sequential], object]] = {
    "orthogonal": lambda n: parametrizations.orthogonal(n[2]),
    "weight_norm": lambda n: parametrizations.weight_norm(n[2]),
    "prune": lambda n: prune.l1_unstructured(n[2], "weight", 0.25),
    "prune, removed": lambda n: prune.remove(prune.l1_unstructured(n[2], "weight", 0.25), "weight"),
    "replaced": lambda n: n.__setitem__(2, nn.Linear(8, 8)),
    "deleted": lambda n: n.__delitem__(slice(1, 3)),
    "deleted to the end": lambda n: n.__delitem__(slice(2, 5)),
}


@pytest.mark.parametrize("criterion", [Magnitude(), Movement()])
@pytest.mark.parametrize("when", [0, LAST])
@pytest.mark.parametrize("change", CHANGES)
def test_a_weight_that_is_no_longer_there_is_named(change: str, when: int, criterion: Any) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    recipe = secateur.Recipe(
        criterion, target=secateur.Target("sparsity", 0.5), schedule=Polynomial(0, LAST, 1)
    )
    pruner = Gradual(model, optimizer, recipe)
    train(model, optimizer, pruner, when)
    CHANGES[change](model)

    def go_on() -> None:
        train(model, optimizer, pruner, LAST - when)
        pruner.finalize()

    with pytest.raises(UsageError, match=r"'2\.weight'.*(no longer|no such|any more)"):
        go_on()


def test_a_mask_that_torch_put_in_the_place_of_ours_is_none_of_ours() -> None:
    model = nn.Linear(4, 4)
    attach_(model, Masks({"weight": torch.ones(4, 4, dtype=torch.bool)}))
    prune.l1_unstructured(model, "weight", 0.25)
    assert not masks_of(model)
    assert not detach_(model)
    with pytest.raises(UsageError, match="of its own"):
        require_free(model, ["weight"])
    prune.remove(model, "weight")
    mask = Masks({"weight": model.weight.detach() != 0})
    attach_(model, mask)
    assert masks_of(model) == mask
    assert detach_(model) == mask
    assert "_secateur_masks" not in vars(model)


@pytest.mark.parametrize("replaced", [False, True])
def test_gradients_of_an_optimizer_that_was_replaced_are_told_to_be_old(replaced: bool) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    recipe = secateur.Recipe(
        Movement(), target=secateur.Target("sparsity", 0.5), schedule=Polynomial(0, LAST, 1)
    )
    pruner = Gradual(model, optimizer, recipe)
    train(model, optimizer, pruner, 2)
    if replaced:
        optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer, pruner, 2)
    told = [note for note in pruner.finalize().facts.notes if "same gradients" in note.text]
    assert len(told) == replaced


# -- optimizers that keep their state in few bits --------------------------------------------------


class _Coded(Tensor):
    """Numbers in 8 bits as torchao's: they can be read, multiplied, and written as a whole."""

    codes: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, whole: Tensor) -> _Coded:
        made: _Coded = Tensor._make_wrapper_subclass(cls, whole.shape, dtype=whole.dtype)  # type: ignore[attr-defined]
        made._write(whole)
        return made

    def _write(self, whole: Tensor) -> None:
        self.scale = whole.abs().amax().clamp(min=1e-9) / 127
        self.codes = (whole / self.scale).round().to(torch.int8)

    def dequantize(self) -> Tensor:
        return self.codes * self.scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner: Any, *_: Any) -> _Coded:
        return _Coded(inner["codes"] * inner["scale"])

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is aten.copy_.default:
            args[0]._write(args[1])
            return args[0]
        if func is aten.detach.default:
            return _Coded(args[0].dequantize())
        if func in (aten.ones_like.default, aten.t.default, aten.addmm.default):
            return func(*tree_map_only(cls, cls.dequantize, args), **(kwargs or {}))
        raise NotImplementedError(f"{func} of {cls.__name__}")


class _Few(torch.optim.Optimizer):
    """Gradient descent with a momentum in 8 bits, and codes of a table as plain whole numbers."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            held = state.get("exp_avg")
            before = torch.zeros_like(parameter) if held is None else held.dequantize()
            state["exp_avg"] = _Coded(0.9 * before + parameter.grad)
            state["codes"] = torch.full(parameter.shape, 7, dtype=torch.uint8)
            parameter.sub_(0.1 * state["exp_avg"].dequantize())


def test_momenta_in_few_bits_are_held_at_zero() -> None:
    model = nn.Linear(6, 4)
    mask = torch.rand(4, 6) < 0.5
    attach_(model, Masks({"weight": mask}))
    optimizer = _Few(model.parameters())
    held = Held(model, optimizer)
    for _ in range(3):
        model(torch.randn(5, 6)).square().sum().backward()
        optimizer.step()
        held.hold_()
        momentum = optimizer.state[model.weight]["exp_avg"]
        assert isinstance(momentum, _Coded)
        assert torch.equal(momentum.dequantize() != 0, mask)
        assert torch.equal(model.weight != 0, mask)
    # In a table of codes, 0 may stand for any number.
    assert (optimizer.state[model.weight]["codes"] == 7).all()
    reset_momentum_(optimizer)
    assert not optimizer.state[model.weight]["exp_avg"].dequantize().any()


# -- quantized weights -----------------------------------------------------------------------------


def quantized(*layers: int) -> nn.Sequential:
    model = net()
    for layer in layers:
        weight = model[layer].weight.detach()
        model[layer].weight = nn.Parameter(_Coded(weight), requires_grad=False)
    return model.eval()


def test_quantized_weights_stay_and_say_why() -> None:
    model = quantized(2)
    pruned = secateur.prune_(model, secateur.recipes.magnitude(0.5))
    assert set(pruned.masks) == {"0.weight"}
    reasons = {note.where: note.text for note in pruned.facts.notes}
    assert reasons["2.weight"].startswith("it is a _Coded, quantized")
    model(torch.ones(1, 6))
    with pytest.raises(UsageError, match="prune before that"):
        secateur.prune_(quantized(0, 2, 4), secateur.recipes.magnitude(0.5))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    recipe = secateur.Recipe(target=secateur.Target("sparsity", 0.5), schedule=Polynomial(0, 2, 1))
    pruner = Gradual(model, optimizer, recipe)
    train(model, optimizer, pruner, 3)
    assert set(pruner.finalize().masks) == {"0.weight"}


def test_layers_with_quantized_weights_are_not_swapped() -> None:
    considered = {layer.name: layer for layer in consider(quantized(2), minimum_sparsity=0)}
    assert not considered["0"].reason
    assert "_Coded" in considered["2"].reason


def test_tensors_that_keep_their_numbers_elsewhere_are_not_stored() -> None:
    with pytest.raises(UsageError, match=r"'2\.weight': it is a _Coded"):
        require_storable(quantized(2).state_dict())


class _Packed(nn.Module):
    """A linear layer whose weight lies in a buffer, two numbers of 4 bits in a byte, as GPTQ's do."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        codes = torch.randint(256, (outputs, inputs // 2), dtype=torch.uint8)
        self.register_buffer("qweight", codes)

    def forward(self, x: Tensor) -> Tensor:
        halves = torch.stack([self.qweight & 15, self.qweight >> 4], -1).flatten(1)
        return nn.functional.linear(x, halves.to(x.dtype) - 8)


def _dynamic(model: nn.Module) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(model, {"0"}, torch.qint8)


@pytest.mark.filterwarnings("ignore")  # torch is about to move its quantization elsewhere
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(_Packed(8, 6), nn.ReLU(), *net()),
        lambda: _dynamic(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), *net())),
    ],
)
def test_layers_without_a_weight_of_their_own_are_named(make: Callable[[], nn.Module]) -> None:
    pruned = secateur.prune(make(), secateur.recipes.magnitude(0.5))
    reasons = {note.where: note.text for note in pruned.facts.notes}
    assert "packed" in reasons["0"]
    assert set(pruned.masks) == {"2.weight", "4.weight"}
    with pytest.raises(UsageError, match=r"1 x its weight is quantized or packed.*prune before"):
        secateur.prune(make()[0], secateur.recipes.magnitude(0.5))


def test_layers_without_a_matrix_are_not_taken_for_packed_ones() -> None:
    pooled = nn.AvgPool2d(2)
    pooled.in_channels = pooled.out_channels = 8
    found = secateur.prune(nn.Sequential(pooled, *net()), secateur.recipes.magnitude(0.5))
    assert "0" not in {note.where for note in found.facts.notes}


@pytest.mark.filterwarnings("ignore")  # torch's old weight norm
@pytest.mark.parametrize(
    ("compute", "part"),
    [
        (nn.utils.weight_norm, "weight_v"),
        (nn.utils.spectral_norm, "weight_orig"),
        (lambda layer: prune.l1_unstructured(layer, "weight", 0.25), "weight_orig"),
    ],
)
def test_weights_that_are_computed_say_how_to_make_them_plain(
    compute: Callable[[nn.Module], object], part: str
) -> None:
    model = net()
    compute(model[2])
    reasons = {slot.name: slot.reason for slot in secateur.plan(model).slots}
    assert "computed from it" in reasons[f"2.{part}"]
