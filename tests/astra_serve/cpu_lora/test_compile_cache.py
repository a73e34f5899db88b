"""The functions behind the cache of compiled models; tests/slow/test_compile_cache.py starts engines with it."""

import io
from types import SimpleNamespace

import torch
from vllm.config import VllmConfig

from astra_serve.cpu_lora import compile_cache


def test_a_loaded_function_takes_the_call_that_the_engine_makes(monkeypatch) -> None:
    loaded = SimpleNamespace(_artifacts=SimpleNamespace(compiled_fn=lambda x: x + 1))
    monkeypatch.setattr(torch.compiler, "load_compiled_function", lambda _file: loaded)
    compile_cache.load_compiled_models()
    compile_cache.load_compiled_models()
    compiled = torch.compiler.load_compiled_function(io.BytesIO())._artifacts.compiled_fn
    compiled.finalize_loading(None)
    assert compiled(1) == 2


def test_the_engine_keeps_a_compiled_model_for_each_kind_of_cpu(monkeypatch) -> None:
    def key(**capabilities: bool) -> str:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
        config = VllmConfig()
        compile_cache.separate_by_cpu(config)
        return config.compute_hash()

    assert key(avx2=True, avx512_f=True) == key(avx512_f=True, avx2=True) != key(avx2=True, avx512_f=False)
