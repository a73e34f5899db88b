"""Adapter folders on disk: round trips, complete or no output, and a one-line error for each fault."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from converter import adapter_dir
from converter.adapter_dir import AstraAdapter, BaseNotFound, MalformedAdapter, NotAnAdapter, OutputExists, WrongBase
from tests.converter.handmade import to_lora


@pytest.fixture
def astra_folder(adapter: AstraAdapter, tmp_path: Path) -> Path:
    with adapter_dir.new_folder(tmp_path / "astra") as folder:
        adapter_dir.save_astra(folder, adapter)
    return tmp_path / "astra"


@pytest.fixture
def lora_folder(adapter: AstraAdapter, tmp_path: Path) -> Path:
    with adapter_dir.new_folder(tmp_path / "lora") as folder:
        adapter_dir.save_lora(folder, to_lora(adapter, torch.bfloat16))
    return tmp_path / "lora"


def test_an_astra_adapter_survives_a_round_trip(adapter: AstraAdapter, astra_folder: Path) -> None:
    read = adapter_dir.load_astra(astra_folder)
    assert read.config == adapter.config
    assert read.provenance == {"format": adapter_dir.ASTRA_FORMAT, **adapter.provenance}
    for name, layer in adapter.layers.items():
        for factor in ("a", "b", "a0", "b0"):
            assert torch.equal(getattr(read.layers[name], factor), getattr(layer, factor))


def test_a_lora_header_has_rank_shapes_and_base_digest(adapter: AstraAdapter, lora_folder: Path) -> None:
    header = adapter_dir.read_lora_header(lora_folder)
    assert header.rank == 8
    assert header.shapes == {name: (layer.b.shape[0], layer.a.shape[1]) for name, layer in adapter.layers.items()}
    assert header.base_digest == adapter.provenance["base"]["digest"]


def test_all_users_may_read_a_written_adapter(astra_folder: Path) -> None:
    assert astra_folder.stat().st_mode & 0o777 == 0o755
    assert {file.stat().st_mode & 0o777 for file in astra_folder.iterdir()} == {0o644}


def test_an_existing_output_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link"):
        with pytest.raises(OutputExists, match="exists already"), adapter_dir.new_folder(tmp_path / name):
            pass
    assert (tmp_path / "file").read_text() == "mine"


def test_an_output_that_appears_during_the_write_is_not_overwritten(tmp_path: Path) -> None:
    with pytest.raises(OutputExists), adapter_dir.new_folder(tmp_path / "out"):
        (tmp_path / "out").mkdir()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failed_write_leaves_no_files(tmp_path: Path) -> None:
    def interrupted() -> None:
        with adapter_dir.new_folder(tmp_path / "out") as folder:
            (folder / "half").write_text("written")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def damage_weights(folder: Path, name: str, **changes: torch.Tensor | None) -> None:
    tensors = load_file(folder / name)
    for key, tensor in changes.items():
        full = next(k for k in tensors if k.endswith(key.replace("__", ".")))
        if tensor is None:
            del tensors[full]
        else:
            tensors[full] = tensor
    save_file(tensors, folder / name)


def change_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))


ASTRA, LORA = adapter_dir.ASTRA_WEIGHTS, adapter_dir.LORA_WEIGHTS


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda f: (f / ASTRA).unlink(), NotAnAdapter, "has no astra_weights.safetensors"),
        (lambda f: (f / ASTRA).rename(f / LORA), NotAnAdapter, "is already a LoRA"),
        (lambda f: (f / "astra.json").unlink(), NotAnAdapter, "has no astra.json"),
        (lambda f: (f / "astra.json").write_text("{"), MalformedAdapter, "is not JSON"),
        (lambda f: (f / "astra.json").write_text("[]"), MalformedAdapter, "is not a JSON object"),
        (lambda f: (f / "astra.json").write_text("{}"), MalformedAdapter, "has format None"),
        (lambda f: (f / "astra.json").write_text('{"format": "astra-adapter/1"}'), MalformedAdapter, "needs base: id"),
        (
            lambda f: (f / "adapter_config.json").write_text('{"r": 8, "lora_alpha": 8}'),
            MalformedAdapter,
            "not (8, d_in)",
        ),
        (lambda f: save_file({}, f / ASTRA), MalformedAdapter, "contains no layers"),
        (lambda f: (f / "adapter_config.json").write_text('{"r": 0}'), MalformedAdapter, "needs r"),
        (lambda f: (f / ASTRA).write_bytes(b"\xff" * 20), MalformedAdapter, "is truncated"),
        (
            lambda f: (f / ASTRA).write_bytes((f / ASTRA).read_bytes()[:-9]),
            MalformedAdapter,
            "but its header describes",
        ),
        (lambda f: damage_weights(f, ASTRA, __A0=None), MalformedAdapter, "has no tensor"),
        (lambda f: damage_weights(f, ASTRA, __A0=torch.ones(2, 2)), MalformedAdapter, "differ in shape"),
        (lambda f: damage_weights(f, ASTRA, __B=torch.full((24, 4), torch.nan)), MalformedAdapter, "NaN"),
    ],
)
def test_each_fault_of_an_astra_folder_has_its_own_error(astra_folder: Path, damage, error, message) -> None:
    damage(astra_folder)
    with pytest.raises(error) as caught:
        dict(adapter_dir.load_astra(astra_folder).layers)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda f: (f / LORA).unlink(), NotAnAdapter, "has no adapter_model.safetensors"),
        (lambda f: (f / LORA).rename(f / ASTRA), NotAnAdapter, "convert it first"),
        (lambda f: (f / LORA).write_bytes(b"garbage"), MalformedAdapter, "is truncated"),
        (
            lambda f: change_config(f, use_dora=True),
            MalformedAdapter,
            "use_dora=True: engines serve plain LoRA only",
        ),
        (lambda f: change_config(f, bias="all"), MalformedAdapter, "bias='all'"),
        (lambda f: save_file({}, f / LORA), MalformedAdapter, "contains no LoRA"),
        (lambda f: save_file({"bare": torch.ones(1)}, f / LORA), MalformedAdapter, "is not a lora_A or lora_B"),
        (
            lambda f: damage_weights(f, LORA, __lora_A__weight=None),
            MalformedAdapter,
            "has only one of lora_A and lora_B",
        ),
        (
            lambda f: damage_weights(f, LORA, __lora_A__weight=torch.ones(3, 16)),
            MalformedAdapter,
            "not (r, d_in), (d_out, r)",
        ),
    ],
)
def test_each_fault_of_a_lora_folder_has_its_own_error(lora_folder: Path, damage, error, message) -> None:
    damage(lora_folder)
    with pytest.raises(error) as caught:
        adapter_dir.read_lora_header(lora_folder)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_rank_of_a_header_is_that_of_the_tensors_which_the_config_must_name(lora_folder: Path) -> None:
    change_config(lora_folder, r=64, rank_pattern={"q_proj": 8})
    assert adapter_dir.read_lora_header(lora_folder).rank == 8
    change_config(lora_folder, rank_pattern={"q_proj": 64})
    with pytest.raises(MalformedAdapter, match=r"has rank 8, but adapter_config\.json says 64"):
        adapter_dir.read_lora_header(lora_folder)


def test_an_unreadable_base_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(BaseNotFound, match=r"model\.safetensors cannot be read"):
        adapter_dir.base_shapes(tmp_path)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    for read in (adapter_dir.load_astra, adapter_dir.read_lora_header):
        with pytest.raises(NotAnAdapter, match="there is no folder"):
            read(tmp_path / "none")


def test_the_digest_of_a_base_depends_on_the_bytes_of_its_weights_only(tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes((tiny_base / "model.safetensors").read_bytes())
    digest = adapter_dir.base_digest(tiny_base)
    assert adapter_dir.base_digest(tmp_path) == digest
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    assert adapter_dir.base_digest(tmp_path) != digest


def test_base_shapes_are_d_out_and_d_in(tiny_base: Path) -> None:
    assert adapter_dir.base_shapes(tiny_base)["model.layers.0.mlp.up_proj"] == (48, 32)


def test_a_base_with_another_digest_than_the_recorded_one_is_refused(lora_folder: Path) -> None:
    header = adapter_dir.read_lora_header(lora_folder)
    with pytest.raises(WrongBase, match="was trained on another base"):
        adapter_dir.check_base(lora_folder, header.base_digest, "sha256:" + 64 * "1")
    adapter_dir.check_base(lora_folder, None, "sha256:" + 64 * "1")


def test_a_base_with_other_shapes_is_refused(lora_folder: Path) -> None:
    header = adapter_dir.read_lora_header(lora_folder)
    adapter_dir.check_shapes(lora_folder, header.shapes, header.shapes)
    name = next(iter(header.shapes))
    for other in ({**header.shapes, name: (1, 1)}, {k: v for k, v in header.shapes.items() if k != name}):
        with pytest.raises(WrongBase, match=f"does not fit this base: '{name}'"):
            adapter_dir.check_shapes(lora_folder, header.shapes, other)


def test_a_hub_id_is_searched_in_the_hub_cache(tiny_base, tmp_path, monkeypatch) -> None:
    """Uses the real hub client, offline, on a cache with the hub's layout."""
    repo = tmp_path / "models--org--tiny"
    (repo / "snapshots").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    (repo / "snapshots" / ("0" * 40)).symlink_to(tiny_base)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert adapter_dir.base_digest(adapter_dir.find_base("org/tiny")) == adapter_dir.base_digest(tiny_base)
    with pytest.raises(
        BaseNotFound, match="'org/none' is not a local folder and cannot be fetched from the hub"
    ) as caught:
        adapter_dir.find_base("org/none")
    assert "\n" not in str(caught.value)


def test_the_same_adapter_gives_the_same_bytes(adapter: AstraAdapter, astra_folder: Path, tmp_path: Path) -> None:
    with adapter_dir.new_folder(tmp_path / "again") as folder:
        adapter_dir.save_astra(folder, adapter)
    for file in astra_folder.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
    assert list(json.loads((astra_folder / "adapter_config.json").read_text())) == sorted(adapter.config)
