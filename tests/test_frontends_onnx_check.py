"""The check of an exported file: every output, and outputs that are not finite."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.core.difference import largest_error
from secateur.core.errors import DataError, UsageError
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


def other(y: Tensor) -> Tensor:
    """Not the same in the file."""
    return y + 1 if torch.compiler.is_exporting() else y


def with_column(y: Tensor, value: float) -> Tensor:
    return torch.cat([y, torch.full_like(y[:, :1], value)], 1)


@pytest.mark.parametrize("value", [0.0, float("inf"), float("-inf"), float("nan")])
def test_a_number_that_is_not_finite_hides_no_difference(tmp_path: Path, value: float) -> None:
    assert exported(tmp_path, lambda y: with_column(y, value)) < 1e-5
    with pytest.raises(DataError, match="differs from PyTorch"):
        exported(tmp_path, lambda y: with_column(other(y), value))


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
    for last in (lambda y: (y, other(y)), lambda y: {"first": y, "second": other(y)}):
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


class Padded(nn.Module):
    """What it says of padding is another thing in the file than in PyTorch, as where no token is read."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        y = self.table(input_ids)
        return torch.where(attention_mask[..., None] > 0, y, other(y))


def test_padding_counts_for_nothing(tmp_path: Path) -> None:
    ids, mask = torch.randint(20, (2, 6)), torch.ones(2, 6, dtype=torch.long)
    mask[0, :3] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    assert export_onnx(Padded(), batch, tmp_path / "net.onnx").error < 1e-5


class Translator(nn.Module):
    """Reads what was said before, which follows from the labels, as in Transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 4)

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        return labels.roll(1, 1)

    def forward(
        self,
        input_ids: Tensor,
        decoder_input_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        if decoder_input_ids is None:
            assert labels is not None
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        return self.table(input_ids).sum(1, keepdim=True) + self.table(decoder_input_ids)


def test_labels_become_what_the_decoder_reads(tmp_path: Path) -> None:
    batch = {"input_ids": torch.randint(20, (3, 6)), "labels": torch.randint(20, (3, 4))}
    done = export_onnx(Translator(), batch, tmp_path / "net.onnx")
    assert done.inputs == ("input_ids", "decoder_input_ids")


def test_random_numbers_are_not_blamed_on_the_exporter(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="draws random numbers") as error:
        exported(tmp_path, noisy)
    assert "two runs" in error.value.found
    assert not list(tmp_path.iterdir())


def test_a_list_of_images_is_refused(tmp_path: Path) -> None:
    images = [torch.randn(3, 8, 9), torch.randn(3, 7, 6)]
    targets = [{"labels": torch.zeros(1)}, {"labels": torch.zeros(2)}]
    with pytest.raises(UsageError, match="a list of 2 images"):
        export_onnx(Net(nn.Identity()), (images, targets), tmp_path / "net.onnx")
