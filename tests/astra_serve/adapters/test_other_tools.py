"""Adapters as other tools write them: fetched, stored as they are, admitted, and read by the engine as PEFT does."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from astra_serve.adapters.served import Served
from astra_serve.adapters.version_files import FILES, files_of, version_digest
from astra_serve.errors import CannotFetch
from converter import adapter_dir
from converter.adapter_dir import AdapterError, MalformedAdapter, NotAnAdapter, UnsafeAdapter
from tests.astra_serve.adapters.test_download import Web, fetched, web  # noqa: F401 (a fixture)
from tests.converter.foreign import (
    CONFIGS,
    EDITS,
    WEIGHTS,
    by_peft,
    edit_config,
    into_checkpoint,
    lora,
    shard,
    trained,
)

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture
def served(store, base) -> Iterator[Served]:
    return Served(store, base)


def digest_in(store, folder: Path) -> str:
    return store.add(folder, None, str(folder))


@pytest.mark.parametrize("edit", EDITS)
def test_the_engine_reads_the_numbers_of_peft(tiny_base, tmp_path: Path, store, served: Served, edit: str) -> None:
    expected = trained(tiny_base, tmp_path / "lora")
    EDITS[edit](tmp_path / "lora")
    digest = digest_in(store, tmp_path / "lora")
    assert digest == version_digest(tmp_path / "lora")
    folder, admitted = served.folder(digest, admit=True)
    assert admitted
    assert admitted.rank == 4
    assert adapter_dir.is_plainly_written(folder)
    torch.testing.assert_close(by_peft(tiny_base, folder), expected, **CLOSE)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_engine_reads_patterns_as_numbers(tiny_base, tmp_path: Path, store, served: Served, name: str) -> None:
    settings, save = CONFIGS[name]
    expected = trained(tiny_base, tmp_path / "lora", lora(**settings), **save)
    folder, _ = served.folder(digest_in(store, tmp_path / "lora"), admit=True)
    torch.testing.assert_close(by_peft(tiny_base, folder), expected, **CLOSE)
    config = json.loads((folder / "adapter_config.json").read_text())
    ranks = [len(tensor) for key, tensor in load_file(folder / WEIGHTS).items() if "lora_A" in key]
    assert config["r"] == max(ranks)  # vLLM reserves memory by it


def test_an_ordinary_lora_is_read_where_it_is_and_another_only_once_it_is_written(
    tiny_base, tmp_path: Path, store, served: Served
) -> None:
    trained(tiny_base, tmp_path / "plain")
    trained(tiny_base, tmp_path / "other", lora(r=2))
    EDITS["name of the adapter"](tmp_path / "other")
    plain, other = (digest_in(store, tmp_path / name) for name in ("plain", "other"))
    assert served.folder(plain, admit=True)[0] == store.folder(plain)
    first, _ = served.folder(other, admit=True)
    assert first == store.engine_folder(other)
    inode = (first / WEIGHTS).stat().st_ino
    again, admitted = served.folder(other, admit=False)
    assert (again, admitted) == (first, None)
    assert (again / WEIGHTS).stat().st_ino == inode


def test_weights_with_the_usual_names_are_not_copied(tiny_base, tmp_path: Path, store, served: Served) -> None:
    trained(tiny_base, tmp_path / "lora", lora(rank_pattern={".*q_proj": 2}))
    digest = digest_in(store, tmp_path / "lora")
    folder, _ = served.folder(digest, admit=True)
    assert folder == store.engine_folder(digest)
    assert (folder / WEIGHTS).stat().st_ino == (store.folder(digest) / WEIGHTS).stat().st_ino


def test_what_the_engine_reads_is_written_again_when_it_was_changed(tiny_base, tmp_path, store, served: Served) -> None:
    expected = trained(tiny_base, tmp_path / "lora")
    EDITS["shards"](tmp_path / "lora")
    digest = digest_in(store, tmp_path / "lora")
    folder, _ = served.folder(digest, admit=True)
    for content in (None, b"x"):
        (folder / WEIGHTS).unlink()
        if content:
            (folder / WEIGHTS).write_bytes(content)
        folder, admitted = served.folder(digest, admit=False)
        assert admitted
        torch.testing.assert_close(by_peft(tiny_base, folder), expected, **CLOSE)
    store.discard(digest)
    assert not folder.exists()


def test_a_version_of_three_files_has_the_digest_that_it_always_had(tiny_base, tmp_path: Path) -> None:
    trained(tiny_base, tmp_path / "lora")
    assert files_of(tmp_path / "lora", with_chat=False) == FILES
    files = [tmp_path / "lora" / name for name in FILES if (tmp_path / "lora" / name).exists()]
    assert version_digest(tmp_path / "lora") == adapter_dir.digest(files)


def test_dropped_copies_and_keys_without_a_module_are_noted(tiny_base, tmp_path: Path, base) -> None:
    config = lora(rank_pattern={"gate_proj": 2}, modules_to_save=["lm_head"])
    trained(tiny_base, tmp_path / "lora", config)
    notes = base.check(tmp_path / "lora").notes()
    assert notes == [
        "keys of rank_pattern or alpha_pattern match no module: gate_proj",
        "left out, because they equal the base's tensors: lm_head.weight",
    ]


def test_a_trained_head_is_refused_by_its_name(tiny_base, tmp_path: Path, base) -> None:
    trained(tiny_base, tmp_path / "lora", lora(modules_to_save=["lm_head"]))
    tensors = load_file(tmp_path / "lora" / WEIGHTS)
    name = next(key for key in tensors if "lm_head" in key)
    save_file({**tensors, name: tensors[name] + 0.1}, tmp_path / "lora" / WEIGHTS)
    with pytest.raises(MalformedAdapter, match=r"has modules_to_save, and 'lm_head\.weight' is no copy"):
        base.check(tmp_path / "lora")


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda"])
def test_an_adapter_of_a_changed_base_is_refused_with_the_command_that_converts_it(
    tiny_base, tmp_path: Path, base, init: str
) -> None:
    trained(tiny_base, tmp_path / "lora")
    edit_config(tmp_path / "lora", init_lora_weights=init)
    with pytest.raises(MalformedAdapter, match=rf"astra-convert {tmp_path}/lora OUT_DIR --initial DIR"):
        base.check(tmp_path / "lora")


def test_nothing_of_a_hostile_expression_is_evaluated_for_long(
    tiny_base, tmp_path: Path, store, served: Served
) -> None:
    trained(tiny_base, tmp_path / "lora")
    edit_config(tmp_path / "lora", alpha_pattern={"(([a-z0-9._]*)*)*!": 3})
    served.folder(digest_in(store, tmp_path / "lora"), admit=True)
    edit_config(tmp_path / "lora", alpha_pattern={r"(?=(a+)+$)q_proj": 3})
    with pytest.raises(MalformedAdapter, match="cannot be matched in linear time") as refused:
        digest_in(store, tmp_path / "lora")
    assert str(tmp_path / "lora") in str(refused.value)
    assert "staging" not in str(refused.value)


def test_a_refusal_names_the_source_and_not_a_folder_of_the_store(tiny_base, tmp_path: Path, store) -> None:
    trained(tiny_base, tmp_path / "lora", lora(use_dora=True))
    with pytest.raises(MalformedAdapter) as refused:
        digest_in(store, tmp_path / "lora")
    assert f"convert it: astra-convert {tmp_path / 'lora'} OUT_DIR" in str(refused.value)
    assert "staging" not in str(refused.value)


def test_a_folder_without_weights_that_a_server_reads_has_its_own_reason(tiny_base, tmp_path: Path, store) -> None:
    trained(tiny_base, tmp_path / "lora")
    (tmp_path / "lora" / WEIGHTS).rename(tmp_path / "lora" / "adapter_model.bin")
    with pytest.raises(
        UnsafeAdapter, match=rf"is a pickle.*: convert it with astra-convert {tmp_path}/lora OUT_DIR --allow"
    ):
        digest_in(store, tmp_path / "lora")
    (tmp_path / "lora" / "adapter_model.bin").rename(tmp_path / "lora" / "astra_weights.safetensors")
    with pytest.raises(NotAnAdapter, match=rf"convert it first \(astra-convert {tmp_path}/lora OUT_DIR\)"):
        digest_in(store, tmp_path / "lora")


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("adapter_model.bin", "astra-convert DIR OUT_DIR --allow-pickle"),
        ("astra_weights.safetensors", "astra-convert DIR OUT"),
    ],
)
def test_a_download_without_weights_that_a_server_reads_says_what_helps(
    tiny_base,
    tmp_path: Path,
    store,
    web: Web,  # noqa: F811
    name: str,
    command: str,
) -> None:
    trained(tiny_base, tmp_path / "lora")
    web.files = {path.name: path.read_bytes() for path in (tmp_path / "lora").iterdir()}
    web.files[name] = web.files.pop(WEIGHTS)
    with pytest.raises(CannotFetch, match=rf"{web.url} cannot be fetched: it .*{command}"):
        fetched(web.url, store)


def test_a_source_that_has_the_adapter_in_a_checkpoint_names_it(tiny_base, tmp_path: Path, store) -> None:
    trained(tiny_base, tmp_path / "run")
    into_checkpoint(tmp_path / "run")
    with pytest.raises(NotAnAdapter, match=r"give .*/run/checkpoint-500"):
        fetched(str(tmp_path / "run"), store)


def test_shards_are_downloaded_with_their_index(tiny_base, tmp_path: Path, store, web: Web) -> None:  # noqa: F811
    trained(tiny_base, tmp_path / "lora")
    shard(tmp_path / "lora")
    web.files = {path.name: path.read_bytes() for path in (tmp_path / "lora").iterdir()}
    folder = fetched(web.url, store)
    assert version_digest(folder) == version_digest(tmp_path / "lora")
    assert store.add(folder) == version_digest(tmp_path / "lora")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"x": "../secret"}}, "names no shards, or others than"),
        ({"weight_map": {}}, "names no shards"),
        ([], "names no shards"),
        ({"weight_map": {"x": "adapter_model-00009-of-00009.safetensors"}}, "cannot be fetched"),
    ],
)
def test_an_index_can_name_nothing_but_shards(tiny_base, tmp_path, store, web: Web, index, message) -> None:  # noqa: F811
    trained(tiny_base, tmp_path / "lora")
    web.files = {path.name: path.read_bytes() for path in (tmp_path / "lora").iterdir() if path.name != WEIGHTS}
    web.files[f"{WEIGHTS}.index.json"] = json.dumps(index).encode()
    with pytest.raises(CannotFetch, match=message):
        fetched(web.url, store)


def test_shards_that_are_too_large_in_all_are_refused(tiny_base, tmp_path: Path, store, web: Web) -> None:  # noqa: F811
    trained(tiny_base, tmp_path / "lora")
    shard(tmp_path / "lora")
    largest = max(path.stat().st_size for path in (tmp_path / "lora").glob("*.safetensors"))
    web.files = {path.name: path.read_bytes() for path in (tmp_path / "lora").iterdir()}
    for source in (web.url, str(tmp_path / "lora")):
        with pytest.raises(AdapterError, match="the limit for an adapter of this base"):
            fetched(source, store, max_bytes=largest + 10)
