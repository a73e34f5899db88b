"""One row of the result: train and convert with each method, load in plain PEFT, serve from one engine."""

import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Collection
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

from converter.errors import AstraError, first_line
from tests.architectures import adapters, engine
from tests.architectures.adapters import METHODS, Adapter
from tests.architectures.models import ARCHITECTURES, Architecture
from tests.architectures.row import YES, Failed, Row, no

T = TypeVar("T")
# The first error in the log that is not about another one is the cause: the engine's processes report it upwards.
_ABOUT_ANOTHER = "Engine core init|WorkerProc init|Command '|Error raised in subprocess"
_ERROR = re.compile(rf"\b[A-Za-z]*(?:Error|Exception): (?!{_ABOUT_ANOTHER})(.+)$", re.MULTILINE)
_ASSERTION = re.compile(r"\b(assert .+)$", re.MULTILINE)  # in the traceback of an AssertionError without a text
_UNKNOWN = re.compile(r"Call to add_lora.*expected target modules in .* but received \['([^']+)'.*", re.DOTALL)
ENGINE_FAILED = "EngineCore encountered an issue"  # the text of vLLM's EngineDeadError


def prove(name: str, work: Path) -> tuple[Row, dict[str, float]]:
    """Return the row of the architecture `name` and the seconds of its parts; what they print goes to `work`/NAME/log.

    This process prints there from now on.
    """
    folder = work / re.sub(r"\W+", "-", name).strip("-").lower()
    folder.mkdir(parents=True)
    print_to(folder / "log")
    architecture, times = ARCHITECTURES[name], [time.monotonic()]
    base = adapters.save_base(architecture, folder / "base")
    left_out = adapters.layers_left_out(architecture, base)
    loras, trained = of_each(METHODS, lambda method: adapters.train_and_convert(architecture, base, method, folder))
    times.append(time.monotonic())
    loaded, peft = of_each(loras, lambda method: adapters.load_in_peft(architecture, base, loras[method]))
    times.append(time.monotonic())
    figures, served = {}, no("there is no adapter")
    if loaded:
        figures["peft"] = max(adapter.difference for adapter in loaded.values())
        served = _serve(architecture, base, loaded, folder / "log", figures)
    times.append(time.monotonic())
    seconds = [after - before for before, after in pairwise(times)]
    row = Row(
        architecture=name,
        kind=architecture.kind,
        all_layers=no(left_out) if left_out else YES,
        trained=trained,
        peft=peft,
        engine=served,
        figures={key: float(f"{value:.1g}") for key, value in figures.items()},
    )
    return row, dict(zip(("train and convert", "PEFT", "engine"), seconds, strict=True))


def of_each(methods: Collection[str], step: Callable[[str], T]) -> tuple[dict[str, T], str]:
    """Return what `step` returns for each method for which it raises nothing, and the cell for all of them."""
    done, reasons = {}, {}
    if not methods:
        return done, no("there is no adapter")
    for method in methods:
        try:
            done[method] = step(method)
        except Failed as error:
            reasons[method] = str(error)
        except Exception as error:  # a program that ends with a traceback has a fault; the other rows are proved
            traceback.print_exc()
            reasons[method] = f"{type(error).__name__}: {first_line(error)}"
    if not reasons:
        return done, YES
    if not done and len(set(reasons.values())) == 1:
        return done, no(next(iter(reasons.values())))
    return done, no("; ".join(f"{method}: {reason}" for method, reason in reasons.items()))


def print_to(log: Path) -> None:
    """Let this process, and those that it starts, print to the file `log`."""
    sys.stdout.flush()
    sys.stderr.flush()
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def _serve(
    architecture: Architecture, base: Path, loaded: dict[str, Adapter], log: Path, figures: dict[str, float]
) -> str:
    """Return the cell of the engine, and put the largest difference to PEFT's answers into `figures`."""
    words, remark = [], YES
    try:
        if architecture.has_experts_with_bias:  # on a CPU they are served beside adapters of other modules alone
            words, remark = engine.named_modules(base, loaded.values()), f"{YES}: with --lora-target-modules"
        elif architecture.kind == "multimodal, its text":
            words, remark = ["--language-model-only"], f"{YES}: with --language-model-only"
        figures["engine"] = engine.serve(base, loaded, architecture.served_in, words)
    except (Failed, AstraError) as error:
        reason = _UNKNOWN.sub(r"vLLM knows no module \1", str(error).replace(f"{base.parent}{os.sep}", ""))
        return no(f"the engine dies at the first request: {_cause(log)}" if ENGINE_FAILED in reason else reason)
    except Exception as error:  # whatever the engine raises while it starts
        return no(f"the engine does not start: {_cause(log) or first_line(error)}")
    return remark


def _cause(log: Path) -> str:
    """Return the text of the first error of the engine in `log`, or ""."""
    text = log.read_text(encoding="utf-8", errors="replace")
    begin = text.rfind("the engine starts")
    found = _ERROR.search(text, begin) or _ASSERTION.search(text, begin)
    return found[1] if found else ""
