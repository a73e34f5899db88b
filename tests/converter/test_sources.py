"""Adapters of other tools: the original base with the converted LoRA equals the model that was trained."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from converter.cli import main

IDS = torch.arange(5, 125).view(6, 20)
TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]


@pytest.fixture
def base(tiny_base: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_base)


def moved(model: PeftModel, by: float = 0.05) -> torch.Tensor:
    """Change the adapter, as training would, and return the logits."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                parameter.add_(by * torch.randn(parameter.shape, generator=generator))
        return model.eval()(input_ids=IDS).logits


def converted(tiny_base: Path, lora: Path) -> torch.Tensor:
    """Return the logits of PEFT with the converted LoRA on the original base."""
    with torch.no_grad():
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), lora)(input_ids=IDS).logits


def save(model: PeftModel, folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns that the initial adapter is needed, too
        model.save_pretrained(folder)


def run(*args: object) -> int:
    return main([str(arg) for arg in args])


@pytest.mark.parametrize("method", ["pissa", "olora", "corda"])
@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_whose_initial_product_was_subtracted_fits_the_original_base(
    base, tiny_base: Path, tmp_path: Path, method: str, rslora: bool
) -> None:
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=TARGETS,
        init_lora_weights=method,
        use_rslora=rslora,
        corda_config=CordaConfig(corda_method="kpm") if method == "corda" else None,
        task_type="CAUSAL_LM",
    )
    if method == "corda":
        preprocess_corda(base, config, lambda: [base(input_ids=row[None]) for row in IDS])
    model = get_peft_model(base, config)
    save(model, tmp_path / "initial")
    expected = moved(model)
    save(model, tmp_path / "trained")
    assert run(tmp_path / "trained", tmp_path / "lora", "--initial", tmp_path / "initial", "--base", tiny_base) == 0
    torch.testing.assert_close(converted(tiny_base, tmp_path / "lora"), expected, rtol=1e-4, atol=1e-4)
    written = json.loads((tmp_path / "lora" / "astra.json").read_text())
    assert written["source"]["kind"] == "lora-and-start"
    assert written["method"] == method
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["init_lora_weights"] is True


def test_without_its_initial_adapter_it_is_refused(base, tiny_base, tmp_path: Path, capsys) -> None:
    model = get_peft_model(base, LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="pissa"))
    save(model, tmp_path / "trained")
    assert run(tmp_path / "trained", tmp_path / "lora", "--base", tiny_base) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "give the adapter as it was saved before training with --initial DIR" in line
    assert not (tmp_path / "lora").exists()


@pytest.fixture
def reference(base, tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """A folder of the reference code (residual model, astra_init, trained adapter in ft), and the logits."""
    root = tmp_path / "run"
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS, init_lora_weights="pissa"))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(root / "astra_init")
    model.unload().save_pretrained(root)
    residual = AutoModelForCausalLM.from_pretrained(root)
    model = PeftModel.from_pretrained(residual, root, subfolder="astra_init", is_trainable=True)
    logits = moved(model)
    model.save_pretrained(root / "ft")
    return root, logits


@pytest.mark.parametrize("given", [".", "ft"])
def test_an_adapter_of_the_reference_code_fits_the_original_base(reference, given, tiny_base, tmp_path) -> None:
    root, expected = reference
    assert run(root / given, tmp_path / "lora", "--base", tiny_base) == 0
    torch.testing.assert_close(converted(tiny_base, tmp_path / "lora"), expected, rtol=1e-4, atol=1e-4)
    written = json.loads((tmp_path / "lora" / "astra.json").read_text())
    assert written["method"] == "astra"
    assert written["base"]["id"] == str(tiny_base)


def test_residual_model_and_initial_adapter_must_add_up_to_the_base(reference, tiny_base, tmp_path, capsys) -> None:
    root, _ = reference
    other = tmp_path / "other"
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(AutoModelForCausalLM.from_pretrained(tiny_base).config)
    model.save_pretrained(other)
    for base, message in [
        ([], "give the original base with --base"),
        (["--base", other], "do not add up to the weight in"),
        (["--base", root], "do not add up to the weight in"),
    ]:
        assert run(root / "ft", tmp_path / "lora", *base) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "lora").exists()


@pytest.fixture
def plain(base, tmp_path: Path) -> Callable[..., tuple[Path, torch.Tensor]]:
    def make(**settings: object) -> tuple[Path, torch.Tensor]:
        config = LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, task_type="CAUSAL_LM", **settings)
        model = get_peft_model(base, config)
        logits = moved(model)
        model.save_pretrained(tmp_path / "plain")
        return tmp_path / "plain", logits

    return make


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}], ids=str)
def test_a_plain_lora_keeps_its_numbers(plain, settings, tiny_base, tmp_path: Path) -> None:
    folder, expected = plain(**settings)
    assert run(folder, tmp_path / "lora", "--base", tiny_base) == 0
    before, after = (load_file(f / "adapter_model.safetensors") for f in (folder, tmp_path / "lora"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    torch.testing.assert_close(converted(tiny_base, tmp_path / "lora"), expected, rtol=1e-4, atol=1e-5)
    written = json.loads((tmp_path / "lora" / "astra.json").read_text())
    assert written["base"]["digest"].startswith("sha256:")
    assert written["probe"]["prompts"]


def test_ranks_and_alphas_by_layer_are_applied_to_the_factors(plain, tiny_base, tmp_path: Path) -> None:
    folder, expected = plain(rank_pattern={"q_proj": 2, "up_proj": 6}, alpha_pattern={"layers.1.mlp.down_proj": 24})
    assert run(folder, tmp_path / "lora", "--base", tiny_base) == 0
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (6, 6)
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    torch.testing.assert_close(converted(tiny_base, tmp_path / "lora"), expected, rtol=1e-4, atol=1e-5)


def test_a_plain_lora_can_be_compressed(plain, tiny_base, tmp_path: Path) -> None:
    folder, _ = plain()
    assert run(folder, tmp_path / "lora", "--base", tiny_base, "--rank", 2, "--max-kl", 10) == 0
    shapes = {tuple(t.shape) for t in load_file(tmp_path / "lora" / "adapter_model.safetensors").values()}
    assert all(2 in shape for shape in shapes)


def test_a_lora_with_another_rank_than_its_config_is_refused(plain, tmp_path: Path, capsys) -> None:
    folder, _ = plain()
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"r": 8}))
    assert run(folder, tmp_path / "lora", "--no-verify") == 2
    assert "has rank 4, but adapter_config.json says 8" in capsys.readouterr().err


class RunsCode:
    """Its pickle calls a function when it is read, as that of a malicious checkpoint does."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return eval, ("__import__('pathlib').Path('ran').touch()",)


def as_bin(folder: Path, content: object) -> None:
    torch.save(content, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink(missing_ok=True)


def test_a_bin_checkpoint_is_read_only_with_allow_pickle(plain, tiny_base, tmp_path: Path, capsys) -> None:
    folder, expected = plain()
    as_bin(folder, load_file(folder / "adapter_model.safetensors"))
    assert run(folder, tmp_path / "lora", "--base", tiny_base) == 2
    assert (
        f"a pickle, which can run code: convert it with astra-convert {folder} OUT_DIR --allow"
        in capsys.readouterr().err
    )
    assert run(folder, tmp_path / "lora", "--base", tiny_base, "--allow-pickle") == 0
    torch.testing.assert_close(converted(tiny_base, tmp_path / "lora"), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weight": RunsCode()}, "contains more than tensors"),
        ([torch.ones(1)], "may contain only finite tensors"),
        ({"a": torch.tensor([torch.nan])}, "may contain only finite tensors"),
        ({"a": torch.ones(1, dtype=torch.int64)}, "may contain only finite tensors"),
    ],
)
def test_a_bin_checkpoint_with_other_content_than_tensors_is_refused(
    plain, tmp_path, content, message, capsys, monkeypatch
) -> None:
    folder, _ = plain()
    as_bin(folder, content)
    monkeypatch.chdir(tmp_path)
    assert run(folder, tmp_path / "lora", "--allow-pickle", "--no-verify") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "ran").exists()


def test_a_bin_checkpoint_that_pytorch_did_not_write_is_refused(plain, tmp_path: Path, capsys) -> None:
    from zipfile import ZIP_DEFLATED, ZipFile

    folder, _ = plain()
    as_bin(folder, {})
    (folder / "adapter_model.bin").write_bytes(b"\x80\x02}q\x00.")
    assert run(folder, tmp_path / "lora", "--allow-pickle", "--no-verify") == 2
    assert "is not a PyTorch checkpoint" in capsys.readouterr().err
    with ZipFile(folder / "adapter_model.bin", "w", ZIP_DEFLATED) as bomb:
        bomb.writestr("archive/data.pkl", b"0" * 10**6)
    assert run(folder, tmp_path / "lora", "--allow-pickle", "--no-verify") == 2
    assert "it could expand to any size" in capsys.readouterr().err


def test_extensions_of_lora_that_no_server_supports_are_refused(plain, tmp_path: Path, capsys) -> None:
    folder, _ = plain()
    config = json.loads((folder / "adapter_config.json").read_text())
    values = {"lora_bias": True, "bias": "lora_only", "layer_replication": [[0, 2]], "target_parameters": ["experts.w"]}
    for key, value in values.items():
        (folder / "adapter_config.json").write_text(json.dumps(config | {key: value}))
        assert run(folder, tmp_path / "lora", "--no-verify") == 2
        assert f"has {key}=" in capsys.readouterr().err
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({"base_model.model.m.lora_embedding_A": torch.ones(1)}, folder / "adapter_model.safetensors")
    assert run(folder, tmp_path / "lora", "--no-verify") == 2
    assert "is not a lora_A or lora_B of a linear layer" in capsys.readouterr().err


def test_a_merged_model_has_the_logits_of_the_trained_one(plain, tiny_base, tmp_path: Path) -> None:
    folder, expected = plain(rank_pattern={"q_proj": 2})
    assert run(folder, tmp_path / "merged", "--base", tiny_base, "--merge") == 0
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(input_ids=IDS).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert (tmp_path / "merged" / "tokenizer.json").is_file()
    assert json.loads((tmp_path / "merged" / "astra.json").read_text())["format"] == "astra-merged/1"


def test_a_merged_model_has_the_weight_files_of_its_base(plain, tiny_base, tmp_path: Path) -> None:
    folder, expected = plain()
    AutoModelForCausalLM.from_pretrained(tiny_base).save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    files = sorted(file.name for file in (tmp_path / "sharded").glob("*.safetensors"))
    assert len(files) > 2
    assert run(folder, tmp_path / "merged", "--base", tmp_path / "sharded", "--merge") == 0
    assert sorted(file.name for file in (tmp_path / "merged").glob("*.safetensors")) == files
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(input_ids=IDS).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_merging_needs_a_local_base(plain, tmp_path: Path, capsys) -> None:
    folder, _ = plain()
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "org/none"}))
    assert run(folder, tmp_path / "merged", "--merge") == 2
    assert "--merge writes the whole model: give --base" in capsys.readouterr().err


def test_merging_into_a_quantised_base_is_refused(plain, tiny_base, tmp_path: Path, capsys) -> None:
    folder, _ = plain()
    other = tmp_path / "int8"
    other.mkdir()
    tensors = load_file(tiny_base / "model.safetensors")
    int8 = {name: (t * 100).to(torch.int8) if t.ndim == 2 else t for name, t in tensors.items()}
    save_file(int8, other / "model.safetensors")
    (other / "config.json").write_text((tiny_base / "config.json").read_text())
    assert run(folder, tmp_path / "merged", "--merge", "--base", other) == 2
    assert "nothing can be merged into a quantised base" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()
