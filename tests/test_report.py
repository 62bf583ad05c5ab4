"""What people and programs read: fixed facts give fixed text."""

from __future__ import annotations

import io
import json
import math
from typing import Any

import pytest
from rich.console import Console, RenderableType

from secateur.core.errors import FileError
from secateur.core.facts import Facts, LayerFacts, Note
from secateur.evaluate import Comparison, Cost, Gain, Latency, Measurement, Speed
from secateur.report import (
    comparison_table,
    document,
    error_document,
    layer_table,
    measurement_table,
    notes_text,
    units,
    verdict_text,
)
from secateur.report.jsonreport import comparison_json
from secateur.report.structure import target_text


def rendered(part: RenderableType, width: int = 80) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width, highlight=False).print(part)
    return "\n".join(line.rstrip() for line in stream.getvalue().rstrip("\n").split("\n"))


def facts() -> Facts:
    return Facts(
        layers=[
            LayerFacts("blocks.0.conv.weight", (32, 16, 3, 3), 4608, 461, 0.0312),
            LayerFacts("fc.weight", (10, 128), 1280, 1280, 0.0),
        ]
    )


def comparison(*, speed: Speed | None = None) -> Comparison:
    slow, quick = (
        Latency(median=m, p10=m - 0.05, p90=m + 0.1, batch=1, threads=2, repetitions=101)
        for m in (4.31, 4.3)
    )
    dense = Cost(322_000, 322_000, None, 13.0e6, 13.0e6, 1_310_000)
    sparse = Cost(322_000, 40_000, 0.9, 13.0e6, 1.6e6, 166_000)
    return Comparison(
        a=Measurement(dense, 0.9132, "accuracy", 0.2481, 10_000, "test", slow),
        b=Measurement(sparse, 0.9101, "accuracy", 0.26, 10_000, "test", quick),
        identical=False,
        difference=-0.0031,
        difference_error=0.0012,
        agreement=0.981,
        kl=0.0123,
        speed=speed or Speed(1.002, 0.99, 1.01),
        verdict=(Gain("smaller", True, "The file is 7.9x smaller."),),
    )


def test_layer_table() -> None:
    assert rendered(layer_table(facts())) == (
        "weight                shape       kept / total  sparsity  output error\n"
        "blocks.0.conv.weight  32x16x3x3    461 / 4,608    90.0 %         3.1 %\n"
        "fc.weight             10x128     1,280 / 1,280     0.0 %         0.0 %\n"
        "all of these                     1,741 / 5,888    70.4 %"
    )


def test_layer_table_without_data_has_no_error_column() -> None:
    bare = Facts(layers=[LayerFacts("w", (2, 2), 4, 2)])
    assert "error" not in rendered(layer_table(bare))


def test_comparison_table() -> None:
    text = rendered(comparison_table(comparison(), ("dense", "pruned")))
    assert text == (
        "                           dense          pruned               change\n"
        "accuracy                 91.32 %         91.01 %  -0.31 ± 0.12 points\n"
        "loss                      0.2481          0.2600              +0.0119\n"
        "samples                   10,000          10,000\n"
        "parameters                 322 k           322 k\n"
        "non-zeros                  322 k          40.0 k            8.1x less\n"
        "sparsity, all              0.0 %          87.6 %\n"
        "sparsity, pruned               -          90.0 %\n"
        "multiply-adds             13.0 M          1.60 M            8.1x less\n"
        "file                     1.31 MB          166 kB         7.9x smaller\n"
        "latency, batch 1  4.31 ± 0.10 ms  4.30 ± 0.10 ms    same within noise\n"
        "threads                        2               2\n"
        "same answers                              98.1 %\n"
        "KL divergence                        0.0123 nats"
    )


@pytest.mark.parametrize("width", [80, 120])
def test_tables_fit_the_terminal(width: int) -> None:
    for part in (layer_table(facts()), comparison_table(comparison(), ("x" * 20, "y" * 20))):
        assert max(map(len, rendered(part, width).split("\n"))) <= width


def test_a_real_gain_in_speed_is_a_number() -> None:
    text = rendered(comparison_table(comparison(speed=Speed(1.83, 1.8, 1.9))))
    assert "1.8x faster" in text
    assert "within noise" not in text


def test_a_busy_machine_shows_in_the_latency() -> None:
    slow = Latency(median=1.1, p10=1.0, p90=12.6, batch=1, threads=2, repetitions=101)
    found = Measurement(Cost(10, 8, None, None, None, 512), latency=slow)
    assert "1.10, p90 12.6 ms" in rendered(measurement_table(found))


def test_measurement_without_data() -> None:
    text = rendered(measurement_table(Measurement(Cost(10, 8, None, None, None, 512))))
    assert "accuracy" not in text
    assert "sparsity, pruned" not in text  # nothing was
    assert "512 B" in text
    assert "20.0 %" in text


def test_verdict_marks() -> None:
    gains = [Gain("smaller", True, "Yes."), Gain("faster", False, "No.")]
    assert rendered(verdict_text(gains)) == "+ Yes.\n- No."


def test_notes_are_grouped_and_cut() -> None:
    notes = [Note("left-out", f"layer{i}", "an embedding") for i in range(5)]
    notes += [Note("damped", "", f"reason {i}") for i in range(9)]
    notes.append(Note("hint", "", "train longer [not markup]"))
    text = rendered(notes_text(notes)).split("\n")
    assert text[:2] == ["Hints", "  train longer [not markup]"]
    assert "  layer0, layer1, layer2 and 2 more: an embedding" in text
    assert text[-1] == "  and 3 more; facts.json has all of them"


@pytest.mark.parametrize(
    ("share", "text"),
    [
        *((1.0, "100.0 %"), (0.0, "0.0 %"), (0.9999, "99.99 %"), (0.00004, "0.004 %")),
        *(
            (1 / 22_713_216, "0.000004 %"),
            (1 - 1 / 22_713_216, "99.999996 %"),
            (1e-12, "0.0000000001 %"),
        ),
    ],
)
def test_percent_never_pretends(share: float, text: str) -> None:
    assert units.percent(share) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (1000, "1.00 k"), (999_600, "1.00 M"), (3.14e9, "3.14 G")],
)
def test_counts(number: float, text: str) -> None:
    assert units.count(number) == text


def test_document_is_json_with_stable_keys() -> None:
    found = json.loads(document("1.0", "compare", {"comparison": comparison_json(comparison())}))
    assert list(found) == ["secateur", "schema", "command", "ok", "comparison"]
    assert set(found["comparison"]) == {
        *("a", "b", "identical", "difference", "difference_error", "agreement", "kl"),
        *("size_ratio", "speed", "verdict"),
    }
    assert set(found["comparison"]["a"]) == {
        *("accuracy", "metric", "loss", "samples", "split", "latency", "parameters", "nonzeros"),
        *("sparsity", "pruned_sparsity", "macs_dense", "macs", "bytes", "uncounted", "perplexity"),
        "one_class",
    }
    assert found["comparison"]["speed"]["verdict"] == "same"


def test_numbers_that_json_lacks_become_null() -> None:
    found: dict[str, Any] = json.loads(document("1", "x", {"a": math.nan, "b": [math.inf, 1.5]}))
    assert (found["a"], found["b"]) == (None, [None, 1.5])


def test_error_document_has_four_parts_and_the_code() -> None:
    error = json.loads(error_document("1", "prune", FileError("a", "b", "c", "d"), 4))["error"]
    assert error == {
        "type": "FileError", "asked": "a", "found": "b", "why": "c", "do": "d", "exit_code": 4
    }  # fmt: skip


def test_widths_that_are_given_follow_no_target() -> None:
    measured = {"target": {"unit": "params", "dense": 2000, "limit": 1000, "reached": 1500}}
    given = Facts({"allocation": {"given": {"shares": {"0": 0.75}}}}, measures=measured)
    assert str(target_text(given)) == "Target: params 2.00 k -> 1.50 k."
    asked = Facts({"allocation": "uniform"}, measures=measured)
    assert "(asked for 1.00 k)" in str(target_text(asked))


def test_notes_are_compared_with_their_like_only(monkeypatch: pytest.MonkeyPatch) -> None:
    made = 0
    equal = Note.__eq__

    def counting(one: Note, other: object) -> bool:
        nonlocal made
        made += 1
        return equal(one, other)

    monkeypatch.setattr(Note, "__eq__", counting)
    found = Facts()
    for index in range(200):
        found.note("pinned", f"{index}.weight", "it reaches the output")
    assert made < 200
    assert len(found.notes) == 200
    del found.notes[100:]
    for index in (99, 100, 100):
        found.note("pinned", f"{index}.weight", "it reaches the output")
    assert [note.where for note in found.notes] == [f"{index}.weight" for index in range(101)]
