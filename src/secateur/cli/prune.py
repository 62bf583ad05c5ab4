"""``secateur prune``: prune a model, prove what was gained, write the bundle."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from secateur.cli import options
from secateur.cli.batches import data_from, measurable
from secateur.cli.flags import Flags, describe, recipe_from
from secateur.cli.places import kept, require_places
from secateur.cli.screen import Screen, screen
from secateur.core.batches import Batch, Data, first_of
from secateur.core.errors import UsageError
from secateur.drive.oneshot import prune as run
from secateur.drive.plan import plan
from secateur.drive.pruned import Pruned
from secateur.drive.recipe import Recipe
from secateur.drive.training.held import attach_
from secateur.drive.training.recorder import Checkpoints
from secateur.evaluate import Comparison
from secateur.evaluate import compare as compare_networks
from secateur.evaluate.measure import batches_of
from secateur.formats.container import require_storable
from secateur.frontends import Exported, Loaded, export_onnx, load_model
from secateur.report import comparison_table, exported_text, layer_table, notes_text, verdict_text
from secateur.report.jsonreport import comparison_json
from secateur.report.units import count, percent

_RECIPE, _TRAIN = options.RECIPE, options.TRAIN


def _part(name: str, example: str) -> Any:
    text = f"{example} See secateur inspect --{name}."
    return typer.Option(metavar="NAME[:KEY=VALUE,...]", help=text, rich_help_panel=_RECIPE)


def prune(  # noqa: PLR0913, PLR0917 - a parameter for each option
    model: options.Model,
    output: options.Output,
    data: options.Data = None,
    weights: options.Weights = None,
    architecture: options.Architecture = None,
    recipe: options.RecipeFile = None,
    method: Annotated[str | None, _part("methods", "A published method to start from.")] = None,
    sparsity: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE",
            help="Share of zeros among the pruned weights, e.g. 90% or 0.9. Default: 50%.",
            rich_help_panel=_RECIPE,
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            metavar="UNIT=VALUE",
            help="Instead: what the whole model may keep, e.g. macs=50%, params=20000, bytes=1e6.",
            rich_help_panel=_RECIPE,
        ),
    ] = None,
    criterion: Annotated[str | None, _part("criteria", "How much a weight matters.")] = None,
    pattern: Annotated[str | None, _part("patterns", "Which go together, e.g. 2:4, 4x1.")] = None,
    allocation: Annotated[str | None, _part("allocations", "How much where.")] = None,
    schedule: Annotated[str | None, _part("schedules", "When.")] = None,
    recovery: Annotated[
        list[str] | None, _part("recoveries", "Repair of the survivors. Repeatable.")
    ] = None,
    sequential: Annotated[
        bool | None,
        typer.Option(
            "--sequential/--parallel",
            metavar="",
            help="Measure each weight on the network as pruned so far, or all on the dense one.",
            rich_help_panel=_RECIPE,
        ),
    ] = None,
    ignore: options.Ignore = None,
    include: options.Include = None,
    epochs: Annotated[
        float | None,
        typer.Option(
            metavar="N",
            help="Train: prune during the first half, fine-tune to the end.",
            rich_help_panel=_TRAIN,
        ),
    ] = None,
    lr: options.Lr = None,
    distill: options.Distill = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Save training there; the same command continues a run that was interrupted.",
            rich_help_panel=_TRAIN,
        ),
    ] = None,
    checkpoint_every: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Steps between two (default 500).", rich_help_panel=_TRAIN
        ),
    ] = None,
    calibration: options.Calibration = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Of everything random.")] = None,
    onnx: options.Onnx = None,
    overwrite: options.Overwrite = False,
    threads: options.Threads = None,
    json: options.Json = False,
) -> None:
    """Prune MODEL and write a bundle: the weights, the recipe, and the facts of the run.

    Without flags: magnitude, half of each layer. With --data and --epochs: gradually, with training.

        secateur prune net.py:build -o small --sparsity 90% --data data.py:load --epochs 5
    """
    with screen("prune", json=json, threads=threads) as out:
        flags = Flags(
            recipe=recipe,
            method=method,
            sparsity=sparsity,
            target=target,
            criterion=criterion,
            pattern=pattern,
            allocation=allocation,
            schedule=schedule,
            recovery=tuple(recovery or ()),
            sequential=sequential,
            ignore=tuple(ignore or ()),
            include=tuple(include or ()),
            epochs=epochs,
            lr=lr,
            distill=distill,
            seed=seed,
        )
        wanted = recipe_from(flags)
        require_places(output, onnx, data, overwrite=overwrite)
        saved = _checkpoints(wanted, checkpoint, checkpoint_every)
        loaded = out.noting(load_model(model, weights=weights, model=architecture))
        require_storable(loaded.model.state_dict())
        batches = data_from(data, calibration)
        _announce(out, loaded, wanted, model)
        pruned = _run(out, loaded, wanted, batches, saved)
        exported = None
        with kept(pruned, output, overwrite=overwrite):
            with out.watching(measurable(batches)) as watched:
                found = compare_networks(loaded.model, pruned, watched)
            pruned.facts.measures["comparison"] = comparison_json(found)
            if onnx is not None:
                with out.working("exporting"):
                    exported = export_onnx(pruned.model, _example(batches), onnx)
        _report(out, pruned, found, exported, output=output)


def _checkpoints(recipe: Recipe, folder: Path | None, every: int | None) -> Checkpoints | None:
    if folder is None and every is None:
        return None
    if folder is None:
        raise UsageError(
            f"--checkpoint-every {every}",
            "there is no --checkpoint",
            "a run saves itself into a folder",
            "say where: --checkpoint",
        )
    if recipe.finetune is None:
        raise UsageError(
            f"--checkpoint {folder}",
            "this recipe does not train",
            "checkpoints save training",
            "leave it out, or add --epochs",
        )
    return Checkpoints(folder) if every is None else Checkpoints(folder, every)


def _announce(out: Screen, loaded: Loaded, recipe: Recipe, name: str) -> None:
    chosen = plan(loaded.model, recipe).chosen
    inside = sum(slot.tensor(loaded.model).numel() for slot in chosen)
    whole = sum(p.numel() for p in loaded.model.parameters())
    target = recipe.target
    assert target is not None
    amount = percent(target.value) if target.value < 1 else count(target.value)
    table = Table.grid(padding=(0, 2))
    rows = [
        ("model", name),
        ("takes part", f"{len(chosen)} weights, {count(inside)} of {count(whole)} parameters"),
        ("target", f"{target.unit} {amount}"),
        *describe(recipe),
    ]
    for key, value in rows:
        table.add_row(Text(key, "bold"), Text(value))
    out.text.print(table)


def _run(
    out: Screen, loaded: Loaded, recipe: Recipe, data: Data | None, saved: Checkpoints | None
) -> Pruned:
    if loaded.masks:  # prune a pruned model further: what is gone stays gone
        attach_(loaded.model, loaded.masks)
    with out.progress() as progress:
        pruned = run(loaded.model, recipe, data, progress=progress, checkpoint=saved)
    pruned.facts.environment["source"] = dict(loaded.source)
    return pruned


def _report(
    out: Screen, pruned: Pruned, found: Comparison, exported: Exported | None, *, output: Path
) -> None:
    facts = pruned.facts
    out.show(layer_table(facts), comparison_table(found), verdict_text(found.verdict))
    if facts.notes:
        out.show(notes_text(facts.notes))
    out.show(Text(f"Written to {output} in {facts.measures['seconds']:.1f} s of pruning."))
    if exported is not None:
        out.text.print(exported_text(exported))
    layers = [{**dataclasses.asdict(x), "sparsity": x.sparsity} for x in facts.layers]
    out.finish(
        {
            "output": str(output),
            "recipe": facts.recipe,
            "fingerprint": facts.fingerprint,
            "sparsity": facts.sparsity,
            "layers": layers,
            "comparison": comparison_json(found),
            "notes": [dataclasses.asdict(note) for note in facts.notes],
            "history": facts.history,
            "seconds": facts.measures["seconds"],
            "environment": facts.environment,
            "onnx": None if exported is None else dataclasses.asdict(exported),
        }
    )


def _example(data: Data | None) -> Batch:
    assert data is not None
    return first_of(batches_of(data)[1])
