"""Folders that are written whole: links in their place, and two writers at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from secateur.core import atomic
from secateur.core.atomic import new_folder, require_new
from secateur.core.errors import OutputExists


def write(path: Path, text: str, *, overwrite: bool = False) -> None:
    with new_folder(path, overwrite=overwrite) as temporary:
        (temporary / "result").write_text(text)


def test_two_writers_at_once_do_not_replace_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, sync = tmp_path / "out", atomic._sync

    def slow(
        entry: Path,
    ) -> None:  # the other one is done while this one brings its files to the disk
        if not place.exists():
            place.mkdir()
            (place / "result").write_text("first")
        sync(entry)

    monkeypatch.setattr(atomic, "_sync", slow)
    with pytest.raises(OutputExists, match="it already exists"):
        write(place, "second")
    assert (place / "result").read_text() == "first"
    assert list(tmp_path.iterdir()) == [place]
    write(place, "third", overwrite=True)
    assert (place / "result").read_text() == "third"


def test_a_link_stays_one_and_what_it_leads_to_is_written(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    link = tmp_path / "out"
    link.symlink_to(tmp_path / "disk" / "real")  # nothing is there yet
    require_new(link, {"result"})
    write(link, "first")
    with pytest.raises(OutputExists):
        write(link, "second")
    write(link, "third", overwrite=True)
    assert link.is_symlink()
    assert (tmp_path / "disk" / "real" / "result").read_text() == "third"
    assert sorted(tmp_path.iterdir()) == [tmp_path / "disk", link]
    assert list((tmp_path / "disk").iterdir()) == [tmp_path / "disk" / "real"]
