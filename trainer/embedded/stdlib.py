"""The source of the Python standard library, which every installation has, split by top-level module.

The split depends on a digest of the module's name. A held-out module is therefore held out on every machine, from the
pre-training of the base as well as from the training rows of the tasks.
"""

import hashlib
import re
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

# Tests are repetitive, newer Pythons lack idlelib and lib2to3, encodings are tables, the rest is not library code.
_SKIPPED = {"test", "tests", "idlelib", "lib2to3", "encodings", "site-packages", "dist-packages", "ensurepip"}
_HELD_OUT_ONE_IN = 6  # about one module in six is held out


def is_held_out(module: str) -> bool:
    """Return whether the top-level `module` belongs to the test split."""
    return hashlib.sha256(module.encode()).digest()[0] % _HELD_OUT_ONE_IN == 0


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
            continue  # a few files have another encoding


def digest() -> str:
    """Return the SHA-256 of the training split; it differs between distributions of one Python version."""
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
