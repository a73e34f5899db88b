"""LoRAs as other tools write them have the numbers that PEFT computes with them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from converter import adapter_dir
from converter.adapter_dir import AdapterError, MalformedAdapter, NotAnAdapter, WrongBase
from converter.check_model import logits
from converter.cli import main
from tests.converter.foreign import (
    CONFIG,
    CONFIGS,
    EDITS,
    IDS,
    WEIGHTS,
    by_peft,
    edit_config,
    into_checkpoint,
    lora,
    rename,
    shard,
    trained,
)

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def bases(tiny_base: Path, tmp_path_factory) -> dict[bool, Path]:
    """Two bases, whose output layer is tied to the embedding, or not."""
    folder = tmp_path_factory.mktemp("untied") / "tiny"
    config = AutoModelForCausalLM.from_pretrained(tiny_base).config
    config.tie_word_embeddings = False
    torch.manual_seed(1)
    LlamaForCausalLM(config).save_pretrained(folder)
    return {True: tiny_base, False: folder}


def fitted(folder: Path, base: Path) -> adapter_dir.FittedLora:
    return adapter_dir.on_base(folder, adapter_dir.load_lora(folder), base, adapter_dir.base_modules(base))


def computed(folder: Path, base: Path) -> torch.Tensor:
    """Return the logits of the base with the LoRA as `adapter_dir` reads it, without PEFT."""
    lora = fitted(folder, base).lora
    mask = torch.ones_like(IDS, dtype=torch.bool)
    return logits(AutoModelForCausalLM.from_pretrained(base).eval(), IDS, mask, lora.layers, lora.scaling)


def rewritten(folder: Path, base: Path, out: Path) -> Path:
    out.mkdir()
    adapter_dir.write_plainly(folder, fitted(folder, base).lora, out)
    return out


@pytest.mark.parametrize("edit", EDITS)
def test_the_way_a_lora_is_written_changes_none_of_its_numbers(tiny_base: Path, tmp_path: Path, edit: str) -> None:
    expected = trained(tiny_base, tmp_path / "lora")
    EDITS[edit](tmp_path / "lora")
    torch.testing.assert_close(computed(tmp_path / "lora", tiny_base), expected, **CLOSE)
    plain = rewritten(tmp_path / "lora", tiny_base, tmp_path / "plain")
    assert adapter_dir.is_plainly_written(plain)
    torch.testing.assert_close(by_peft(tiny_base, plain), expected, **CLOSE)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_means_what_it_means_in_peft(bases, tmp_path: Path, name: str, tied: bool) -> None:
    settings, save = CONFIGS[name]
    expected = trained(bases[tied], tmp_path / "lora", lora(**settings), **save)
    torch.testing.assert_close(computed(tmp_path / "lora", bases[tied]), expected, **CLOSE)
    plain = rewritten(tmp_path / "lora", bases[tied], tmp_path / "plain")
    torch.testing.assert_close(by_peft(bases[tied], plain), expected, **CLOSE)
    config = json.loads((plain / CONFIG).read_text())
    assert not config["modules_to_save"]
    assert all(key.startswith("^") for key in (*config["rank_pattern"], *config["alpha_pattern"]))
    assert set(load_file(plain / WEIGHTS)) == {key for key in load_file(plain / WEIGHTS) if ".lora_" in key}


@pytest.mark.parametrize("edit", ["shards", "a multimodal model", "a byte order mark"])
def test_astra_convert_reads_what_the_server_reads(tiny_base: Path, tmp_path: Path, edit: str) -> None:
    expected = trained(tiny_base, tmp_path / "lora", lora(rank_pattern={"(q|v)_proj": 2}), save_embedding_layers=True)
    EDITS[edit](tmp_path / "lora")
    assert main([str(tmp_path / "lora"), str(tmp_path / "out"), "--base", str(tiny_base)]) == 0
    torch.testing.assert_close(by_peft(tiny_base, tmp_path / "out"), expected, **CLOSE)
    record = json.loads((tmp_path / "out" / "astra.json").read_text())
    assert record["dropped"] == ["lm_head.weight", "model.embed_tokens.weight"]


def test_a_copy_is_compared_only_with_a_base(tiny_base: Path, tmp_path: Path, capsys) -> None:
    trained(tiny_base, tmp_path / "lora", save_embedding_layers=True)
    edit_config(tmp_path / "lora", base_model_name_or_path="org/none")
    assert main([str(tmp_path / "lora"), str(tmp_path / "out"), "--no-verify"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        "it has the base's tensor 'lm_head.weight', which has to be compared with the base: give it with --base" in line
    )


def test_a_changed_embedding_is_refused_by_its_name(tiny_base: Path, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "lora"
    trained(tiny_base, folder, save_embedding_layers=True)
    tensors = load_file(folder / WEIGHTS)
    name = next(key for key in tensors if "embed_tokens" in key)
    tensors[name][3, 3] += 0.1
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(MalformedAdapter, match=r"'model\.embed_tokens\.weight' is no copy of the base's tensor"):
        adapter_dir.check_only_factors(folder, fitted(folder, tiny_base).lora)
    assert main([str(folder), str(tmp_path / "out"), "--base", str(tiny_base)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "'model.embed_tokens.weight' is not equal to the base's tensor" in line


@pytest.mark.parametrize("tied", [True, False])
def test_a_trained_head_becomes_a_lora_of_the_output_layer(bases, tmp_path: Path, tied: bool) -> None:
    folder = tmp_path / "lora"
    trained(bases[tied], folder, lora(modules_to_save=["lm_head"]))
    tensors = load_file(folder / WEIGHTS)
    name = next(key for key in tensors if "lm_head" in key)
    tensors[name] += 0.1 * torch.randn(tensors[name].shape, generator=torch.Generator().manual_seed(0))
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    expected = by_peft(bases[tied], folder)
    assert main([str(folder), str(tmp_path / "out"), "--base", str(bases[tied]), "--no-verify"]) == 0
    torch.testing.assert_close(by_peft(bases[tied], tmp_path / "out"), expected, rtol=1e-3, atol=1e-4)


def test_two_adapters_in_one_file_are_refused(tiny_base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "lora"
    trained(tiny_base, folder)
    tensors = load_file(folder / WEIGHTS)
    both = {key.replace(".weight", f".{name}.weight"): t for key, t in tensors.items() for name in ("one", "two")}
    save_file({key: tensor.clone() for key, tensor in both.items()}, folder / WEIGHTS)
    with pytest.raises(MalformedAdapter, match="has two adapters in one file"):
        adapter_dir.load_lora(folder)


def test_names_that_mix_two_models_are_refused(tiny_base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "lora"
    trained(tiny_base, folder)
    tensors = load_file(folder / WEIGHTS)
    more = {key.replace("model.model", "model.model.language_model"): tensor for key, tensor in tensors.items()}
    save_file({**tensors, **{key: tensor.clone() for key, tensor in more.items()}}, folder / WEIGHTS)
    with pytest.raises(WrongBase, match=r"has two layers for 'model\.layers"):
        fitted(folder, tiny_base)


def test_tensors_that_peft_would_ignore_are_refused(tiny_base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "lora"
    trained(tiny_base, folder)
    for changes in (
        {"target_modules": ["q_proj"]},
        {"target_modules": r".*\.(q|k|v)_proj"},
        {"exclude_modules": ["layers.0.self_attn.o_proj"]},
        {"exclude_modules": r".*o_proj"},
        {"layers_to_transform": [0]},
    ):
        config = json.loads((folder / CONFIG).read_text())
        edit_config(folder, **changes)
        with pytest.raises(MalformedAdapter, match=r"which target_modules of its .* does not mean"):
            adapter_dir.load_lora(folder)
        (folder / CONFIG).write_text(json.dumps(config))


def test_a_folder_that_has_the_adapter_in_a_checkpoint_names_it(tiny_base: Path, tmp_path: Path, capsys) -> None:
    for number in (500, 1000):
        trained(tiny_base, tmp_path / "run")
        into_checkpoint(tmp_path / "run", f"checkpoint-{number}")
    for read in (adapter_dir.load_lora, adapter_dir.read_lora_header):
        with pytest.raises(NotAnAdapter, match=r"checkpoint-1000 in it has one .*: give .*/run/checkpoint-1000"):
            read(tmp_path / "run")
    assert main([str(tmp_path / "run"), str(tmp_path / "out")]) == 2
    assert "checkpoint-1000" in capsys.readouterr().err


def drop_a_shard(folder: Path) -> None:
    next(folder.glob("adapter_model-00002*")).unlink()


def index(folder: Path, content: object) -> None:
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_a_shard, "has no adapter_model-00002-of-00002.safetensors"),
        (lambda folder: index(folder, {}), "has no weight_map"),
        (lambda folder: index(folder, {"weight_map": {"x": "../../etc/passwd"}}), "adapter_model-X-of-Y.safetensors"),
        (lambda folder: index(folder, {"weight_map": {"x": ["a"]}}), "adapter_model-X-of-Y.safetensors"),
        (
            lambda folder: index(folder, {"weight_map": {"x": "adapter_model-00001-of-00002.safetensors"}}),
            "is not in the",
        ),
        (lambda folder: (folder / f"{WEIGHTS}.index.json").unlink(), "without adapter_model.safetensors.index.json"),
    ],
)
def test_shards_and_index_that_contradict_each_other_are_refused(tiny_base, tmp_path, damage, message: str) -> None:
    trained(tiny_base, tmp_path / "lora")
    shard(tmp_path / "lora")
    damage(tmp_path / "lora")
    with pytest.raises(AdapterError) as refused:
        adapter_dir.load_lora(tmp_path / "lora")
    assert message in str(refused.value)
    assert str(tmp_path / "lora") in str(refused.value)


def test_the_digest_of_shards_is_that_of_all_files(tiny_base: Path, tmp_path: Path) -> None:
    trained(tiny_base, tmp_path / "lora")
    shard(tmp_path / "lora")
    before = adapter_dir.lora_digest(tmp_path / "lora")
    last = tmp_path / "lora" / "adapter_model-00002-of-00002.safetensors"
    content = bytearray(last.read_bytes())
    content[-1] ^= 1
    last.write_bytes(content)
    assert adapter_dir.lora_digest(tmp_path / "lora") != before


def test_a_bias_of_a_factor_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    trained(tiny_base, tmp_path / "lora")
    rename(tmp_path / "lora", lambda key: key.replace("layers.1.self_attn.q_proj.lora_B.weight", "x.lora_B.bias"))
    with pytest.raises(MalformedAdapter, match="is not a lora_A or lora_B of a linear layer"):
        adapter_dir.load_lora(tmp_path / "lora")


def test_a_name_that_no_module_has_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    trained(tiny_base, tmp_path / "lora")
    rename(tmp_path / "lora", lambda key: key.replace("layers.1.", 200 * "a." + "layers.1."))
    with pytest.raises(MalformedAdapter, match="has a longer name than any module"):
        adapter_dir.load_lora(tmp_path / "lora")


def test_tensors_that_the_base_does_not_have_are_refused_by_name(tiny_base: Path, tmp_path: Path) -> None:
    trained(tiny_base, tmp_path / "lora")
    tensors = load_file(tmp_path / "lora" / WEIGHTS)
    save_file({**tensors, **{f"x{n}.weight": torch.ones(1) for n in range(3)}}, tmp_path / "lora" / WEIGHTS)
    with pytest.raises(MalformedAdapter, match=r"'x\d\.weight' is no copy of the base's tensor"):
        adapter_dir.check_only_factors(tmp_path / "lora", fitted(tmp_path / "lora", tiny_base).lora)
