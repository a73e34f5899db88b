"""The direction of data flow: packages meet only through adapter folders, and one module imports the engine."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("astra_serve", "converter", "trainer")
SHARED = ("converter.adapter_dir", "converter.atomic", "converter.errors")
BRIDGE = ("trainer/python_api.py", "converter.convert")  # the one module that may write a LoRA folder


def imports(file: Path) -> set[str]:
    """Every dotted name that `file` imports, `from a import b` as a.b."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively: the rule below reads absolute names"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_of_its_neighbours_only_the_adapter_format(package: str) -> None:
    for file in (ROOT / package).rglob("*.py"):
        for name in imports(file):
            top = name.partition(".")[0]
            if top in PACKAGES and top != package:
                is_bridge = str(file.relative_to(ROOT)) == BRIDGE[0] and name.startswith(BRIDGE[1])
                assert name.startswith(SHARED) or is_bridge, f"{file.relative_to(ROOT)} imports {name}"


def test_only_the_engine_its_server_and_its_plugin_import_vllm() -> None:
    users = {
        str(file.relative_to(ROOT))
        for package in PACKAGES
        for file in (ROOT / package).rglob("*.py")
        if any(name.partition(".")[0] == "vllm" for name in imports(file))
    }
    engine = ("background", "chat", "metered_client", "options", "server", "vllm", "vllm_seams", "worker_extension")
    assert users == {
        *(f"astra_serve/engine/{name}.py" for name in engine),
        *(f"astra_serve/cpu_lora/{name}.py" for name in ("__init__", "experts", "finite_cache", "wrapper")),
    }


def test_only_one_module_imports_trl() -> None:
    """The import changes the environment, and the module mends that: in tests, too, which start servers.

    `tests.support.trl_rollout` is a process of its own, which starts no server.
    """
    users = {
        str(file.relative_to(ROOT))
        for package in (*PACKAGES, "benchmarks", "tests")
        for file in (ROOT / package).rglob("*.py")
        if any(name.partition(".")[0] == "trl" for name in imports(file))
    }
    assert users == {"trainer/sft.py", "tests/support/trl_rollout.py"}


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_a_package_imports_nothing_heavy(package: str) -> None:
    importlib.import_module(package)
    script = f"import sys, {package}.cli; sys.exit('transformers' in sys.modules or 'vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False).returncode == 0


def test_importing_the_client_imports_nothing_heavy() -> None:
    heavy = {"torch", "transformers", "vllm"}
    script = (
        f"import sys; from astra_serve.client import AsyncClient, Client; sys.exit(bool({heavy} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False).returncode == 0


# Each package of astra_serve may import those that stand before it; `client` talks to servers over HTTP alone.
ROOMS = (
    "environment",
    "parent_death",
    "errors",
    "document",
    "adapters",
    "gateway",
    "control",
    "engine",
    "observe",
    "run",
    "start",
    "cli",
)
ALLOWED = {
    **{room: set(ROOMS[:number]) for number, room in enumerate(ROOMS)},
    "engine": {"parent_death", "errors", "document", "adapters", "gateway"},
    "client": {"environment", "errors", "document"},
    "cpu_lora": set(),
    "cli": {"start", "client", "engine", "observe"},
}


def test_inside_astra_serve_imports_go_in_one_direction() -> None:
    for file in (ROOT / "astra_serve").rglob("*.py"):
        room = file.relative_to(ROOT / "astra_serve").parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        used = {name.split(".")[1] for name in imports(file) if name.startswith("astra_serve.")} - {room}
        assert used <= ALLOWED[room], f"{file.relative_to(ROOT)} imports {used - ALLOWED[room]}"
