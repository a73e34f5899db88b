"""A vLLM engine without HTTP, in a process of its own, so that several engines can be compared in one run.

Scheduler, worker and kernels run in that one process, so only the engine is measured. vLLM does not bind the threads of
such a process to cores.
"""

import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Load:
    """`waves` times `concurrency` simultaneous requests, which use the adapters in turn; without adapters, the base."""

    concurrency: int
    prompt_tokens: int
    output_tokens: int
    waves: int = 1
    adapters: Sequence[Path] = ()
    profile: bool = False


@dataclass(frozen=True)
class Speed:
    """The speed of an engine with one load."""

    prefill: float  # prompt tokens per second until the last request of a wave has its first token
    decode: float | None  # output tokens per second after that; None if there are none
    ttft: float  # median seconds to the first token of a request
    operators: dict[str, float] | None = None  # profiled loads: milliseconds per engine step in each PyTorch operator


@dataclass
class Engine:
    """A running engine."""

    log: Path
    _pipe: Connection
    _process: Any = field(repr=False)

    def run(self, load: Load) -> Speed:
        """Run `load` and return its speed. Raises RuntimeError if the engine's process has ended."""
        self._pipe.send(load)
        return self._receive()

    def _receive(self) -> Any:
        while not self._pipe.poll(0.2):
            if not self._process.is_alive():
                tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-20:])
                raise RuntimeError(f"the process of the engine has ended; the end of {self.log}:\n{tail}")
        return self._pipe.recv()


@contextmanager
def engine(
    base: Path, log: Path, options: dict[str, Any] | None = None, env: dict[str, str] | None = None
) -> Iterator[Engine]:
    """Start an engine for `base` with vLLM's `options` in a process with the environment `env`, yield it, and stop it.

    Raises RuntimeError with the end of `log` if the engine does not start.
    """
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_serve, args=(theirs, log, base, options or {}, env or {}), daemon=True)
    process.start()
    theirs.close()
    made = Engine(log, ours, process)
    try:
        made._receive()
        yield made
    finally:
        ours.close()  # the process ends when its end of the pipe is closed
        process.join(30)
        process.kill()


def _serve(pipe: Connection, log: Path, base: Path, options: dict[str, Any], env: dict[str, str]) -> None:
    with log.open("wb") as stream:
        os.dup2(stream.fileno(), sys.stdout.fileno())
        os.dup2(stream.fileno(), sys.stderr.fileno())
    os.environ.update(
        {"VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"} | env
    )
    from vllm import LLM

    llm = LLM(str(base), skip_tokenizer_init=True, enable_prefix_caching=False, **options)
    pipe.send("ready")
    with suppress(EOFError):
        while True:
            load = pipe.recv()
            pipe.send((_profile if load.profile else _measure)(llm.llm_engine, load))


def _profile(engine: Any, load: Load) -> Speed:
    """Measure `load` with the profiler on during all steps but the first, which processes the prompts."""
    from torch.profiler import ProfilerActivity, profile

    trace, steps, step = profile(activities=[ProfilerActivity.CPU]), 0, engine.step

    def traced_step() -> Any:
        nonlocal steps
        if steps == 1:
            trace.start()
        steps += 1
        return step()

    engine.step = traced_step
    try:
        speed = _measure(engine, load)
    finally:
        engine.step = step
        trace.stop()
    spent = {event.key: event.self_cpu_time_total / 1e3 / (steps - 1) for event in trace.key_averages()}
    return replace(speed, operators=spent)


def _measure(engine: Any, load: Load) -> Speed:
    import torch
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    params = SamplingParams(temperature=0, max_tokens=load.output_tokens, ignore_eos=True, detokenize=False)
    loras = [LoRARequest(str(folder), i + 1, str(folder)) for i, folder in enumerate(load.adapters)]
    random = torch.Generator().manual_seed(0)
    ttft, prefill_s, decode_s, decoded = [], 0.0, 0.0, 0
    for wave in range(load.waves):
        prompts = torch.randint(5, 4000, (load.concurrency, load.prompt_tokens), generator=random).tolist()
        started = time.perf_counter()
        for i, prompt in enumerate(prompts):
            lora = loras[(wave * load.concurrency + i) % len(loras)] if loras else None
            engine.add_request(f"{wave}-{i}-{started}", {"prompt_token_ids": prompt}, params, lora_request=lora)
        first: dict[str, float] = {}
        lengths: dict[str, int] = {}
        lengths_at_prefill: dict[str, int] = {}  # when the last request got its first token
        while engine.has_unfinished_requests():
            outputs = engine.step()
            now = time.perf_counter()
            for output in outputs:
                first.setdefault(output.request_id, now)
                lengths[output.request_id] = len(output.outputs[0].token_ids)
            if len(first) == load.concurrency and not lengths_at_prefill:
                lengths_at_prefill = dict(lengths)
        ttft += [moment - started for moment in first.values()]
        prefill_s += max(first.values()) - started
        decode_s += now - max(first.values())
        decoded += sum(lengths.values()) - sum(lengths_at_prefill.values())
    prefilled = load.waves * load.concurrency * load.prompt_tokens
    return Speed(prefilled / prefill_s, decoded / decode_s if decoded else None, statistics.median(ttft))
