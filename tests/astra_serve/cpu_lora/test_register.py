"""The plugin puts itself into the engine where it should, and nowhere else."""

import logging
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from astra_serve import cpu_lora

STOCK, OURS = "PunicaWrapperCPU", "GroupedPunicaWrapper"


@pytest.fixture
def platform(monkeypatch):
    """The engine's platform class, put back afterwards."""
    from vllm.platforms import current_platform

    kind = type(current_platform)
    stock = f"{PunicaWrapperCPU.__module__}.{STOCK}"  # also when another test has loaded the engine's plugins already
    monkeypatch.setattr(kind, "get_punica_wrapper", classmethod(lambda _: stock))
    check = kind.check_and_update_config
    stock_check = getattr(check, "keeps_compilation", None) or check
    monkeypatch.setattr(kind, "check_and_update_config", stock_check)
    overrides = kind.register_triton_kernel_overrides
    monkeypatch.setattr(
        kind, "register_triton_kernel_overrides", getattr(overrides, "without_experts", None) or overrides
    )
    return current_platform


def assert_stock(platform) -> None:
    """The stock path serves, and uncompiled: it cannot be compiled."""
    assert platform.get_punica_wrapper().rpartition(".")[2] == STOCK
    assert not hasattr(platform.check_and_update_config, "keeps_compilation")
    assert not hasattr(platform.register_triton_kernel_overrides, "without_experts")


def test_the_plugin_is_an_entry_point_and_on_by_default(platform, monkeypatch) -> None:
    from importlib.metadata import entry_points

    (entry,) = [e for e in entry_points(group="vllm.general_plugins") if e.name == "astra_cpu_lora"]
    monkeypatch.delenv("ASTRA_CPU_LORA", raising=False)
    entry.load()()
    assert platform.get_punica_wrapper().rpartition(".")[2] == OURS
    assert hasattr(platform.register_triton_kernel_overrides, "without_experts")


def test_the_environment_switches_it_off(platform, monkeypatch) -> None:
    monkeypatch.setenv("ASTRA_CPU_LORA", "0")
    cpu_lora.register()
    assert_stock(platform)


def test_nothing_happens_on_another_platform(platform, monkeypatch) -> None:
    monkeypatch.setattr(type(platform), "is_cpu", lambda _: False)
    cpu_lora.register()
    assert_stock(platform)


def test_a_changed_engine_gives_one_warning_and_the_stock_path(platform, monkeypatch, caplog) -> None:
    monkeypatch.setattr(PunicaWrapperCPU, "add_shrink", lambda _self, _y, _weights: None)
    with caplog.at_level(logging.WARNING, logger="astra_serve.cpu_lora"):
        cpu_lora.register()
    assert len(caplog.records) == 1
    assert_stock(platform)


@pytest.mark.skipif(not shutil.which("g++"), reason="g++ is not installed")
def test_models_with_adapters_are_compiled_as_the_base_is(platform, monkeypatch) -> None:
    """The engine turns compilation off where its configuration has LoRA: its check no longer sees that."""
    monkeypatch.delenv("CXX", raising=False)
    seen = []
    monkeypatch.setattr(type(platform), "check_and_update_config", classmethod(lambda _, c: seen.append(c.lora_config)))
    cpu_lora.register()
    once = platform.check_and_update_config.__func__
    cpu_lora.register()  # the engine loads plugins more than once
    assert platform.check_and_update_config.__func__ is once
    config = SimpleNamespace(lora_config="lora", additional_config={})
    platform.check_and_update_config(config)
    assert seen == [None]
    assert config.lora_config == "lora"


def test_without_a_compiler_models_with_adapters_stay_uncompiled_and_start(platform, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(type(platform), "check_and_update_config", classmethod(lambda _, c: seen.append(c.lora_config)))
    monkeypatch.setenv("CXX", "/nonexistent/g++")
    cpu_lora.register()
    platform.check_and_update_config(SimpleNamespace(lora_config="lora", additional_config={}))
    assert seen == ["lora"]


def test_a_check_that_fails_leaves_the_configuration_as_it_was(platform, monkeypatch) -> None:
    def check(*_) -> None:
        raise ValueError

    monkeypatch.setattr(type(platform), "check_and_update_config", classmethod(check))
    cpu_lora.register()
    config = SimpleNamespace(lora_config="lora", additional_config={})
    with pytest.raises(ValueError):  # noqa: PT011
        platform.check_and_update_config(config)
    assert config.lora_config == "lora"


def test_other_processes_and_platforms_do_not_import_the_plugin() -> None:
    """The engine calls the plugin in every process: it imports nothing heavy there, and on a GPU nothing at all."""
    script = "import sys, astra_serve.cpu_lora; sys.exit('torch' in sys.modules or 'vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
