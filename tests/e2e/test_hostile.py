"""Adapters made to harm, published to the real server under load."""

import asyncio
import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from converter import adapter_dir
from tests.converter.test_hostile import CONFIGS, FAULTS
from tests.e2e.conftest import Admin
from tests.support import load, swap
from tests.support.server import Server

pytestmark = pytest.mark.timeout(400)


def hostile(good: Path, folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield what to call it, and a copy of an adapter with one fault: each that an admission rule is against."""
    weights = adapter_dir.LORA_WEIGHTS
    faults = {name: lambda copy, damage=damage: damage(copy, weights) for name, (damage, _) in FAULTS.items()}
    faults |= {name: lambda copy, text=text: write_config(copy, text) for name, (text, _) in CONFIGS.items()}
    faults |= {
        "another base": lambda copy: edit_provenance(copy, lambda p: p["base"].update(digest="sha256:" + 64 * "0")),
        "a forged probe": lambda copy: edit_provenance(copy, forge),
        "no effect": without_effect,
        "too high a rank": lambda copy: with_rank(copy, 100),
        "a layer that the base has not": lambda copy: renamed(copy, "q_proj", "z_proj"),
        "a layer of another shape": lambda copy: renamed(copy, "down_proj", "o_proj"),
        "no config": lambda copy: (copy / adapter_dir.CONFIG).unlink(),
        "no weights": lambda copy: (copy / weights).unlink(),
    }
    for number, (name, damage) in enumerate(faults.items()):
        copy = folder / str(number) / "adapter"
        shutil.copytree(good, copy)
        damage(copy)
        yield name, copy


def write_config(copy: Path, text: str) -> None:
    (copy / adapter_dir.CONFIG).write_text(text, errors="surrogateescape")


def edit_provenance(copy: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = copy / adapter_dir.PROVENANCE
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def forge(provenance: dict[str, Any]) -> None:
    for prompt in provenance["probe"]["prompts"]:
        prompt["adapter"] = prompt["base"]


def without_effect(copy: Path) -> None:
    file = copy / adapter_dir.LORA_WEIGHTS
    save_file({name: tensor * ("lora_A" in name) for name, tensor in load_file(file).items()}, file)
    (copy / adapter_dir.PROVENANCE).unlink()


def with_rank(copy: Path, rank: int) -> None:
    file = copy / adapter_dir.LORA_WEIGHTS
    tensors = load_file(file)
    for name, tensor in tensors.items():
        rows = rank - tensor.shape["lora_B" in name]
        pad = (0, rows) if "lora_B" in name else (0, 0, 0, rows)
        tensors[name] = torch.nn.functional.pad(tensor, pad)
    save_file(tensors, file)
    config = json.loads((copy / adapter_dir.CONFIG).read_text())
    write_config(copy, json.dumps({**config, "r": rank, "lora_alpha": rank}))


def renamed(copy: Path, old: str, new: str) -> None:
    file = copy / adapter_dir.LORA_WEIGHTS
    tensors = {name: tensor for name, tensor in load_file(file).items() if f".{new}." not in name}
    save_file({name.replace(f".{old}.", f".{new}."): tensor for name, tensor in tensors.items()}, file)


def test_a_hundred_hostile_adapters_are_refused_and_traffic_is_undisturbed(server, admin, api, loras, tmp_path) -> None:
    """Each rule's own, over and over. Meanwhile every answer is the one that its adapter gave before."""
    attempts = list(itertools.islice(itertools.cycle(hostile(loras["sql"], tmp_path)), 100))
    assert len({name for name, _ in attempts}) > 40
    wrong = asyncio.run(refused(server, admin, attempts))
    assert wrong == []
    found = {adapter["name"]: adapter["state"] for adapter in api.get("/adapters").json()["adapters"]}
    assert found == dict.fromkeys(loras, "serving")
    assert server.process.poll() is None


def with_weights(change: Callable[[str, torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    """Returns a fault: other weights, and no record that would show it."""

    def damage(copy: Path) -> None:
        file = copy / adapter_dir.LORA_WEIGHTS
        save_file({name: change(name, tensor) for name, tensor in load_file(file).items()}, file)
        (copy / adapter_dir.PROVENANCE).unlink()

    return damage


def one(value: float, where: str) -> Callable[[Path], None]:
    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if where in name:
            tensor.view(-1)[0] = value
        return tensor

    return with_weights(change)


OVERFLOWING = {
    "one NaN": one(float("nan"), "layers.0.self_attn.v_proj.lora_A"),
    "a NaN in each layer": one(float("nan"), "lora_B"),
    "an infinity": one(float("inf"), "k_proj.lora_B"),
    "both infinities": one(-float("inf"), "lora_A"),
    "only NaN": with_weights(lambda _, tensor: tensor * float("nan")),
    "1e30": one(1e30, "v_proj"),
    "all 1e30": with_weights(lambda _, tensor: torch.full_like(tensor, 1e30)),
    "all 1e5": with_weights(lambda _, tensor: torch.full_like(tensor, 1e5)),
    "all 1000": with_weights(lambda _, tensor: torch.full_like(tensor, 1e3)),
    "1e30 against 1e-30": with_weights(lambda n, tensor: torch.full_like(tensor, 1e30 if "lora_A" in n else 1e-30)),
}


def test_all_answers_are_the_same_after_ten_adapters_that_overflow(server, api, loras, tmp_path) -> None:
    def ask(http: httpx.Client, model: str, prompt: str) -> str:
        body = {"model": model, "prompt": prompt, "max_tokens": 2, "temperature": 0}
        return http.post(f"{server.url}/v1/completions", json=body).json()["choices"][0]["text"]

    prompts = [f"{prompt} {number}" for number in range(4) for prompt in swap.PROMPTS[:5]]
    with httpx.Client(timeout=60) as http:

        def answers() -> list[str]:
            return [ask(http, model, prompt) for model in ("base", *loras) for prompt in prompts]

        before = answers()
        for number, (name, damage) in enumerate(OVERFLOWING.items()):
            copy = tmp_path / str(number)
            shutil.copytree(loras["sql"], copy)
            damage(copy)
            answer = api.put("/adapters/overflow", json={"source": str(copy), "allow_no_effect": True})
            assert answer.status_code == 422, name
            assert answers() == before, name


async def refused(server: Server, admin: Admin, attempts: list[tuple[str, Path]]) -> list[str]:
    """Publish each under load; return what went wrong."""
    headers = {"Authorization": f"Bearer {admin.token}"}
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{admin.port}", headers=headers, timeout=60) as http:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as asking:
            known = {p: (await load.ask(asking, "sql", p, 16, stream=False)).text for p in swap.PROMPTS}

        def judge(_: str, prompt: str, answer: load.Answer) -> str | None:
            return None if answer.text == known[prompt] else "mixed"

        def pick(number: int, turn: int) -> tuple[str, str]:
            return "sql", swap.PROMPTS[(number + turn) % len(swap.PROMPTS)]

        traffic, stop = load.Load(server.url, 4, pick, judge, 16), asyncio.Event()
        running = asyncio.create_task(traffic.run(stop))
        wrong = []
        for name, folder in attempts:
            answer = await http.put("/adapters/hostile", json={"source": str(folder)})
            if answer.status_code != 422 or "was not published" not in answer.json()["error"]["message"]:
                wrong.append(f"{name}: {answer.status_code} {answer.text}")
        stop.set()
        await running
    if traffic.requests < 20 or any(traffic.faults.values()):
        wrong.append(f"traffic: {traffic.requests} requests, {traffic.faults} {traffic.examples}")
    return wrong
