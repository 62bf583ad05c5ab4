"""Networks in half precision: what is computed from them does not vanish, overflow or turn NaN."""

from __future__ import annotations

import pytest
import torch
from oneshot_cases import mlp

from secateur import Recipe, prune
from secateur.recover import Integer


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_an_empty_row_stays_empty_when_rounded(dtype: torch.dtype) -> None:
    net = mlp().to(dtype)
    with torch.no_grad():
        net[0].weight[3] = 0
    pruned = prune(net, Recipe(rounding=Integer(8)))
    weight = pruned.model.get_parameter("0.weight").detach()
    assert not weight[3].any()
    assert torch.isfinite(weight).all()


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_half_precision_is_rounded_as_finely_as_single(bits: int) -> None:
    values = (torch.rand(4, 8) * 1e-3).half()
    single = Integer(bits).fit(values.float())(values.float(), slice(None))
    half = Integer(bits).fit(values)(values, slice(None))
    assert half.dtype == torch.float16
    assert torch.equal(half, single.half())
