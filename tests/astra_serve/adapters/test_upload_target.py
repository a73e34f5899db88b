"""Copies of uploaded versions: complete under their digest, or not there."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import s3fs

from astra_serve.adapters.upload_target import UploadTarget
from astra_serve.adapters.version_files import version_digest
from astra_serve.errors import CannotStore, ServeError

KILLED = """
import os, signal, sys
from pathlib import Path
from astra_serve.adapters.upload_target import UploadTarget
source, root, digest = sys.argv[1:]
UploadTarget(root).put(Path(source), digest, lambda _: os.kill(os.getpid(), signal.SIGKILL))
"""


def put(source: Path, target: UploadTarget) -> str:
    """Copy a version, and return its source."""
    digest = version_digest(source)
    target.put(source, digest, lambda _: None)
    return target.source(digest)


@pytest.mark.parametrize("url", ["{}", "{}/", "file://{}"])
def test_a_version_is_copied_into_a_folder_under_its_digest(url: str, write_lora, tmp_path: Path) -> None:
    source, root = write_lora("one", 1.0), tmp_path / "shared"
    located = put(source, UploadTarget(url.format(root)))
    assert located == url.format(root).rstrip("/") + "/" + version_digest(source).removeprefix("sha256:")
    copy = root / located.rpartition("/")[2]
    assert version_digest(copy) == version_digest(source)
    assert copy.stat().st_mode & 0o777 == 0o755  # servers of other users read it
    before = copy.stat().st_ino
    put(source, UploadTarget(url.format(root)))
    assert copy.stat().st_ino == before
    assert list(root.iterdir()) == [copy]


def test_a_copy_with_other_bytes_is_refused_and_stays(write_lora, tmp_path: Path) -> None:
    source, target = write_lora("one", 1.0), UploadTarget(str(tmp_path / "shared"))
    copy = Path(put(source, target))
    (copy / "adapter_config.json").write_text("{}")
    with pytest.raises(CannotStore, match="other bytes than its name says: remove it"):
        put(source, target)
    (copy / "adapter_config.json").unlink()
    (copy / "adapter_model.safetensors").unlink()
    with pytest.raises(CannotStore, match="remove it"):
        put(source, target)


def test_a_folder_that_cannot_be_written_is_one_line(write_lora, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        CannotStore, match=r"cannot be copied to .*/file \(--upload-to\): (Not a directory|File exists)"
    ):
        put(write_lora("one", 1.0), UploadTarget(str(tmp_path / "file")))


def test_a_copy_that_fails_leaves_nothing(write_lora, tmp_path: Path) -> None:
    def fails(_: int) -> None:
        raise OSError(28, "No space left on device")

    source = write_lora("one", 1.0)
    with pytest.raises(CannotStore, match="No space left on device"):
        UploadTarget(str(tmp_path / "shared")).put(source, version_digest(source), fails)
    assert list((tmp_path / "shared").iterdir()) == []


def test_what_a_killed_server_left_is_removed_and_what_another_writes_is_not(write_lora, tmp_path: Path) -> None:
    source, root = write_lora("one", 1.0), tmp_path / "shared"
    words = [str(source), str(root), version_digest(source)]
    killed = subprocess.run([sys.executable, "-c", KILLED, *words], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(list(root.iterdir())) == 2
    target, seen = UploadTarget(str(root)), []

    def sweep(_: int) -> None:
        if not seen:
            UploadTarget(str(root)).sweep()
            seen.extend(root.iterdir())

    target.put(source, version_digest(source), sweep)
    assert len(seen) == 2  # of the present copy
    assert list(root.iterdir()) == [Path(target.source(version_digest(source)))]


@pytest.fixture
def objects(monkeypatch) -> Iterator[list[str]]:
    """The names of the objects that are written; writing one named `refused` fails."""
    written: list[str] = []
    put_file = s3fs.S3FileSystem._put_file

    async def noted(self, here: str, there: str, **more) -> None:
        written.append(there.rpartition("/")[2])
        if "/refused/" in there and there.endswith("config.json"):
            raise OSError("the connection was reset")
        await put_file(self, here, there, **more)

    monkeypatch.setattr(s3fs.S3FileSystem, "_put_file", noted)
    s3fs.S3FileSystem.clear_instance_cache()
    yield written
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_version_is_copied_into_an_object_store_with_its_config_last(bucket, write_lora, objects) -> None:
    source, target = write_lora("one", 1.0), UploadTarget(f"{bucket}/up")
    assert put(source, target) == f"{bucket}/up/{version_digest(source).removeprefix('sha256:')}"
    assert len(objects) == 3
    assert objects[-1] == "adapter_config.json"
    put(source, target)
    assert len(objects) == 3  # they are there


def test_a_copy_into_an_object_store_that_fails_leaves_nothing(bucket, write_lora, objects) -> None:
    source, target = write_lora("one", 1.0), UploadTarget(f"{bucket}/refused")
    with pytest.raises(CannotStore, match="the connection was reset"):
        put(source, target)
    assert len(objects) == 3
    system = s3fs.S3FileSystem()
    system.invalidate_cache()
    assert not system.exists(target.source(version_digest(source)))


@pytest.mark.parametrize(
    "url", ["", "https://host/x", "hf://org/repo", "s3://key:hunter2@bucket", "simplecache::s3://b", "nosuch://x"]
)
def test_a_target_that_no_server_can_write_is_refused(url: str) -> None:
    with pytest.raises(ServeError, match="--upload-to") as caught:
        UploadTarget(url)
    assert "hunter2" not in str(caught.value)
