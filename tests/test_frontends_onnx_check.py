"""The check of an exported file: every output, and outputs that are not finite."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.core.difference import largest_error
from secateur.core.errors import DataError
from secateur.frontends import export_onnx

for name in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(name)


class Net(nn.Module):
    """A linear layer, and what is made of its output."""

    def __init__(self, last: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.linear, self.last = nn.Linear(4, 4), last

    def forward(self, x: Tensor) -> Any:
        return self.last(self.linear(x))


def exported(tmp_path: Path, last: Callable[[Tensor], Any]) -> float:
    return export_onnx(Net(last), torch.randn(3, 4), tmp_path / "net.onnx").error


def noisy(y: Tensor) -> Tensor:
    """Not the same in any two runs."""
    return y + torch.randn_like(y)


def with_column(y: Tensor, value: float) -> Tensor:
    return torch.cat([y, torch.full_like(y[:, :1], value)], 1)


@pytest.mark.parametrize("value", [0.0, float("inf"), float("-inf"), float("nan")])
def test_a_number_that_is_not_finite_hides_no_difference(tmp_path: Path, value: float) -> None:
    assert exported(tmp_path, lambda y: with_column(y, value)) < 1e-5
    with pytest.raises(DataError, match="differs from PyTorch"):
        exported(tmp_path, lambda y: with_column(noisy(y), value))


class Timed(nn.Module):
    """A mapping, and a time step: one number for all samples, as diffusion models take it."""

    def forward(self, given: dict[str, Tensor], step: Tensor | None = None) -> Tensor:
        given["y"] = given["x"] * 2  # models do write into their inputs
        return given["y"] if step is None else given["y"] * step


def test_an_example_of_one_sample_may_be_nested_and_hold_a_number(tmp_path: Path) -> None:
    given, step = {"x": torch.randn(1, 4)}, torch.tensor(3.0)
    for i, batch in enumerate([(given,), (given, step, None), {"given": given, "step": step}]):
        made = export_onnx(Timed(), batch, tmp_path / f"{i}.onnx")
        assert made.error < 1e-5
        assert len(made.inputs) == min(i, 1) + 1
    assert list(given) == ["x"]


def test_every_output_is_checked(tmp_path: Path) -> None:
    assert exported(tmp_path, lambda y: (y, None, {"b": y * 2, "a": y > 0}, y.argmax(1))) < 1e-5
    for last in (lambda y: (y, noisy(y)), lambda y: {"first": y, "second": noisy(y)}):
        with pytest.raises(DataError, match="differs from PyTorch"):
            exported(tmp_path, last)
    assert not list(tmp_path.glob(".*"))


def test_the_comparison_sees_planted_errors() -> None:
    one = torch.tensor([1.0, -4.0])
    assert largest_error([one, one], [one, one + 2]) == 0.5
    assert largest_error([one], [one, one]) == float("inf")
    assert largest_error([one], [one.double()]) == float("inf")
    assert largest_error([one], [one[None]]) == float("inf")
    assert largest_error([one], [torch.tensor([1.0, float("nan")])]) == float("inf")
    inf = torch.tensor([float("inf"), 1.0])
    assert largest_error([inf], [inf]) == 0
    assert largest_error([inf], [-inf]) == largest_error([inf], [one]) == float("inf")
    whole = torch.arange(200)
    assert largest_error([whole], [whole.clamp(min=1)]) == 0
    assert largest_error([whole], [whole.clamp(min=9)]) == float("inf")
    assert largest_error([one[:0]], [one[:0]]) == 0
