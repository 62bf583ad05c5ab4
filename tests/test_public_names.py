"""Everything public exists, says what it does, and shows it in an example."""

from __future__ import annotations

import doctest
import importlib
import inspect
import types

import pytest

import secateur

# Home of each catalogue (name -> class) and its name.
CATALOGUES = {
    "secateur.score": "CRITERIA",
    "secateur.pattern": "PATTERNS",
    "secateur.allocate": "ALLOCATIONS",
    "secateur.schedule": "SCHEDULES",
    "secateur.recover": "RECOVERIES",
}
CRITERION_LINES = ("**formula**", "**Shapes**", "**Units**", "**Needs**", "**Source**")


def own_doc(thing: object) -> str:
    """The docstring that ``thing`` itself carries; one inherited from a parent does not count."""
    if isinstance(thing, type) or callable(thing) or isinstance(thing, types.ModuleType):
        doc = vars(thing).get("__doc__") if isinstance(thing, type) else thing.__doc__
        # A dataclass without a docstring gets its signature as one: "Name(field: int)".
        if doc and not doc.startswith(f"{getattr(thing, '__name__', '')}("):
            return inspect.cleandoc(doc)
    return ""


def has_example(doc: str) -> bool:
    """Whether at least one line of ``doc`` is run as a doctest."""
    return bool(doctest.DocTestParser().get_examples(doc))


def documented_object(name: str) -> bool:
    """Whether a public name is one that can carry a docstring (not a constant or a type alias)."""
    thing = getattr(secateur, name)
    return isinstance(thing, (type, types.ModuleType, types.FunctionType))


def entries() -> list[tuple[str, str, object]]:
    """Catalogue, key and class of everything in the catalogues that exist so far."""
    found: list[tuple[str, str, object]] = []
    for home, catalogue in CATALOGUES.items():
        try:
            module = importlib.import_module(home)
        except ModuleNotFoundError as error:
            if error.name != home:
                raise
            continue
        found += [(catalogue, key, entry) for key, entry in getattr(module, catalogue).items()]
    return found


ENTRIES = entries()
IDS = [f"{catalogue}[{key}]" for catalogue, key, _ in ENTRIES]


def test_all_names_exist_once() -> None:
    names = list(secateur.__all__)
    assert len(set(names)) == len(names)
    missing = [name for name in names if not hasattr(secateur, name)]
    assert missing == []


@pytest.mark.parametrize("name", [n for n in secateur.__all__ if not n.startswith("__")])
def test_public_name_has_an_example(name: str) -> None:
    if not documented_object(name):
        pytest.skip("a constant: nothing to document at run time")
    doc = own_doc(getattr(secateur, name))
    assert doc, f"secateur.{name} has no docstring of its own"
    if not isinstance(getattr(secateur, name), types.ModuleType):
        assert has_example(doc), f"the docstring of secateur.{name} has no example (>>>)"


@pytest.mark.parametrize(("catalogue", "key", "entry"), ENTRIES, ids=IDS)
def test_catalogue_entry_says_what_it_is(catalogue: str, key: str, entry: object) -> None:
    doc = own_doc(entry)
    assert doc, f"{catalogue}[{key!r}] has no docstring of its own"
    summary, *rest = doc.splitlines()
    assert summary.rstrip().endswith("."), f"{catalogue}[{key!r}]: the summary is not one line"
    assert not rest or not rest[0].strip(), f"{catalogue}[{key!r}]: the summary is not one line"


@pytest.mark.parametrize(("catalogue", "key", "entry"), ENTRIES, ids=IDS)
def test_criterion_has_the_five_lines(catalogue: str, key: str, entry: object) -> None:
    if catalogue != "CRITERIA":
        return
    doc = own_doc(entry)
    missing = [line for line in CRITERION_LINES if line.lower() not in doc.lower()]
    assert missing == [], f"{catalogue}[{key!r}] lacks {missing}"


class _Parent:
    """A parent.

    Example:
        >>> 1 + 1
        2
    """


class _Child(_Parent):
    pass


def test_own_doc_does_not_count_what_is_inherited() -> None:
    assert has_example(own_doc(_Parent))
    assert own_doc(_Child) == ""
    assert not has_example("Example:\n    no prompt here")
