"""Sentences and tables say the same, and say what the numbers show."""

from __future__ import annotations

import dataclasses

import pytest
from test_report import comparison, rendered

from secateur.evaluate import Measurement, Speed
from secateur.evaluate.verdict import Gain, verdict
from secateur.report import comparison_table


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
