"""The weighted virtual token counter: whose request the engine computes next.

After Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024), with weights, and with two levels: tenants
by their weights, and within a tenant its adapters with equal weights. A counter is the service that its owner has had,
divided by its weight; the service is `INPUT` for each token of a prompt and `OUTPUT` for each token of an answer.

- The next request is the oldest one of the smallest counter among those that have requests waiting. Of equal counters
  the owner comes first that has fewer requests running for its weight, then the one that has waited for longer.
- An owner that begins to wait is lifted to the smallest counter of those that wait, or to that of the owner that has
  waited last: time without requests saves nothing up. When nothing waits or runs any more, all counters begin anew.

The bound. Let U be the largest service that the requests of one owner which run at the same time can have: the paper's
max(w_p L_input, w_q M), where M is the tokens that they can hold. When a request of owner i is taken, no waiting
counter is smaller, and from then until the next one is taken the counter of i rises by at most U / w_i. Waiting
counters never fall, and no owner begins below the smallest: therefore c_i - c_j <= U / w_i for all that wait. While
two owners i and j wait without a pause, the services per weight that they get differ by at most U / w_i + U / w_j,
however long that lasts; with equal weights of 1 it is the paper's 2 max(w_p L_input, w_q M).
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

INPUT, OUTPUT = 1.0, 2.0  # service of a token: the paper's w_p and w_q, for what prices of tokens and their times are

T = TypeVar("T")


@dataclass(eq=False)
class _Owner(Generic[T]):
    """A tenant, or an adapter within a tenant."""

    weight: float = 1.0
    counter: float = 0.0  # service / weight
    running: int = 0  # requests
    adapters: "_Level[T]" = field(default_factory=lambda: _Level())  # of a tenant
    queue: "deque[Turn[T]]" = field(default_factory=deque)  # of an adapter: those that wait, the oldest first

    @property
    def rank(self) -> tuple[float, float]:
        return self.counter, self.running / self.weight


@dataclass(eq=False)
class _Level(Generic[T]):
    """The owners whose counters are compared with each other, by their names."""

    owners: dict[str, _Owner[T]] = field(default_factory=dict)
    waiting: dict[str, _Owner[T]] = field(default_factory=dict)  # in the order in which they began to wait
    last: _Owner[T] | None = None  # that has waited last

    def join(self, name: str, weight: float) -> _Owner[T]:
        """Return the owner of this name, which waits from now on."""
        owner = self.owners.setdefault(name, _Owner())
        owner.weight = weight
        if name not in self.waiting:
            floor = min((one.counter for one in self.waiting.values()), default=self.last.counter if self.last else 0.0)
            owner.counter = max(owner.counter, floor)
            self.waiting[name] = owner
        return owner

    def leave(self, name: str) -> None:
        """Note that an owner has no request waiting any more."""
        self.last = self.waiting.pop(name)

    def forget_if_idle(self) -> None:
        """Let all counters begin anew where nothing waits or runs."""
        if not self.waiting and not any(owner.running for owner in self.owners.values()):
            self.owners, self.last = {}, None

    def in_order(self) -> Iterator[_Owner[T]]:
        """Yield those that wait, the one whose turn is next first."""
        if len(self.waiting) == 1:  # of most adapters' levels, and of a server that is not full
            yield from list(self.waiting.values())
        elif self.waiting:
            first = min(self.waiting.values(), key=lambda owner: owner.rank)
            yield first
            yield from sorted((one for one in self.waiting.values() if one is not first), key=lambda owner: owner.rank)


@dataclass(eq=False)
class Turn(Generic[T]):
    """One request: it waits, is taken, and ends."""

    names: tuple[str, str]  # of its tenant and its adapter
    tenant: _Owner[T]
    adapter: _Owner[T]
    item: T

    @property
    def alone(self) -> bool:
        """Return whether its tenant has nothing running."""
        return not self.tenant.running


class FairCounter(Generic[T]):
    """The counters of one engine. It knows nothing of places and of time."""

    def __init__(self) -> None:
        self._tenants: _Level[T] = _Level()

    def __bool__(self) -> bool:
        """Return whether a request waits."""
        return bool(self._tenants.waiting)

    def add(self, tenant: str, weight: float, adapter: str, item: T) -> Turn[T]:
        """Let a request wait; it takes its turn by `take`, or gives up by `remove`."""
        owner = self._tenants.join(tenant, weight)
        turn = Turn((tenant, adapter), owner, owner.adapters.join(adapter, 1.0), item)
        turn.adapter.queue.append(turn)
        return turn

    def turns(self) -> Iterator[Turn[T]]:
        """Yield the oldest waiting request of each tenant and adapter, the one whose turn is next first."""
        for tenant in self._tenants.in_order():
            for adapter in tenant.adapters.in_order():
                yield adapter.queue[0]

    def take(self, turn: Turn[T]) -> None:
        """Let a waiting request run."""
        self._leave_queue(turn)
        turn.tenant.running += 1
        turn.adapter.running += 1

    def remove(self, turn: Turn[T]) -> None:
        """Forget a request that waits."""
        self._leave_queue(turn)
        self._forget_if_idle(turn)

    def charge(self, turn: Turn[T], service: float) -> None:
        """Count the service that a running request has got."""
        turn.tenant.counter += service / turn.tenant.weight
        turn.adapter.counter += service

    def done(self, turn: Turn[T]) -> None:
        """Note that a running request has ended."""
        turn.tenant.running -= 1
        turn.adapter.running -= 1
        self._forget_if_idle(turn)

    def _leave_queue(self, turn: Turn[T]) -> None:
        turn.adapter.queue.remove(turn)
        tenant, adapter = turn.names
        if not turn.adapter.queue:
            turn.tenant.adapters.leave(adapter)
        if not turn.tenant.adapters.waiting:
            self._tenants.leave(tenant)

    def _forget_if_idle(self, turn: Turn[T]) -> None:
        turn.tenant.adapters.forget_if_idle()
        if not turn.tenant.running:
            self._tenants.forget_if_idle()
