"""The proof of an adapter: before its first request, the engine must answer a few prompts as the adapter should.

A LoRA that `astra-convert` wrote carries a record: the likeliest next tokens of its base and of the adapter after a few
prompts. The engine's answers must be those of the adapter. A LoRA without a record must change the base's answers. When
a version is published again, its answer to one prompt must be the one of its proof.
"""

import asyncio
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from astra_serve.adapters.protocol import Engine
from astra_serve.errors import ProbeFailed
from converter.adapter_dir import PROVENANCE, read_json

# Nats per token. Kernels and dtypes of engines differ from those of the converter by some hundredths.
MOST_DEVIATION = 0.3
LEAST_EFFECT = 0.01
NOISE = 0.05  # between two answers of one engine to one prompt, in batches of different sizes
_REMEMBERED = 256  # sets of prompts
# Token ids that every vocabulary has, in no meaningful order: a change of the weights changes the next tokens.
PROMPTS = [[i * 7 % 199 + 3 for i in range(n, n + 12)] for n in range(0, 96, 12)]

Token = Annotated[int, Field(ge=0, lt=2**24)]


class _Distribution(BaseModel):
    token_ids: list[Token] = Field(min_length=1, max_length=64)
    logprobs: list[float] = Field(min_length=1, max_length=64)


class _Prompt(BaseModel):
    token_ids: list[Token] = Field(min_length=1, max_length=512)
    base: _Distribution
    adapter: _Distribution


class _Probe(BaseModel):
    prompts: list[_Prompt] = Field(min_length=1, max_length=64)


@dataclass(frozen=True)
class Verdict:
    """The result of a probe; mean absolute differences of log probabilities, in nats."""

    recorded: bool  # whether the adapter has a record of its answers
    prompts: int
    effect: float  # between the engine's answers with the adapter and those of the base
    deviation: float | None  # between the engine's answers with the adapter and the record


@dataclass(frozen=True)
class Proof:
    """A verdict, and the prompt that shows later whether the engine has read the same weights again."""

    verdict: Verdict
    prompt: list[int]  # the one with the largest effect
    answer: dict[int, float]  # log probabilities of the likeliest next tokens
    most_deviation: float  # of a later answer, in nats

    @property
    def of_an_effect(self) -> bool:
        """Return whether the adapter changes answers; otherwise it was admitted because it need not."""
        return self.verdict.effect >= LEAST_EFFECT


class Prover:
    """Proves adapters on one engine; the base's answers to a set of prompts are asked for once."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._base: dict[str, list[dict[int, float]]] = {}

    async def prove(
        self, handle: Any, folder: Path, *, may_change_nothing: bool = False, urgent: bool = False
    ) -> Proof:
        """Prove the engine's adapter `handle`, which was read from `folder`. Raises ProbeFailed and ServeError."""
        probe = await asyncio.to_thread(_recorded, folder)
        prompts = [prompt.token_ids for prompt in probe.prompts] if probe else PROMPTS
        answers = await self._engine.next_tokens(prompts, handle, urgent=urgent)
        of_base = await self._of_base(prompts, urgent=urgent)
        effects = [_between(one, other) for one, other in zip(answers, of_base, strict=True)]
        effect, deviation = _mean(effects), None
        if not math.isfinite(effect):
            raise ProbeFailed("with the adapter the engine computes numbers that are not finite: its weights overflow")
        if probe:
            deviation = _mean([_from(one, prompt.adapter) for one, prompt in zip(answers, probe.prompts, strict=True)])
            if not deviation <= MOST_DEVIATION:  # a recorded NaN fails, too
                raise ProbeFailed(
                    f"the engine is {deviation:.2f} nats from what the adapter should say, allowed are "
                    f"{MOST_DEVIATION}: it is not the adapter that was converted, or not its base"
                )
            expected = _mean([_apart(prompt.base, prompt.adapter) for prompt in probe.prompts])
            may_change_nothing = may_change_nothing or expected < LEAST_EFFECT
        if not (effect >= LEAST_EFFECT or may_change_nothing):
            raise ProbeFailed(
                f"the adapter changes nothing ({effect:.4f} nats from the base): is it a trained one? "
                "allow_no_effect admits it all the same"
            )
        most = max(range(len(prompts)), key=effects.__getitem__)
        tolerance = min(MOST_DEVIATION, max(NOISE, effects[most] / 2))
        return Proof(
            Verdict(probe is not None, len(prompts), effect, deviation), prompts[most], answers[most], tolerance
        )

    async def again(self, handle: Any, proof: Proof, *, urgent: bool = False) -> None:
        """Verify that an adapter that the engine has read again is the one that was proved. Raises ProbeFailed."""
        (answer,) = await self._engine.next_tokens([proof.prompt], handle, urgent=urgent)
        deviation = _between(answer, proof.answer)
        if not deviation <= proof.most_deviation:
            raise ProbeFailed(
                f"the engine is {deviation:.2f} nats from its answers with this version before: publish it again"
            )

    async def _of_base(self, prompts: list[list[int]], *, urgent: bool) -> list[dict[int, float]]:
        key = str(prompts)
        if key not in self._base:
            if len(self._base) >= _REMEMBERED:
                self._base.clear()
            self._base[key] = await self._engine.next_tokens(prompts, None, urgent=urgent)
        return self._base[key]


def _recorded(folder: Path) -> _Probe | None:
    if not (folder / PROVENANCE).is_file():
        return None
    probe = read_json(folder, PROVENANCE).get("probe")
    try:
        return None if probe is None else _Probe.model_validate(probe)
    except ValidationError as error:
        fault = error.errors()[0]
        raise ProbeFailed(f"its probe cannot be read: {'.'.join(map(str, fault['loc']))}: {fault['msg']}") from error


def _from(answer: dict[int, float], recorded: _Distribution) -> float:
    """Return the difference between an answer of the engine and a recorded one, over the recorded tokens."""
    least = min(answer.values())  # a token that the engine does not list is less likely than all listed ones
    return _mean([
        abs(answer.get(token, min(least, value)) - value)
        for token, value in zip(recorded.token_ids, recorded.logprobs, strict=False)
    ])  # fmt: skip


def _apart(one: _Distribution, other: _Distribution) -> float:
    return _from(dict(zip(one.token_ids, one.logprobs, strict=False)), other)


def _between(one: dict[int, float], other: dict[int, float]) -> float:
    """Return the difference between two answers of the engine, over the tokens that either lists."""
    floors = min(one.values()), min(other.values())
    return _mean([abs(one.get(t, floors[0]) - other.get(t, floors[1])) for t in one.keys() | other.keys()])


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
