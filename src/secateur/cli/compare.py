"""``secateur compare``: what was really gained from A to B."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from secateur.cli import options
from secateur.cli.batches import example_from
from secateur.cli.screen import screen
from secateur.core.errors import UnknownName, UsageError
from secateur.core.facts import environment
from secateur.core.masks import Masks
from secateur.evaluate import Comparison
from secateur.evaluate import compare as compare_networks
from secateur.experiments import Similarity, mask_jaccard
from secateur.formats import is_bundle
from secateur.frontends import load_data, load_model
from secateur.report import comparison_table, verdict_text
from secateur.report.jsonreport import comparison_json
from secateur.report.units import percent

GAIN_MISSING = 6
_REQUIRABLE = ("smaller", "faster", "accuracy")
# Far above the rounding of a difference, and far below one answer of any test set.
_ROUNDING = 1e-12
# Only accuracy can be: size always is, and without an example for the speed nothing was asked.
_UNMEASURED = (
    "not measured: the data have no classes as targets; a metric of your own takes its place"
)


def compare(  # noqa: PLR0913, PLR0917 - a parameter for each option
    a: Annotated[str, typer.Argument(metavar="A", help="The first model, e.g. the dense one.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The second model.")],
    data: options.Data = None,
    weights: options.Weights = None,
    architecture: options.Architecture = None,
    inputs: options.Input = None,
    require: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GAIN",
            help="Exit with 6 unless B is smaller, faster, or keeps its "
            "accuracy: accuracy=0.5 allows a loss of 0.5 points (no % sign). Repeatable.",
            show_default=False,
        ),
    ] = None,
    threads: options.Threads = None,
    json: options.Json = False,
) -> None:
    """Compare A with B: paired accuracy, size, and latency measured in turn.

    Of two masked networks it also says how alike their masks are.
    --weights belongs to A. --model belongs to whichever is a bundle. Without data, both are timed on
    random numbers of the shapes in --input.

        secateur compare net.py:build small --weights net.safetensors --data data.py:load
    """
    with screen("compare", json=json, threads=threads) as out:
        claims = [_claim(text, data, inputs) for text in require or ()]
        # --model is for bundles; a function or a folder says itself what to build.
        if architecture is not None and not (is_bundle(a) or is_bundle(b)):
            raise UsageError(
                f"--model {architecture}",
                f"neither {a!r} nor {b!r} is a bundle",
                "it says what to build for a bundle",
                "leave --model out",
            )
        first = out.noting(
            load_model(a, weights=weights, model=architecture if is_bundle(a) else None)
        )
        second = out.noting(load_model(b, model=architecture if is_bundle(b) else None))
        batches = None if data is None else load_data(data)
        example = example_from(inputs, data, first.model, second.model)
        masks = first.masks or None, second.masks or None
        with out.watching(batches) as watched:
            found = compare_networks(
                first.model, second.model, watched, masks=masks, example=example
            )
        out.text.print(comparison_table(found, (_short(a), _short(b))))
        out.show(verdict_text(found.verdict))
        if found.identical:
            out.show(Text("The two networks are identical, bit for bit."))
        alike = _alike(first.masks, second.masks)
        if alike is not None:
            out.show(
                Text(
                    "Masks: of the weights that either network keeps, both keep "
                    f"{percent(alike.whole.value)} (random masks: {percent(alike.given_layers.chance)})."
                )
            )
        missing = [
            text
            for text, (name, most) in zip(require or (), claims, strict=True)
            if not _holds(found, name, most)
        ]
        for text in missing:
            why = "" if found.gain(text.partition("=")[0]) else f" ({_UNMEASURED})"
            out.errors.print(Text(f"required and missing: {text}{why}", "bold red"))
        content = {
            "comparison": comparison_json(found),
            "masks": alike and {"jaccard": alike.whole.value, "chance": alike.given_layers.chance},
            "environment": environment(),
        }
        out.finish({**content, "required": list(require or ()), "missing": missing})
        if missing:
            raise typer.Exit(GAIN_MISSING)


def _alike(a: Masks, b: Masks) -> Similarity | None:
    """How alike the masks are; None unless both networks have them, of the same weights."""
    same = bool(a) and {n: m.shape for n, m in a.items()} == {n: m.shape for n, m in b.items()}
    return mask_jaccard(a, b, per_layer=False) if same else None


def _claim(text: str, data: str | None, inputs: str | None) -> tuple[str, float | None]:
    """``smaller``, ``faster``, ``accuracy`` or ``accuracy=0.5``."""
    name, equals, value = text.partition("=")
    if name not in _REQUIRABLE:
        raise UnknownName("gain to require", name, _REQUIRABLE)
    if equals and name != "accuracy":
        raise UsageError(
            f"--require {text}",
            f"{name} takes no value",
            "it holds or it does not",
            f"write {name}",
        )
    timed = name == "faster" and inputs is not None
    if data is None and name != "smaller" and not timed:
        raise UsageError(
            f"--require {text}",
            "no data was given",
            "it is measured on data",
            "add --data" + (", or --input" if name == "faster" else ""),
        )
    return name, _points(text, value) if equals else None


def _points(text: str, value: str) -> float:
    """The loss that is allowed; ``50%`` might be 50 points, half of one, or half of the accuracy."""
    try:
        most = float(value)
    except ValueError:
        most = math.nan
    if not math.isfinite(most):
        raise UsageError(
            f"--require {text}",
            f"{value!r} is no plain number",
            "the loss that is allowed is counted in points (of a metric of your own: in its unit)",
            "write e.g. accuracy=0.5 for half a point",
        )
    return most


def _holds(found: Comparison, name: str, most: float | None) -> bool:
    if most is None or found.difference is None:
        gain = found.gain(name)
        return gain is not None and gain.real
    # Accuracy is given in points; a metric of the user's own in its own unit.
    scale = 100 if found.a.metric == "accuracy" else 1
    # Of shares in double precision: 0.9 - 0.895 is a little more than 0.005.
    rounding = _ROUNDING * max(abs(value or 0.0) for value in (found.a.accuracy, found.b.accuracy))
    return (-found.difference - rounding) * scale <= most


def _short(spec: str) -> str:
    name = Path(spec).name or spec
    return name if len(name) <= 20 else name[:17] + "..."
