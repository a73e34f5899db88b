"""Versions on disk: immutable, complete or absent, and found out when they are neither."""

import errno
import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from astra_serve.adapters import store as store_module
from astra_serve.adapters.store import Store, first_free
from astra_serve.adapters.version_files import version_digest
from astra_serve.errors import CannotStore, Damaged, ServeError
from converter import adapter_dir
from converter.adapter_dir import MalformedAdapter, NotAnAdapter


def test_a_version_is_a_copy_under_its_contents_digest(store, write_lora) -> None:
    source = write_lora("a", 1.0)
    digest = store.add(source)
    assert digest == version_digest(source)
    assert store.add(source, adapter_dir.lora_digest(source)) == digest  # the one that the adapter records of itself
    assert store.verify(digest) == store.folder(digest)
    (source / "adapter_model.safetensors").write_bytes(b"changed")  # what the publisher does later does not matter
    store.verify(digest)
    assert {file.stat().st_mode & 0o777 for file in store.folder(digest).iterdir()} == {0o444}


def test_the_same_content_is_one_version(store, write_lora) -> None:
    assert store.add(write_lora("a", 1.0)) == store.add(write_lora("b", 1.0))
    assert store.add(write_lora("c", 2.0)) != store.add(write_lora("d", 1.0))


def test_another_content_than_the_expected_is_not_published(store, write_lora, tmp_path) -> None:
    with pytest.raises(Damaged, match="its digest is"):
        store.add(write_lora("a"), "sha256:" + 64 * "0")
    assert not list((tmp_path / "store" / "versions").iterdir())
    assert not list((tmp_path / "store" / "staging").iterdir())


def test_the_same_weights_with_another_record_are_another_version(store, write_lora) -> None:
    """The probe proves a version: a forged one must not take the place of the real one."""
    real = store.add(write_lora("real", 1.0))
    forged = write_lora("forged", 1.0)
    (forged / "astra.json").write_text('{"format": "astra-lora/1"}')
    assert store.add(forged) != real
    store.verify(real)


def with_chat_files(folder: Path) -> Path:
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "generation_config.json").write_text('{"top_k": 3}')
    (folder / "README.md").write_text("is not part of a version")
    return folder


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


THREE = {"adapter_model.safetensors", "adapter_config.json", "astra.json"}
CHAT = {"chat_template.jinja", "generation_config.json"}


def test_template_and_defaults_are_part_of_a_version_and_of_its_digest(store, write_lora) -> None:
    source = write_lora("a")
    plain = store.add(source)
    digest = store.add(with_chat_files(source))
    assert digest != plain
    assert (names(store.folder(plain)), names(store.folder(digest))) == (THREE, THREE | CHAT)
    store.verify(digest)
    (source / "chat_template.jinja").write_text("other")
    assert store.add(source) not in (digest, plain)
    file = store.folder(digest) / "chat_template.jinja"
    file.chmod(0o644)
    file.write_text("changed")
    with pytest.raises(Damaged):
        store.verify(digest)


def test_a_digest_from_before_they_counted_names_the_version_without_them(store, write_lora) -> None:
    source = write_lora("a")
    files = [source / name for name in ("adapter_model.safetensors", "adapter_config.json", "astra.json")]
    old = adapter_dir.digest(files)
    with_chat_files(source)
    for _ in range(2):  # the second time the store has it
        assert store.add(source, old) == old
    assert names(store.folder(old)) == THREE
    staged = store.staging()
    for path in source.iterdir():
        shutil.copy(path, staged)
    store.discard(old)
    assert store.add(staged, old) == old  # a download
    assert names(store.folder(old)) == THREE
    new = store.add(source)
    assert new != old
    assert store.add(source, new) == new
    assert store.add(source, adapter_dir.lora_digest(source)) == new  # as `astra-convert` records it
    (source / "astra.json").unlink()
    assert store.add(source, adapter_dir.lora_digest(source)) == adapter_dir.lora_digest(source)  # it was that version


def test_a_broken_adapter_is_not_published(store, write_lora, tmp_path) -> None:
    source = write_lora("a")
    with (source / "adapter_model.safetensors").open("ab") as file:
        file.write(b"more")
    with pytest.raises(MalformedAdapter):
        store.add(source)
    assert not list((tmp_path / "store" / "versions").iterdir())


def test_a_link_out_of_the_adapters_folder_is_not_followed(store, write_lora, tmp_path) -> None:
    source = write_lora("a")
    (source / "astra.json").unlink()
    (source / "astra.json").symlink_to("/etc/passwd")
    with pytest.raises(adapter_dir.UnsafeAdapter):
        store.add(source)
    assert not list((tmp_path / "store" / "versions").iterdir())


@pytest.mark.parametrize("damage", ["flip", "unlink", "rmdir"])
def test_a_changed_or_missing_version_is_detected_and_can_be_published_again(store, write_lora, damage):
    source = write_lora("a")
    digest = store.add(source)
    file = store.folder(digest) / "adapter_model.safetensors"
    file.chmod(0o644)
    if damage == "flip":
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    else:
        file.unlink()
    if damage == "rmdir":
        store.discard(digest)
    with pytest.raises(Damaged):
        store.verify(digest)
    assert store.add(source) == digest
    store.verify(digest)


def test_collect_keeps_the_given_versions_and_the_newest_others(store, write_lora) -> None:
    digests = [store.add(write_lora(str(i), float(i))) for i in range(5)]
    for age, digest in enumerate(digests):
        os.utime(store.folder(digest), (1e9 + age, 1e9 + age))
    assert set(store.collect({digests[0]}, newest=2)) == {digests[1], digests[2]}
    assert [digest in store for digest in digests] == [True, False, False, True, True]


def test_a_store_has_one_process_and_drops_unfinished_publications_of_a_killed_one(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from astra_serve.adapters.store import Store; "
        f"s = Store(Path({str(tmp_path)!r})); (s.staging() / 'half').write_text('x'); print('up', flush=True); "
        "time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert other.stdout
    assert other.stdout.readline() == b"up\n"
    with pytest.raises(ServeError, match="in use by another server"):
        Store(tmp_path)
    other.kill()
    other.wait()
    other.stdout.close()
    store = Store(tmp_path)
    assert not list((tmp_path / "staging").iterdir())
    store.close()


def test_servers_that_share_a_folder_each_take_a_store_in_it_and_find_it_again(tmp_path: Path, write_lora) -> None:
    first, second = first_free(tmp_path / "shared"), first_free(tmp_path / "shared")
    digest = first.add(write_lora("a", 1.0))
    assert digest not in second
    first.close()
    again = first_free(tmp_path / "shared")
    assert digest in again
    again.close()
    second.close()


def test_a_store_whose_file_system_has_no_locks_is_refused(tmp_path: Path, monkeypatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(ServeError, match="cannot be locked: No locks available"):
        first_free(tmp_path / "shared")


def test_a_full_disk_gets_room_from_versions_that_nothing_needs(store, write_lora, monkeypatch) -> None:
    needed, spare = store.add(write_lora("needed", 1.0)), store.add(write_lora("spare", 2.0))
    store.collect({needed}, newest=3)
    monkeypatch.setattr(store_module, "_copy", full_while(lambda: spare in store))
    digest = store.add(write_lora("new", 3.0))
    assert [one in store for one in (needed, spare, digest)] == [True, False, True]


def full_while(full: Callable[[], bool]) -> Callable[..., None]:
    """Return a copy of a file that fails as on a full disk."""
    copy = store_module._copy

    def copied(source: Path, target: Path, on_bytes: Callable[[int], None]) -> None:
        if full():
            target.write_bytes(source.read_bytes()[:10])
            raise OSError(errno.ENOSPC, "No space left on device")
        copy(source, target, on_bytes)

    return copied


def test_a_publication_on_a_full_disk_leaves_nothing_and_says_so(store, write_lora, tmp_path, monkeypatch) -> None:
    there = store.add(write_lora("there", 1.0))
    with store.keeping() as kept:  # by a publication in progress
        kept.append(there)
        store.collect(set(), newest=3)
        monkeypatch.setattr(store_module, "_copy", full_while(lambda: True))
        with pytest.raises(CannotStore, match=r"the disk of the store .* is full: remove adapters, or give"):
            store.add(write_lora("new", 2.0), source="./new")
    assert there in store
    store.verify(there)
    assert len(list((tmp_path / "store").glob("versions/*"))) == 1
    assert not list((tmp_path / "store").glob("staging/*"))
    assert not list((tmp_path / "store").glob("sources/*"))


def test_a_store_that_became_read_only_says_so_and_its_versions_are_there(store, write_lora, monkeypatch) -> None:
    digest, broken = store.add(write_lora("there", 1.0)), store.add(write_lora("broken", 2.0))
    new = write_lora("new", 3.0)
    damaged = store.folder(broken) / "adapter_model.safetensors"
    damaged.chmod(0o644)
    damaged.write_bytes(b"damaged")

    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(store.folder(digest)))

    for name in ("mkdir", "rename", "chmod", "unlink"):
        monkeypatch.setattr(os, name, read_only)
    with pytest.raises(CannotStore, match=r"the store .* cannot be written: Read-only file system"):
        store.add(new)
    with pytest.raises(OSError, match="Read-only"):
        store.collect(set(), newest=0)
    assert store.intact(digest)
    assert not store.intact(broken)
    assert digest in store


def test_what_the_store_has_is_known_without_the_disk(store, write_lora, tmp_path, monkeypatch) -> None:
    digest = store.add(write_lora("one", 1.0), source="./one")
    store.close()
    again = Store(tmp_path / "store")
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", None)
        patch.setattr(Path, "open", None)
        assert digest in again
        assert again.source(digest) == "./one"
    shutil.rmtree(again.folder(digest))
    assert not again.intact(digest)
    assert digest not in again
    again.close()


@pytest.mark.parametrize("kind", ["folder", "pipe", "socket", "broken link"])
@pytest.mark.parametrize("name", ["astra.json", "adapter_config.json"])
def test_a_file_that_is_no_regular_one_is_refused(store, write_lora, tmp_path, monkeypatch, kind, name) -> None:
    source = write_lora("a")
    (source / name).unlink()
    if kind == "folder":
        (source / name).mkdir()
    elif kind == "pipe":
        os.mkfifo(source / name)
    elif kind == "socket":
        monkeypatch.chdir(source)  # the path of a socket is short
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(name)
    else:
        (source / name).symlink_to("nowhere")
    with pytest.raises(NotAnAdapter, match=f"has no {name} that is a regular file"):
        store.add(source)
    assert not list((tmp_path / "store").glob("*/*"))


def test_an_error_names_the_source_and_no_folder_of_the_store(store, write_lora) -> None:
    staged = store.staging()
    for path in write_lora("a").iterdir():
        (staged / path.name).write_bytes(path.read_bytes())
    (staged / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 4, "peft_type": "LOHA"}')
    with pytest.raises(MalformedAdapter) as caught:
        store.add(staged, source="https://user:secret@host/a?token=x")
    assert str(caught.value).startswith("https://host/a/adapter_config.json has peft_type='LOHA'")


def test_a_file_that_grows_is_copied_as_long_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1234")

    def grow(_: int) -> None:
        with (tmp_path / "a").open("ab") as file:
            file.write(b"more")

    store_module._copy(tmp_path / "a", tmp_path / "b", grow)
    assert (tmp_path / "b").read_bytes() == b"1234"


@pytest.mark.parametrize("found", ["LOHA", "lora", "ADALORA", None, ["LORA"]])
def test_an_adapter_of_another_type_is_refused_even_with_the_tensors_of_a_lora(store, write_lora, found) -> None:
    """PEFT refuses a config without `peft_type`, too."""
    source = write_lora("a")
    config = json.loads((source / "adapter_config.json").read_text())
    (source / "adapter_config.json").write_text(json.dumps({**config, "peft_type": found}))
    with pytest.raises(MalformedAdapter, match=r"has peft_type=.*: engines serve plain LoRA only"):
        store.add(source)
