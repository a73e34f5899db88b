"""Patterns of a config mean the modules that they mean in PEFT, and none can take long."""

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from converter.adapter_dir import MalformedAdapter
from converter.adapter_dir.patterns import first_matches, untargeted

MODULES = [f"model.layers.{n}.{part}" for n in (0, 1, 10, 11) for part in ("self_attn.q_proj", "mlp.up_proj", "q.proj")]
MODULES += ["lm_head", "q_proj"]
PIECES = [
    "q_proj",
    "layers",
    "1",
    "0",
    ".",
    r"\.",
    ".*",
    "(q|up)",
    "_proj",
    "^",
    "model",
    "[01]",
    r"\d+",
    "$",
    "|",
    ".*?",
]
keys = st.lists(st.sampled_from(PIECES), min_size=1, max_size=6).map("".join)


@settings(deadline=None, max_examples=300)
@given(st.lists(keys, min_size=1, max_size=4, unique=True))
def test_the_first_key_that_matches_is_that_of_peft(found: list[str]) -> None:
    try:
        ours = first_matches(found, MODULES, "config")
    except MalformedAdapter:  # such as ^* and .**
        return
    for module in MODULES:
        key = get_pattern_key(found, module)
        assert ours.get(module, module) == key, (found, module)


@settings(deadline=None, max_examples=200)
@given(
    st.one_of(keys, st.lists(st.sampled_from(["q_proj", "mlp.up_proj", "lm_head", "proj"]), min_size=1)),
    st.one_of(st.none(), st.just("q_proj"), st.just([r"up_proj"]), st.just(r".*\.1\..*")),
    st.one_of(st.none(), st.integers(0, 11), st.lists(st.integers(0, 11), max_size=3)),
)
def test_the_targets_are_those_of_peft(target, exclude, layers) -> None:
    layers = None if isinstance(target, str) else layers
    config = {"target_modules": target, "exclude_modules": exclude, "layers_to_transform": layers}
    try:
        ours = untargeted(config, MODULES, "config")
    except MalformedAdapter:
        return
    peft = LoraConfig(**config)
    assert ours == [module for module in MODULES if not check_target_module_exists(peft, module)]


@pytest.mark.parametrize("parameter", ["up_proj.weight", "1.mlp.up_proj.weight", "model.layers.0.q.proj.weight"])
@pytest.mark.parametrize("target", [[], ["q_proj"]])
def test_weights_are_targeted_as_parameters(target: list[str], parameter: str) -> None:
    """PEFT compares the ends of the parameters' names, as those of modules."""
    module = parameter.removesuffix(".weight")
    ours = untargeted({"target_modules": target, "target_parameters": [parameter]}, MODULES, "config")
    names = [*target, module]
    assert ours == [m for m in MODULES if not check_target_module_exists(LoraConfig(target_modules=names), m)]


@pytest.mark.parametrize(
    "key",
    [
        *(
            "(?!x)q_proj",
            r"(q)_\1",
            "(?i)q_proj",
            "(",
            "*",
            "[",
            r"\Qq\E",
            r"\pL",
            "[[:alpha:]]_proj",
            "q{,3}",
            "(?<x>q)",
        ),
        *("(?<x>q)", "q\ud800*", "q++", "((q{100}){100}){100}", "q" * 5000 + "*"),
    ],
)
def test_an_expression_that_cannot_be_matched_in_linear_time_or_is_read_differently_is_refused(key: str) -> None:
    with pytest.raises(MalformedAdapter, match="cannot be matched in linear time") as refused:
        first_matches([key], MODULES, "rank_pattern in DIR/adapter_config.json")
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 400
    with pytest.raises(MalformedAdapter):
        untargeted({"target_modules": key + "|x"}, MODULES, "config")


@pytest.mark.parametrize("key", ["(a+)+$", "(([a-z0-9._]*)*)*!", "(a|aa)+$", "(.*.*)*b", "(.*){1,30}[bc]"])
def test_an_expression_that_freezes_python_takes_no_time(key: str) -> None:
    began = time.monotonic()
    first_matches([key], ["a" * 5000, "model." + "a" * 5000 + "!x"], "config")
    assert time.monotonic() - began < 1


def test_thousands_of_names_take_no_time_and_as_many_expressions_are_refused() -> None:
    modules = [f"model.layers.{n}.mlp.experts.{e}.up_proj" for n in range(50) for e in range(200)]
    began = time.monotonic()
    found = first_matches([f"^{module}" for module in modules], modules, "config")
    assert len(found) == len(modules)
    assert time.monotonic() - began < 5
    with pytest.raises(MalformedAdapter, match="has 1000 regular expressions for 10000 modules: give module names"):
        first_matches([f"(x{n})+" for n in range(1000)], modules, "config")


def test_names_made_to_be_compared_for_hours_are_refused() -> None:
    modules = [f"{n:06}{'x' * 30}" for n in range(5000)]
    names = ["".join(random.Random(n).choices("x.", k=36)) for n in range(20_000)]
    began = time.monotonic()
    with pytest.raises(MalformedAdapter, match=r"has .* keys, too many for 5000 modules"):
        first_matches(names, modules, "rank_pattern in DIR/adapter_config.json")
    assert time.monotonic() - began < 15
