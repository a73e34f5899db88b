"""Safetensors files, a tensor at a time: headers are checked before a byte is read, and nothing is held in memory.

Layout: 8 bytes n (little endian), n bytes of JSON {name: {dtype, shape, data_offsets}}, then the tensors' bytes.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import ZIP_STORED, ZipFile

import torch
from safetensors import SafetensorError, safe_open

from converter.adapter_dir.errors import CannotWrite, MalformedAdapter, UnsafeAdapter
from converter.adapter_dir.folder import file_in
from converter.errors import first_line

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()} | {
    torch.float64: "F64",  # what else a base model may hold
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
LARGEST_HEADER = 100_000_000  # bytes, as in the safetensors library
LARGEST_DIMENSION = 2**22  # no model has a matrix with so many rows; a header can claim any number


class TensorFile(Mapping[str, torch.Tensor]):
    """The tensors of a safetensors file of an adapter folder, each read when it is asked for, and checked then.

    Opening it raises NotAnAdapter, UnsafeAdapter and MalformedAdapter; reading a tensor raises MalformedAdapter.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.file = file_in(folder, name)
        self.shapes = _checked_header(self.file)

    def __getitem__(self, name: str) -> torch.Tensor:
        """Return a copy in memory. The file is mapped only meanwhile, so that it does not fill the process's memory."""
        if name not in self.shapes:
            raise KeyError(name)
        try:
            with safe_open(self.file, framework="pt") as file:
                tensor: torch.Tensor = file.get_tensor(name).clone()
        except (SafetensorError, OSError) as error:
            raise MalformedAdapter(f"{self.file} cannot be read: {error}") from error
        if not tensor.isfinite().all():
            raise MalformedAdapter(f"{self.file}: {name!r} holds NaN or infinite values")
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


class PickledTensors(dict[str, torch.Tensor]):
    """The tensors of a PyTorch checkpoint, all in memory, read by the unpickler that makes nothing but tensors.

    Raises NotAnAdapter, UnsafeAdapter and MalformedAdapter.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.file = file_in(folder, name)
        try:
            with ZipFile(self.file) as parts:
                if any(part.compress_type != ZIP_STORED for part in parts.infolist()):
                    raise UnsafeAdapter(f"{self.file} is compressed, which PyTorch never does: it could be of any size")
            content = torch.load(self.file, map_location="cpu", weights_only=True)
        except UnpicklingError as error:
            raise UnsafeAdapter(f"{self.file} holds more than tensors: {first_line(error)}") from error
        except UnsafeAdapter:
            raise
        except Exception as error:  # a broken pickle can raise anything
            raise MalformedAdapter(f"{self.file} is no PyTorch checkpoint: {str(error).splitlines()[:1]}") from error
        if not isinstance(content, dict) or not all(_is_plain(name, tensor) for name, tensor in content.items()):
            raise MalformedAdapter(f"{self.file} must hold finite tensors ({', '.join(DTYPES)}) by name, nothing else")
        super().__init__(content)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self.items()}


def _is_plain(name: object, tensor: object) -> bool:
    """Whether a tensor is what it takes up in memory, and finite: a view can claim any shape."""
    return (
        isinstance(name, str)
        and isinstance(tensor, torch.Tensor)
        and tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and tensor.dtype in DTYPES.values()
        and tensor.nbytes <= tensor.untyped_storage().nbytes()
        and bool(tensor.isfinite().all())
    )


def write_tensors(
    file: Path, names: Iterable[str], tensors: Iterable[tuple[str, torch.Tensor]], metadata: Mapping[str, str]
) -> None:
    """Write `tensors`, whose names are `names` in any order, one after the other, so that one at a time is in memory.

    The header comes first and is known last: room for it is kept, and filled up with spaces, as the format allows.
    """
    longest = {"dtype": "F8_E4M3", "shape": 6 * [2**40], "data_offsets": 2 * [2**60]}
    room = len(json.dumps({"__metadata__": metadata, **dict.fromkeys(names, longest)}))
    room += -room % 8
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    with file.open("wb") as stream:
        stream.seek(8 + room)
        for name, tensor in tensors:
            data = tensor.detach().cpu().contiguous()
            if data.dtype not in _NAMES:
                raise CannotWrite(f"{name!r} is {data.dtype}, for which safetensors has no name here")
            begin, end = end, end + data.nbytes
            header[name] = {"dtype": _NAMES[data.dtype], "shape": list(data.shape), "data_offsets": [begin, end]}
            stream.write(data.flatten().view(torch.uint8).numpy().data)
        text = json.dumps(header).encode().ljust(room)
        assert len(text) == room, "the header grew beyond its room"
        stream.seek(0)
        stream.write(room.to_bytes(8, "little") + text)


def _checked_header(file: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes by name after a look at the header alone. Raises MalformedAdapter."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            room = int.from_bytes(stream.read(8), "little")
            if size < 8 or room > size - 8:
                raise MalformedAdapter(f"{file} is cut short: it has {size} bytes, its header alone claims {room + 8}")
            if room > LARGEST_HEADER:
                raise MalformedAdapter(f"{file} claims a header of {room} bytes: that is no adapter's")
            header = json.loads(stream.read(room), object_pairs_hook=_without_repetition)
    except OSError as error:
        raise MalformedAdapter(f"{file} cannot be read: {error.strerror}") from error
    except MalformedAdapter:
        raise
    except (ValueError, RecursionError) as error:
        raise MalformedAdapter(f"{file} has no safetensors header: {error}") from error
    if not isinstance(header, dict):
        raise MalformedAdapter(f"{file} has no safetensors header: it is no JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise MalformedAdapter(f"{file} has a header whose __metadata__ is not text by name")
    shapes, spans = {}, []
    for name, entry in header.items():
        match entry:
            case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]} if all(
                type(d) is int and 0 <= d <= LARGEST_DIMENSION for d in shape
            ):
                pass
            case _:
                raise MalformedAdapter(f"{file}: {name!r} is no tensor of a possible size: {str(entry)[:100]}")
        if dtype not in DTYPES:
            raise MalformedAdapter(f"{file}: {name!r} is {dtype[:20]!r}: adapters hold {', '.join(DTYPES)}")
        if end - begin != prod(shape) * DTYPES[dtype].itemsize:
            raise MalformedAdapter(f"{file}: {name!r} has {end - begin} bytes for {dtype} of shape {tuple(shape)}")
        shapes[name] = tuple(shape)
        spans.append((begin, end, name))
    place = 0
    for begin, end, name in sorted(spans):
        if begin != place:
            fault = "overlaps the tensor before it" if begin < place else "leaves bytes before it that nobody owns"
            raise MalformedAdapter(f"{file}: {name!r} {fault}")
        place = end
    if place != size - 8 - room:
        raise MalformedAdapter(f"{file} holds {size - 8 - room} bytes of tensors, its header claims {place}")
    return shapes


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found
