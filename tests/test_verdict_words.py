"""Sentences and tables say the same, and say what the numbers show."""

from __future__ import annotations

import dataclasses
import importlib
import math

import pytest
import torch
from test_report import comparison, rendered
from torch import nn

from secateur import Recipe, Scope, compare, prune
from secateur.evaluate import Measurement, Speed
from secateur.evaluate.verdict import Gain, verdict
from secateur.report import comparison_table
from secateur.runtime import accelerate, library


def measured(bytes_: int = 1000, samples: int = 24) -> Measurement:
    cost = dataclasses.replace(comparison().a.cost, bytes=bytes_)
    return Measurement(cost, 0.9, "accuracy", 0.2, samples, "test", None)


def judged(
    before: int = 1000, *, error: float | None = None, samples: int = 24, speed: Speed | None = None
) -> dict[str, Gain]:
    a, b = measured(before, samples), measured(1000, samples)
    difference = None if error is None else 0.0
    return {gain.name: gain for gain in verdict(a, b, difference, error, speed)}


@pytest.mark.parametrize(
    ("before", "text", "real"),
    [
        (1020, "1.02x smaller", True),
        (1010, "1.01x smaller", True),
        (1004, "not smaller", False),
        (1000, "not smaller", False),
        (985, "1.02x larger", False),
        (7930, "7.9x smaller", True),
    ],
)
def test_the_size_in_the_sentence_is_that_of_the_table(before: int, text: str, real: bool) -> None:
    gain = judged(before)["smaller"]
    assert (gain.text, gain.real) == (f"The file is {text}.", real)
    found = dataclasses.replace(comparison(), a=measured(before), b=measured())
    row = next(x for x in rendered(comparison_table(found)).split("\n") if x.startswith("file "))
    assert row.endswith("same" if text == "not smaller" else text)


@pytest.mark.parametrize(
    ("speed", "word", "sentence"),
    [
        (Speed(1.04, 1.04, 1.04), "less than 5 % faster", "less than 5 % faster"),
        (Speed(0.97, 0.96, 0.98), "less than 5 % slower", "less than 5 % slower"),
        (Speed(1.3, 1.04, 1.5), "not surely 5 % faster", "not surely 5 % faster"),
        (Speed(1.01, 0.99, 1.02), "same within noise", "not faster"),
        (Speed(0.5, 0.4, 0.6), "2.0x slower", "slower"),
    ],
)
def test_noise_is_only_what_may_be_none(speed: Speed, word: str, sentence: str) -> None:
    assert word in rendered(comparison_table(comparison(speed=speed)))
    gain = judged(speed=speed)["faster"]
    assert gain.text.startswith(f"It is {sentence}: {speed.ratio:.2f}x, 95 % range")
    assert not gain.real


def test_few_samples_are_told_when_no_answer_changed() -> None:
    assert "With 24 samples, a loss of up to 12 points can go unseen." in judged(error=0.0)[
        "accuracy"
    ].text  # fmt: skip
    assert "unseen" not in judged(error=0.0, samples=10_000)["accuracy"].text
    assert "smaller losses cannot be seen" in judged(error=0.02)["accuracy"].text


@pytest.mark.parametrize("difference", [float("nan"), float("-inf")])
def test_what_is_no_number_is_no_gain(difference: float) -> None:
    a, b = measured(), dataclasses.replace(measured(), metric="count")
    gain = verdict(dataclasses.replace(a, metric="count"), b, difference, None, None)[1]
    assert not gain.real
    assert gain.text == (
        "Count of one of the networks is not finite, so there is no difference to judge."
    )


def test_the_name_of_a_metric_is_the_user_s() -> None:
    a = dataclasses.replace(measured(), metric="mAP")
    (_, gain) = verdict(a, a, 0.01, None, None)
    assert gain.text == "mAP changed by +0.01."


@pytest.mark.parametrize(("loss", "advice"), [(0.5, "Fine-tune longer"), (math.nan, "overflowed")])
def test_a_network_without_numbers_needs_no_fine_tuning(loss: float, advice: str) -> None:
    a, b = measured(), dataclasses.replace(measured(), loss=loss)
    (_, gain) = verdict(a, b, -0.5, 0.01, None)
    assert gain.text.startswith("Accuracy is lost: -50.00 ± 1.00 points, more than noise. ")
    assert advice in gain.text


@pytest.mark.skipif(not library.available(), reason="the native library is not built")
def test_who_skips_zeros_already_is_not_advised_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: timings in which the second network is slower."""
    module = importlib.import_module("secateur.evaluate.compare")
    monkeypatch.setattr(module, "race", lambda *_, **__: ([1.0] * 9, [2.0] * 9))
    net, x = nn.Linear(8, 8).eval(), torch.zeros(2, 8)
    sparse = prune(net, Recipe(scope=Scope(sensitive=True))).model
    plain, packed = (
        compare(net, b, example=x).verdict[-1].text for b in (sparse, accelerate(sparse))
    )
    assert "PyTorch multiplies the zeros too" in plain
    assert "PyTorch" not in packed
    assert "secateur doctor" in packed
