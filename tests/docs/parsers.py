"""The argument parsers of our programs and of vLLM, and the commands of a page parsed by them."""

import argparse
import importlib.util
import re
from collections.abc import Callable
from functools import cache

from astra_serve import start
from astra_serve.client import adapters_cli, keys_cli, usage_cli
from converter import cli as convert_cli
from tests.docs.pages import ROOT
from trainer import cli as train_cli

PARSERS: dict[str, Callable[[], argparse.ArgumentParser]] = {
    "astra-train": train_cli._train_parser,
    "astra-convert": convert_cli._parser,
    "astra-serve": start._parser,
    "astra-serve adapters": adapters_cli._parser,
    "astra-serve keys": keys_cli._parser,
    "astra-serve usage": usage_cli._parser,
}


@cache
def of_vllm() -> argparse.ArgumentParser:
    """Return vLLM's parser, which `astra_serve.engine.options` extends."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from astra_serve.engine.vllm_seams import make_arg_parser

    found: argparse.ArgumentParser = make_arg_parser(FlexibleArgumentParser(prog="vllm serve"))
    return found


def parse(words: list[str]) -> None:
    """Parse a command by its program's own parser. Raises SystemExit or AssertionError where that is not possible."""
    match _launched(words):
        case ["astra-train", "analyze", folder] | ["astra-convert", "inspect", folder, *_]:
            assert not folder.startswith("-")
        case ["astra-serve", "adapters", *options]:
            PARSERS["astra-serve adapters"]().parse_args(options, argparse.Namespace(before=[], after=[]))
        case ["astra-serve", "keys" | "usage" as command, *options]:
            PARSERS[f"astra-serve {command}"]().parse_args(options)
        case ["astra-serve", *options]:
            _, others = PARSERS["astra-serve"]().parse_known_args(options)
            of_vllm().parse_args(others)
        case ["astra-train" | "astra-convert" as program, *options]:
            PARSERS[program]().parse_args(options)
        case ["vllm", "serve", model, *options]:
            of_vllm().parse_args([model, *options])
        case ["make", *targets]:
            made = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert set(targets) <= set(made)
        case ["python", "-m", module, *_]:
            assert importlib.util.find_spec(module), f"there is no module {module}"


def options(parser: argparse.ArgumentParser) -> set[str]:
    """Return the long options of a parser and of its commands."""
    found = {name for action in parser._actions for name in action.option_strings if name.startswith("--")}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= {name for command in action.choices.values() for name in options(command)}
    return found - {"--help"}


def _launched(words: list[str]) -> list[str]:
    """Return the command that `accelerate launch` starts."""
    if words[:2] != ["accelerate", "launch"]:
        return words
    module, *rest = words[words.index("-m") + 1 :]
    return ["astra-train" if module == "trainer.cli" else module, *rest]
