"""Tensor files, read and written one tensor at a time; a header is checked completely before any tensor is read.

Layout of safetensors: 8 bytes n (little endian), n bytes of JSON {name: {dtype, shape, data_offsets}}, the tensors.
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

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # of adapters
_NAMES = {dtype: name for name, dtype in DTYPES.items()} | {
    torch.float64: "F64",  # this and all below: only in base models
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
MAX_HEADER_BYTES = 100_000_000  # as in the safetensors library
MAX_DIMENSION = 2**22  # more rows than any model has; a damaged header can name any number


class TensorFile(Mapping[str, torch.Tensor]):
    """The tensors of an adapter folder's safetensors file by name; a tensor is read and checked when it is accessed.

    Opening the file raises NotAnAdapter, UnsafeAdapter and MalformedAdapter, reading a tensor raises MalformedAdapter.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.file = file_in(folder, name)
        self.shapes = _checked_header(self.file)

    def __getitem__(self, name: str) -> torch.Tensor:
        """Return a copy; the file is unmapped again, because mapped pages would count as memory of the process."""
        if name not in self.shapes:
            raise KeyError(name)
        try:
            with safe_open(self.file, framework="pt") as file:
                tensor: torch.Tensor = file.get_tensor(name).clone()
        except (SafetensorError, OSError) as error:
            raise MalformedAdapter(f"{self.file} cannot be read: {error}") from error
        if not tensor.isfinite().all():
            raise MalformedAdapter(f"{self.file}: {name!r} contains NaN or infinite values")
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


class TensorFiles(Mapping[str, torch.Tensor]):
    """The tensors of an adapter whose safetensors file is split, as one mapping; otherwise as a TensorFile.

    `weight_map` is that of the index: the file of each tensor. Opening the files raises NotAnAdapter, UnsafeAdapter and
    MalformedAdapter, also where index and files contradict each other.
    """

    def __init__(self, folder: Path, files: Iterable[str], weight_map: Mapping[str, str]) -> None:
        opened = {name: TensorFile(folder, name) for name in files}
        self._file_of = {key: opened[name] for key, name in weight_map.items()}
        keys_of: dict[str, set[str]] = {name: set() for name in opened}
        for key, name in weight_map.items():
            keys_of[name].add(key)
        for name, file in opened.items():
            for key in file.keys() ^ keys_of[name]:
                where = "the index" if key in file else "the file"
                raise MalformedAdapter(f"{file.file}: {key[:200]!r} is not in {where}: copy the adapter again")
        self.shapes = {key: file.shapes[key] for key, file in self._file_of.items()}

    def __getitem__(self, name: str) -> torch.Tensor:
        """Return a copy, as a TensorFile does."""
        return self._file_of[name][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


class PickledTensors(dict[str, torch.Tensor]):
    """The tensors of a PyTorch checkpoint by name, all in memory, read by PyTorch's weights-only unpickler.

    Raises NotAnAdapter, UnsafeAdapter and MalformedAdapter.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.file = file_in(folder, name)
        try:
            with ZipFile(self.file) as parts:
                if any(part.compress_type != ZIP_STORED for part in parts.infolist()):
                    raise UnsafeAdapter(f"{self.file} is compressed, unlike PyTorch's own: it could expand to any size")
            content = torch.load(self.file, map_location="cpu", weights_only=True)
        except UnpicklingError as error:
            raise UnsafeAdapter(f"{self.file} contains more than tensors: {first_line(error)}") from error
        except UnsafeAdapter:
            raise
        except Exception as error:  # a damaged pickle can raise any exception
            raise MalformedAdapter(f"{self.file} is not a PyTorch checkpoint: {first_line(error)}") from error
        if not isinstance(content, dict) or not all(_is_plain(name, tensor) for name, tensor in content.items()):
            raise MalformedAdapter(f"{self.file} may contain only finite tensors ({', '.join(DTYPES)}) by name")
        super().__init__(content)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self.items()}


def _is_plain(name: object, tensor: object) -> bool:
    """Return whether this is a named, dense, finite tensor that is not larger than its storage, as a view can be."""
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
    """Write a safetensors file with one tensor in memory at a time; `names` are the names of `tensors` in any order.

    The header is the first part of the file, but complete only after the last tensor: the longest possible header is
    reserved, and padded with spaces, as the format allows. Raises CannotWrite for an unknown dtype, and OSError.
    """
    longest = {"dtype": "F8_E4M3", "shape": 6 * [2**40], "data_offsets": 2 * [2**60]}
    header_bytes = len(json.dumps({"__metadata__": metadata, **dict.fromkeys(names, longest)}))
    header_bytes += -header_bytes % 8
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    with file.open("wb") as stream:
        stream.seek(8 + header_bytes)
        for name, tensor in tensors:
            data = tensor.detach().cpu().contiguous()
            if data.dtype not in _NAMES:
                raise CannotWrite(f"{name!r} has dtype {data.dtype}, which cannot be written")
            begin, end = end, end + data.nbytes
            header[name] = {"dtype": _NAMES[data.dtype], "shape": list(data.shape), "data_offsets": [begin, end]}
            stream.write(data.flatten().view(torch.uint8).numpy().data)
        text = json.dumps(header).encode().ljust(header_bytes)
        assert len(text) == header_bytes, "the header is longer than the reserved space"
        stream.seek(0)
        stream.write(header_bytes.to_bytes(8, "little") + text)


def _checked_header(file: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes by name; reads only the header. Raises MalformedAdapter."""
    header, data_bytes = _read_header(file)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise MalformedAdapter(f"{file}: __metadata__ of the header does not map names to strings")
    shapes, spans = {}, []
    for name, entry in header.items():
        shapes[name], begin, end = _checked_entry(file, name, entry)
        spans.append((begin, end, name))
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            fault = "overlaps the tensor before it" if begin < position else "has unused bytes before it"
            raise MalformedAdapter(f"{file}: {name!r} {fault}")
        position = end
    if position != data_bytes:
        raise MalformedAdapter(f"{file} has {data_bytes} bytes of tensors, but its header describes {position}")
    return shapes


def _read_header(file: Path) -> tuple[dict[str, Any], int]:
    """Return the JSON object of the header, and the number of bytes after it. Raises MalformedAdapter."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
            if size < 8 or header_bytes > size - 8:
                raise MalformedAdapter(f"{file} is truncated: it has {size} bytes, its header needs {header_bytes + 8}")
            if header_bytes > MAX_HEADER_BYTES:
                raise MalformedAdapter(f"{file} has a header of {header_bytes} bytes; the limit is {MAX_HEADER_BYTES}")
            header = json.loads(stream.read(header_bytes), object_pairs_hook=_unique_names)
    except OSError as error:
        raise MalformedAdapter(f"{file} cannot be read: {error.strerror}") from error
    except MalformedAdapter:
        raise
    except (ValueError, RecursionError) as error:
        raise MalformedAdapter(f"{file} has no safetensors header: {error}") from error
    if not isinstance(header, dict):
        raise MalformedAdapter(f"{file} has no safetensors header: it is not a JSON object")
    return header, size - 8 - header_bytes


def _checked_entry(file: Path, name: str, entry: Any) -> tuple[tuple[int, ...], int, int]:
    """Return the shape of a tensor and where its bytes begin and end. Raises MalformedAdapter."""
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]} if all(
            type(d) is int and 0 <= d <= MAX_DIMENSION for d in shape
        ):
            pass
        case _:
            raise MalformedAdapter(f"{file}: {name!r} has an impossible header entry: {str(entry)[:100]}")
    if dtype not in DTYPES:
        raise MalformedAdapter(f"{file}: {name!r} has dtype {dtype[:20]!r}, not one of {', '.join(DTYPES)}")
    if end - begin != prod(shape) * DTYPES[dtype].itemsize:
        raise MalformedAdapter(f"{file}: {name!r} has {end - begin} bytes for {dtype} of shape {tuple(shape)}")
    return tuple(shape), begin, end


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found
