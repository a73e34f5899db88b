"""A GGUF file becomes an ordinary model folder: bfloat16 safetensors, config, tokenizer, chat template.

transformers reads the file: it puts llama.cpp's layout of the rotary heads back and dequantises each tensor. A model of
4 or 8 bits is then a little worse than the model from which the file was made: the lost bits do not come back. The
result is a base like any other, for `astra-train`, `astra-convert` and `astra-serve`.
"""

import struct
from pathlib import Path

import torch
from rich.console import Console
from tokenizers import Regex
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedTokenizerBase

from converter.adapter_dir import BaseNotFound, new_folder
from converter.errors import first_line

_MAGIC = b"GGUF"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_AROUND_DIGITS = (
    r"[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(digits: str) -> PreTokenizer:
    pattern = f"{_CONTRACTIONS}|{_AROUND_DIGITS.format(digits=digits)}"
    return Sequence([Split(Regex(pattern), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)])


# The rule by which text is cut before byte-level BPE merges it: GGUF stores its name alone, llama.cpp holds the rules
# (`llama_vocab`), and transformers takes GPT-2's for every file. Sentences with numbers then have other tokens.
_PRE_TOKENIZERS = {
    "gpt-2": ByteLevel(add_prefix_space=False),
    "smollm": Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]),
    "llama-bpe": _split(digits="{1,3}"),
    "qwen2": _split(digits=""),
}


def base_from_gguf(file: Path, out: Path) -> None:
    """Write the model and the tokenizer of `file` to the new folder `out`.

    Prints a warning if the file names a pre-tokenizer that is not known here: its tokens may be wrong. Raises
    BaseNotFound if `file` is not a GGUF file that transformers can read, OutputExists and CannotWrite.
    """
    with new_folder(out) as folder:
        _check_magic(file)
        try:
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
            model = AutoModelForCausalLM.from_pretrained(
                file.parent,
                gguf_file=file.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.bfloat16,
            )
        except ImportError as error:
            raise BaseNotFound(f"reading GGUF files needs the package gguf: pip install gguf ({error})") from error
        except (OSError, ValueError, KeyError, IndexError, NotImplementedError, struct.error) as error:
            raise BaseNotFound(f"transformers cannot read {file}: {first_line(error)}") from error
        _set_pre_tokenizer(tokenizer, file)
        # Without a limit, trainers and servers would believe in contexts of 10^30 tokens.
        tokenizer.model_max_length = min(tokenizer.model_max_length, model.config.max_position_embeddings)
        model.config.name_or_path = ""  # the file's title, not a path
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _check_magic(file: Path) -> None:
    try:
        with file.open("rb") as stream:
            magic = stream.read(len(_MAGIC))
    except OSError as error:
        raise BaseNotFound(f"{file} cannot be read: {error.strerror}") from error
    if magic != _MAGIC:
        raise BaseNotFound(f"{file} is not a GGUF file: it begins with {magic!r}")


def _set_pre_tokenizer(tokenizer: PreTrainedTokenizerBase, file: Path) -> None:
    from gguf import GGUFReader  # an optional package; transformers has needed it above

    fields = GGUFReader(file).fields
    if "tokenizer.ggml.pre" not in fields:  # SentencePiece, or a file older than the field
        return
    name = fields["tokenizer.ggml.pre"].contents()
    if name in _PRE_TOKENIZERS:
        tokenizer.backend_tokenizer.pre_tokenizer = _PRE_TOKENIZERS[name]
    else:
        Console(stderr=True).print(
            f"warning: the pre-tokenizer {name!r} is not known: compare token ids with llama.cpp's before you train",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
