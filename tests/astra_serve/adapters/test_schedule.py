"""The decisions about the engine's memory: a table of situations, and random histories."""

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from astra_serve.adapters.schedule import HEADROOM, Action, Do, Limits, Owner, Residence, State, Wait, Waiter, decide
from astra_serve.adapters.version import Version

NOW = 100.0
LIMITS = Limits(capacity=2, wait_s=30.0, patience_s=1.0, mark_s=10.0)


def residence(name: str, state: State, **facts: Any) -> Residence:
    return Residence(Version(name, f"sha256:{name}"), state, **{"serving": True, **facts})


def resident(name: str, *, leases: int = 0, **facts: Any) -> Residence:
    """A version that was used at NOW - 10, and became resident at NOW - 20."""
    facts = {"resident_since": NOW - 20, "last_used": NOW - 10, **facts}
    return residence(name, facts.pop("state", State.RESIDENT), leases={f"{name}{i}" for i in range(leases)}, **facts)


def waiting(
    name: str, *since: float, publication: bool = False, state: State = State.WAITING, **facts: Any
) -> Residence:
    waiters = [Waiter(one, publication=publication) for one in since or (NOW,)]
    return residence(name, state, waiters=waiters, **facts)


def loading(*names: str, publication: bool = False) -> list[Residence]:
    return [waiting(name, publication=publication, state=State.LOADING) for name in names]


def decision(*residences: Residence, head_since: float = 0.0, now: float = NOW, capacity: int = 2) -> tuple[Any, Any]:
    """Return the action and its version's name, or "wait" and until when."""
    found = decide(residences, replace(LIMITS, capacity=capacity), head_since, now)
    return (found.do, found.residence.version.alias) if isinstance(found, Action) else ("wait", found.until)


def test_the_first_waiter_gets_a_free_place() -> None:
    assert decision(resident("a"), waiting("b", NOW - 1), waiting("c", NOW - 2)) == (Do.LOAD, "c")


def test_nothing_is_done_where_no_request_waits() -> None:
    assert decision(resident("a"), resident("b")) == ("wait", math.inf)


def test_the_least_recently_used_idle_version_is_evicted_first() -> None:
    old, new = resident("old", last_used=NOW - 9), resident("new", last_used=NOW - 8)
    assert decision(new, old, waiting("c")) == (Do.EVICT, "old")


@pytest.mark.parametrize(
    "kept",
    [
        resident("kept", last_used=0, pinned=True),
        resident("kept", last_used=0, leases=1),
        resident("kept", last_used=0, holds=1),
        resident("kept", last_used=0, state=State.MARKED, leases=1),
    ],
)
def test_a_version_that_is_pinned_leased_or_held_is_not_evicted(kept: Residence) -> None:
    assert decision(kept, resident("idle", last_used=NOW - 1), waiting("c")) == (Do.EVICT, "idle")


def test_a_pinned_version_that_no_alias_serves_any_more_is_evicted() -> None:
    assert decision(resident("a", pinned=True, serving=False, last_used=0), resident("b"), waiting("c")) == (
        Do.EVICT,
        "a",
    )


def test_a_marked_version_without_leases_is_idle_whatever_waits_for_it() -> None:
    marked = resident("a", state=State.MARKED, last_used=0, waiters=[Waiter(NOW)])
    assert decision(marked, resident("b", leases=1), waiting("c")) == (Do.EVICT, "a")


def test_where_all_are_in_use_the_version_resident_for_the_longest_time_is_marked_after_the_patience() -> None:
    long, short = (
        resident("long", leases=1, resident_since=NOW - 50),
        resident("short", leases=1, resident_since=NOW - 40),
    )
    assert decision(short, long, waiting("c", NOW - 0.5)) == ("wait", NOW + 0.5)
    assert decision(short, long, waiting("c", NOW - 1.0)) == (Do.MARK, "long")
    assert decision(short, long, waiting("c", NOW - 5.0), head_since=NOW - 0.25) == ("wait", NOW + 0.75)


def test_a_mark_lasts_for_mark_s_and_then_another_version_is_marked() -> None:
    busy, marked = resident("busy", leases=1), resident("a", leases=1, state=State.MARKED, marked_since=NOW - 9)
    queue = waiting("c", NOW - 20)
    assert decision(busy, marked, queue) == ("wait", NOW + 1)
    assert decision(busy, marked, queue, now=NOW + 1) == (Do.UNMARK, "a")
    assert decision(busy, resident("a", leases=1, resident_since=NOW), queue) == (Do.MARK, "busy")


def test_only_one_version_is_marked_at_a_time() -> None:
    marked = resident("a", leases=1, state=State.MARKED, marked_since=NOW)
    assert decision(marked, resident("b", leases=1), waiting("c", 80.0)) == ("wait", NOW + 10)


def test_a_version_that_leaves_anyway_is_marked_once_and_after_mark_s_another_one() -> None:
    leaving = resident("a", leases=1, resident_since=NOW - 50, leaving=True)
    queue = waiting("c", NOW - 2)
    assert decision(leaving, queue, capacity=1) == (Do.MARK, "a")
    marked = replace(leaving, state=State.MARKED, marked_since=NOW)
    assert decision(marked, queue, capacity=1) == ("wait", NOW + 10)
    assert decision(marked, queue, capacity=1, now=NOW + 10) == ("wait", NOW + 28)
    assert decision(marked, resident("b", leases=1), queue, now=NOW + 10) == (Do.MARK, "b")


@pytest.mark.parametrize("facts", [{"holds": 1}, {"pinned": True}])
def test_a_marked_version_that_becomes_pinned_or_held_is_unmarked(facts: dict[str, Any]) -> None:
    marked = resident("a", leases=1, state=State.MARKED, marked_since=NOW, **facts)
    assert decision(marked, resident("b", leases=1), waiting("c")) == (Do.UNMARK, "a")


def test_a_version_is_unmarked_when_no_request_waits_for_a_place_any_more() -> None:
    assert decision(resident("a", leases=1, state=State.MARKED, marked_since=NOW)) == (Do.UNMARK, "a")


def test_an_unloaded_version_stays_marked_until_its_last_lease_ends() -> None:
    marked = resident("a", leases=1, state=State.MARKED, marked_since=NOW, leaving=True)
    assert decision(marked) == ("wait", math.inf)
    assert decision(replace(marked, leases=set())) == (Do.EVICT, "a")


def test_a_request_is_refused_when_it_has_waited_for_wait_s_wherever_its_version_is() -> None:
    for state in (State.WAITING, State.LOADING, State.PROBING, State.UNLOADING):
        late = waiting("c", NOW - 30, NOW - 29, state=state)
        found = decide([late], LIMITS, 0.0, NOW)
        assert isinstance(found, Action)
        assert (found.do, found.waiters) == (Do.REFUSE, (late.waiters[0],))
    busy = resident("a", leases=1), resident("b", leases=1, state=State.MARKED, marked_since=NOW)
    assert decision(*busy, waiting("c", NOW - 0.5), waiting("d", NOW - 29.9))[1] == pytest.approx(NOW + 0.1)


def test_a_publication_waits_for_its_turn_without_limit_and_wait_s_from_then_on() -> None:
    busy = [resident(name, leases=1, holds=1) for name in "ab"]
    late = waiting("c", 0.0, publication=True)
    assert decision(*busy, late, head_since=NOW - 29) == ("wait", NOW + 1)
    assert decision(*busy, late, head_since=NOW - 30) == (Do.REFUSE, "c")


def test_a_request_for_the_same_version_gives_a_publication_the_patience_of_a_request() -> None:
    both = waiting("c", NOW - 40, publication=True)
    both.waiters.append(Waiter(NOW - 2))
    assert decision(*(resident(name, leases=1, holds=1) for name in "ab"), both) == ("wait", NOW + 28)


def test_at_most_four_versions_load_at_a_time_and_at_most_three_of_them_for_publications_alone() -> None:
    queue = waiting("c", publication=True), waiting("d", NOW + 1)
    assert decision(*loading("w", "x", publication=True), *queue, capacity=9) == (Do.LOAD, "c")
    assert decision(*loading("w", "x", "y", publication=True), *queue, capacity=9) == (Do.LOAD, "d")
    assert decision(*loading("w", "x", publication=True), *loading("y"), *queue, capacity=9) == (Do.LOAD, "c")
    assert decision(*loading("w", "x", "y", "z"), *queue, capacity=9) == ("wait", NOW + 30)


def test_at_most_headroom_versions_are_unloaded_at_a_time() -> None:
    going = [residence(name, State.UNLOADING) for name in "wxyz"]
    assert decision(*going[:3], resident("a"), waiting("c"), capacity=1) == (Do.EVICT, "a")
    assert decision(*going, resident("a"), waiting("c"), capacity=1) == ("wait", NOW + 30)
    assert decision(*going, resident("a", leaving=True, serving=False)) == ("wait", math.inf)


def test_a_replaced_version_is_evicted_as_soon_as_it_is_idle() -> None:
    replaced = resident("a", serving=False, leaving=True)
    assert decision(replaced) == (Do.EVICT, "a")
    for facts in ({"leases": {"r"}}, {"holds": 1}):
        assert decision(replace(replaced, **facts)) == ("wait", math.inf)
    assert decision(replace(replaced, state=State.LOADING)) == ("wait", math.inf)


def test_the_leases_of_a_replaced_version_are_cancelled_at_its_deadline_and_later_ones_are_not() -> None:
    replaced = resident("a", serving=False, leaving=True)
    replaced.leases, replaced.deadlines = {"old", "later"}, {"old": NOW + 5, "ended": NOW + 1}
    assert decision(replaced) == ("wait", NOW + 5)
    assert decision(replaced, now=NOW + 5) == (Do.CANCEL, "a")
    replaced.leases.remove("old")
    assert decision(replaced, now=NOW + 5) == ("wait", math.inf)


def of(tenant: str, one: Residence, weight: float = 1.0) -> Residence:
    """Let a version be one that the requests of a tenant use, or wait for, or used last."""
    owner = Owner(tenant, weight)
    one.owners, one.last_owner = dict.fromkeys(one.leases, owner), owner
    for waiter in one.waiters:
        waiter.owner = None if waiter.publication else owner
    return one


def test_the_tenant_with_fewest_versions_for_its_weight_is_first_then_the_oldest_waiter() -> None:
    busy = [of(tenant, resident(name, leases=1)) for tenant, name in (("a", "v"), ("a", "w"), ("b", "x"))]
    old, new = of("a", waiting("old", NOW - 9)), of("b", waiting("new", NOW - 1))
    assert decision(*busy, old, new, capacity=9) == (Do.LOAD, "new")
    assert decision(*busy, old, new, of("c", waiting("none", NOW)), capacity=9) == (Do.LOAD, "none")
    assert decision(*busy, old, new, of("b", waiting("older", NOW - 2)), capacity=9) == (Do.LOAD, "older")
    heavy = [of("a", one, 4.0) for one in (*busy[:2], old)]
    assert decision(*heavy, busy[2], new, capacity=9) == (Do.LOAD, "old")


def test_a_publication_is_first_where_it_has_waited_longer_than_the_tenant_that_is_first() -> None:
    busy, old = of("a", resident("v", leases=1)), of("a", waiting("old", NOW - 9))
    for since, first in ((NOW - 2, "published"), (NOW, "new")):
        queue = old, of("b", waiting("new", NOW - 1)), of("a", waiting("published", since, publication=True))
        assert decision(busy, *queue, capacity=9) == (Do.LOAD, first)


def test_an_idle_version_of_the_tenant_with_most_for_its_weight_is_evicted_first() -> None:
    many = [of("a", resident(name, last_used=NOW - 5)) for name in ("v", "w")]
    one = of("b", resident("x", last_used=NOW - 9))
    assert decision(*many, one, of("c", waiting("n"))) == (Do.EVICT, "v")
    assert decision(*[of("a", residence, 4.0) for residence in many], one, of("c", waiting("n"))) == (Do.EVICT, "x")


@pytest.mark.parametrize("facts", [{"pinned": True}, {"leases": 1}])
def test_versions_that_are_pinned_or_in_use_count_for_their_tenant(facts: dict[str, Any]) -> None:
    kept, idle = of("a", resident("kept", **facts)), of("a", resident("idle", last_used=NOW - 5))
    assert decision(kept, idle, of("b", resident("x", last_used=NOW - 9)), of("c", waiting("n"))) == (Do.EVICT, "idle")


def test_a_version_that_no_tenant_has_used_is_evicted_as_one_of_the_tenant_with_most() -> None:
    used = [of("a", resident("v", last_used=NOW - 5)), of("b", resident("x", leases=1))]
    assert decision(*used, resident("unused", last_used=NOW - 6), of("c", waiting("n"))) == (Do.EVICT, "unused")
    assert decision(*used, resident("unused", last_used=NOW - 4), of("c", waiting("n"))) == (Do.EVICT, "v")


def test_a_version_that_several_tenants_use_counts_for_each_and_is_evicted_as_one_of_the_smallest() -> None:
    shared = of("a", resident("shared", leases=2, resident_since=NOW - 90))
    shared.owners["shared1"] = Owner("b")
    own = of("a", resident("own", leases=1, resident_since=NOW - 5))
    assert decision(shared, own, of("c", waiting("n", NOW - 2))) == (Do.MARK, "own")


def test_a_version_of_the_tenant_with_most_is_marked_then_the_one_resident_for_the_longest_time() -> None:
    many = [of("a", resident(name, leases=1, resident_since=NOW - s)) for name, s in (("v", 5), ("w", 6))]
    one = of("b", resident("x", leases=1, resident_since=NOW - 50))
    assert decision(*many, one, of("c", waiting("n", NOW - 2))) == (Do.MARK, "w")


class Simulation:
    """A memory that executes decisions at once, and fails where an engine would."""

    def __init__(self, capacity: int) -> None:
        self.limits = Limits(capacity, wait_s=30.0, patience_s=1.0, mark_s=10.0)
        self.residences = {name: residence(name, State.ABSENT) for name in "abcde"}
        self.now, self.head_since, self.requests = 0.0, 0.0, 0

    def execute(self) -> Wait:
        """Execute decisions until one is to wait, which must not take long."""
        for _ in range(100):
            found = decide(self.residences.values(), self.limits, self.head_since, self.now)
            if isinstance(found, Wait):
                assert found.until > self.now
                return found
            self.act(found)
            self.check()
        raise AssertionError("decisions without an end")

    def act(self, action: Action) -> None:
        one = action.residence
        match action.do:
            case Do.LOAD:
                assert one.state is State.WAITING
                one.state, self.head_since = State.LOADING, self.now
            case Do.EVICT:
                assert one.loaded
                assert not one.leases
                assert not one.holds
                assert one.leaving or not (one.pinned and one.serving)
                one.state, one.leaving = State.UNLOADING, False
            case Do.MARK:
                assert one.state is State.RESIDENT
                one.state, one.marked_since = State.MARKED, self.now
            case Do.UNMARK:
                assert one.state is State.MARKED
                self.becomes_resident(one)
            case Do.REFUSE:
                assert action.waiters
                one.waiters = [waiter for waiter in one.waiters if waiter not in action.waiters]
                if one.state is State.WAITING and not one.waiters:
                    one.state, self.head_since = State.ABSENT, self.now
            case Do.CANCEL:
                one.leases = {lease for lease in one.leases if one.deadlines.get(lease, math.inf) > self.now}

    def becomes_resident(self, one: Residence) -> None:
        one.state, one.resident_since, waiters, one.waiters = State.RESIDENT, self.now, one.waiters, []
        for waiter in waiters:
            if waiter.publication:
                one.holds += 1
            else:
                one.leases.add(waiter.lease)

    def check(self) -> None:
        states = [one.state for one in self.residences.values()]
        taken = sum(state in (State.LOADING, State.RESIDENT, State.MARKED) for state in states)
        assert taken <= self.limits.capacity
        assert states.count(State.UNLOADING) <= HEADROOM
        for one in self.residences.values():
            assert bool(one.waiters) or one.state is not State.WAITING

    def step(self, what: str, name: str, number: float) -> None:
        """Let something happen to the version `name`."""
        one = self.residences[name]
        if what == "publish" and one.loaded:
            one.holds, one.leaving = one.holds + 1, False
        elif what in ("request", "publish"):
            waiter = Waiter(self.now, publication=what == "publish", lease=f"r{self.requests}")
            self.requests += 1
            one.waiters.append(waiter)
            if one.state is State.ABSENT:
                one.state = State.WAITING
            elif one.state is State.RESIDENT:
                self.becomes_resident(one)
        elif what == "finish" and one.state in (State.LOADING, State.UNLOADING):
            if one.state is State.LOADING:
                self.becomes_resident(one)
            else:
                one.state = State.WAITING if one.waiters else State.ABSENT
        elif what == "end":
            one.leases, one.holds = set(sorted(one.leases)[1:]), max(0, one.holds - 1)
        elif what == "pin":
            one.pinned = not one.pinned
        elif what == "retire" and one.loaded:
            one.serving, one.leaving = False, True
            one.deadlines = {lease: one.deadlines.get(lease, self.now + number) for lease in one.leases}
        elif what == "time":
            self.now += number


STEPS = st.tuples(
    st.sampled_from(["request", "request", "publish", "finish", "finish", "end", "pin", "retire", "time"]),
    st.sampled_from("abcde"),
    st.floats(0.01, 20),
)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 4), st.lists(STEPS, max_size=60))
def test_whatever_happens_no_place_is_given_twice_and_every_waiter_is_served_or_refused(
    capacity: int, steps: list[tuple[str, str, float]]
) -> None:
    memory = Simulation(capacity)
    for what, name, number in steps:
        memory.step(what, name, number)
        memory.execute()
        memory.check()
    for _ in range(200):  # all loads finish, and no request ends by itself
        for name in memory.residences:
            memory.step("finish", name, 0)
        until = memory.execute().until
        if until == math.inf and not any(
            p.state in (State.LOADING, State.UNLOADING) for p in memory.residences.values()
        ):
            break
        memory.now = max(memory.now, until if until < math.inf else memory.now)
    assert not any(one.waiters for one in memory.residences.values())
    assert not any(one.leaving and one.loaded and not (one.leases or one.holds) for one in memory.residences.values())
