"""More adapters than fit into a batch, long prompts, and a cache that is too small: requests are preempted.

vLLM up to 0.32 forgets the adapters of running requests that a step leaves out, so a later batch could have more than
`max_loras`, and an assertion would end the engine (fixed in 0.33).
"""

import asyncio
import random
from pathlib import Path

import httpx

from benchmarks.attack.target import Tried
from tests.support import demo
from tests.support.loras import write_random_lora

ADAPTERS, SLOTS, CLIENTS = 6, 2, 24
OPTIONS = ["--max-loras", str(SLOTS), "--resident", str(ADAPTERS), "--kv-cache-memory-bytes", str(3 * 2**20),
           "--max-num-batched-tokens", "512", "--max-num-seqs", "16"]  # fmt: skip


def options(folder: Path) -> list[str]:
    """Write random adapters, and return the options of a server of them."""
    found = ["--base", str(demo.BASE), *OPTIONS]
    for number in range(ADAPTERS):
        found += ["--adapter", f"p{number}={write_random_lora(folder / f'p{number}', seed=number)}"]
    return found


def attack(url: str, seconds: float) -> list[Tried]:
    requests, fault = asyncio.run(_press(url, seconds))
    page = httpx.get(f"{url}/metrics").text.splitlines()
    preempted = sum(float(line.rpartition(" ")[2]) for line in page if line.startswith("vllm:num_preemptions_total"))
    return [
        Tried("pressure", f"{requests} requests of {ADAPTERS} adapters in {SLOTS} slots", fault),
        Tried("pressure", f"{preempted:.0f} preemptions", None if preempted else "nothing was preempted"),
    ]


async def _press(url: str, seconds: float) -> tuple[int, str | None]:
    until, count, fault = asyncio.get_running_loop().time() + seconds, 0, None

    async def client(seed: int) -> None:
        nonlocal count, fault
        chance = random.Random(seed)
        async with httpx.AsyncClient(base_url=url, timeout=120) as http:
            while asyncio.get_running_loop().time() < until and not fault:
                prompt = [chance.randrange(5, 200) for _ in range(chance.choice([3, 50, 200, 400]))]
                body = {"model": f"p{chance.randrange(ADAPTERS)}", "prompt": prompt, "ignore_eos": True}
                answer = await http.post("/v1/completions", json={**body, "max_tokens": chance.choice([1, 20, 80])})
                count += 1
                if not answer.is_success:
                    fault = f"{answer.status_code} {answer.text[:200]}"

    await asyncio.gather(*(client(seed) for seed in range(CLIENTS)))
    return count, fault
