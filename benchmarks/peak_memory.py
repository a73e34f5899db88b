"""How much memory this process holds, and held at most: the kernel's own figures (Linux), for sampling misses peaks."""

from pathlib import Path

_PROCESS = Path("/proc/self")


def reset() -> None:
    """Let the high-water mark fall to what is held now."""
    (_PROCESS / "clear_refs").write_text("5", encoding="utf-8")


def highest() -> int:
    """Return the most bytes that the process held since `reset`."""
    return _status("VmHWM")


def held() -> int:
    """Return the bytes that the process holds."""
    return _status("VmRSS")


def _status(key: str) -> int:
    lines = (_PROCESS / "status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))
