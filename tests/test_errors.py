"""Errors as objects."""

from __future__ import annotations

import copy

import pytest

from secateur.core import errors

SAMPLES = [
    errors.UsageError("asked", "found", "why", "do"),
    errors.UnknownName("pattern", "bloks", ["blocks", "rows"]),
    errors.OutputExists("asked", "found"),
    errors.MissingExtra("onnx", "onnx", "reading ONNX"),
    errors.MissingNative("it was not built"),
    errors.NotYet("asked", "found"),
]


@pytest.mark.parametrize("error", SAMPLES, ids=lambda e: type(e).__name__)
def test_an_error_can_be_copied(error: errors.SecateurError) -> None:
    """What pickles it for another process rebuilds it in the same way."""
    for again in (copy.copy(error), copy.deepcopy(error)):
        assert type(again) is type(error)
        assert str(again) == str(error)
        assert again.parts() == error.parts()
        assert again.exit_code == error.exit_code


@pytest.mark.parametrize("known", [["blocks", "rows"], []])
def test_a_name_without_a_near_match_has_all_parts(known: list[str]) -> None:
    error = errors.UnknownName("pattern", "xyzzy", known)
    assert all(error.parts().values())
