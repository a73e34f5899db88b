"""Versions on disk: immutable, complete or absent, and found out when they are neither."""

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from astra_serve.adapters.store import Store, first_free, version_digest
from astra_serve.errors import Damaged, ServeError
from converter import adapter_dir
from converter.adapter_dir import MalformedAdapter


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
