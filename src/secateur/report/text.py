"""Text for the terminal: tables and notes."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from secateur.core.facts import Facts, Note
from secateur.core.ratios import times
from secateur.evaluate import Comparison, Latency, Measurement
from secateur.evaluate.verdict import Gain
from secateur.frontends import Exported
from secateur.report.columns import Columns
from secateur.report.units import (
    count,
    fewer,
    milliseconds,
    percent,
    points,
    size,
)

#: Notes of one topic that are listed one by one; the rest is counted.
_LISTED = 6
#: What a narrow terminal leaves of the first column: the longest usual label, and half a layer's name.
_LABEL, _NAME = len("sparsity, pruned"), 12
_TOPICS = {
    "hint": "Hints",
    "left-out": "Left dense",
    "unseen": "Inputs that the data did not show",
    "even-scores": "Layers that the criterion cannot rank",
    "skipped": "Steps that were skipped",
    "nearly-empty": "Nearly empty layers",
    "output-error": "Layers that suffered most",
    "repair": "Repairs that needed help",
    "tied": "Tied weights",
    "batchnorm-drift": "Batch normalisation that moved",
    "beyond-knee": "Pruned beyond the knee of their error curve",
    "bias": "Biases",
    "target": "Target",
    "widths": "Widths",
    "reduces": "Normalisations over kept units",
    "uncompensated": "Layers that were not fitted",
    "damped": "Fits that needed more damping",
    "traced-path": "One path of several",
    "removed-block": "Removed blocks",
    "rolled-back": "Rolled back",
    "vacuous": "A proof that says nothing",
}


def layer_table(facts: Facts) -> Columns:
    """One row per pruned weight, and their sum.

    Example:
        >>> from rich.console import Console
        >>> from secateur.core.facts import LayerFacts
        >>> table = layer_table(Facts(layers=[LayerFacts("fc.weight", (4, 8), 32, 8, 0.25)]))
        >>> Console(width=60).print(table)
        weight     shape  kept / total  sparsity  output error
        fc.weight  4x8          8 / 32    75.0 %        25.0 %
    """
    longest = max((len(layer.name) for layer in facts.layers), default=0)
    table = _table("weight", "shape", "kept / total", "sparsity", least=min(longest, _NAME))
    judged = any(layer.output_error is not None for layer in facts.layers)
    if judged:
        table.add_column("output error", justify="right", no_wrap=True)
    for layer in facts.layers:
        row: list[RenderableType] = [
            Text(layer.name),
            "x".join(map(str, layer.shape)),
            f"{layer.kept:,} / {layer.total:,}",
            percent(layer.sparsity),
        ]
        if judged:
            row.append(percent(layer.output_error))
        table.add_row(*row)
    if len(facts.layers) > 1:
        table.add_section()
        kept, total = (sum(getattr(x, key) for x in facts.layers) for key in ("kept", "total"))
        table.add_row("all of these", "", f"{kept:,} / {total:,}", percent(facts.sparsity))
    return Columns(table)


def measurement_table(found: Measurement) -> Columns:
    """One network: name and value."""
    table = _table("", "value", least=_LABEL)
    for name, value in _rows(found):
        if value != "-":
            table.add_row(name, value)
    return Columns(table)


def comparison_table(found: Comparison, names: tuple[str, str] = ("before", "after")) -> Columns:
    """Two networks side by side, with what changed."""
    table = _table("", *names, "change", least=_LABEL)
    changes = _changes(found)
    for (name, first), (_, second) in zip(_rows(found.a), _rows(found.b), strict=True):
        if (first, second) != ("-", "-"):  # nothing was pruned in either
            table.add_row(name, first, second, changes.get(name, ""))
    if found.agreement is not None:
        table.add_row("same answers", "", percent(found.agreement), "")
    if found.kl is not None:
        table.add_row("KL divergence", "", f"{found.kl:.3g} nats", "")
    for column in table.columns[1:3]:  # names of files may wrap, the numbers below them may not
        column.min_width = max(len(str(cell)) for cell in column.cells)
        column.no_wrap, column.overflow = False, "fold"
    return Columns(table)


def verdict_text(gains: Iterable[Gain]) -> RenderableType:
    """What was gained, one line each: ``+`` for real, ``-`` for not."""
    table = Table.grid(padding=(0, 1))
    for gain in gains:
        mark = Text("+", "bold green") if gain.real else Text("-", "bold red")
        table.add_row(mark, Text(gain.text))
    return table


def exported_text(done: Exported) -> Text:
    """One line on an ONNX file, and its notes.

    Example:
        >>> print(exported_text(Exported("net.onnx", 2048, 20, 1e-7, ("x",))))
        ONNX: net.onnx, 2.05 kB, differs from PyTorch by 1e-07 (relative).
    """
    line = f"ONNX: {done.path}, {size(done.bytes)}, differs from PyTorch by {done.error:.1g} (relative)."
    return Text("\n".join((line, *(f"  {note}" for note in done.notes))))


def notes_text(notes: Iterable[Note]) -> RenderableType:
    """Notes by topic; long lists are cut, and say so."""
    topics: dict[str, list[Note]] = {}
    for note in notes:
        topics.setdefault(note.topic, []).append(note)
    order = sorted(topics, key=lambda t: (t != "hint", list(topics).index(t)))
    parts: list[RenderableType] = []
    for topic in order:
        parts.append(Text(_TOPICS.get(topic, topic.capitalize()), "bold"))
        reasons: dict[str, list[str]] = {}
        for note in topics[topic]:
            reasons.setdefault(note.text, []).append(note.where)
        for text, places in list(reasons.items())[:_LISTED]:
            where = [place for place in places if place]
            shown = ", ".join(where[:3]) + (f" and {len(where) - 3} more" if len(where) > 3 else "")
            line = f"{shown}: {text}" if shown else text
            parts.append(Padding(Text(line), (0, 0, 0, 2)))
        if len(reasons) > _LISTED:
            rest = f"and {len(reasons) - _LISTED} more; facts.json has all of them"
            parts.append(Padding(Text(rest), (0, 0, 0, 2)))
    return Group(*parts)


def _rows(found: Measurement) -> list[tuple[str, str]]:
    cost, rows = found.cost, []
    if found.accuracy is not None:
        share = found.metric == "accuracy"
        value = percent(found.accuracy, 2) if share else f"{found.accuracy:.4g}"
        where = " (training)" if found.split == "train" else ""
        rows.append((found.metric + where, value))
    if found.loss is not None:
        rows.append(("loss", f"{found.loss:.4f}"))
    if found.perplexity is not None:
        rows.append(("perplexity", f"{found.perplexity:.4g}"))
    if found.samples:
        rows.append(("samples", f"{found.samples:,}"))
    if found.one_class:
        rows.append(("classes", "one only"))
    rows += [
        ("parameters", count(cost.parameters)),
        ("non-zeros", count(cost.nonzeros)),
        ("sparsity, all", percent(cost.sparsity)),
        ("sparsity, pruned", percent(cost.pruned_sparsity)),
    ]
    if cost.macs is not None:
        rows.append(("multiply-adds", count(cost.macs)))
    rows.append(("file", size(cost.bytes)))
    if found.latency is not None:
        rows.append((f"latency, batch {found.latency.batch}", _latency(found.latency)))
        rows.append(("threads", str(found.latency.threads)))
    return rows


def _latency(found: Latency) -> str:
    # On a busy machine a few passes take many times longer: then a "±" would say nothing.
    if found.p90 > 1.5 * found.median:
        return f"{milliseconds(found.median).removesuffix(' ms')}, p90 {found.p90:.3g} ms"
    spread = max(found.p90 - found.median, found.median - found.p10)
    digits = max(0, 3 - len(f"{found.median:.0f}")) if found.median >= 1 else 3
    return f"{milliseconds(found.median).removesuffix(' ms')} ± {spread:.{digits}f} ms"


def _changes(found: Comparison) -> dict[str, str]:
    a, b = found.a, found.b
    changes = {
        "non-zeros": fewer(a.cost.nonzeros, b.cost.nonzeros),
        "multiply-adds": fewer(a.cost.macs, b.cost.macs),
        "file": times(found.size_ratio, "smaller", "larger"),
    }
    if found.difference is not None:
        where = " (training)" if a.split == "train" else ""
        change = (
            points(found.difference, found.difference_error)
            if a.metric == "accuracy"
            else f"{found.difference:+.4g}"
        )
        changes[a.metric + where] = change
    if a.loss is not None and b.loss is not None:
        changes["loss"] = f"{b.loss - a.loss:+.4f}"
    if a.perplexity is not None and b.perplexity is not None:
        changes["perplexity"] = f"{b.perplexity - a.perplexity:+.3g}"
    if a.latency is not None and found.speed is not None:
        same = found.speed.verdict == "same"
        word = found.speed.words if same else times(found.speed.ratio, "faster", "slower")
        changes[f"latency, batch {a.latency.batch}"] = word
    return changes


def _table(first: str, *others: str, least: int) -> Table:
    """A table whose first column keeps ``least`` characters on a narrow terminal."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column(first, overflow="fold", min_width=least)
    for name in others:
        left = name == "shape"
        table.add_column(name, justify="left" if left else "right", no_wrap=True)
    return table
