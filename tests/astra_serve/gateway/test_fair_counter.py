"""The virtual token counter alone: tenants with random weights and requests before random numbers of places."""

import itertools
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from astra_serve.gateway.tenancy.fair_counter import INPUT, OUTPUT, FairCounter, Turn

MOST_TOKENS = 6  # of a prompt, and of an answer


@dataclass
class Work:
    """A request: its sequences, the tokens of its prompt, and those that each sequence still has to compute."""

    sequences: int
    prompt: int
    left: int


@dataclass
class Engine:
    """Computes one token of each running sequence in a step; the prompt in its request's first one."""

    places: int
    counter: FairCounter[Work] = field(default_factory=FairCounter)
    running: list[Turn[Work]] = field(default_factory=list)
    weights: dict[str, float] = field(default_factory=dict)
    service: dict[str, float] = field(default_factory=dict)  # by tenant or tenant/adapter, divided by weight

    def ask(self, tenant: str, adapter: str, work: Work) -> Turn[Work]:
        return self.counter.add(tenant, self.weights.get(tenant, 1.0), adapter, work)

    def used(self) -> int:
        return sum(turn.item.sequences for turn in self.running)

    def dispatch(self) -> None:
        while self.used() < self.places and (turn := next(self.counter.turns(), None)):
            self.counter.take(turn)
            self.running.append(turn)

    def step(self) -> None:
        for turn in list(self.running):
            work = turn.item
            service = INPUT * work.prompt + OUTPUT * work.sequences
            work.prompt, work.left = 0, work.left - 1
            self.counter.charge(turn, service)
            tenant, adapter = turn.names
            weight = self.weights.get(tenant, 1.0)
            self.service[tenant] = self.service.get(tenant, 0.0) + service / weight
            self.service[f"{tenant}/{adapter}"] = self.service.get(f"{tenant}/{adapter}", 0.0) + service
            if not work.left:
                self.running.remove(turn)
                self.counter.done(turn)

    def waiting(self) -> set[str]:
        """Return the tenants, and the adapters of tenants, that have requests waiting."""
        names = [turn.names for turn in self.counter.turns()]
        return {tenant for tenant, _ in names} | {"/".join(pair) for pair in names}


WORK = st.builds(Work, st.integers(1, 3), st.integers(0, MOST_TOKENS), st.integers(1, MOST_TOKENS))
ARRIVALS = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("xyz"), WORK), max_size=8)
HISTORY = st.lists(ARRIVALS, min_size=1, max_size=40)  # before each step


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 5), st.lists(st.floats(0.1, 10), min_size=3, max_size=3), HISTORY)
def test_the_gap_of_two_tenants_or_adapters_that_wait_without_a_pause_is_bounded(
    places: int, weights: list[float], history: list[list[tuple[str, str, Work]]]
) -> None:
    engine = Engine(places, weights=dict(zip("abc", weights, strict=True)))
    tokens = (places - 1 + 3) * 2 * MOST_TOKENS  # that the running requests of one owner can hold: the paper's M
    u = max(INPUT * MOST_TOKENS, OUTPUT * tokens)
    began: dict[tuple[str, str], list[float]] = {}  # the gap at the first step of a wait, and its extremes since
    for arrivals in history + [[]] * 40:
        for tenant, adapter, work in arrivals:
            engine.ask(tenant, adapter, Work(work.sequences, work.prompt, work.left))
        engine.dispatch()
        names = sorted(engine.waiting())
        pairs = [p for p in itertools.combinations(names, 2) if _beside(*p)]
        began = {pair: began.get(pair, []) for pair in pairs}
        for pair in pairs:
            one, other = pair
            began[pair].append(engine.service.get(one, 0.0) - engine.service.get(other, 0.0))
            bound = u / _weight(engine, one) + u / _weight(engine, other)
            assert max(began[pair]) - min(began[pair]) <= bound * (1 + 1e-9)
        engine.step()


def _beside(one: str, other: str) -> bool:
    """Return whether two owners are compared: two tenants, or two adapters of one tenant."""
    return one.count("/") == other.count("/") and ("/" not in one or one[0] == other[0])


def _weight(engine: Engine, name: str) -> float:
    return 1.0 if "/" in name else engine.weights[name]


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 5), HISTORY)
def test_no_place_is_empty_while_a_request_waits_and_all_are_computed(
    places: int, history: list[list[tuple[str, str, Work]]]
) -> None:
    engine, asked, done = Engine(places), 0, 0
    for arrivals in history + [[]] * 1000:
        for tenant, adapter, work in arrivals:
            engine.ask(tenant, adapter, Work(work.sequences, work.prompt, work.left))
            asked += 1
        engine.dispatch()
        assert not engine.counter or engine.used() >= places
        before = len(engine.running)
        engine.step()
        done += before - len(engine.running)
        if not (arrivals or engine.running or engine.counter):
            break
    assert done == asked


@pytest.mark.parametrize(("idle", "busy"), [(("b", "x"), ("a", "x")), (("a", "y"), ("a", "x"))])
def test_an_owner_that_was_idle_gets_no_more_than_its_share_from_then_on(
    idle: tuple[str, str], busy: tuple[str, str]
) -> None:
    engine = Engine(1)
    for _ in range(200):
        engine.ask(*busy, Work(1, 0, 1))
    for _ in range(100):
        engine.dispatch()
        engine.step()
    for _ in range(100):
        engine.ask(*idle, Work(1, 0, 1))
    before = dict(engine.service)
    for _ in range(50):
        engine.dispatch()
        engine.step()
    got = [engine.service.get("/".join(one), 0.0) - before.get("/".join(one), 0.0) for one in (idle, busy)]
    assert got == [50.0, 50.0]  # 25 tokens each


def test_an_owner_whose_requests_all_run_saves_nothing_up_either() -> None:
    engine = Engine(2)
    engine.ask("long", "x", Work(1, 0, 1000))
    for _ in range(200):
        engine.ask("a", "x", Work(1, 0, 1))
    engine.dispatch()
    for _ in range(100):
        engine.step()
        engine.dispatch()
    engine.ask("b", "x", Work(1, 0, 1))
    assert engine.ask("b", "x", Work(1, 0, 1)).tenant.counter >= 198


def test_an_owner_that_begins_to_wait_when_no_other_does_is_lifted_to_the_last_one_that_waited() -> None:
    engine = Engine(1)
    engine.ask("a", "x", Work(1, 0, 1000))
    engine.dispatch()
    for _ in range(100):
        engine.step()
    assert engine.ask("b", "x", Work(1, 0, 1)).tenant.counter == 200


def test_tenants_get_tokens_by_their_weights() -> None:
    engine = Engine(4, weights={"a": 1.0, "b": 2.0, "c": 4.0})
    for tenant in "abc":
        for number in range(2000):
            engine.ask(tenant, "xyz"[number % 3], Work(1, number % 4, 1 + number % 3))
    for _ in range(1000):
        engine.dispatch()
        engine.step()
    assert max(engine.service.values()) > 0
    shares = [engine.service[tenant] for tenant in "abc"]
    assert max(shares) / min(shares) < 1.05


def test_a_request_that_gives_up_leaves_the_queue_and_the_counters_of_an_idle_engine_begin_anew() -> None:
    engine = Engine(1)
    first = engine.ask("a", "x", Work(1, 0, 5))
    second = engine.ask("a", "x", Work(1, 0, 5))
    other = engine.ask("b", "x", Work(1, 0, 5))
    engine.dispatch()
    assert engine.running == [first]
    engine.counter.remove(second)
    assert list(engine.counter.turns()) == [other]
    engine.counter.remove(other)
    assert not engine.counter
    for _ in range(5):
        engine.step()
    assert engine.ask("a", "x", Work(1, 0, 1)).tenant.counter == 0
