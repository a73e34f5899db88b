"""The standard library as text: real Python that every installation has, split by top-level module.

The split is by a digest of the module's name, so a held-out module is held out on every machine, from the base's
pre-training as well as from the adapters' training rows.
"""

import hashlib
import re
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

# Tests repeat themselves, idlelib and lib2to3 leave newer Pythons, encodings are tables, the rest is not source.
_SKIPPED = {"test", "tests", "idlelib", "lib2to3", "encodings", "site-packages", "dist-packages", "ensurepip"}
_HELD_OUT_OF = 6  # one module in six


def is_held_out(module: str) -> bool:
    """Whether the top-level `module` belongs to the test split."""
    return hashlib.sha256(module.encode()).digest()[0] % _HELD_OUT_OF == 0


def sources(held_out: bool) -> Iterator[tuple[str, str]]:
    """Yield (path relative to the standard library, source text) of one split, in a fixed order."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        module = relative.parts[0].removesuffix(".py")
        if _SKIPPED & set(relative.parts) or module.startswith("_sysconfigdata") or is_held_out(module) != held_out:
            continue
        try:
            yield str(relative), path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a few files declare another encoding


def digest() -> str:
    """Return the SHA-256 of the training split: distributions ship one Python version with differing libraries."""
    total = hashlib.sha256()
    for path, source in sources(held_out=False):
        total.update(f"{path}\0{source}\0".encode())
    return f"sha256:{total.hexdigest()}"


@cache
def identifiers() -> tuple[str, ...]:
    """Return the identifiers that occur at least three times in the training split's sources, sorted."""
    counts: dict[str, int] = {}
    for _, source in sources(held_out=False):
        for word in re.findall(r"[A-Za-z_]\w{2,17}", source):
            counts[word] = counts.get(word, 0) + 1
    return tuple(sorted(word for word, n in counts.items() if n >= 3))
