"""Which snapshots are published, and in which order."""

import threading
from pathlib import Path

from astra_serve.client.publisher import Publisher, Snapshot
from astra_serve.errors import NotPublished


def test_one_is_published_at_a_time_and_a_newer_one_replaces_the_one_that_waits() -> None:
    began, go_on, running = threading.Event(), threading.Event(), []

    def publish(snapshot: Snapshot) -> int:
        running.append(snapshot.step)
        began.set()
        assert go_on.wait(10)
        if snapshot.step == 1:
            raise NotPublished("the first one fails")
        return snapshot.step

    publisher = Publisher(publish)
    one, two, three, four = (Snapshot(step, Path(f"/{step}")) for step in (1, 2, 3, 4))
    assert publisher.submit(one) is None
    assert began.wait(10)
    assert publisher.submit(two) is None
    assert publisher.submit(three) == two
    assert publisher.outcomes() == []
    go_on.set()
    publisher.wait()
    failed, served = publisher.outcomes()
    assert (failed.snapshot, str(failed.result)) == (one, "the first one fails")
    assert (served.snapshot, served.result) == (three, 3)
    assert publisher.outcomes() == []
    publisher.submit(four)
    publisher.wait()
    assert running == [1, 3, 4]


def test_nothing_to_publish_is_not_waited_for() -> None:
    publisher = Publisher(lambda _: None)
    publisher.wait()
    assert publisher.outcomes() == []
