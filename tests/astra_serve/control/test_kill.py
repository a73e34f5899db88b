"""A server that is killed while it publishes starts again with what the document says."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from astra_serve.adapters.store import Store
from astra_serve.adapters.version_files import version_digest
from tests.astra_serve.world import in_a_loop, server


@pytest.mark.parametrize("event", ["fetching", "verifying", "probing", "loaded", "serving"])
def test_a_server_killed_while_publishing_comes_back_with_what_the_document_says(
    engine, base, tiny_base, write_lora, tmp_path, event
) -> None:
    one, two = write_lora("one", 1.0), write_lora("two", 2.0)

    def publish(source: Path, last: str) -> int:
        words = [str(tmp_path), str(tiny_base), str(source), last]
        command = [sys.executable, "-m", "tests.astra_serve.control.killed_while_publishing", *words]
        return subprocess.run(command, capture_output=True, check=False).returncode

    assert publish(one, "never") == 0
    before = (tmp_path / "adapters.yaml").read_text()
    assert publish(two, event) == -signal.SIGKILL
    written = event == "serving"  # prepared, then written, then followed
    assert ((tmp_path / "adapters.yaml").read_text() != before) == written

    @in_a_loop
    async def restarted() -> None:
        store = Store(tmp_path / "store")
        async with server(engine, store, base, tmp_path / "adapters.yaml") as w:
            await w.control.refresh()
            assert (await w.settled("a")).phase == "serving"
            assert w.current("a") == version_digest(two if written else one)
            for version in (tmp_path / "store" / "versions").iterdir():
                store.verify(f"sha256:{version.name}")  # complete, or absent
            assert not list((tmp_path / "store" / "staging").iterdir())
            await w.control.publish("a", str(two))  # and it can be done again
        store.close()

    restarted()
