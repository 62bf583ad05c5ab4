"""PyTorch modules with our kernels, against the same modules without."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional
from torch.nn.utils import parametrizations, prune
from torch_runtime_cases import net, operands, prune_, relative, same

from secateur.core.errors import UsageError
from secateur.runtime import library, sparse_layer, torch_packed
from secateur.runtime.native import Variant
from secateur.runtime.race import Raced
from secateur.runtime.torch_layers import SparseLayer, accelerate, consider, restore

pytestmark = pytest.mark.skipif(not library.available(), reason="the native library is not built")


def test_the_comparison_sees_a_planted_error() -> None:
    module = prune_(net())
    x = torch.randn(2, 3, 16, 16)
    ours = accelerate(copy.deepcopy(module))
    layer = ours.get_submodule("3")
    assert isinstance(layer, SparseLayer)
    layer.values[5] += 0.5
    with torch.inference_mode():
        assert relative(ours(x), module(x)) > 1e-4


# ---- layers


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(37,), (1, 37), (8, 37), (9, 37), (2, 3, 5, 37), (0, 37)])
def test_linear(shape: tuple[int, ...], bias: bool) -> None:
    layer = prune_(nn.Linear(37, 19, bias=bias))
    x = torch.randn(shape)
    ours = accelerate(copy.deepcopy(layer))
    assert isinstance(ours, SparseLayer)
    with torch.inference_mode():
        assert ours(x).shape == layer(x).shape
        if x.numel():
            assert relative(ours(x), layer(x)) < 1e-5


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 1},
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "padding": "same", "dilation": 2},
        {"kernel_size": (4, 2), "padding": "same"},
        {"kernel_size": 5, "padding": "valid", "bias": False},
        {"kernel_size": 3, "stride": 2, "padding": (2, 1), "groups": 2},
        {"kernel_size": (1, 3), "stride": (2, 1), "dilation": (1, 3), "padding": (0, 2)},
    ],
)
def test_conv(options: dict[str, object]) -> None:
    layer = prune_(nn.Conv2d(8, 12, **options))  # type: ignore[arg-type]
    same(layer, torch.randn(2, 8, 13, 17), torch.randn(8, 9, 11), torch.randn(1, 8, 30, 7))


def test_inputs_in_any_order_of_memory() -> None:
    image = torch.randn(2, 8, 9, 11)
    views = (image.to(memory_format=torch.channels_last), image.transpose(2, 3), image[:, :, ::2])
    same(prune_(nn.Conv2d(8, 12, 3)), *views)
    same(prune_(nn.Linear(9, 12)), torch.randn(9, 21).T, torch.randn(4, 18)[:, ::2])


def test_an_empty_batch_is_an_empty_output() -> None:
    ours = accelerate(prune_(nn.Conv2d(4, 6, 3)))
    assert ours(torch.empty(0, 4, 8, 8)).shape == (0, 6, 6, 6)


def test_all_zeros_and_no_zeros() -> None:
    for sparsity in (0.0, 1.0):
        layer = prune_(nn.Linear(70, 5), sparsity)
        ours = accelerate(copy.deepcopy(layer), minimum_sparsity=0.0)
        for tokens in (1, 20):
            x = torch.randn(tokens, 70)
            with torch.inference_mode():
                assert relative(ours(x), layer(x)) < 1e-5


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_number_of_threads_does_not_change_the_result(threads: int) -> None:
    layer = prune_(nn.Linear(256, 512), 0.5)
    for tokens in (1, 40):
        x = torch.randn(tokens, 256)
        one = accelerate(copy.deepcopy(layer), threads=1, choose="first")
        many = accelerate(copy.deepcopy(layer), threads=threads, choose="first")
        with torch.inference_mode():
            assert relative(many(x), one(x)) < 1e-5


def test_many_threads_call_one_module() -> None:
    module = prune_(net())
    ours = accelerate(copy.deepcopy(module), threads=2)
    inputs = [torch.randn(1 + i % 3, 3, 16, 16) for i in range(12)]
    with torch.inference_mode():
        wanted = [module(x) for x in inputs]
    worst = [1.0] * len(inputs)

    def work(i: int) -> None:
        with torch.inference_mode():
            worst[i] = max(relative(ours(inputs[i]), wanted[i]) for _ in range(5))

    started = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    assert max(worst) < 1e-5


def _refused(*_: object) -> None:
    raise RuntimeError("called")


def _unpacked_once(layer: nn.Module) -> None:
    """The layer and the operator use one dense weight, not two."""
    assert isinstance(layer, SparseLayer)
    form = list(torch_packed._PACKED.values())[-1]
    raced = form.ways[None]
    assert isinstance(raced, torch_packed.Dense)
    assert layer._known is not None
    assert layer._known.weight is not None
    assert layer._known.weight.data_ptr() == raced.matrix.data_ptr()


@pytest.mark.parametrize("padding", [1, "same"])
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_the_fastest_runs_dense_included(
    padding: int | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = {
        "linear": (prune_(nn.Linear(600, 500), 0.5), torch.randn(3, 600)),
        "conv": (prune_(nn.Conv2d(8, 16, (4, 3), padding=padding), 0.5), torch.randn(2, 8, 20, 19)),
    }
    for layer, x in layers.values():
        for winner in range(2):

            def fixed(runs: list[object], winner: int = winner, **_: object) -> Raced:
                return Raced(tuple((float(i != winner),) for i in range(len(runs))))

            monkeypatch.setattr(torch_packed, "race", fixed)
            monkeypatch.setattr(torch_packed, "_CHOICES", {})
            ours = accelerate(copy.deepcopy(layer), minimum_sparsity=0.0)
            with torch.inference_mode():
                assert relative(ours(x), layer(x)) < 1e-5
                assert relative(ours(x), layer(x)) < 1e-5
                # Where dense won, no operator is called again.
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(torch_packed.Packed, "run", _refused)
                    if winner == 0:
                        assert torch.equal(ours(x), layer(x))
                        _unpacked_once(ours)
                    else:
                        with pytest.raises(RuntimeError, match="called"):
                            ours(x)
            form = list(torch_packed._PACKED.values())[-1]
            assert (form.chosen.popitem()[1] is None) == (winner == 0)
            assert len(form.ways) == 1


# ---- what is swapped


def test_what_stays_dense_has_a_reason() -> None:
    class Own(nn.Linear):
        pass

    tied = nn.Linear(4, 4)
    embedding = nn.Embedding(4, 4)
    tied.weight = embedding.weight
    hooked = nn.Linear(4, 4)
    hooked.register_forward_hook(lambda *_: None)
    replaced = nn.Linear(4, 4)
    replaced.forward = lambda x: x + 1  # type: ignore[method-assign]
    computed = nn.Linear(4, 4)
    prune.l1_unstructured(computed, "weight", 0.9)
    half_sparse = nn.Linear(4, 4)
    half_sparse.weight.data[:1] = 0
    module = nn.ModuleDict(
        {
            "embedding": embedding,
            "tied": tied,
            "hooked": hooked,
            "replaced": replaced,
            "computed": computed,
            "own": Own(4, 4),
            "lazy": nn.LazyLinear(4),
            "meta": nn.Linear(4, 4, device="meta"),
            "normed": parametrizations.weight_norm(nn.Linear(4, 4)),
            "wide": nn.Linear(4, 4).double(),
            "reflect": nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
            "depthwise": nn.Conv2d(4, 4, 3, groups=4),
            "quarter": half_sparse,
            "encoder": nn.TransformerEncoderLayer(4, 2, 8, batch_first=True),
            "good": prune_(nn.Linear(40, 40)),
        }
    ).eval()
    with torch.no_grad():
        for name in (
            "tied",
            "hooked",
            "replaced",
            "own",
            "wide",
            "reflect",
            "depthwise",
            "encoder",
        ):
            for parameter in module[name].parameters():
                parameter.zero_()
    found = {c.name: c.reason for c in consider(module)}
    for name, word in {
        "tied": "same weight",
        "hooked": "hooks",
        "replaced": "forward was replaced",
        "computed": "computed at every call",
        "own": "Own, and a subclass",
        "lazy": "LazyLinear, and a subclass",
        "normed": "remove_parametrizations",
        "meta": "on meta",
        "wide": "float64",
        "reflect": "'reflect'",
        "depthwise": "depthwise",
        "quarter": "0.250 is below 0.5",
        "encoder.linear1": "TransformerEncoderLayer",
    }.items():
        assert word in found.pop(name), name
    assert found.pop("good") == ""
    assert set(found) == {"encoder.linear2", "encoder.self_attn.out_proj"}
    accelerate(module)
    assert [n for n, m in module.named_modules() if isinstance(m, SparseLayer)] == ["good"]


def test_sizes_and_strides_can_still_be_read() -> None:
    for dense in (prune_(nn.Conv2d(4, 6, 3, stride=2, padding="valid")), prune_(nn.Linear(9, 5))):
        layer = accelerate(copy.deepcopy(dense))
        assert isinstance(layer, SparseLayer)
        for name in dense.__constants__:
            assert getattr(layer, name) == getattr(dense, name), name


def test_a_layer_that_stands_twice_stays_one() -> None:
    shared = prune_(nn.Linear(9, 9))
    module = accelerate(nn.Sequential(shared, nn.ReLU(), shared).eval())
    assert isinstance(module.get_submodule("0"), SparseLayer)
    assert module.get_submodule("0") is module.get_submodule("2")
    restore(module)
    assert type(module.get_submodule("0")) is nn.Linear
    assert module.get_submodule("0") is module.get_submodule("2")


@pytest.mark.parametrize(
    ("ask", "word"),
    [
        (lambda: accelerate(nn.Linear(3, 3)), "training mode"),
        (lambda: accelerate(nn.Linear(3, 3).eval(), threads=0), "threads=0"),
        (lambda: accelerate(nn.Linear(3, 3).eval(), minimum_sparsity=50), "minimum_sparsity=50"),
        (lambda: accelerate(nn.Linear(3, 3).eval(), choose="best"), "choose='best'"),  # type: ignore[arg-type]
    ],
)
def test_wrong_arguments(ask: Callable[[], object], word: str) -> None:
    with pytest.raises(UsageError, match=word) as caught:
        ask()
    assert all(caught.value.parts().values())


def test_a_kernel_must_win_by_more_than_its_call_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = prune_(nn.Linear(600, 500), 0.5), torch.randn(3, 600)
    for lead, dense in ((0.5, True), (2.0, False)):
        times = (1.0, 1.0 - lead * torch_packed._CALL)
        made = Raced(tuple((each,) for each in times))
        monkeypatch.setattr(torch_packed, "race", lambda runs, made=made, **_: made)
        monkeypatch.setattr(torch_packed, "_CHOICES", {})
        monkeypatch.setattr(torch_packed, "_kernels", lambda *_: [Variant("gemv", 1, 1)])
        ours = accelerate(copy.deepcopy(layer), minimum_sparsity=0.0)
        assert isinstance(ours, SparseLayer)
        with torch.inference_mode():
            ours(x)
        assert torch_packed.stays_dense(operands(ours), 3) is dense


def test_layers_of_one_kind_share_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    raced: list[int] = []

    def last(runs: list[object], **_: object) -> Raced:
        raced.append(len(runs))
        return Raced(tuple((float(i < len(runs) - 1),) for i in range(len(runs))))

    monkeypatch.setattr(torch_packed, "race", last)
    monkeypatch.setattr(torch_packed, "_CHOICES", {})

    def runs(layer: nn.Module, tokens: int) -> int:
        """How often kernels are timed for a layer and an input."""
        before, x = len(raced), torch.randn(tokens, layer.get_parameter("weight").shape[1])
        ours = accelerate(copy.deepcopy(layer))
        assert isinstance(ours, SparseLayer)
        with torch.inference_mode():
            assert relative(ours(x), layer(x)) < 1e-5
        assert torch_packed.stays_dense(operands(ours), tokens) is False
        return len(raced) - before

    blocks = nn.Linear(600, 512)
    with torch.no_grad():
        blocks.weight *= (torch.rand(128, 600) >= 0.7).repeat_interleave(4, 0)
    kinds = (
        (prune_(nn.Linear(600, 512), 0.7), 40),
        (prune_(nn.Linear(600, 512), 0.8), 40),
        (prune_(nn.Linear(600, 512), 0.7), 100),
        (prune_(nn.Linear(600, 512, bias=False), 0.7), 40),
        (prune_(nn.Linear(512, 600), 0.7), 40),
        (blocks.eval(), 40),
    )
    assert [runs(*kind) for kind in kinds] == [1] * len(kinds)
    assert [runs(*kind) for kind in kinds] == [0] * len(kinds)
    assert runs(prune_(nn.Linear(600, 512), 0.7), 40) == 0
    restore(accelerate(prune_(nn.Linear(9, 9))))
    assert runs(*kinds[0]) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("choose", ["first", "measured"])
def test_half_precision_is_rounded_once(dtype: torch.dtype, choose: Any) -> None:
    linear, conv = nn.Linear(700, 600), nn.Conv2d(24, 32, 3, padding=1)
    for layer, shape in ((linear, (1, 700)), (linear, (40, 700)), (conv, (2, 24, 9, 9))):
        half = prune_(copy.deepcopy(layer)).to(dtype)
        x = torch.randn(shape).to(dtype)
        exact = copy.deepcopy(half).double()(x.double()).detach()
        ours = accelerate(copy.deepcopy(half), choose=choose)
        assert isinstance(ours, SparseLayer)
        with torch.inference_mode():
            found = ours(x)
        assert found.dtype == dtype
        rounding = torch.finfo(dtype).eps / 2
        gap = (found.double() - exact).abs()
        assert bool((gap <= rounding * exact.abs() + 1e-5 * exact.abs().max()).all())
        back = restore(ours)
        assert torch.equal(back.get_parameter("weight"), half.weight)


def test_a_type_that_no_kernel_knows_stays_dense() -> None:
    (found,) = consider(prune_(nn.Linear(9, 9)).double())
    assert "float64" in found.reason


@pytest.mark.parametrize(
    ("layer", "few", "many"),
    [
        (nn.Linear(64, 32), (3, 64), (500, 64)),
        (nn.Linear(64, 32, bias=False), (64,), (50, 10, 64)),
        (nn.Conv2d(16, 16, 3, padding=1), (1, 16, 8, 8), (2, 16, 8, 8)),
        (nn.Conv2d(16, 8, 3, padding="same", bias=False), (16, 9, 7), (16, 60, 70)),
        (nn.Conv2d(8, 16, (3, 5), 2, (1, 0), groups=2), (2, 8, 9, 9), (8, 8, 30, 30)),
    ],
)
def test_where_a_call_costs_more_than_the_work_the_layer_is_dense(
    layer: nn.Module, few: tuple[int, ...], many: tuple[int, ...]
) -> None:
    prune_(layer)
    ours = accelerate(copy.deepcopy(layer))
    assert isinstance(ours, SparseLayer)
    calls: list[Any] = []

    def called(*given: Any) -> Tensor:
        calls.append(given)
        return torch.zeros(1, 1)

    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_packed.Packed, "run", called)
        x = torch.randn(few)
        for _ in range(2):
            assert torch.equal(ours(x), layer(x))
        assert not calls
        ours(torch.randn(many))
        assert len(calls) == 1
    y = ours(x)  # with gradients on
    assert not y.requires_grad
    assert torch.equal(y, layer(x))


def test_a_small_layer_sees_weights_and_biases_that_change() -> None:
    layer, few = prune_(nn.Linear(64, 32)), torch.randn(3, 64)
    ours = accelerate(copy.deepcopy(layer))
    with torch.inference_mode():
        assert torch.equal(ours(few), layer(few))
    # A weight that is loaded later counts.
    other = prune_(nn.Linear(64, 32))
    ours.load_state_dict(other.state_dict())
    with torch.inference_mode():
        assert torch.equal(ours(few), other(few))
        ours.values.mul_(2)
        assert torch.equal(ours(few), functional.linear(few, 2 * other.weight, other.bias))
        ours.bias.zero_()
        assert torch.equal(ours(few), functional.linear(few, 2 * other.weight))


def test_a_layer_does_not_remember_shapes_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_layer, "_SHAPES", 5)
    layer = prune_(nn.Linear(6, 4))
    ours = accelerate(copy.deepcopy(layer))
    assert isinstance(ours, SparseLayer)
    with torch.inference_mode():
        for tokens in range(1, 20):
            x = torch.randn(tokens, 6)
            assert torch.equal(ours(x), layer(x))
            assert ours._known is not None
            assert len(ours._known.dense) <= 5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_other_types_are_refused_with_the_reason(dtype: torch.dtype) -> None:
    for layer, shape in ((nn.Linear(9, 9), (2, 9)), (nn.Conv2d(9, 9, 3), (1, 9, 5, 5))):
        ours = accelerate(prune_(layer))
        with pytest.raises(UsageError, match=f"the input is {dtype}"), torch.inference_mode():
            ours(torch.ones(shape, dtype=dtype))


@pytest.mark.parametrize("choose", ["first", "measured"])
@pytest.mark.parametrize("kind", ["nested", "jagged", "sparse_coo"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_inputs_that_are_no_dense_arrays_are_refused(kind: str, choose: Any) -> None:
    ours = accelerate(prune_(nn.Linear(9, 9)), choose=choose)
    rows = [torch.ones(2, 9), torch.ones(3, 9)]
    if kind == "sparse_coo":
        x = rows[0].to_sparse()
    else:
        layout = torch.jagged if kind == "jagged" else torch.strided
        x = torch.nested.nested_tensor(rows, layout=layout)
    with (
        pytest.raises(UsageError, match=r"its input is (nested|torch.sparse_coo)"),
        torch.no_grad(),
    ):
        ours(x)


def test_a_module_that_was_made_float64_says_that_there_is_no_kernel() -> None:
    ours = accelerate(prune_(nn.Linear(9, 9)), choose="first").double()
    for dtype in (torch.float64, torch.float32):
        with pytest.raises(
            UsageError, match=r"weight is torch.float64. There are kernels for"
        ) as e:
            ours(torch.ones(2, 9, dtype=dtype))
        assert all(e.value.parts().values())
    x = torch.ones(2, 9)
    with torch.no_grad():
        assert ours.float()(x).dtype == torch.float32
        assert restore(ours.double())(x.double()).dtype == torch.float64


def test_a_call_with_tensors_of_its_own_gets_no_weight() -> None:
    ours = accelerate(prune_(nn.Sequential(nn.Linear(9, 9))))
    given, x = dict(ours.state_dict()), torch.ones(2, 9)
    with torch.no_grad():
        with pytest.raises(UsageError, match=r"functional_call is given, leave .* out") as caught:
            torch.func.functional_call(ours, given, x)
        assert all(caught.value.parts().values())
        found = torch.func.functional_call(ours, {"0.bias": given["0.bias"] + 1}, x)
        assert torch.allclose(found, ours(x) + 1)


def test_wrong_shapes_are_refused() -> None:
    linear, conv = accelerate(prune_(nn.Linear(9, 9))), accelerate(prune_(nn.Conv2d(9, 9, 3)))
    wrong = ((linear, (2, 8)), (conv, (1, 8, 5, 5)), (conv, (1, 9, 2, 5)), (conv, (1, 1, 9, 5, 5)))
    for layer, shape in wrong:
        with pytest.raises(UsageError) as caught, torch.inference_mode():
            layer(torch.ones(shape))
        assert all(caught.value.parts().values()), shape


@pytest.mark.filterwarnings("ignore:`torch.jit")  # forward_ad uses it
def test_training_is_refused() -> None:
    ours = accelerate(prune_(nn.Linear(9, 9)))
    with pytest.raises(UsageError, match="requires a gradient") as gradient:
        ours(torch.randn(2, 9, requires_grad=True))
    with pytest.raises(UsageError, match="has a tangent"), forward_ad.dual_level():
        ours(forward_ad.make_dual(torch.ones(2, 9), torch.ones(2, 9)))
    ours.train()
    with pytest.raises(UsageError, match="training mode") as training, torch.inference_mode():
        ours(torch.randn(2, 9))
    assert all(gradient.value.parts().values())
    assert all(training.value.parts().values())
