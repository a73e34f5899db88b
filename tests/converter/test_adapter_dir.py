"""The folders on disk: a round trip, nothing half-written, and one line for every broken one."""

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


def test_what_is_written_is_read_back(adapter: AstraAdapter, astra_folder: Path) -> None:
    read = adapter_dir.load_astra(astra_folder)
    assert read.config == adapter.config
    assert read.provenance == {"format": adapter_dir.ASTRA_FORMAT, **adapter.provenance}
    for name, layer in adapter.layers.items():
        for half in ("a", "b", "a0", "b0"):
            assert torch.equal(getattr(read.layers[name], half), getattr(layer, half))


def test_the_header_of_a_lora_is_read_without_its_weights(adapter: AstraAdapter, lora_folder: Path) -> None:
    header = adapter_dir.read_lora_header(lora_folder)
    assert header.rank == 8
    assert header.shapes == {name: (layer.b.shape[0], layer.a.shape[1]) for name, layer in adapter.layers.items()}
    assert header.base_digest == adapter.provenance["base"]["digest"]


def test_other_users_can_read_an_adapter(astra_folder: Path) -> None:
    assert astra_folder.stat().st_mode & 0o777 == 0o755
    assert {file.stat().st_mode & 0o777 for file in astra_folder.iterdir()} == {0o644}


def test_an_output_that_exists_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link"):
        with pytest.raises(OutputExists, match="exists already"), adapter_dir.new_folder(tmp_path / name):
            pass
    assert (tmp_path / "file").read_text() == "mine"


def test_an_output_that_appears_meanwhile_is_not_overwritten_either(tmp_path: Path) -> None:
    with pytest.raises(OutputExists), adapter_dir.new_folder(tmp_path / "out"):
        (tmp_path / "out").mkdir()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
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
        (lambda f: (f / ASTRA).rename(f / LORA), NotAnAdapter, "holds a LoRA already"),
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
        (lambda f: save_file({}, f / ASTRA), MalformedAdapter, "holds no layers"),
        (lambda f: (f / "adapter_config.json").write_text('{"r": 0}'), MalformedAdapter, "needs r"),
        (lambda f: (f / ASTRA).write_bytes(b"\xff" * 20), MalformedAdapter, "is cut short"),
        (lambda f: (f / ASTRA).write_bytes((f / ASTRA).read_bytes()[:-9]), MalformedAdapter, "its header claims"),
        (lambda f: damage_weights(f, ASTRA, __A0=None), MalformedAdapter, "has no tensor"),
        (lambda f: damage_weights(f, ASTRA, __A0=torch.ones(2, 2)), MalformedAdapter, "differ in shape"),
        (lambda f: damage_weights(f, ASTRA, __B=torch.full((24, 4), torch.nan)), MalformedAdapter, "NaN"),
    ],
)
def test_a_broken_astra_folder_is_refused_with_its_own_reason(astra_folder: Path, damage, error, message) -> None:
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
        (lambda f: (f / LORA).write_bytes(b"garbage"), MalformedAdapter, "is cut short"),
        (
            lambda f: change_config(f, use_dora=True),
            MalformedAdapter,
            "use_dora=True: engines serve plain LoRA only",
        ),
        (lambda f: change_config(f, bias="all"), MalformedAdapter, "bias='all'"),
        (lambda f: save_file({}, f / LORA), MalformedAdapter, "holds no LoRA"),
        (lambda f: save_file({"bare": torch.ones(1)}, f / LORA), MalformedAdapter, "is no lora_A or lora_B"),
        (lambda f: damage_weights(f, LORA, __lora_A__weight=None), MalformedAdapter, "without its other half"),
        (lambda f: damage_weights(f, LORA, __lora_A__weight=torch.ones(3, 16)), MalformedAdapter, "is no matching"),
    ],
)
def test_a_broken_lora_folder_is_refused_with_its_own_reason(lora_folder: Path, damage, error, message) -> None:
    damage(lora_folder)
    with pytest.raises(error) as caught:
        adapter_dir.read_lora_header(lora_folder)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_rank_is_the_one_that_the_engine_reads_from_the_config(lora_folder: Path) -> None:
    change_config(lora_folder, rank_pattern={"q_proj": 64})
    assert adapter_dir.read_lora_header(lora_folder).rank == 64


def test_a_base_that_cannot_be_read_gives_one_line(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(BaseNotFound, match=r"model\.safetensors cannot be read"):
        adapter_dir.base_shapes(tmp_path)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for read in (adapter_dir.load_astra, adapter_dir.read_lora_header):
        with pytest.raises(NotAnAdapter, match="there is no folder"):
            read(tmp_path / "none")


def test_the_base_digest_depends_on_every_byte_and_the_shapes_come_from_the_header(tiny_base: Path, tmp_path) -> None:
    (tmp_path / "model.safetensors").write_bytes((tiny_base / "model.safetensors").read_bytes())
    digest = adapter_dir.base_digest(tiny_base)
    assert adapter_dir.base_digest(tmp_path) == digest
    shapes = adapter_dir.base_shapes(tmp_path)
    assert shapes["model.layers.0.mlp.up_proj"] == (48, 32)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    assert adapter_dir.base_digest(tmp_path) != digest


def test_an_adapter_for_another_base_is_refused_by_digest_and_by_shape(lora_folder: Path) -> None:
    header = adapter_dir.read_lora_header(lora_folder)
    with pytest.raises(WrongBase, match="was trained on another base"):
        adapter_dir.check_base(lora_folder, header.base_digest, "sha256:" + 64 * "1")
    adapter_dir.check_base(lora_folder, None, "sha256:" + 64 * "1")
    adapter_dir.check_shapes(lora_folder, header.shapes, header.shapes)
    name = next(iter(header.shapes))
    for other in ({**header.shapes, name: (1, 1)}, {k: v for k, v in header.shapes.items() if k != name}):
        with pytest.raises(WrongBase, match=f"does not fit this base: '{name}'"):
            adapter_dir.check_shapes(lora_folder, header.shapes, other)


def test_a_hub_id_is_found_in_the_hubs_cache_and_a_missing_one_gives_one_line(tiny_base, tmp_path, monkeypatch) -> None:
    """The real hub client, offline, on a cache laid out as the hub lays it out."""
    repo = tmp_path / "models--org--tiny"
    (repo / "snapshots").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    (repo / "snapshots" / ("0" * 40)).symlink_to(tiny_base)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert adapter_dir.base_digest(adapter_dir.find_base("org/tiny")) == adapter_dir.base_digest(tiny_base)
    with pytest.raises(BaseNotFound, match="'org/none' is no local folder and the hub did not give it") as caught:
        adapter_dir.find_base("org/none")
    assert "\n" not in str(caught.value)


def test_json_is_sorted_so_that_the_same_adapter_gives_the_same_bytes(adapter, astra_folder: Path, tmp_path) -> None:
    with adapter_dir.new_folder(tmp_path / "again") as folder:
        adapter_dir.save_astra(folder, adapter)
    for file in astra_folder.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
    assert list(json.loads((astra_folder / "adapter_config.json").read_text())) == sorted(adapter.config)
