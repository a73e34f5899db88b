"""The folder that the engine reads a version from: the version itself, or the same LoRA written as engines read it.

Adapters of other tools may have names, shards or patterns that PEFT reads and engines do not. Such a version is stored
as it was published, so that its digest is that of the source. What the engine reads is written beside it when the
version is admitted, and again when it was changed. Weights that need no other names are not copied.
"""

import shutil
import threading
from collections import defaultdict
from pathlib import Path

from astra_serve.adapters.admission import Admitted, Base
from astra_serve.adapters.store import Store
from astra_serve.adapters.version_files import version_digest
from converter import adapter_dir
from converter.adapter_dir import AdapterError


class Served:
    """The folders of one store for one engine."""

    def __init__(self, store: Store, base: Base) -> None:
        self._store, self._base = store, base
        self._writing: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)  # by version
        self._written: dict[str, str | None] = {}  # by version, the digest of the folder; None: the version itself

    def folder(self, digest: str, *, admit: bool) -> tuple[Path, Admitted | None]:
        """Return the folder for the engine, after reading all of it, and how a version was admitted, if it was now.

        A version is admitted if `admit` says so, or if it has no folder for the engine yet. Raises ServeError,
        AdapterError and OSError.
        """
        version = self._store.verify(digest)
        with self._writing[digest]:
            if not admit and digest in self._written:
                if (expected := self._written[digest]) is None:
                    return version, None
                if self._is(digest, expected):
                    return self._store.engine_folder(digest), None
            admitted = self._base.check(version)
            if admitted.rewritten is None:
                self._written[digest] = None
                return version, admitted
            if not (self._written.get(digest) and self._is(digest, self._written[digest])):
                self._write(digest, version, admitted)
            return self._store.engine_folder(digest), admitted

    def _write(self, digest: str, version: Path, admitted: Admitted) -> None:
        assert admitted.rewritten is not None
        out, staged = self._store.engine_folder(digest), self._store.staging()
        try:
            adapter_dir.write_plainly(version, admitted.rewritten, staged)
            staged.chmod(0o755)
            self._written[digest] = version_digest(staged)
            shutil.rmtree(out, ignore_errors=True)
            staged.rename(out)
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    def _is(self, digest: str, expected: str | None) -> bool:
        try:
            return version_digest(self._store.engine_folder(digest)) == expected
        except (AdapterError, OSError):
            return False
