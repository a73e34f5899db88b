"""Adapters as tars, good and hostile."""

import io
import tarfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def tar_of(folder: Path, prefix: str = "") -> bytes:
    """Return the files of a folder as a tar, as `tar --format=ustar -C FOLDER -c ...` writes it."""
    return tar(*((f"{prefix}{path.name}", path.read_bytes()) for path in sorted(folder.iterdir())))


def tar(*files: tuple[str, bytes]) -> bytes:
    return b"".join(entry(name, data) for name, data in files) + END


def entry(
    name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, size: int | None = None, link: str = ""
) -> bytes:
    """Return one entry; `size` is what its header says."""
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, len(data) if size is None else size, link
    return info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512)


def with_every_header(folder: Path) -> bytes:
    """Return the tar that Python's `tarfile` writes by default: with extended headers, for the times of the files."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as found:
        for path in folder.iterdir():
            info = tarfile.TarInfo(path.name)
            info.size, info.mtime = path.stat().st_size, 1.5
            found.addfile(info, io.BytesIO(path.read_bytes()))
    return stream.getvalue()


def sparse() -> bytes:
    """Return a sparse file of a TiB in a few bytes, as GNU tar writes it in extended headers."""
    records = b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n34 GNU.sparse.realsize=1099511627776\n"
    return entry(CONFIG, records, tarfile.XHDTYPE) + entry(WEIGHTS, b"1\n0\n0\n".ljust(512, b"\0")) + END


END = bytes(1024)
REFUSED: dict[str, tuple[bytes, str]] = {  # by what is wrong with it: a body, and a part of the line
    "a path above": (tar(("../adapter_config.json", b"{}")), r"no file of an adapter: send astra\.json, "),
    "an absolute path": (tar(("/adapter_config.json", b"{}")), "no file of an adapter"),
    "a folder in the name": (tar(("x/adapter_config.json", b"{}")), "no file of an adapter"),
    "another folder": (entry("x/", kind=tarfile.DIRTYPE) + END, "no regular file"),
    "another name": (tar((CONFIG, b"{}"), ("train.py", b"")), "'train.py', which is no file of an adapter"),
    "a name with control characters": (tar(("a\n\x1b[2J", b"")), r"'a\\n\\x1b\[2J', which is no file"),
    "a pickle": (tar(("adapter_model.bin", b"")), "a pickle, which can run code"),
    "a symbolic link": (entry(WEIGHTS, kind=tarfile.SYMTYPE, link="/etc/passwd") + END, "no regular file"),
    "a hard link": (entry(WEIGHTS, kind=tarfile.LNKTYPE, link=CONFIG) + END, "no regular file"),
    "a device": (entry(WEIGHTS, kind=tarfile.CHRTYPE) + END, "no regular file"),
    "a pipe": (entry(WEIGHTS, kind=tarfile.FIFOTYPE) + END, "no regular file"),
    "a sparse file": (entry(WEIGHTS, kind=tarfile.GNUTYPE_SPARSE) + END, "--format=ustar"),
    "a sparse file in extended headers": (sparse(), "--format=ustar"),
    "an extended header of a TiB": (entry("x", kind=tarfile.XHDTYPE, size=2**40) + END, "--format=ustar"),
    "a long name": (entry("././@LongLink", b"a" * 600, tarfile.GNUTYPE_LONGNAME) + END, "--format=ustar"),
    "one file twice": (tar((CONFIG, b"{}"), (f"./{CONFIG}", b"{}")), "has adapter_config.json twice"),
    "a negative size": (entry(CONFIG, size=-512) + END, "adapter_config.json has more than"),
    "a config that is too large": (entry(CONFIG, size=2**30) + END, "adapter_config.json has more than 16 MiB"),
    "weights that are too large": (entry(WEIGHTS, size=2**40) + END, f"{WEIGHTS} has more than"),
    "no end": (tar((CONFIG, b"{}"))[:-1024], "cut off"),
    "a file that is cut off": (entry(CONFIG, b"{}" * 600)[:700], "cut off"),
    "a header that is cut off": (entry(CONFIG, b"{}")[:300], "cut off"),
    "no bytes": (b"", "cut off"),
    "gzip": (b"\x1f\x8b\x08" + bytes(range(256)) * 4, "is compressed: send a plain tar"),
    "something else": (b"PK\x03\x04" + bytes(range(256)) * 4, "is no tar of an adapter"),
    "garbage after a file": (entry(CONFIG, b"{}") + b"x" * 1024, "is no tar of an adapter"),
    "a second archive": (tar((CONFIG, b"{}")) + bytes(2**20) + tar((WEIGHTS, b"")), "goes on after the end"),
}


def pieces(data: bytes, size: int = 2**16) -> Callable[[], AsyncIterator[bytes]]:
    """Return a function that yields `data` in pieces of `size` bytes."""

    async def yielded() -> AsyncIterator[bytes]:
        for start in range(0, len(data), size):
            yield data[start : start + size]

    return yielded
