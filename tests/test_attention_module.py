"""PrunedAttention with all its heads computes what nn.MultiheadAttention computes, in all its options."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from attention_cases import (
    EACH,
    MASKS,
    OPTIONS,
    PADDING,
    TOLERANCE,
    E,
    H,
    L,
    S,
    build,
    inputs,
    numbers,
    stock,
)
from torch import Tensor, nn

from secateur.core.attention import free_heads_, is_plain, settle_heads_
from secateur.core.errors import UsageError


def gradients(module: nn.Module, given: Any, named: Mapping[str, Any]) -> tuple[Any, list[Tensor]]:
    """Both outputs, and the gradients of the inputs and all parameters."""
    leaves = [x.detach().clone().requires_grad_() for x in given]
    out, weights = module(*leaves, **named)
    loss = (out * torch.cos(torch.arange(out.numel())).reshape(out.shape)).sum()
    if weights is not None:
        loss = loss + weights.square().sum()
    found = torch.autograd.grad(loss, [*leaves, *module.parameters()])
    return (out, weights), list(found)


@pytest.mark.parametrize("weights", ["no", "mean", "each"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("mask", MASKS)
def test_with_all_heads_it_is_that_of_pytorch(options: str, mask: str, weights: str) -> None:
    module = stock(**OPTIONS[options])
    own = copy.deepcopy(module)
    free_heads_(own)
    given = inputs(module, mask)
    named = {
        **MASKS[mask],
        "need_weights": weights != "no",
        "average_attn_weights": weights == "mean",
    }
    wanted, slopes = gradients(module, given, named)
    found, own_slopes = gradients(own, given, named)
    torch.testing.assert_close(found, wanted, **TOLERANCE)
    torch.testing.assert_close(own_slopes, slopes, **TOLERANCE)


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_one_sample_without_a_batch_axis(batch_first: bool, weights: bool) -> None:
    module = stock(batch_first=batch_first, add_bias_kv=True)
    own = copy.deepcopy(module)
    free_heads_(own)
    q, k = numbers(L, E), numbers(S, E, seed=1)
    for named in ({}, {"attn_mask": EACH[:H]}, {"key_padding_mask": PADDING[1]}):
        wanted = module(q, k, k, need_weights=weights, **named)
        torch.testing.assert_close(own(q, k, k, need_weights=weights, **named), wanted, **TOLERANCE)


@pytest.mark.parametrize("weights", [False, True])
def test_dropout_draws_as_in_pytorch(weights: bool) -> None:
    module = stock(dropout=0.4).train()
    own = copy.deepcopy(module)
    free_heads_(own)
    found = []
    for each in (module, own):
        torch.manual_seed(1)
        found.append(each(*inputs(module, "none"), need_weights=weights)[0])
    torch.testing.assert_close(found[1], found[0], **TOLERANCE)
    assert not torch.allclose(found[0], module.eval()(*inputs(module, "none"))[0])


def test_causal_without_a_mask_is_refused_as_in_pytorch() -> None:
    own = stock()
    free_heads_(own)
    with pytest.raises(UsageError, match="attn_mask is None"):
        own(*inputs(own, "causal"), is_causal=True)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensors_are_read_alone() -> None:
    module = stock(batch_first=True)
    own = copy.deepcopy(module)
    free_heads_(own)
    x = torch.nested.nested_tensor([numbers(3, E), numbers(L, E, seed=1)])
    with torch.no_grad():
        found, wanted = own(x, x, x, need_weights=False)[0], module(x, x, x, need_weights=False)[0]
    for a, b in zip(found.unbind(), wanted.unbind(), strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)
    for given in ((x, x, x), (x, x.clone(), x, None, False), (x, x, x, PADDING, False)):
        with pytest.raises(UsageError, match="nested"):
            own(*given)


def test_settling_changes_nothing_that_fits() -> None:
    net = build("transformer")
    settle_heads_(net)
    assert all(is_plain(m) for m in net.modules() if isinstance(m, nn.MultiheadAttention))
    separate = stock(kdim=6)
    settle_heads_(separate)
    assert is_plain(separate)
    assert not separate._qkv_same_embed_dim
