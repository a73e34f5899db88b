"""When a source is given up, and the largest adapter of a base."""

import pytest

from astra_serve.adapters.progress import FetchLimits, Progress, largest_adapter

LIMITS = FetchLimits(stall_s=60, slowest=100, window_s=300)
SILENT, SLOW = "it has sent nothing for 60 s", "it has sent less than 0 KiB/s for 300 s"


@pytest.mark.parametrize(
    ("noted", "now", "fault"),
    [
        ([], 59, None),
        ([], 60, SILENT),
        ([(50, 1)], 109, None),
        ([(50, 1)], 110, SILENT),
        ([(50, 1), (90, 1)], 110, SILENT),  # no byte more
        ([(t, t * 100) for t in range(0, 301, 50)], 300, None),
        ([(t, t * 99) for t in range(0, 301, 50)], 300, SLOW),
        ([(t, t * 99) for t in range(0, 300, 50)], 299, None),
        ([(50, 10**6), *((t, 10**6 + t) for t in range(100, 351, 50))], 350, SLOW),  # a fast start is forgotten
        ([(t, 10**6 * t) for t in range(0, 100_000, 50)], 100_000, None),  # no limit for the whole
    ],
)
def test_a_source_is_given_up_without_bytes_or_with_too_few(noted, now, fault) -> None:
    progress = Progress(LIMITS, 0)
    for when, total in noted:
        progress.note(total, when)
    assert progress.fault(now) == fault
    assert progress.due(now) > 0


def test_the_largest_adapter_is_a_lora_in_float32_with_the_embedding_and_the_head() -> None:
    shapes = {"embed_tokens": (1000, 64), "q_proj": (64, 64)}
    assert largest_adapter(shapes, rank=8) == 4 * (8 * (1064 + 128) + 2 * 64_000) + 2**24
    assert largest_adapter({}, rank=8) == 2**24
