"""Failures of the machine as one line each: no memory, no space on the disk."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError

from converter.adapter_dir import CannotWrite
from trainer.errors import OutOfMemory

_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
_NO_SPACE = ("No space left on device", "PytorchStreamWriter failed", "Disk quota exceeded")


@contextmanager
def in_one_line(out: Path) -> Iterator[None]:
    """Raise OutOfMemory, or CannotWrite for the output folder `out`, in place of the error of a library.

    Other errors pass: they are faults of the program, and their traceback helps to find them.
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise OutOfMemory(
                "out of memory: set gradient_accumulation (more parts, same result), gradient_checkpointing=true, a "
                "smaller max_length, or quantization"
            ) from error
        if is_disk_full(error):
            raise CannotWrite(f"{out} cannot be written: no space left on the disk; free some and try again") from error
        raise


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that there is too little memory, of the GPU or of the machine."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)


def is_disk_full(error: BaseException) -> bool:
    """Return whether an error says that the disk, or the user's share of it, is full."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return isinstance(error, OSError | RuntimeError | SafetensorError) and any(text in str(error) for text in _NO_SPACE)
