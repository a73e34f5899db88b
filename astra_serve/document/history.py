"""The rollback history of an entry: the versions that a rollback can reach, newest first, each with its source."""

from collections.abc import Sequence

from astra_serve.document.desired import Adapter, Digest, Step

MOST_STEPS = 8


def rollback_history(old: Adapter | None, served: Sequence[Step], digest: str) -> list[Step | Digest]:
    """Return `previous` of an entry whose version becomes `digest`.

    The versions that `served` are first, whatever the document said; then the one of the entry as it was, and its
    steps. A version is listed once, with its source where any of them knows it.
    """
    known = [*served]
    if old and old.digest:
        known.append(Step(digest=old.digest, source=source_of(old)))
    known += old.steps if old else []
    found: dict[str, Step] = {}
    for step in known:
        there = found.setdefault(step.digest, step)
        if there.source is None and step.source:
            found[step.digest] = there.model_copy(update={"source": step.source})
    found.pop(digest, None)
    return [step if step.source or step.replaced else step.digest for step in found.values()][:MOST_STEPS]


def source_of(entry: Adapter) -> str | None:
    """Return where an entry's version is fetched; None where it names a version of the store alone."""
    return None if entry.source.startswith("sha256:") else entry.source


def known_source(old: Adapter | None, digest: str) -> str | None:
    """Return the source that an entry, its canary or its steps give for `digest`, or None."""
    if old is None:
        return None
    known = [(old.digest, source_of(old)), *((step.digest, step.source) for step in old.steps)]
    if old.canary and not old.canary.version.startswith("sha256:"):
        known.append((old.canary.digest, old.canary.version))
    return next((source for found, source in known if found == digest and source), None)
