"""Folders that are written whole: links in their place, two writers at once, and full disks."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from secateur.core import atomic
from secateur.core.atomic import new_file, new_folder, require_new
from secateur.core.errors import FileError, OutputExists
from secateur.core.facts import Facts
from secateur.core.masks import Masks
from secateur.formats import read_bundle, write_bundle


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


LIMITED = """
import resource, sys, torch
from secateur.core.errors import FileError
from secateur.core.facts import Facts
from secateur.core.masks import Masks
from secateur.formats import write_bundle

resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)  # as on a full disk
tensors = {"w": torch.ones(100, 100)}
try:
    write_bundle(sys.argv[1], tensors, Masks({}), recipe={}, facts=Facts(), overwrite=True)
except FileError as error:
    print(error.found)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits of a process are those of POSIX")
@pytest.mark.parametrize("room", [10, 5_000])
def test_a_full_disk_is_an_error_of_four_parts_and_leaves_the_old(
    tmp_path: Path, room: int
) -> None:
    write_bundle(tmp_path / "out", {"w": torch.zeros(1)}, Masks({}), recipe={}, facts=Facts())
    words = [sys.executable, "-c", LIMITED, str(tmp_path / "out"), str(room)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert "broke off" in done.stdout, done.stderr
    assert "File too large" in done.stdout
    assert read_bundle(tmp_path / "out").tensors["w"].tolist() == [0.0]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_text_that_cannot_be_written_whole_is_one_too(tmp_path: Path) -> None:
    for make in (new_file, new_folder):
        with (
            pytest.raises(FileError, match=r"broke off \(No space left on device\)"),
            make(tmp_path / "out"),
        ):
            raise OSError(errno.ENOSPC, "No space left on device")
        with pytest.raises(OutputExists, match="this: stays"), make(tmp_path / "out"):
            raise OutputExists("this", "stays", "as it is", "")
    assert not list(tmp_path.iterdir())
