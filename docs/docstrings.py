"""A docstring and a signature as Markdown; `generate.py` makes pages of them."""

import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Any

COLUMNS = ("formula", "Needs", "Source", "Differs")
FIXED = (*COLUMNS, "Shapes", "Units")


def clean(text: str) -> str:
    """Sphinx roles as Markdown."""
    text = re.sub(r":math:`([^`]*)`", lambda m: f"${' '.join(m[1].split())}$", text)
    text = re.sub(r":\w+:`~?([\w.]+)`", lambda m: f"`{m[1].rpartition('.')[2]}`", text)
    return text.replace("``", "`")


def markdown(doc: str | None) -> str:
    """A Google-style docstring as Markdown."""
    out: list[str] = []
    for block in re.split(r"\n(?=(?:[A-Z]\w+:|::)\n)", inspect.cleandoc(doc or "")):
        head, _, body = block.partition("\n")
        inside, *after = re.split(r"\n\n(?=\S)", body.strip("\n"), maxsplit=1)
        inside = textwrap.dedent(inside)
        if head in ("::", "Example:"):
            kind = "text" if head == "::" else "pycon"
            out += [f"```{kind}\n{inside}\n```", *map(clean, after)]
        elif head in ("Args:", "Returns:", "Raises:", "Attributes:"):
            items = re.sub(r"(?m)^(\w+): ", r"- `\1`: ", clean(inside))
            out += [f"**{head[:-1]}**\n\n{items}", *map(clean, after)]
        else:  # the five fixed lines are points of a list
            out.append(re.sub(rf"(?m)^(?=\*\*({'|'.join(FIXED)})\*\* )", "- ", clean(block)))
    return "\n\n".join(part.strip() for part in out) + "\n"


def signature(name: str, thing: Any) -> str:
    """The call as it is written."""
    whole, parts, star = inspect.signature(thing), [], False
    for p in whole.parameters.values():
        if p.kind is p.KEYWORD_ONLY and not star:
            parts, star = [*parts, "*"], True
        default = getattr(p.default, "__name__", None) or repr(p.default)
        note = "" if p.annotation is p.empty else f": {p.annotation}"
        parts.append(p.name + note + ("" if p.default is p.empty else f" = {default}"))
    gives = (
        "" if whole.return_annotation in (whole.empty, "None", None) else whole.return_annotation
    )
    return f"{name}({', '.join(p for p in parts if p != 'self')})" + (gives and f" -> {gives}")


def entry(name: str, thing: Any, level: str = "##") -> Iterator[str]:
    """One documented name, then its documented members."""
    yield f"{level} `{name}`\n"
    if not isinstance(thing, property) and not getattr(thing, "_is_protocol", False):
        call = signature(name.rpartition(".")[2], thing)
        broken = call if len(call) < 96 else re.sub(r"([(,]) ?(?=\w+: |\*)", r"\1\n    ", call)
        yield f"```python\n{broken}\n```\n"
    yield markdown(thing.__doc__)
    for key, member in vars(thing).items() if inspect.isclass(thing) else ():
        inner = getattr(member, "__func__", member)
        shown = isinstance(inner, property) or inspect.isfunction(inner)
        if shown and inner.__doc__ and (key == "__call__" or not key.startswith("_")):
            yield from entry(f"{name}.{key}", inner, "###")
