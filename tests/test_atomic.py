"""Folders that are written whole: links in their place, two writers at once, and full disks."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from secateur.cli.places import require_new_file
from secateur.core import atomic
from secateur.core.atomic import new_file, new_folder, require_new, sweep
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


def test_overwriting_is_not_advised_where_it_would_be_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    for path, found in ((tmp_path, "it holds mine.txt"), (tmp_path / "mine.txt", "it is a file")):
        for overwrite in (False, True):
            with pytest.raises(OutputExists, match=found) as caught:
                require_new(path, {"facts.json"}, overwrite=overwrite)
            assert "--overwrite" not in str(caught.value)
    (tmp_path / "mine.txt").rename(tmp_path / "facts.json")
    with pytest.raises(OutputExists, match="--overwrite"):
        require_new(tmp_path, {"facts.json"})
    require_new(tmp_path, {"facts.json"}, overwrite=True)


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


KILLED = """
import os, signal, sys
from pathlib import Path
from secateur.core import atomic

atomic._put = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
with atomic.new_folder(Path(sys.argv[1])) as temporary:
    (temporary / "result").write_text("half")
"""


def test_what_a_killed_writer_left_is_swept_by_the_next(tmp_path: Path) -> None:
    place = tmp_path / "out [1]"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(place)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 1
    write(tmp_path / "other", "whole")  # which the rest is not of
    (tmp_path / ".out [1].mine").touch()
    assert len(list(tmp_path.iterdir())) == 3
    write(place, "whole")
    assert {entry.name for entry in tmp_path.iterdir()} == {"other", ".out [1].mine", place.name}


@pytest.mark.parametrize("kind", [new_file, new_folder])
def test_what_another_writer_holds_is_not_swept(tmp_path: Path, kind: Any) -> None:
    place = tmp_path / "out"
    with kind(place) as first:
        sweep(tmp_path)
        assert first.exists()
        (first / "result" if first.is_dir() else first).write_text("whole")
    assert list(tmp_path.iterdir()) == [place]


def test_a_place_that_is_swept_before_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, real = [], tempfile.mkdtemp

    def swept(*arguments: Any) -> str:
        made.append(real(*arguments))
        if len(made) == 1:
            sweep(tmp_path)
        return made[-1]

    monkeypatch.setattr(tempfile, "mkdtemp", swept)
    write(tmp_path / "out", "whole")
    assert len(made) == 2
    assert (tmp_path / "out" / "result").read_text() == "whole"


@pytest.mark.parametrize("name", ["a" * 300, "a" * 240, "a\0b"])
@pytest.mark.parametrize("check", [partial(require_new, entries=None), require_new_file])
def test_a_name_that_no_file_can_have_is_told_early(tmp_path: Path, name: str, check: Any) -> None:
    with pytest.raises(FileError, match="a shorter name"):
        check(tmp_path / name)
    with pytest.raises(FileError), new_folder(tmp_path / name):
        raise AssertionError
    with pytest.raises(FileError), new_file(tmp_path / name):
        raise AssertionError
    assert not list(tmp_path.iterdir())


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
