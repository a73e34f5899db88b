"""Random adapters, and settings for several engines on one small machine."""

import pytest


@pytest.fixture
def one_thread_each(monkeypatch) -> None:
    """Let several engines share two cores: threads that are bound to cores would wait for each other in busy loops."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("ASTRA_ADMIN_TOKEN", "e2e-token")
