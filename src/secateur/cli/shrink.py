"""``secateur shrink``: remove filters, channels, heads and neurons, and prove the cut."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from secateur.cli import options
from secateur.cli.batches import data_from, measurable
from secateur.cli.flags import part, require_alone, with_training
from secateur.cli.places import kept, require_places
from secateur.cli.screen import Screen, screen
from secateur.core.batches import first_of
from secateur.core.masks import Masks
from secateur.drive.pruned import Pruned
from secateur.drive.structural.cutting import as_batch, example_of
from secateur.drive.structural.recipe import ShrinkRecipe
from secateur.drive.structural.recipe_file import from_plain, read_shrink_recipe
from secateur.drive.structural.shrink import shrink as run
from secateur.evaluate import Comparison
from secateur.evaluate import compare as compare_networks
from secateur.evaluate.measure import batches_of
from secateur.formats.container import require_storable
from secateur.frontends import Exported, export_onnx, load_model
from secateur.frontends.example import example_inputs
from secateur.frontends.transformers import copy_readers
from secateur.frontends.transformers_save import SavedModel, require_transformers, save_transformers
from secateur.report import comparison_table, exported_text, notes_text, verdict_text
from secateur.report.jsonreport import comparison_json
from secateur.report.structure import cut_table, proof_text, steps_text, target_text
from secateur.report.units import percent

_RECIPE, _TRAIN = options.RECIPE, options.TRAIN


def _part(example: str) -> Any:
    return typer.Option(metavar="NAME[:KEY=VALUE,...]", help=example, rich_help_panel=_RECIPE)


def shrink(  # noqa: PLR0913, PLR0917 - a parameter for each option
    model: options.Model,
    output: options.Output,
    data: options.Data = None,
    weights: options.Weights = None,
    architecture: options.Architecture = None,
    inputs: options.Input = None,
    recipe: options.RecipeFile = None,
    method: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="A published method. See secateur inspect --shrink-methods.",
            rich_help_panel=_RECIPE,
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            metavar="UNIT=VALUE",
            help="What the whole model may keep: macs=50%, params=1e6, bytes=50%, latency=2x or "
            "latency=5 (milliseconds). Default: macs=50%.",
            rich_help_panel=_RECIPE,
        ),
    ] = None,
    criterion: Annotated[
        str | None, _part("How much a group matters. See secateur inspect --group-criteria.")
    ] = None,
    allocation: Annotated[str | None, _part("How much where: uniform, ranked or given.")] = None,
    recovery: Annotated[
        list[str] | None,
        _part("Repair: compensation, batchnorm, finetune, or none. Repeatable."),
    ] = None,
    ignore: options.Ignore = None,
    include: options.Include = None,
    uniform: Annotated[
        bool,
        typer.Option(
            "--uniform",
            metavar="",
            help="Like widths in all blocks stay alike, and Transformers models load with from_pretrained.",
            rich_help_panel=_RECIPE,
        ),
    ] = False,
    align: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            help="Widths in multiples of N; 1: any width. Default: up to 16, as runtimes like it.",
            rich_help_panel=_RECIPE,
        ),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="What measures a latency target: onnxruntime or torch. Default: ONNX Runtime "
            "where it can.",
            rich_help_panel=_RECIPE,
        ),
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Cut and repair in N steps. Default: 1.",
            rich_help_panel=_RECIPE,
        ),
    ] = None,
    epochs: Annotated[
        float | None,
        typer.Option(metavar="N", help="Fine-tune the cut network.", rich_help_panel=_TRAIN),
    ] = None,
    lr: options.Lr = None,
    distill: options.Distill = None,
    calibration: options.Calibration = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Of everything random.")] = None,
    onnx: options.Onnx = None,
    pretrained: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Write a folder for from_pretrained too (Transformers models)."
        ),
    ] = None,
    overwrite: options.Overwrite = False,
    threads: options.Threads = None,
    json: options.Json = False,
) -> None:
    """Remove filters, channels, heads and neurons of MODEL, repair it, and prove the cut.

    The result needs no special runtime: it is a smaller network of the same class. Without --data
    there is no repair and no accuracy; --input then says what the network reads.

    secateur shrink net.py:build -o small --target macs=50% --data data.py:load --epochs 3
    """
    with screen("shrink", json=json, threads=threads) as out:
        wanted = _recipe(
            recipe,
            {
                "method": method,
                "target": target,
                "criterion": criterion,
                "allocation": allocation,
                "recovery": recovery,
                "uniform": uniform or None,
                "align": align,
                "engine": engine,
                "rounds": rounds,
                "seed": seed,
            },
            {"ignore": ignore, "include": include},
            {"epochs": epochs, "lr": lr, "distill": distill},
        )
        require_places(output, onnx, data, pretrained=pretrained, overwrite=overwrite)
        loaded = out.noting(load_model(model, weights=weights, model=architecture))
        require_storable(loaded.model.state_dict())
        if pretrained is not None:
            require_transformers(loaded.model)
        batches = data_from(data, calibration)
        example = None
        if inputs is not None or batches is None:
            example = example_inputs(loaded.model, inputs)
        with out.progress() as progress:
            pruned = run(loaded.model, wanted, example, batches, progress=progress)
        pruned.facts.environment["source"] = dict(loaded.source)
        judged = measurable(batches)
        _note_masks(pruned, loaded.masks)
        masks = (loaded.masks or None, None)
        exported = None
        with kept(pruned, output, overwrite=overwrite):
            with out.watching(judged) as watched:
                taken = None if judged is not None or example is None else as_batch(example)
                found = compare_networks(loaded.model, pruned, watched, masks=masks, example=taken)
            pruned.facts.measures["comparison"] = comparison_json(found)
            if onnx is not None:
                assert batches is not None
                with out.working("exporting"):
                    exported = export_onnx(pruned.model, first_of(batches_of(batches)[1]), onnx)
        saved = None
        if pretrained is not None:
            assert pruned.surgery is not None
            with out.working("looking for a configuration"):
                saved = save_transformers(
                    pruned.model,
                    pretrained,
                    pruned.surgery,
                    example=example_of(example, batches),
                    overwrite=overwrite,
                )
            if "transformers" in loaded.source:
                copy_readers(Path(loaded.source["transformers"]), pretrained)
        _report(out, pruned, found, (exported, saved), output)


def _recipe(
    path: str | None,
    keys: dict[str, Any],
    selectors: dict[str, list[str] | None],
    training: dict[str, float | None],
) -> ShrinkRecipe:
    """The recipe of a file, or of flags: what was not given is None (or no names)."""
    if path is not None:
        require_alone(path, {**keys, **selectors, **training})
        return read_shrink_recipe(path)
    given = {key: value for key, value in keys.items() if value is not None}
    for key in ("criterion", "allocation"):
        if key in given:
            given[key] = part(key, given[key])
    recovery = given.pop("recovery", [])
    if recovery:
        given["recovery"] = [part("recovery", text) for text in recovery]
    scope = {key: list(value) for key, value in selectors.items() if value}
    if scope:
        given["scope"] = scope
    return with_training(from_plain(given), training, recovery)


def _note_masks(pruned: Pruned, masks: Masks) -> None:
    if masks:
        text = (
            f"MODEL has masks ({percent(masks.sparsity)} zeros), which end here: repairs fill the "
            "zeros, and the file stores all weights. Shrink first and prune the result"
        )
        pruned.facts.note("masks", "", text)


def _saved(saved: SavedModel) -> dict[str, Any]:
    return {**dataclasses.asdict(saved), "folder": str(saved.folder)}


def _report(
    out: Screen,
    pruned: Pruned,
    found: Comparison,
    beside: tuple[Exported | None, SavedModel | None],
    output: Path,
) -> None:
    facts, (exported, saved) = pruned.facts, beside
    out.show(cut_table(facts), target_text(facts), steps_text(facts), proof_text(facts))
    out.show(comparison_table(found), verdict_text(found.verdict))
    # Pinned parts are many and say the same; inspect --structure lists them.
    notes = [note for note in facts.notes if note.topic != "pinned"]
    if notes:
        out.show(notes_text(notes))
    pinned = len(facts.notes) - len(notes)
    if pinned:
        out.say(
            f"{pinned} axes of parameters stay as they are: see secateur inspect MODEL --structure."
        )
    out.show(Text(f"Written to {output} after {facts.measures['seconds']:.1f} s."))
    if exported is not None:
        out.text.print(exported_text(exported))
    if saved is not None:
        how = "from_pretrained" if saved.uniform else "secateur.load_transformers"
        out.say(f"Written to {saved.folder}; load it with {how}.")
    out.finish(
        {
            "output": str(output),
            "recipe": facts.recipe,
            "fingerprint": facts.fingerprint,
            "widths": [dataclasses.asdict(width) for width in facts.widths],
            "proof": facts.measures["proof"],
            "target": facts.measures["target"],
            "parameters": facts.measures["parameters"],
            "comparison": comparison_json(found),
            "notes": [dataclasses.asdict(note) for note in facts.notes],
            "history": facts.history,
            "seconds": facts.measures["seconds"],
            "environment": facts.environment,
            "onnx": None if exported is None else dataclasses.asdict(exported),
            "pretrained": None if saved is None else _saved(saved),
        }
    )
