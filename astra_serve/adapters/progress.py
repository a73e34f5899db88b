"""Whether the bytes of a source still arrive: it may take any time as long as they do."""

from collections import deque
from dataclasses import dataclass

from astra_serve.adapters.version_files import FILES
from converter.adapter_dir import CHAT_FILES, LORA_WEIGHTS, MAX_JSON_BYTES


@dataclass(frozen=True, kw_only=True)
class FetchLimits:
    """The limits for sources: sizes in bytes, times in seconds."""

    max_bytes: int = 2**33  # of a weight file; `largest_adapter` computes it for a base
    stall_s: float = 60.0  # without a byte
    slowest: int = 64 * 2**10  # bytes in a second, on average over `window_s`
    window_s: float = 300.0
    look_s: float = 10.0  # for a source to say whether it has changed
    downloads: int = 12  # at a time, each in a process
    threads: int = 32  # that read local folders, and look at sources
    share: int = 4  # of these, for one origin


def largest_adapter(shapes: dict[str, tuple[int, int]], rank: int) -> int:
    """Return the bytes of the largest weight file that an engine of `rank` can serve on a base.

    That is a LoRA in float32 over all matrices of the base, (d_out, d_in) by name, one copy of the embedding and the
    output layer, whose size is at most that of the largest matrix, and 16 MiB for the header.
    """
    factors = sum(rank * (d_out + d_in) for d_out, d_in in shapes.values())
    copied = 2 * max((d_out * d_in for d_out, d_in in shapes.values()), default=0)
    return 4 * (factors + copied) + 2**24


def largest_files(max_bytes: int) -> dict[str, int]:
    """Return the most bytes of each file of an adapter, the small files first; `max_bytes` are those of its weights."""
    small = {name: MAX_JSON_BYTES for name in reversed(FILES) if name != LORA_WEIGHTS}
    return {**small, **CHAT_FILES, LORA_WEIGHTS: max_bytes}


class Progress:
    """The bytes that have arrived, and when."""

    def __init__(self, limits: FetchLimits, now: float) -> None:
        self._limits, self._last = limits, now
        self._seen = deque([(now, 0)])  # of the last `window_s`: time, bytes until then

    def note(self, total: int, now: float) -> None:
        """Note that `total` bytes have arrived until now."""
        if total > self._seen[-1][1]:
            self._last = now
            self._seen.append((now, total))

    def fault(self, now: float) -> str | None:
        """Return the reason if the source is to be given up."""
        if now - self._last >= self._limits.stall_s:
            return f"it has sent nothing for {self._limits.stall_s:.0f} s"
        while len(self._seen) > 1 and self._seen[1][0] <= now - self._limits.window_s:
            self._seen.popleft()
        (began, before), (_, total) = self._seen[0], self._seen[-1]
        if now - began >= self._limits.window_s and total - before < self._limits.slowest * (now - began):
            return f"it has sent less than {self._limits.slowest >> 10} KiB/s for {self._limits.window_s:.0f} s"
        return None

    def due(self, now: float) -> float:
        """Return the seconds after which there may be a fault."""
        return max(0.01, min(self._last + self._limits.stall_s - now, self._limits.window_s / 10))
