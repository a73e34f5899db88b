"""The rollback history of an entry, and the sources that it knows."""

import pytest

from astra_serve.document import desired
from astra_serve.document.desired import Adapter, Step
from astra_serve.document.history import MOST_STEPS, known_source, rollback_history

A, B, C, D = ("sha256:" + 64 * digit for digit in "abcd")


def entry(**facts: object) -> Adapter:
    return desired.entry({"name": "a", "source": "./a", **facts})


@pytest.mark.parametrize(
    ("old", "served", "expected"),
    [
        (None, [], []),
        (None, [Step(digest=A, source="./a")], [Step(digest=A, source="./a")]),
        (entry(), [Step(digest=A, source="./a")], [Step(digest=A, source="./a")]),  # whatever the entry said
        (entry(digest=A), [], [Step(digest=A, source="./a")]),
        (entry(digest=A), [Step(digest=B)], [B, Step(digest=A, source="./a")]),
        (entry(digest=A), [Step(digest=A)], [Step(digest=A, source="./a")]),  # with the source that any of them knows
        (entry(digest=A), [Step(digest=A, source="./first")], [Step(digest=A, source="./first")]),
        (entry(digest=A, source=A), [], [A]),  # only the store has it
        (entry(previous=[A, {"digest": B, "source": "./b"}]), [], [A, Step(digest=B, source="./b")]),
        (entry(previous=[D, A]), [Step(digest=D, source="./d")], [A]),  # the version itself is no step back
        (entry(previous=[A, A]), [], [A]),
    ],
)
def test_the_version_that_served_comes_first_then_those_of_the_entry_each_once(
    old: Adapter | None, served: list[Step], expected: list[object]
) -> None:
    assert rollback_history(old, served, D) == expected


def test_the_newest_eight_steps_are_kept() -> None:
    digests = [f"sha256:{number:064x}" for number in range(12)]
    assert rollback_history(entry(previous=digests), [], D) == digests[:MOST_STEPS]


@pytest.mark.parametrize(
    ("old", "expected"),
    [
        (None, None),
        (entry(), None),
        (entry(digest=A), "./a"),
        (entry(digest=A, source=A), None),
        (entry(digest=B, previous=[{"digest": A, "source": "./older"}]), "./older"),
        (entry(digest=A, source=A, previous=[{"digest": A, "source": "./older"}]), "./older"),
        (entry(previous=[A]), None),
        (entry(canary={"version": "./canary", "digest": A, "weight": 0.5}), "./canary"),
        (entry(canary={"version": A, "digest": A, "weight": 0.5}), None),
        (entry(canary={"version": "./canary", "digest": B, "weight": 0.5}), None),
    ],
)
def test_a_digests_source_is_the_one_of_the_entry_its_canary_or_its_steps(
    old: Adapter | None, expected: str | None
) -> None:
    assert known_source(old, A) == expected
