"""A file or folder is written whole or not at all, whatever ends the write."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from chunkkv.files import errors_name_target, whole_directory, write_whole


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(("content", "expected"), [(b"\x00\xff\r\n", b"\x00\xff\r\n"), ("grün\n", "grün\n".encode())])
def test_bytes_are_written_as_they_are_and_text_as_utf8(tmp_path: Path, content: bytes | str, expected: bytes) -> None:
    write_whole(tmp_path / "file", content)
    assert (tmp_path / "file").read_bytes() == expected and names(tmp_path) == ["file"]


def test_a_file_that_is_there_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a much longer old text")
    write_whole(str(tmp_path / "file"), "new")
    assert (tmp_path / "file").read_text() == "new" and names(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
@pytest.mark.parametrize("old", [None, "old"])
def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, old: str | None
) -> None:
    if old is not None:
        (tmp_path / "file").write_text(old)

    def interrupted(*arguments: object) -> None:
        assert len(names(tmp_path)) == (1 if old is None else 2)  # the temporary file is there
        raise error

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(type(error)):
        write_whole(tmp_path / "file", "new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == ({} if old is None else {"file": old})


def test_text_that_cannot_be_encoded_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(UnicodeEncodeError):
        write_whole(tmp_path / "file", "\ud800")
    assert names(tmp_path) == []


def test_a_folder_of_the_same_name_is_no_file_to_replace(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    with pytest.raises(OSError, match="file"):
        write_whole(tmp_path / "file", "new")
    assert names(tmp_path) == ["file"]


def test_processes_that_write_the_same_file_do_not_collide(tmp_path: Path) -> None:
    program = (
        "import sys; from chunkkv.files import write_whole\n"
        "for _ in range(200): write_whole(sys.argv[1], sys.argv[2] * 100_000)\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "file"), each]) for each in "ab"]
    contents = set()
    while any(writer.poll() is None for writer in writers):
        if (tmp_path / "file").exists():
            contents.add((tmp_path / "file").read_text())
    assert [writer.returncode for writer in writers] == [0, 0]
    assert contents <= {"a" * 100_000, "b" * 100_000} and names(tmp_path) == ["file"]


def test_two_writes_of_one_process_use_two_temporary_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    monkeypatch.setattr(os, "replace", lambda temporary, target: used.append(temporary))
    write_whole(tmp_path / "file", "a")
    write_whole(tmp_path / "file", "b")
    assert len(set(used)) == 2


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_takes_its_name_when_it_is_complete(tmp_path: Path, there: bool) -> None:
    target = tmp_path / "parent" / "folder"
    if there:
        target.mkdir(parents=True)
    with whole_directory(target) as folder:
        (folder / "file").write_text("text")
        assert names(tmp_path / "parent") != ["folder"] and not (target / "file").exists()
    assert names(tmp_path / "parent") == ["folder"] and names(target) == ["file"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError()])
def test_a_folder_that_is_not_completed_is_removed(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), whole_directory(tmp_path / "folder") as folder:
        (folder / "file").write_text("text")
        raise error
    assert names(tmp_path) == []


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").touch()
    with pytest.raises(OSError, match="folder"), whole_directory(tmp_path / "folder") as folder:
        (folder / "new").touch()
    assert names(tmp_path) == ["folder"] and names(tmp_path / "folder") == ["old"]


@pytest.mark.parametrize("name", [None, ".target.", "target.partial", "elsewhere"])
def test_an_error_names_the_target_and_not_what_is_written_meanwhile(tmp_path: Path, name: str | None) -> None:
    """A full disk names nothing; a temporary file, something in it and a folder above it belong to the target."""
    temporary = tmp_path / "target.partial"
    paths = {None: None, ".target.": temporary / "file", "target.partial": temporary, "elsewhere": tmp_path / "other"}
    path = paths[name]
    with pytest.raises(OSError) as caught, errors_name_target("target", temporary):
        raise OSError(errno.ENOSPC, "No space left on device", None if path is None else str(path))
    assert caught.value.filename == ("target" if name != "elsewhere" else str(path))


def test_an_error_of_no_path_that_is_not_of_a_full_disk_stays(tmp_path: Path) -> None:
    with pytest.raises(BrokenPipeError) as caught, errors_name_target("target", tmp_path):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")
    assert caught.value.filename is None


def test_a_folder_that_cannot_be_written_to_is_named_as_it_was_given(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OSError) as caught, whole_directory(tmp_path / "file" / "target"):
        raise AssertionError("nothing is yielded")
    assert caught.value.filename == str(tmp_path / "file" / "target")
