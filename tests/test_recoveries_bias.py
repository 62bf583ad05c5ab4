"""Bias correction, and BatchNorm statistics measured again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from secateur import Recipe, Target, prune, prune_
from secateur.recover import BatchNorm, BiasCorrection
from secateur.score import Wanda


@pytest.mark.parametrize("kind", ["linear", "convolution", "grouped"])
def test_bias_correction_keeps_the_mean_output(kind: str) -> None:
    x = torch.randn(16, 8, 6) + torch.randn(8, 1) * 2
    layer: nn.Module = (
        nn.Linear(8, 8)
        if kind == "linear"
        else nn.Conv1d(8, 8, 3, padding=1, groups=2 if kind == "grouped" else 1)
    )
    net = nn.Sequential(layer)
    x = x.transpose(1, 2) if kind == "linear" else x
    recipe = Recipe(target=Target("sparsity", 0.6), recovery=(BiasCorrection(),))
    pruned = prune(net, recipe, [x[:5], x[5:]])
    axes = (0, 1) if kind == "linear" else (0, 2)
    before, after = net(x).detach().mean(axes), pruned.model(x).detach().mean(axes)
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)
    plain = prune(net, Recipe(target=Target("sparsity", 0.6))).model(x).detach().mean(axes)
    assert float((plain - before).abs().max()) > 1e-2


def test_bias_correction_without_a_bias_is_noted() -> None:
    net = nn.Sequential(nn.Linear(8, 8, bias=False))
    recipe = Recipe(target=Target("sparsity", 0.6), recovery=(BiasCorrection(),))
    pruned = prune(net, recipe, [torch.randn(9, 8)])
    assert any(note.topic == "bias" for note in pruned.facts.notes)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_bias_correction_of_a_recurrent_layer(kind: type[nn.RNNBase]) -> None:
    net = nn.Sequential(kind(6, 8, batch_first=True))
    x = torch.randn(32, 5, 6) + 2
    pruned = prune(net, Recipe(recovery=BiasCorrection()), [x])
    for way, given in (("ih", x), ("hh", None)):
        weight, bias = f"0.weight_{way}_l0", f"0.bias_{way}_l0"
        change = pruned.model.get_parameter(bias) - net.get_parameter(bias)
        assert float(change.detach().abs().max()) > 1e-3
        if given is not None:
            lost = net.get_parameter(weight) - pruned.model.get_parameter(weight)
            torch.testing.assert_close(change, lost @ given.mean((0, 1)), atol=1e-5, rtol=1e-4)
    assert not any(note.topic == "bias" for note in pruned.facts.notes)
    flat = nn.Sequential(kind(6, 8, bias=False))
    noted = prune(flat, Recipe(recovery=BiasCorrection()), [x]).facts.notes
    assert sum(note.topic == "bias" for note in noted) == 2


def batchnorm_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(6, 4, 1),
        nn.BatchNorm2d(4, momentum=0.3),
    )  # fmt: skip


def test_batchnorm_by_hand() -> None:
    net = batchnorm_net().eval()
    with torch.no_grad():
        net[1].running_mean.fill_(3.0)
    batches = [torch.randn(5, 8, 6, 6), torch.randn(2, 8, 6, 6) + 1]
    drift = BatchNorm().reestimate_(net, batches)
    first = [net[0](x) for x in batches]
    # The second layer saw what the first gives in training mode, without dropout.
    second = [
        net[4](
            torch.relu(nn.functional.batch_norm(y, None, None, net[1].weight, net[1].bias, True))
        )
        for y in first
    ]
    for norm, outputs in ((net[1], torch.cat(first)), (net[5], torch.cat(second))):
        mean, variance = outputs.mean((0, 2, 3)).detach(), outputs.var((0, 2, 3)).detach()
        torch.testing.assert_close(norm.running_mean, mean, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(norm.running_var, variance, atol=1e-5, rtol=1e-4)
    assert net[5].momentum == 0.3
    assert not net.training
    assert drift["1"] > 1


@pytest.mark.parametrize("sizes", [[1026], [128] * 8 + [2], [2] * 513])
def test_batchnorm_statistics_do_not_depend_on_batches(sizes: list[int]) -> None:
    x = torch.randn(1026, 4, 3, 3) * 2 + 5
    x = x[x[:, 0, 0, 0].argsort()]  # sorted, so that batches differ
    net = nn.Sequential(nn.BatchNorm2d(4)).eval()
    BatchNorm().reestimate_(net, x.split(sizes))
    torch.testing.assert_close(net[0].running_mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(net[0].running_var, x.var((0, 2, 3)))
    # Sums are not kept in the layer's own precision, where late batches would be lost.
    half = nn.Sequential(nn.BatchNorm2d(4)).eval().bfloat16()
    BatchNorm().reestimate_(half, x.bfloat16().split(sizes))
    torch.testing.assert_close(half[0].running_var.float(), x.var((0, 2, 3)), rtol=0.01, atol=0)


def test_batchnorm_that_no_data_reach_keeps_its_statistics() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.BatchNorm1d(2), nn.BatchNorm1d(2)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    net = Net()
    net.spare.running_mean.fill_(5.0)
    BatchNorm().reestimate_(net, [torch.randn(4, 2)])
    assert net.spare.running_mean.tolist() == [5.0, 5.0]


def test_batchnorm_keeps_its_statistics_when_the_forward_pass_raises() -> None:
    net = nn.Sequential(nn.BatchNorm1d(2)).eval()
    net[0].running_mean.fill_(5.0)
    with pytest.raises(RuntimeError, match="should contain 3"):
        BatchNorm().reestimate_(net, [torch.randn(4, 3)])
    assert net[0].running_mean.tolist() == [5.0, 5.0]
    assert not net[0].training


def test_the_drift_is_measured_on_the_network_itself() -> None:
    """A run may not need room for a second network to look at its BatchNorms."""

    class Only(nn.Sequential):
        def __deepcopy__(self, memo: object) -> Only:
            raise AssertionError("the network was copied")

    net = Only(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 2))
    data = [torch.randn(32, 4) * 40]
    pruned = prune_(net, Recipe(Wanda()), data)
    drifted = [note for note in pruned.facts.notes if note.topic == "batchnorm-drift"]
    assert [note.where for note in drifted] == ["1"]
    assert net[1].running_mean.tolist() == [0.0] * 8
    assert net[1].num_batches_tracked == 0
    assert net[1].momentum == 0.1
    assert net.training


def test_a_drift_that_cannot_be_measured_is_told() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.mid, self.norm = nn.Linear(4, 8), nn.Linear(8, 8), nn.BatchNorm1d(8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.mid(self.body(x))
            return torch.cat([self.norm(x[:1]), x[1:]])

    pruned = prune(Net().eval(), Recipe(Wanda()), [torch.randn(8, 4)])
    assert pruned.masks.sparsity == 0.5
    assert any("more than 1 value" in note.text for note in pruned.facts.notes)
