"""The recipe and the facts of a bundle: plain values come back, everything else is refused."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.core.errors import FormatError, UsageError
from secateur.core.facts import Facts
from secateur.core.masks import Masks
from secateur.formats import read_bundle, write_bundle
from secateur.formats.texts import DEPTH_LIMIT, parse_facts, parse_recipe, recipe_text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small bundle. Tests change it and put it back."""
    folder = tmp_path_factory.mktemp("texts") / "b"
    write_bundle(folder, {}, Masks({}), recipe={"pattern": "2:4"}, facts=Facts())
    return folder


def refused(folder: Path, name: str) -> FormatError:
    """Reading must fail with a whole message that names the file."""
    with pytest.raises(FormatError) as caught:
        read_bundle(folder)
    assert name in str(caught.value)
    assert all(caught.value.parts().values()), caught.value.parts()
    return caught.value


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(recipe=st.dictionaries(st.text(), PLAIN, max_size=5))
def test_any_plain_recipe_comes_back(recipe: dict[str, Any]) -> None:
    assert parse_recipe(recipe_text(recipe).encode()) == recipe


def test_recipe_may_share_objects_but_not_hold_them(tmp_path: Path) -> None:
    shared = ["a"]
    assert parse_recipe(recipe_text({"x": shared, "y": shared}).encode()) == {
        "x": ["a"],
        "y": ["a"],
    }
    ring: list[Any] = []
    ring.append(ring)
    for bad in ({"x": torch.ones(1)}, {1: "x"}, {"x": ring}, {"x": ["a"] * 10**6}):
        with pytest.raises(UsageError) as caught:
            write_bundle(tmp_path / "b", {}, Masks({}), recipe=bad, facts=Facts())  # type: ignore[arg-type]
        assert all(caught.value.parts().values())
    with pytest.raises(UsageError):
        write_bundle(
            tmp_path / "b", {}, Masks({}), recipe={}, facts=Facts(measures={"x": torch.ones(1)})
        )
    assert list(tmp_path.iterdir()) == []


def test_the_largest_recipe_can_be_read_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateur.formats.texts.NODE_LIMIT", 50)
    edge = {"x": ["a"] * (50 - 4 - 2 - 1 - 2)}
    assert parse_recipe(recipe_text(edge).encode()) == edge
    edge["x"].append("a")
    with pytest.raises(UsageError, match="parts"):
        recipe_text(edge)


def test_the_deepest_recipe_can_be_read_back() -> None:
    deep: Any = []
    for _ in range(DEPTH_LIMIT - 2):
        deep = [deep]
    assert parse_recipe(recipe_text({"x": deep}).encode()) == {"x": deep}
    with pytest.raises(UsageError, match="deeper"):
        recipe_text({"x": [deep]})


BOMB = b"a: &a [x, x]\n" + b"".join(
    b"%c: &%c [*%c, *%c, *%c, *%c]\n" % (c, c, c - 1, c - 1, c - 1, c - 1) for c in b"bcdefghijklm"
)
RECIPES = {
    "bomb": BOMB,
    "anchor": b"a: &x 1",
    "alias": b"a: *x",
    "merge": b"a: {<<: {b: 1}, c: 2, <<: 5}",
    "tag": b"a: !!python/object/apply:os.getcwd []",
    "own tag": b"a: !x 1",
    "known tag": b"a: !!bool maybe",
    "huge": b"a: '" + b"x" * 1_000_000 + b"'",
    "many": b"a: [" + b"1," * 30_000 + b"]",
    "deep": b"a: " + b"[" * 15_000,
    "deep and closed": b"a: " + b"[" * 9_000 + b"]" * 9_000,
    "nested": b"a: " + b"[" * 40 + b"]" * 40,
    "date": b"a: 2001-01-01",
    "no date": b"a: 2001-99-99",
    "no number": b"a: 0b_",
    "long number": b"a: " + b"9" * 5000,
    "list": b"[1]",
    "empty": b"",
    "text": b"abc",
    "number key": b"1: 2",
    "list key": b"[1]: 2",
    "two documents": b"a: 1\n---\nb: 2",
    "not text": b"\xff\xfe\x00",
    "control": b"a: \x01",
    "open": b"a: {",
    "tab": b"a:\n\t- b",
}


@pytest.mark.parametrize("raw", RECIPES.values(), ids=RECIPES.keys())
def test_bad_recipes(folder: Path, raw: bytes) -> None:
    file = folder / "recipe.yaml"
    whole = file.read_bytes()
    try:
        file.write_bytes(raw)
        refused(folder, "recipe.yaml")
    finally:
        file.write_bytes(whole)


FACTS = {
    "open": b"{",
    "list": b"[]",
    "deep": b'{"recipe":' + b"[" * 200_000,
    "not text": b"\xff",
    "unknown field": b'{"x": 1}',
    "twice": b'{"fingerprint": "a", "fingerprint": "b"}',
    "layers": b'{"layers": 5}',
    "layer": b'{"layers": [{"name": "x"}]}',
    "shape": b'{"layers": [{"name": "x", "shape": 5, "total": 1, "kept": 1}]}',
    "sizes": b'{"layers": [{"name": "x", "shape": [1.5], "total": 1, "kept": 1}]}',
    "notes": b'{"notes": ["x"]}',
    "recipe": b'{"recipe": null}',
    "fingerprint": b'{"fingerprint": 1}',
    "long number": b'{"measures": {"x": ' + b"9" * 5000 + b"}}",
}


@pytest.mark.parametrize("raw", FACTS.values(), ids=FACTS.keys())
def test_bad_facts(folder: Path, raw: bytes) -> None:
    file = folder / "facts.json"
    whole = file.read_bytes()
    try:
        file.write_bytes(raw)
        refused(folder, "facts.json")
    finally:
        file.write_bytes(whole)


def test_oversized_facts(folder: Path) -> None:
    file = folder / "facts.json"
    whole = file.read_bytes()
    try:
        with file.open("r+b") as stream:
            stream.truncate(70_000_000)  # a sparse file: takes no room on the disk
        assert "64,000,000" in refused(folder, "facts.json").found
    finally:
        file.write_bytes(whole)


@settings(max_examples=200)
@given(
    raw=st.binary(max_size=40)
    | st.text("ab:-[]{},'\"|>&*!#%@ \n?0_.~=<1e", max_size=40).map(str.encode)
)
def test_any_bytes_as_text_files(raw: bytes) -> None:
    for parse in (parse_recipe, parse_facts):
        with contextlib.suppress(FormatError):
            parse(raw)
