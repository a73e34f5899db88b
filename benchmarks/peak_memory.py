"""Current and peak memory of this process, from the kernel's counters (Linux): sampling would miss peaks."""

from pathlib import Path

_PROCESS = Path("/proc/self")


def reset_peak() -> None:
    """Reset the peak to the current memory."""
    (_PROCESS / "clear_refs").write_text("5", encoding="utf-8")


def peak_bytes() -> int:
    """Return the peak resident memory since `reset_peak`, in bytes."""
    return _status("VmHWM")


def current_bytes() -> int:
    """Return the current resident memory in bytes."""
    return _status("VmRSS")


def _status(key: str) -> int:
    lines = (_PROCESS / "status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))
