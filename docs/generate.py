"""Write `methods.md` and `reference/` from the docstrings: python docs/generate.py."""

import dataclasses
import importlib.util
import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from docstrings import COLUMNS, clean, entry, markdown, signature

HERE = Path(__file__).parent
PUBLIC = """secateur secateur.score secateur.pattern secateur.allocate secateur.schedule secateur.recover
secateur.learn secateur.structure secateur.allocate.widths secateur.drive.recipe
secateur.drive.methods secateur.drive.recipe_file secateur.drive.structural.shrink
secateur.drive.structural.recipe secateur.drive.structural.methods
secateur.drive.training.regrow secateur.drive.training.learned
secateur.drive.training.learn_masks
secateur.drive.training.resume secateur.drive.training.order secateur.drive.training.recorder
secateur.drive.training.ranks secateur.drive.training.session
secateur.drive.training.hosts secateur.drive.structural.heads
secateur.stats secateur.frontends secateur.formats secateur.formats.checkpoint secateur.report
secateur.report.jsonreport secateur.report.runtime secateur.report.doctor secateur.report.plots
secateur.report.plots_curves secateur.drive.structural.shrinking
secateur.drive.structural.uniform secateur.drive.structural.depth
secateur.drive.structural.experts secateur.drive.structural.branches secateur.frontends.surgery
secateur.frontends.transformers_save secateur.evaluate secateur.evaluate.robustness
secateur.experiments secateur.runtime secateur.testing secateur.core.weight secateur.core.widths
secateur.core.groups secateur.core.slots secateur.core.budget secateur.core.batches secateur.core.losses
secateur.core.facts secateur.core.masks secateur.core.selectors secateur.core.select
secateur.core.errors"""
KINDS = (
    "criterion",
    "pattern",
    "allocation",
    "schedule",
    "recovery",
    "rounding",
    "regrow",
    "group_criterion",
    "width_allocation",
    "cut_recovery",
)
TITLES = (
    "Criteria",
    "Patterns",
    "Allocations",
    "Schedules",
    "Recoveries",
    "Roundings",
    "Regrowth",
    "Group criteria",
    "Width allocations",
    "Recoveries of a cut",
)
METHODS = """# Methods

Every part in the catalogues, and every published method that is assembled from them.
The *name* is what a recipe file uses; the *call* is the same part in Python.
Where a part departs from its source, *differs* says so.

Made from the docstrings by `docs/generate.py`. Do not edit.
"""
REFERENCE = """# Reference

Made from the docstrings by `docs/generate.py`. Do not edit.
"""


def page(module: Any) -> str:
    """The reference page of a module: what it exports, or what it defines."""
    own = [k for k, v in vars(module).items() if getattr(v, "__module__", "") == module.__name__]
    text = [f"# {module.__name__}\n", "<!-- fmt: off -->\n", markdown(module.__doc__)]
    for key in getattr(module, "__all__", None) or [k for k in own if not k.startswith("_")]:
        value = getattr(module, key)
        if inspect.ismodule(value):
            text.append(f"## `{key}`\n\nThe module [{value.__name__}]({value.__name__}.md).\n")
        elif inspect.isclass(value) or inspect.isfunction(value):
            text += entry(key, value)
        elif isinstance(value, Mapping):
            rows = "\n".join(f"- `{k}`: `{getattr(v, '__name__', v)}`" for k, v in value.items())
            text.append(f"## `{key}`\n\nThe names in recipe files and their parts.\n\n{rows}\n")
    return "\n".join(text)


def cell(text: str) -> str:
    """Text for a table, where a bar would end the cell."""
    text = re.sub(r"\$[^$]*\$", lambda m: m[0].replace(r"\|", r"\Vert "), clean(text))
    text = re.sub(r"\$[^$]*\$", lambda m: m[0].replace("|", r"\vert "), text)
    return " ".join(text.replace("|", r"\|").split())


def table(rows: list[list[str]]) -> str:
    """A table; a column that nobody fills is left out."""
    used = [i for i in range(len(rows[0])) if any(row[i] for row in rows[1:])]
    lines = [[row[i] for i in used] for row in (rows[0], ["---"] * len(rows[0]), *rows[1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def part_row(key: str, part: type) -> list[str]:
    """Name, call, first sentence, and the fixed lines `**name** text` of the docstring."""
    doc = inspect.cleandoc(part.__doc__ or "")
    found = re.findall(r"\*\*(\w+)\*\* (.*?)(?=\n\*\*|\n\n|\Z)", doc, re.DOTALL)
    lines = [dict(found).get(column, "") for column in COLUMNS]
    call = signature(part.__name__, part)
    return [f"`{key}`", f"`{cell(call)}`", *map(cell, (doc.split("\n")[0], *lines))]


def brief(part: Any) -> str:
    """A part as a call, with what differs from the defaults."""
    if isinstance(part, tuple):
        return ", ".join(map(brief, part))
    if not dataclasses.is_dataclass(part):
        return repr(part)
    pairs = [(f, getattr(part, f.name)) for f in dataclasses.fields(part)]
    given = ", ".join(f"{f.name}={brief(v)}" for f, v in pairs if v != f.default)
    return f"{type(part).__name__}({given})"


def methods() -> str:
    """The table of everything in the catalogues."""
    from secateur import stats
    from secateur.drive.methods import ALIASES
    from secateur.drive.parts import CATALOGUES
    from secateur.drive.recipe import Recipe
    from secateur.drive.structural.methods import SHRINK_ALIASES
    from secateur.drive.structural.recipe import ShrinkRecipe

    head = ["name", "call", "what", *(c.lower() for c in COLUMNS)]
    text = [METHODS]
    measured = {n: getattr(stats, n) for n in stats.__all__}
    known = {n: s for n, s in measured.items() if "**formula**" in (s.__doc__ or "")}
    catalogues = {t: CATALOGUES[k] for k, t in zip(KINDS, TITLES, strict=True)}
    for title, parts in (catalogues | {"Statistics (what parts need)": known}).items():
        text += [f"## {title}\n", table([head, *(part_row(k, p) for k, p in parts.items())])]
    text[0] += "\n## Published methods\n\n" + made_of(ALIASES, Recipe)
    text[0] += "\n## Published methods of shrink\n\n" + made_of(SHRINK_ALIASES, ShrinkRecipe)
    text[0] += f"\n\nAll of them repair what is left: `recovery={brief(ShrinkRecipe().recovery)}`. "
    text[0] += "Published results are without that, or with training; FLAP corrects biases alone.\n"
    return "\n".join(text)


def made_of(aliases: Mapping[str, Any], kind: type) -> str:
    """The table of aliases: how each recipe differs from the default one."""
    rows = [["method", "what", "made of"]]
    for name, alias in aliases.items():
        recipe, plain = alias(), kind()
        keys = [f.name for f in dataclasses.fields(kind) if f.name not in ("criterion", "target")]
        made = [f"{k}={brief(v)}" for k in keys if (v := getattr(recipe, k)) != getattr(plain, k)]
        call = signature(name, alias).partition(" ->")[0]
        what = inspect.cleandoc(alias.__doc__ or "").split("\n")[0]
        rows.append(
            [f"`{call}`", what, " ".join(f"`{m}`" for m in (brief(recipe.criterion), *made))]
        )
    return table([[cell(text) for text in row] for row in rows])


def pages() -> dict[Path, str]:
    """Every generated page."""
    specs = [importlib.util.find_spec(name) for name in PUBLIC.split()]
    modules = {s.name: importlib.import_module(s.name) for s in specs if s and s.origin}
    index = [f"- [{n}]({n}.md): {clean(m.__doc__).splitlines()[0]}" for n, m in modules.items()]
    made = {n: page(m) for n, m in modules.items()} | {"index": "\n".join([REFERENCE, *index, ""])}
    paths = {HERE / "reference" / f"{name}.md": text for name, text in made.items()}
    return {HERE / "methods.md": methods()} | paths


if __name__ == "__main__":
    (HERE / "reference").mkdir(exist_ok=True)
    for old in (HERE / "reference").glob("*.md"):
        old.unlink()
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
