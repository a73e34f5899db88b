"""Does the engine answer as the adapter should? Asked before an adapter gets its first request.

A LoRA that `astra-convert` wrote carries what its base and it say after a few prompts. The engine must say the same as
the adapter, and not what the base says. Of any other LoRA it is only known that it must change something. When the
engine reads a proved version again, one prompt tells whether it says what it said before.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from astra_serve.adapters.protocol import Engine
from astra_serve.errors import ProbeFailed
from converter.adapter_dir import PROVENANCE, read_json

# Nats. Kernels and dtypes of engines differ from those of the converter by some hundredths.
MOST_DEVIATION = 0.3
LEAST_EFFECT = 0.01
NOISE = 0.05  # between two answers of one engine to one prompt, in batches of different sizes
_REMEMBERED = 256  # sets of prompts
# Token ids that every vocabulary has, in no meaningful order: whatever changes the weights changes what follows them.
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
    """What a probe found; mean absolute differences of log probabilities, nats."""

    recorded: bool  # whether the adapter says what to expect of it
    prompts: int
    effect: float  # the engine with the adapter, from the base
    deviation: float | None  # the engine with the adapter, from what was recorded


@dataclass(frozen=True)
class Proof:
    """A verdict, and how to see with one prompt that the same weights were read again."""

    verdict: Verdict
    prompt: list[int]  # after which the adapter is furthest from the base
    said: dict[int, float]
    most_deviation: float

    @property
    def of_an_effect(self) -> bool:
        """Return whether it changes something; otherwise it was admitted because it need not."""
        return self.verdict.effect >= LEAST_EFFECT


class Prover:
    """Proves adapters on one engine. What its base says is asked once for each set of prompts: it never changes."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._base: dict[str, list[dict[int, float]]] = {}

    async def prove(
        self, handle: Any, folder: Path, *, may_change_nothing: bool = False, urgent: bool = False
    ) -> Proof:
        """Ask the engine what its adapter `handle`, read from `folder`, says. Raises ProbeFailed and ServeError."""
        probe = _recorded(folder)
        prompts = [prompt.token_ids for prompt in probe.prompts] if probe else PROMPTS
        said = await self._engine.next_tokens(prompts, handle, urgent=urgent)
        effects = [
            _between(one, other) for one, other in zip(said, await self._of_base(prompts, urgent=urgent), strict=True)
        ]
        effect, deviation = _mean(effects), None
        if probe:
            deviation = _mean([_from(one, prompt.adapter) for one, prompt in zip(said, probe.prompts, strict=True)])
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
        return Proof(Verdict(probe is not None, len(prompts), effect, deviation), prompts[most], said[most], tolerance)

    async def again(self, handle: Any, proof: Proof, *, urgent: bool = False) -> None:
        """Make sure that an adapter that the engine has read again is the one that was proved. Raises ProbeFailed."""
        (said,) = await self._engine.next_tokens([proof.prompt], handle, urgent=urgent)
        deviation = _between(said, proof.said)
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


def _from(said: dict[int, float], recorded: _Distribution) -> float:
    """Return how far the engine is from a recorded distribution, over the tokens of which both know."""
    least = min(said.values())  # what the engine does not list is less likely than all that it lists
    return _mean([
        abs(said.get(token, min(least, value)) - value)
        for token, value in zip(recorded.token_ids, recorded.logprobs, strict=False)
    ])  # fmt: skip


def _apart(one: _Distribution, other: _Distribution) -> float:
    return _from(dict(zip(one.token_ids, one.logprobs, strict=False)), other)


def _between(one: dict[int, float], other: dict[int, float]) -> float:
    """Return how far two answers of the engine are apart, over the tokens that either lists."""
    floors = min(one.values()), min(other.values())
    return _mean([abs(one.get(t, floors[0]) - other.get(t, floors[1])) for t in one.keys() | other.keys()])


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
