"""The scripts of the page astra_serve/README.md, run as they stand there but for names of folders and the address."""

import re
from pathlib import Path

import pytest

import astra_serve
from astra_serve.client import Client
from tests.astra_serve.client.conftest import Admin

PAGE = Path(astra_serve.__file__).parent / "README.md"


def script(first: str, **replaced: object) -> str:
    """Return the script of the page that begins with `first`, with some of its words replaced."""
    (found,) = re.findall(rf"^```python\n({re.escape(first)}.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    for old, new in replaced.items():
        assert old in found, f"the script has no {old}"
        found = found.replace(old, str(new))
    return found


def test_the_script_with_the_client_runs(admin: Admin, write_lora, capsys) -> None:
    with Client(admin.url) as client:
        before = client.publish("sql", write_lora("before", 1.0)).version
        words = {"http://127.0.0.1:8001": admin.url, "./sql-lora": write_lora("now", 2.0)}
        exec(script("from astra_serve.client import Client", **words), {"__name__": "__main__"})  # noqa: S102
        assert client.get("sql").version.digest == before.digest
    shown = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"sql@[0-9a-f]{12} 2\.00 nats from the base", shown[0])
    assert any(line.endswith(" serving") for line in shown)


@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
def test_the_script_that_publishes_while_it_trains_runs(admin: Admin, tiny_base, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = {
        "http://127.0.0.1:8001": admin.url,
        "Qwen/Qwen3-0.6B": tiny_base,
        "max_steps=200": "max_steps=4",
        "every=50": "every=2",
    }
    exec(script("from peft import", **words), {"__name__": "__main__"})  # noqa: S102
    assert "'publish_step': 4, 'publish_version': 'plus@" in capsys.readouterr().out
    with Client(admin.url) as client:
        assert client.get("plus").state == "serving"
