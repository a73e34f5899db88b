"""Malicious and damaged adapter folders: each fault has its own one-line error, and nothing is written."""

import io
import json
import shutil
import struct
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from converter import adapter_dir
from converter.adapter_dir import AdapterError, UnsafeAdapter
from converter.adapter_dir.patterns import pattern_value
from converter.adapter_dir.tensors import TensorFile, write_tensors
from converter.cli import main
from tests.converter.handmade import make_adapter, make_layer, to_lora

WEIGHTS = {"astra": adapter_dir.ASTRA_WEIGHTS, "lora": adapter_dir.LORA_WEIGHTS}


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An Astra adapter and a LoRA by kind; their base is not available locally."""
    root = tmp_path_factory.mktemp("intact")
    adapter = make_adapter({"m.0.q_proj": make_layer(12, 8, 2, 0.1), "m.0.up_proj": make_layer(8, 12, 2, 0.1, 1)})
    with adapter_dir.new_folder(root / "astra") as folder:
        adapter_dir.save_astra(folder, adapter)
    with adapter_dir.new_folder(root / "lora") as folder:
        adapter_dir.save_lora(folder, to_lora(adapter, torch.bfloat16))
    return {kind: root / kind for kind in WEIGHTS}


def header_of(file: Path) -> tuple[dict[str, Any], bytes]:
    data = file.read_bytes()
    (n,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + n]), data[8 + n :]


def with_header(file: Path, header: Any, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def edit(change: Callable[[dict[str, Any]], None]) -> Callable[[Path, str], None]:
    """Return a fault that edits the entries of the header with `change`."""

    def damage(folder: Path, name: str) -> None:
        header, data = header_of(folder / name)
        change(header)
        with_header(folder / name, header, data)

    return damage


def first_entry(header: dict[str, Any]) -> dict[str, Any]:
    return header[next(name for name in header if name != "__metadata__")]


def overlap(header: dict[str, Any]) -> None:
    entries = (entry for name, entry in header.items() if name != "__metadata__")
    *_, previous, last = sorted(entries, key=lambda entry: entry["data_offsets"])
    length = last["data_offsets"][1] - last["data_offsets"][0]
    begin = previous["data_offsets"][0]
    last["data_offsets"] = [begin, begin + length]


def shifted(header: dict[str, Any]) -> None:
    for name, entry in header.items():
        if name != "__metadata__":
            entry["data_offsets"] = [offset + 8 for offset in entry["data_offsets"]]


def set_values(value: float) -> Callable[[Path, str], None]:
    def damage(folder: Path, name: str) -> None:
        tensors = load_file(folder / name)
        next(iter(tensors.values()))[0, 0] = value
        save_file(tensors, folder / name)

    return damage


def replace_bytes(content: bytes) -> Callable[[Path, str], None]:
    return lambda folder, name: (folder / name).write_bytes(content) and None


def link_outside(folder: Path, name: str) -> None:
    outside = folder.parent / "outside"
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)


def rename_tensor(new: str) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        name = next(name for name in header if name != "__metadata__")
        header[new] = header.pop(name)

    return change


def remove_a_factor(folder: Path, name: str) -> None:
    tensors = load_file(folder / name)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, folder / name)


FAULTS: dict[str, tuple[Callable[[Path, str], Any], str]] = {
    "empty": (replace_bytes(b""), "is truncated"),
    "header longer than the file": (replace_bytes(struct.pack("<Q", 2**60) + b"{}"), "its header needs"),
    "header is not JSON": (lambda f, n: with_header(f / n, b"{" + b" " * 7, b""), "has no safetensors header"),
    "header is a list": (lambda f, n: with_header(f / n, b"[]      ", b""), "it is not a JSON object"),
    "header is nested too deeply": (lambda f, n: with_header(f / n, b"[" * 200_000, b""), "has no safetensors header"),
    "a name twice": (lambda f, n: with_header(f / n, b'{"a": 1, "a": 2}', b""), "a name occurs twice"),
    "overlapping tensors": (edit(overlap), "overlaps the tensor before it"),
    "a gap": (edit(shifted), "has unused bytes before it"),
    "bytes missing": (lambda f, n: (f / n).write_bytes((f / n).read_bytes()[:-4]), "but its header describes"),
    "bytes at the end": (lambda f, n: (f / n).write_bytes((f / n).read_bytes() + b"more"), "but its header describes"),
    "size and shape differ": (edit(lambda h: first_entry(h).update(shape=[1])), "of shape (1,)"),
    "a huge shape": (edit(lambda h: first_entry(h).update(shape=[2**50, 2**50])), "an impossible header entry"),
    "a huge shape of no bytes": (
        edit(lambda h: first_entry(h).update(shape=[0, 2**62], data_offsets=[0, 0])),
        "an impossible header entry",
    ),
    "negative sizes": (edit(lambda h: first_entry(h).update(shape=[-1, -8])), "an impossible header entry"),
    "offsets that are not numbers": (
        edit(lambda h: first_entry(h).update(data_offsets=[0, "8"])),
        "an impossible header entry",
    ),
    "a wrong dtype": (edit(lambda h: first_entry(h).update(dtype="I64")), "not one of F32, F16, BF16"),
    "an unknown dtype": (edit(lambda h: first_entry(h).update(dtype="[red]" * 99)), "not one of F32, F16, BF16"),
    "NaN": (set_values(float("nan")), "contains NaN or infinite values"),
    "infinity": (set_values(float("inf")), "contains NaN or infinite values"),
    "a link out of the folder": (link_outside, "is a link that leads out of its folder"),
    "a missing factor": (remove_a_factor, "has no tensor|has only one of lora_A and lora_B"),
    "an unknown tensor name": (
        edit(rename_tensor("two\nlines [bold]of text")),
        "has no tensor|is not a lora_A or lora_B",
    ),
    "a folder instead of the file": (lambda f, n: ((f / n).unlink(), (f / n).mkdir()), "has no a"),
}


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_of_the_weights_has_its_own_error(intact, tmp_path, kind, fault, capsys) -> None:
    damage, message = FAULTS[fault]
    folder = shutil.copytree(intact[kind], tmp_path / "adapter")
    damage(folder, WEIGHTS[kind])
    refused(folder, tmp_path / "out", message, capsys)


def refused(folder: Path, out: Path, message: str, capsys) -> None:
    """Assert that `folder` is refused with one line that contains a part of `message`, and that nothing is written."""
    assert main([str(folder), str(out), "--no-verify"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert any(part in line for part in message.split("|")), line
    assert not [
        path for path in out.parent.iterdir() if path.name.startswith((".out", "out")) and path.name != "outside"
    ]


CONFIGS: dict[str, tuple[str, str]] = {
    "r is true": ('{"r": true, "lora_alpha": 1}', "needs r, an integer from 1 to 4096"),
    "r is huge": ('{"r": 99999999999999999999, "lora_alpha": 1}', "needs r, an integer from 1 to 4096"),
    "r is a list": ('{"r": [8], "lora_alpha": 1}', "needs r, an integer from 1 to 4096"),
    "alpha is NaN": ('{"r": 2, "lora_alpha": NaN}', "needs lora_alpha, a positive number"),
    "alpha is infinite": ('{"r": 2, "lora_alpha": 1e999}', "needs lora_alpha, a positive number"),
    "alpha is negative": ('{"r": 2, "lora_alpha": -1}', "needs lora_alpha, a positive number"),
    "a pattern is a list": ('{"r": 2, "lora_alpha": 2, "rank_pattern": [1]}', "must map module names to positive"),
    "a pattern of strings": ('{"r": 2, "lora_alpha": 2, "alpha_pattern": {"q": "2"}}', "must map module names to"),
    "is nested too deeply": ("[" * 200_000, "is not JSON"),
    "is not an object": ('"r"', "is not a JSON object"),
    "is not UTF-8": ("\udcff", "is not JSON"),
}


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("fault", CONFIGS)
def test_each_fault_of_the_config_has_its_own_error(intact, tmp_path, kind, fault, capsys) -> None:
    text, message = CONFIGS[fault]
    folder = shutil.copytree(intact[kind], tmp_path / "adapter")
    (folder / "adapter_config.json").write_text(text, errors="surrogateescape")
    refused(folder, tmp_path / "out", message, capsys)


def test_a_huge_config_is_refused_without_reading_it(intact, tmp_path, capsys) -> None:
    folder = shutil.copytree(intact["lora"], tmp_path / "adapter")
    with (folder / "adapter_config.json").open("wb") as file:
        file.truncate(2**40)  # sparse: a terabyte that uses no disk space
    refused(folder, tmp_path / "out", "is larger than 4 MiB", capsys)


def test_a_huge_weight_file_is_refused_from_its_header(intact, tmp_path, capsys) -> None:
    folder = shutil.copytree(intact["lora"], tmp_path / "adapter")
    with (folder / adapter_dir.LORA_WEIGHTS).open("r+b") as file:
        file.truncate(2**40)
    refused(folder, tmp_path / "out", "but its header describes", capsys)


def test_a_pattern_that_needs_more_than_linear_time_is_refused(intact, tmp_path, capsys) -> None:
    folder = shutil.copytree(intact["lora"], tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["alpha_pattern"] = {r"(?=(([a-z0-9._]*)*)*!)q_proj": 3}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    refused(folder, tmp_path / "out", "is a regular expression that cannot be matched in linear time", capsys)


@pytest.mark.parametrize(
    ("pattern", "module", "expected"),
    [
        ({"q_proj": 3}, "model.layers.0.q_proj", 3),
        ({"q_proj": 3}, "model.layers.0.fake_q_proj", None),
        ({"^q_proj": 3}, "model.q_proj", None),
        ({"^model.q_proj": 3}, "model.q_proj", 3),
        ({"model.q_proj": 3, "q_proj": 4}, "model.q_proj", 3),
        (None, "model.q_proj", None),
    ],
)
def test_pattern_keys_match_as_in_peft(pattern, module: str, expected: int | None) -> None:
    from peft.utils.other import get_pattern_key

    assert pattern_value(pattern, module, None) == expected
    key = get_pattern_key(list(pattern or {}), module)
    assert (pattern or {}).get(key) == expected


def test_links_into_the_hub_cache_are_followed_and_others_are_refused(intact, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0", tmp_path / "models--a--b" / "blobs"
    shutil.copytree(intact["lora"], blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    assert len(adapter_dir.load_lora(snapshot).layers) == 2
    (snapshot / "adapter_config.json").unlink()
    (snapshot / "adapter_config.json").symlink_to("/etc/passwd")
    with pytest.raises(UnsafeAdapter, match="leads out of its folder"):
        adapter_dir.load_lora(snapshot)


def test_an_adapter_with_other_layer_names_than_the_base_is_refused(
    intact, tiny_base: Path, tmp_path: Path, capsys
) -> None:
    assert main([str(intact["lora"]), str(tmp_path / "out"), "--base", str(tiny_base)]) == 2
    assert "was trained on another base" in capsys.readouterr().err
    (shutil.copytree(intact["lora"], tmp_path / "adapter") / "astra.json").unlink()
    assert main([str(tmp_path / "adapter"), str(tmp_path / "out"), "--base", str(tiny_base)]) == 2
    assert "'m.0.q_proj' is (12, 8) in the adapter, missing in the base" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def loads(folder: Path, kind: str) -> bool:
    """Return whether the folder can be read completely; an error other than AdapterError is a bug of the reader."""
    try:
        if kind == "astra":
            return len(dict(adapter_dir.load_astra(folder).layers)) > 0
        adapter_dir.read_lora_header(folder)
        return len(dict(adapter_dir.load_lora(folder).layers)) > 0
    except AdapterError:
        return False


FUZZ = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(kind=st.sampled_from(sorted(WEIGHTS)), data=st.data())
def test_an_adapter_with_changed_bytes_is_read_or_refused_in_one_line(intact, kind: str, data) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = shutil.copytree(intact[kind], Path(temporary) / "adapter")
        name = data.draw(st.sampled_from(sorted(file.name for file in folder.iterdir() if file.suffix != ".md")))
        content = bytearray((folder / name).read_bytes())
        for _ in range(data.draw(st.integers(1, 6))):
            # Most changes are in the header: the tensors after it may contain any numbers.
            position = data.draw(
                st.one_of(st.integers(0, min(900, len(content) - 1)), st.integers(0, len(content) - 1))
            )
            content[position] = data.draw(st.integers(0, 255))
        cut = data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))
        (folder / name).write_bytes(content[:cut])
        if not loads(folder, kind):
            with redirect_stderr(io.StringIO()) as stderr:
                assert main([str(folder), str(Path(temporary) / "out"), "--no-verify"]) == 2
            assert stderr.getvalue().count("\n") == 1
            assert not (Path(temporary) / "out").exists()


sizes = st.one_of(st.integers(-2, 12), st.sampled_from([2**22, 2**31, 2**53, 2**64, 10**30]), st.just("8"), st.none())
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "F64", "I8", "", "f32"]),
        "shape": st.lists(sizes, max_size=4),
        "data_offsets": st.lists(sizes, min_size=1, max_size=3),
    }
)
headers = st.dictionaries(
    st.sampled_from(["m.A", "m.B", "m.A0", "m.B0", "m.lora_A.weight", "m.lora_B.weight", "__metadata__", "", "."]),
    st.one_of(entries, st.none(), st.integers(), st.text(max_size=3), st.lists(entries, max_size=1)),
    max_size=5,
)


@FUZZ
@given(header=headers, n=st.integers(0, 600))
def test_an_accepted_header_is_accepted_by_the_safetensors_library(header, n: int) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with_header(folder / "x.safetensors", header, bytes(n))
        try:
            found = TensorFile(folder, "x.safetensors")
        except AdapterError:
            return
        try:
            with safe_open(folder / "x.safetensors", framework="pt") as file:
                expected = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            pytest.fail(f"{error}: {header}")
        assert expected == found.shapes


@settings(deadline=None, max_examples=50)
@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(
            lambda n: n != "__metadata__"
        ),
        st.tuples(
            st.sampled_from([torch.float32, torch.bfloat16, torch.int8]), st.lists(st.integers(0, 4), max_size=3)
        ),
        max_size=6,
    )
)
def test_the_safetensors_library_reads_the_tensors_that_were_written(content) -> None:
    tensors = {name: torch.randint(-100, 100, shape).to(dtype) for name, (dtype, shape) in content.items()}
    with tempfile.TemporaryDirectory() as temporary:
        write_tensors(Path(temporary) / "x", tensors, tensors.items(), {"format": "pt"})
        read = load_file(Path(temporary) / "x")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) and read[name].dtype == tensors[name].dtype for name in tensors)
