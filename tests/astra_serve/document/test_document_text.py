"""A document's text where it is: in a file, and in an S3 service on this machine."""

import errno
import fcntl
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest
import s3fs

from astra_serve.document import document_text
from astra_serve.document.document_text import edit, read
from astra_serve.errors import BadDocument, Conflict, ServeError


@pytest.fixture(params=["file", "S3"])
def where(request, tmp_path: Path) -> str:
    """A document that is not there yet."""
    if request.param == "file":
        return str(tmp_path / "deep" / "adapters.yaml")
    return f"{request.getfixturevalue('bucket')}/{tmp_path.name}.yaml"


def put(where: str, text: str) -> None:
    """Write it without a lock or a condition."""
    with fsspec.open(where, "w", auto_mkdir=True) as stream:
        stream.write(text)


def test_a_missing_text_reads_as_empty_and_can_be_written(where: str) -> None:
    assert read(where) == ""
    assert edit(where, lambda text: text + "one") == ("", "one")
    assert edit(where, lambda text: text + " two") == ("one", "one two")
    assert edit(where, lambda text: text) == ("one two", "one two")
    assert read(where) == "one two"


def test_concurrent_writers_lose_no_change(where: str) -> None:
    words = [f"word{i}" for i in range(8)]
    together = threading.Barrier(len(words))

    def add(word: str) -> None:
        together.wait(10)
        edit(where, lambda text: f"{text} {word}")

    with ThreadPoolExecutor(len(words)) as pool:
        list(pool.map(add, words))
    assert sorted(read(where).split()) == words


def test_a_text_that_changed_meanwhile_is_edited_again_and_not_overwritten(where: str) -> None:
    seen = []

    def change(text: str) -> str:
        if not seen:
            put(where, "theirs")
        seen.append(text)
        return f"{text} and ours"

    assert edit(where, change) == ("theirs", "theirs and ours")
    assert seen == ["", "theirs"]
    assert read(where) == "theirs and ours"


def test_an_edit_that_always_conflicts_raises_conflict(where: str, monkeypatch) -> None:
    monkeypatch.setattr(document_text, "TRIES", 3)
    seen = []

    def change(text: str) -> str:
        seen.append(text)
        put(where, f"theirs {len(seen)}")
        return "ours"

    with pytest.raises(Conflict, match="others change the document without a pause"):
        edit(where, change)
    assert read(where) == "theirs 3"


def test_a_change_that_fails_changes_nothing(where: str) -> None:
    put(where, "before")
    with pytest.raises(ZeroDivisionError):
        edit(where, lambda _: str(1 / 0))
    assert read(where) == "before"


def test_a_file_is_replaced_in_one_step_with_its_mode_behind_its_link(tmp_path: Path) -> None:
    """Servers of other users read it."""
    file, link = tmp_path / "real" / "adapters.yaml", tmp_path / "adapters.yaml"
    edit(str(file), lambda _: "one")
    assert file.stat().st_mode & 0o777 == 0o644
    file.chmod(0o640)
    link.symlink_to(file)
    edit(str(link), lambda _: "two")
    assert link.is_symlink()
    assert file.stat().st_mode & 0o777 == 0o640
    assert file.read_text() == "two"
    assert [path.name for path in file.parent.iterdir()] == ["adapters.yaml"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "adapters.yaml"
    file.write_text("before")

    def full(_: int) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        edit(str(file), lambda _: "after")
    assert [path.name for path in tmp_path.iterdir()] == ["adapters.yaml"]
    assert file.read_text() == "before"


def test_a_service_without_conditional_writes_is_written(bucket: str, monkeypatch) -> None:
    pipe_file = s3fs.S3FileSystem.pipe_file

    def without_conditions(self: s3fs.S3FileSystem, path: str, value: bytes, **conditions: str) -> object:
        if conditions:
            raise OSError(errno.ENOSYS, "A header you provided implies functionality that is not implemented")
        return pipe_file(self, path, value)

    monkeypatch.setattr(s3fs.S3FileSystem, "pipe_file", without_conditions)
    assert edit(f"{bucket}/unconditional.yaml", lambda text: text + "one")[1] == "one"
    assert edit(f"{bucket}/unconditional.yaml", lambda text: text + " two")[1] == "one two"


def test_a_lock_that_is_never_released_is_an_error_after_a_while(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(document_text, "LOCK_S", 0.2)
    file = tmp_path / "adapters.yaml"
    file.write_text("before")
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        with pytest.raises(ServeError, match="is locked by another process"):
            edit(str(file), lambda _: "after")
    finally:
        os.close(handle)
    assert file.read_text() == "before"
    edit(str(file), lambda _: "after")


def test_a_file_system_without_locks_is_written(tmp_path: Path, monkeypatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError("Operation not supported")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    edit(str(tmp_path / "adapters.yaml"), lambda _: "after")
    assert read(str(tmp_path / "adapters.yaml")) == "after"


def fault_of(where: str) -> str:
    with pytest.raises(BadDocument) as caught:
        read(where)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_a_document_that_is_no_text_is_a_fault_of_one_line(tmp_path: Path) -> None:
    assert fault_of(str(tmp_path)) == f"{tmp_path} is a folder: give a file"
    os.mkfifo(tmp_path / "pipe")
    assert fault_of(str(tmp_path / "pipe")) == f"{tmp_path}/pipe is no regular file: give a file"
    (tmp_path / "latin").write_bytes(b"adapters: \xff")
    assert fault_of(str(tmp_path / "latin")) == f"{tmp_path}/latin is not UTF-8: byte 10 is none of a text"


def test_a_document_has_at_most_64_mib(tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(3 * 2**30)  # sparse
    assert fault_of(str(tmp_path / "large")) == f"{tmp_path}/large is larger than 64 MiB, the limit for a document"


def test_an_object_has_the_same_limit_before_it_is_read(bucket: str, monkeypatch) -> None:
    put(f"{bucket}/large.yaml", "12345")
    monkeypatch.setattr(document_text, "MAX_BYTES", 4)
    monkeypatch.setattr(s3fs.S3FileSystem, "cat_file", None)
    assert "s3://adapters/large.yaml is larger" in fault_of(f"{bucket}/large.yaml")
