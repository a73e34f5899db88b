"""Answers that are no numbers are never a proof."""

from pathlib import Path

import pytest

from astra_serve.adapters.probe import Prover
from astra_serve.errors import ProbeFailed
from tests.astra_serve.stand_in import StandInEngine
from tests.astra_serve.world import in_a_loop


@pytest.mark.parametrize("shift", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("may_change_nothing", [False, True])
def test_answers_that_are_not_finite_are_refused_whatever_is_allowed(
    shift: float, may_change_nothing: bool, tmp_path: Path
) -> None:
    engine = StandInEngine(1)
    engine.loaded["a"] = shift

    @in_a_loop
    async def prove() -> None:
        with pytest.raises(ProbeFailed, match="its weights overflow"):
            await Prover(engine).prove("a", tmp_path, may_change_nothing=may_change_nothing)

    prove()
