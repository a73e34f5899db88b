"""Tars of adapters, good and hostile, as they are received."""

import asyncio
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from astra_serve.adapters.tar import largest_tar, receive
from astra_serve.errors import BadUpload
from tests.support import tars
from tests.support.tars import CONFIG, REFUSED, WEIGHTS, pieces

MAX_BYTES = 2**26


def received(data: bytes, folder: Path, size: int = 2**16, max_bytes: int = MAX_BYTES) -> dict[str, bytes]:
    """Return the files of a folder after a tar has arrived there in pieces of `size` bytes."""
    folder.mkdir()
    asyncio.run(receive(pieces(data, size)(), folder, max_bytes))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("size", [1, 511, 512, 10240, 2**26])
def test_the_files_are_written_in_whatever_pieces_they_arrive(size: int, write_lora, tmp_path: Path) -> None:
    source = write_lora("one", 1.0)
    expected = {path.name: path.read_bytes() for path in source.iterdir()}
    assert received(tars.tar_of(source), tmp_path / "here", size) == expected


def test_an_entry_of_the_folder_and_padding_are_accepted(write_lora, tmp_path: Path) -> None:
    source = write_lora("one", 1.0)
    data = tars.entry("./", kind=b"5") + tars.tar_of(source, "./") + bytes(10240)
    assert set(received(data, tmp_path / "here")) == {path.name for path in source.iterdir()}


@pytest.mark.parametrize("size", [512, 2**26])
@pytest.mark.parametrize("fault", REFUSED)
def test_a_hostile_tar_is_refused_in_one_line(fault: str, size: int, tmp_path: Path) -> None:
    data, message = REFUSED[fault]
    with pytest.raises(BadUpload, match=message) as caught:
        received(data, tmp_path / "here", size)
    assert len(str(caught.value).splitlines()) == 1
    assert str(caught.value).isascii()
    assert [path for path in tmp_path.iterdir() if path.name != "here"] == []
    assert all(path.is_file() and not path.is_symlink() for path in (tmp_path / "here").iterdir())


def test_extended_headers_are_refused_with_the_option_that_writes_none(write_lora, tmp_path: Path) -> None:
    with pytest.raises(BadUpload, match="make it with tar --format=ustar"):
        received(tars.with_every_header(write_lora("one", 1.0)), tmp_path / "here")


def test_all_shards_together_have_the_limit_of_the_weights(tmp_path: Path) -> None:
    shards = [(f"adapter_model-{n}-of-3.safetensors", bytes(400)) for n in range(3)]
    with pytest.raises(BadUpload, match=r"adapter_model-2-of-3.safetensors has more than") as caught:
        received(tars.tar(*shards), tmp_path / "here", max_bytes=1000)
    assert caught.value.status == 413
    assert len(received(tars.tar(*shards), tmp_path / "all", max_bytes=1200)) == 3


def test_many_entries_are_refused(tmp_path: Path) -> None:
    many = [(f"adapter_model-{n}-of-1.safetensors", b"") for n in range(1100)]
    with pytest.raises(BadUpload, match="more than 1032 entries"):
        received(tars.tar(*many), tmp_path / "here")


def test_a_large_file_is_not_held_in_memory(tmp_path: Path) -> None:
    size = 2**26

    async def body() -> AsyncIterator[bytes]:
        yield tars.entry(WEIGHTS, size=size)
        for _ in range(size // 2**16):
            yield bytes(2**16)
        yield tars.entry(CONFIG, b"{}") + tars.END

    tracemalloc.start()
    try:
        asyncio.run(receive(body(), tmp_path, size))
        assert tracemalloc.get_traced_memory()[1] < 2**23
    finally:
        tracemalloc.stop()
    assert (tmp_path / WEIGHTS).stat().st_size == size


def test_the_limit_of_a_body_allows_the_largest_files() -> None:
    assert largest_tar(MAX_BYTES) > MAX_BYTES + 5 * 2**24
