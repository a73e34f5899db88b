"""The state of adapters as the admin API shows it."""

from dataclasses import asdict
from typing import Any

from astra_serve.adapters.schedule import State
from astra_serve.adapters.version import Version
from astra_serve.control.control import Control
from astra_serve.control.status import Phase, Status


def names(control: Control) -> list[str]:
    """Return the adapters of the desired state, and those that are published for the first time now."""
    return list(dict.fromkeys([*control.reconciler.status, *control.changes.preparing()]))


def describe(control: Control, name: str) -> dict[str, Any]:
    """Return the state of an adapter of `names`.

    `publishing` is the state of a version that is prepared for it now, or null; a name without any other state has
    that one.
    """
    status, preparing = control.reconciler.status.get(name), control.changes.preparing().get(name)
    shown = status or preparing
    assert shown is not None
    alias, publishing = control.fleet.aliases.get(name), None
    sources = {step.digest: step.source for step in shown.entry.steps}
    if preparing:
        publishing = {"source": preparing.entry.source, "state": state(control, preparing)}
    return {
        "name": name,
        "state": state(control, shown),
        "reason": shown.reason,
        "since": shown.since,
        "seconds": shown.seconds,
        "source": shown.entry.source,
        "required": shown.entry.required,
        "pin": shown.entry.pin,
        "publishing": publishing,
        "version": version(control, alias.current, alias.source) if alias else None,
        "canary": _canary(control, name),
        "previous": [version(control, one, sources.get(one.digest)) for one in alias.previous] if alias else [],
    }


def state(control: Control, status: Status) -> str:
    """Return the phase of an entry, and of one whose versions are loaded the part of that phase."""
    if status.phase is Phase.LOADING:
        loading = (State.WAITING, State.LOADING, State.PROBING)
        residences = control.fleet.residency.of_alias(status.entry.name)
        return next((str(residence.state) for residence in residences if residence.state in loading), "loading")
    return str(status.phase)


def version(control: Control, found: Version, source: str | None = None) -> dict[str, Any]:
    """Return the state of a version."""
    residence = control.fleet.residency.of(found)
    return {
        "name": found.name,
        "digest": found.digest,
        "source": source,
        "residency": control.fleet.residency.where(found),
        "requests": len(residence.leases) + sum(not waiter.publication for waiter in residence.waiters),
        "failed": residence.failed,
        "probe": asdict(residence.proof.verdict) if residence.proof else None,
    }


def _canary(control: Control, name: str) -> dict[str, Any] | None:
    """Return the state of a canary with its weight, and its share of the requests since it began (null before any)."""
    alias = control.fleet.aliases.get(name)
    if alias is None or alias.canary is None:
        return None
    requests = control.fleet.requests[name]
    share = requests[alias.canary] / requests.total() if requests else None
    return {**version(control, alias.canary), "weight": alias.weight, "share": share}
