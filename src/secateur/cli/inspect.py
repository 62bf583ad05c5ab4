"""``secateur inspect``: what can be pruned in a model, and which parts a recipe is made of."""

from __future__ import annotations

import dataclasses
import inspect as introspection
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text
from torch import nn

from secateur.cli import options
from secateur.cli.flags import Flags, recipe_from
from secateur.cli.screen import Screen, screen
from secateur.core.batches import first_of, inputs_of
from secateur.core.errors import UsageError
from secateur.core.plain import numbers_of
from secateur.core.slots import Slot
from secateur.drive.methods import ALIASES
from secateur.drive.parts import CATALOGUES
from secateur.drive.plan import plan
from secateur.drive.structural.methods import SHRINK_ALIASES
from secateur.drive.structural.width_cost import removable_share
from secateur.frontends import load_data, load_model
from secateur.frontends.example import example_inputs
from secateur.report.structure import parameters_table, structure_rows, widths_table
from secateur.report.units import count, percent
from secateur.structure import couple

_LISTS: dict[str, Mapping[str, Callable[..., Any]]] = {
    "methods": ALIASES,
    "shrink-methods": SHRINK_ALIASES,
    "criteria": CATALOGUES["criterion"],
    "patterns": CATALOGUES["pattern"],
    "allocations": CATALOGUES["allocation"],
    "schedules": CATALOGUES["schedule"],
    "recoveries": CATALOGUES["recovery"],
    "group-criteria": CATALOGUES["group_criterion"],
    "width-allocations": CATALOGUES["width_allocation"],
}


#: Columns of a terminal from which on the names of axes are shown.
_WIDE = 100


def _list(name: str) -> Any:
    return typer.Option(
        f"--{name}", metavar="", help=f"List the {name.replace('-', ' ')}.", rich_help_panel="Lists"
    )


def inspect(  # noqa: PLR0913, PLR0917 - a parameter for each option
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="file.py:function, a Transformers folder, or a bundle.",
            show_default=False,
        ),
    ] = None,
    weights: options.Weights = None,
    architecture: options.Architecture = None,
    pattern: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Show what fits this pattern.", show_default=False),
    ] = None,
    ignore: options.Ignore = None,
    include: options.Include = None,
    structure: Annotated[
        bool,
        typer.Option(
            "--structure", metavar="", help="Show what shrink can remove, and why the rest stays."
        ),
    ] = False,
    inputs: options.Input = None,
    data: options.Data = None,
    methods: Annotated[bool, _list("methods")] = False,
    shrink_methods: Annotated[bool, _list("shrink-methods")] = False,
    criteria: Annotated[bool, _list("criteria")] = False,
    patterns: Annotated[bool, _list("patterns")] = False,
    allocations: Annotated[bool, _list("allocations")] = False,
    schedules: Annotated[bool, _list("schedules")] = False,
    recoveries: Annotated[bool, _list("recoveries")] = False,
    group_criteria: Annotated[bool, _list("group-criteria")] = False,
    width_allocations: Annotated[bool, _list("width-allocations")] = False,
    json: options.Json = False,
) -> None:
    """List every parameter of MODEL: prunable, left out, or not prunable, and why.

    secateur inspect net.py:build

    secateur inspect --criteria
    """
    with screen("inspect", json=json) as out:
        chosen = [
            name
            for name, wanted in zip(
                _LISTS,
                (
                    methods,
                    shrink_methods,
                    criteria,
                    patterns,
                    allocations,
                    schedules,
                    recoveries,
                    group_criteria,
                    width_allocations,
                ),
                strict=True,
            )
            if wanted
        ]
        if model is None and not chosen:
            raise UsageError(
                "secateur inspect",
                "neither a model nor a list was named",
                "",
                "name a model (file.py:function), or a list such as --criteria",
            )
        given = {
            "weights": weights,
            "model": architecture,
            "structure": structure or None,
            "pattern": pattern,
            "ignore": ignore,
            "include": include,
            "input": inputs,
            "data": data,
        }
        _require_use({name for name, value in given.items() if value}, model, chosen)
        content: dict[str, Any] = {}
        for name in chosen:
            content[name] = [_entry(key, part) for key, part in _LISTS[name].items()]
            _show_list(out, name, content[name])
        if model is not None:
            loaded = out.noting(load_model(model, weights=weights, model=architecture))
            if structure:
                content |= _structure(out, loaded.model, inputs, data)
                out.finish(content)
                return
            flags = Flags(pattern=pattern, ignore=tuple(ignore or ()), include=tuple(include or ()))
            slots = plan(loaded.model, recipe_from(flags)).slots
            content |= _parameters(out, loaded.model, slots)
        out.finish(content)


def _require_use(given: set[str], model: str | None, lists: list[str]) -> None:
    """Refuse options that would change nothing, each with what it stands beside."""
    if model is None:
        beside, idle = f"--{lists[0]}", sorted(given)
        why, do = "a list of parts is the same for all models", "name a MODEL"
    elif "structure" in given:
        beside, idle = "--structure", sorted(given & {"pattern", "ignore", "include"})
        why, do = "it shows all that shrink could remove", "leave --structure out"
        if {"input", "data"} <= given:
            beside, idle = "--input", ["data"]
            why, do = "each says what the network reads", "leave --input out"
    else:
        beside, idle = f"MODEL {model}", sorted(given & {"input", "data"})
        why, do = "only to follow its structure a network is run", "add --structure"
    if idle:
        raise UsageError(
            f"secateur inspect {beside} --{idle[0]}",
            f"--{idle[0]} would change nothing",
            why,
            f"leave --{idle[0]} out, or {do}",
        )


def _structure(
    out: Screen, model: nn.Module, inputs: str | None, data: str | None
) -> dict[str, Any]:
    if inputs is None and data is not None:
        found = load_data(data)
        batches = found.train if found.train is not None else found.test
        first = first_of([] if batches is None else batches)
        positional, named = inputs_of(first)
        example: Any = named or positional
    else:
        example = example_inputs(model, inputs)
    found_structure = couple(model, example)
    rows = structure_rows(model, found_structure)
    free = removable_share(model, found_structure)
    out.text.print(widths_table(found_structure))
    out.show(parameters_table(rows))
    out.show(
        Text(
            f"{len(found_structure.widths)} widths; up to {percent(free)} of the parameters can go."
        )
    )
    return {
        "widths": [
            {"name": w.name, "groups": w.groups, "parameters": w.parameters(), "why": w.why}
            for w in found_structure.widths
        ],
        "parameters": rows,
        "removable": free,
    }


def _parameters(out: Screen, model: nn.Module, slots: tuple[Slot, ...]) -> dict[str, Any]:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("parameter", overflow="fold")
    table.add_column("shape", overflow="fold")
    table.add_column("zeros", justify="right", no_wrap=True)
    table.add_column("role", ratio=1)
    rows: list[dict[str, Any]] = []
    wide = out.text.width >= _WIDE
    for slot in slots:
        tensor = slot.tensor(model)
        zeros = 1 - int(numbers_of(tensor).count_nonzero()) / max(1, tensor.numel())
        role = _role(slot)
        rows.append(
            {
                "name": slot.name,
                "module": slot.kind,
                "shape": list(slot.shape),
                "axes": list(slot.axes.names) if slot.axes else None,
                "elements": tensor.numel(),
                "zeros": zeros,
                "role": role,
                "reason": slot.reason,
                "tied": list(slot.aliases),
            }
        )
        tied = f" (also {', '.join(slot.aliases)})" if slot.aliases else ""
        text = f"{role}: {slot.reason}" if slot.reason else role
        style = "green" if slot.prunable else "yellow" if role == "left out" else "dim"
        table.add_row(
            Text(slot.name),
            _shape(slot, wide=wide),
            percent(zeros) if zeros else "",
            Text(text + tied, style),
        )
    out.text.print(table)
    whole = sum(p.numel() for p in model.parameters())
    inside = sum(r["elements"] for r in rows if r["role"] == "prunable")
    chosen = sum(1 for r in rows if r["role"] == "prunable")
    share = inside / whole if whole else 0.0
    out.show(
        Text(
            f"{chosen} of {len(rows)} parameters are prunable: {count(inside)} of {count(whole)} "
            f"numbers, {percent(share)}."
        )
    )
    totals = {"parameters": whole, "prunable": inside, "weights": chosen}
    return {"slots": rows, "totals": totals}


def _role(slot: Slot) -> str:
    if slot.prunable:
        return "prunable"
    return "not prunable" if slot.axes is None else "left out"


def _shape(slot: Slot, *, wide: bool) -> Text:
    """The shape, with the names of its axes where there is room."""
    sizes = "x".join(map(str, slot.shape)) or "scalar"
    named = f"{sizes} {','.join(slot.axes.names)}" if wide and slot.axes is not None else sizes
    return Text(named)


def _entry(name: str, part: Callable[..., Any]) -> dict[str, Any]:
    summary = (introspection.getdoc(part) or "").split("\n", 1)[0].replace("``", "")
    made = {
        f.name: f.default_factory()
        for f in (dataclasses.fields(part) if dataclasses.is_dataclass(part) else ())
        if f.default_factory is not dataclasses.MISSING
    }
    arguments = {
        p.name: None if p.default is p.empty else _default(made.get(p.name, p.default))
        for p in introspection.signature(part).parameters.values()
    }
    return {"name": name, "summary": summary, "arguments": arguments}


def _default(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return repr(value) if not callable(value) else "..."


def _show_list(out: Screen, title: str, entries: list[dict[str, Any]]) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column(title, no_wrap=True)
    table.add_column("what it is; arguments with their defaults", ratio=1)
    for entry in entries:
        table.add_row(Text(entry["name"]), Text(entry["summary"]))
        given = ", ".join(
            key if value is None else f"{key}={value}" for key, value in entry["arguments"].items()
        )
        if given:
            table.add_row("", Text(given, "dim"))
    out.text.print(table)
