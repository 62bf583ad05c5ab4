"""``secateur ticket``: find lottery tickets, level after level."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text
from torch import nn

from secateur.cli import options
from secateur.cli.flags import Flags, recipe_from
from secateur.cli.screen import screen
from secateur.core.budget import number
from secateur.core.errors import UsageError
from secateur.core.facts import environment
from secateur.drive.parts import read_plain
from secateur.experiments import (
    TicketPlan,
    Training,
    emergent_structure,
    find_ticket,
    level_lines,
    overall_structure,
)
from secateur.experiments.reading import require_errors
from secateur.formats.container import require_storable
from secateur.frontends import load_data, load_model
from secateur.report import notes_text
from secateur.report.tickets import structure_table, ticket_table

_RECIPE, _TRAIN, _REWIND = "What to prune", "Training", "Levels and rewinding"


def _part(name: str, example: str) -> Any:
    text = f"{example} See secateur inspect --{name}."
    return typer.Option(metavar="NAME[:KEY=VALUE,...]", help=text, rich_help_panel=_RECIPE)


def _training(metavar: str, text: str) -> Any:
    return typer.Option(metavar=metavar, help=text, rich_help_panel=_TRAIN)


def _rewinding(metavar: str, text: str) -> Any:
    return typer.Option(metavar=metavar, help=text, rich_help_panel=_REWIND)


def ticket(  # noqa: PLR0913, PLR0917 - a parameter for each option
    model: options.Model,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="FOLDER", help="Of runs; finished stages are kept."),
    ],
    data: Annotated[
        str,
        typer.Option(
            metavar="FILE.PY:FUNCTION",
            help="Training and test batches, and a metric if there is one: larger is better.",
        ),
    ],
    weights: options.Weights = None,
    architecture: options.Architecture = None,
    levels: Annotated[
        str | None,
        _rewinding(
            "SHARE,...",
            "Sparsities, e.g. 0.36,0.79. Default: 20% of the rest a level, up to --sparsity.",
        ),
    ] = None,
    rewind: Annotated[
        str,
        _rewinding(
            "WORD",
            "What goes back: weights, or the learning rate alone (rate); finetune: nothing; reinit: "
            "new random weights.",
        ),
    ] = "weights",
    rewind_to: Annotated[
        str, _rewinding("EPOCHS", "To when in the dense training; 500steps counts steps.")
    ] = "0",
    one_shot: Annotated[
        bool,
        typer.Option(
            "--one-shot",
            metavar="",
            help="Each level straight from dense.",
            rich_help_panel=_REWIND,
        ),
    ] = False,
    recipe: Annotated[
        str | None,
        typer.Option(metavar="FILE.YAML", help="All of this in a file.", rich_help_panel=_RECIPE),
    ] = None,
    sparsity: Annotated[
        str | None,
        typer.Option(metavar="SHARE", help="The last level.", rich_help_panel=_RECIPE),
    ] = None,
    criterion: Annotated[str | None, _part("criteria", "How much a weight matters.")] = None,
    pattern: Annotated[str | None, _part("patterns", "Which go together, e.g. rows.")] = None,
    allocation: Annotated[str | None, _part("allocations", "How much where, e.g. global.")] = None,
    ignore: options.Ignore = None,
    include: options.Include = None,
    epochs: Annotated[float, _training("N", "Of the dense training.")] = 10.0,
    lr: Annotated[float, _training("RATE", "Peak learning rate.")] = 0.1,
    optimizer: Annotated[str, _training("NAME", "sgd or adamw.")] = "sgd",
    decay: Annotated[str, _training("NAME", "Of the rate: steps or cosine.")] = "steps",
    seed: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Of everything random. Default: that of the recipe, or 0.",
            show_default=False,
        ),
    ] = None,
    connectivity: Annotated[
        bool,
        typer.Option(
            "--connectivity",
            metavar="",
            help="Also measure the line from each level to the one before: is there a barrier?",
        ),
    ] = False,
    threads: options.Threads = None,
    json: options.Json = False,
) -> None:
    """Train MODEL, prune it, rewind, train again: lottery tickets, level after level.

    A run that was cut off goes on where it was; what is finished is only read. Each level is a
    bundle.

    secateur ticket net.py:build -o runs --data data.py:load --levels 0.36,0.79 --rewind rate
    """
    with screen("ticket", json=json, threads=threads) as out:
        flags = Flags(
            recipe=recipe,
            sparsity=sparsity,
            criterion=criterion,
            pattern=pattern,
            allocation=allocation,
            ignore=tuple(ignore or ()),
            include=tuple(include or ()),
        )
        wanted = recipe_from(flags)
        _require_one_target(levels, sparsity, recipe)
        if seed is not None:  # the same recipe, another draw
            wanted = dataclasses.replace(wanted, seed=seed)
        steps = re.fullmatch(r"(\d+)\s*steps?", rewind_to)
        plan = TicketPlan(
            levels=None if levels is None else _levels(levels),
            rewind=rewind,
            rewind_to=float(steps[1]) if steps else number(rewind_to),
            unit="steps" if steps else "epochs",
            one_shot=one_shot,
            training=Training(
                epochs=epochs, lr=lr, optimizer=optimizer, decay=decay, seed=wanted.seed
            ),
        )
        network = _network(model, weights, architecture)
        with out.progress() as progress:
            batches = load_data(data)
            if connectivity:
                require_errors(_built(network), batches)
            found = find_ticket(
                network, wanted, batches, folder=output, plan=plan, progress=progress
            )
        content = found.to_dict()
        if connectivity:
            with out.working("measuring the lines between levels"):
                lines = level_lines(_built(network), found, batches)
            content["connectivity"] = [
                {**dataclasses.asdict(line), "barrier": line.barrier} for line in lines
            ]
        out.text.print(ticket_table(content))
        structure = overall_structure(emergent_structure(found.masks()[-1], _built(network)))
        shares = {kind: (each.share, each.expected) for kind, each in structure.items()}
        out.show(structure_table(shares))
        if found.notes:
            out.show(notes_text(found.notes))
        out.show(Text(f"Each level is a bundle in {found.folder}."))
        told = {kind: {"found": a, "expected": b} for kind, (a, b) in shares.items()}
        out.finish({**content, "structure": told, "environment": environment()})


def _require_one_target(levels: str | None, sparsity: str | None, recipe: str | None) -> None:
    if levels is not None and recipe is not None and _has_target(recipe):
        raise UsageError(
            f"--levels {levels} --recipe {recipe}",
            "the recipe has a target, and both say where the levels end",
            "the last of --levels is the target",
            "take the target out of the file, or leave --levels out",
        )
    if levels is not None and sparsity is not None:
        raise UsageError(
            f"--levels {levels} --sparsity {sparsity}",
            "both say where the levels end",
            "the last of --levels is the target",
            "leave one of them out",
        )


def _has_target(recipe: str) -> bool:
    """Whether a file says how sparse, itself or as an argument of its method."""
    plain = read_plain(recipe)
    method = plain.get("method")
    arguments = list(method.values()) if isinstance(method, Mapping) else []
    return plain.get("target") is not None or any(
        isinstance(own, Mapping) and "sparsity" in own for own in arguments
    )


def _network(
    model: str, weights: str | None, architecture: str | None
) -> nn.Module | Callable[[], nn.Module]:
    """A function where the file's own function draws the weights, else the network."""
    loaded = load_model(model, weights=weights, model=architecture)
    require_storable(loaded.model.state_dict())
    if loaded.masks:
        raise UsageError(
            f"tickets of {model!r}",
            f"it is a pruned network ({loaded.masks.sparsity:.1%} zeros)",
            "tickets start from a dense network",
            "name the dense one",
        )
    if weights is None and ".py:" in model:
        return lambda: load_model(model).model
    return loaded.model


def _built(network: nn.Module | Callable[[], nn.Module]) -> nn.Module:
    return network if isinstance(network, nn.Module) else network()


def _levels(text: str) -> tuple[float, ...]:
    return tuple(number(part) for part in text.split(","))
