"""The built wheel in an environment that has only its requirements: no dev set, no checkout."""

import email
import importlib.metadata
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import httpx
import pytest
from packaging.requirements import Requirement

from tests.docs.pages import ROOT
from tests.support.server import astra_serve

BUILT_FROM = ("pyproject.toml", "README.md", "LICENSE", "astra_serve", "converter", "trainer")
DATA = {
    "astra_serve/cpu_lora/grouped_lora.cpp",
    "astra_serve/py.typed",
    "converter/py.typed",
    "trainer/analysis/report.html.jinja",
    "trainer/py.typed",
    *(f"trainer/embedded/base/{name}" for name in ("config.json", "model.safetensors", "tokenizer.json")),
}
PACKAGES = ("astra_serve", "converter", "trainer")
PROGRAMS = ("astra-train", "astra-convert", "astra-serve")
NOT_INSTALLED = ("hypothesis", "moto", "pytest")  # of the dev set
OUTSIDE = {"PYTHONPATH": "", "PYTHONNOUSERSITE": "1"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy of the sources: setuptools leaves files beside them."""
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "source").mkdir()
    for name in BUILT_FROM:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
        copy(ROOT / name, folder / "source" / name)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(folder / "source")], check=True)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel beside links to the packages that it requires, and return the environment's folder."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    venv.create(folder)
    for distribution in required(wheel, "cpu"):
        link(distribution, site_packages(folder))
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python")]
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--quiet", str(wheel)], check=True)
    return folder


def test_a_wheel_has_all_modules_and_their_data(wheel: Path) -> None:
    found = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(file.relative_to(ROOT)) for name in PACKAGES for file in (ROOT / name).rglob("*.py")}
    assert found >= modules | DATA
    assert {name.split("/")[0] for name in found if ".dist-info/" not in name} == set(PACKAGES)


def test_the_programs_of_a_wheel_start_without_the_dev_set(environment: Path) -> None:
    for module in NOT_INSTALLED:
        assert run(environment, "python", "-c", f"import {module}").returncode == 1
    for program in PROGRAMS:
        assert run(environment, program, "--version").stdout == f"{importlib.metadata.version('astra-serve')}\n"


def test_an_installed_wheel_serves_the_embedded_base(environment: Path, tmp_path: Path) -> None:
    base, document = site_packages(environment) / "trainer" / "embedded" / "base", tmp_path / "adapters.yaml"
    document.write_text("adapters: []\n")
    options = ["--base", str(base), "--adapters", str(document), "--enforce-eager"]
    program = environment / "bin" / "astra-serve"
    with astra_serve(options, tmp_path / "server.log", program=program, environment=OUTSIDE) as server:
        body = {"model": "base", "prompt": "def main(", "max_tokens": 4}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
        assert answer.json()["usage"]["completion_tokens"] == 4
        assert httpx.get(f"{server.url}/readyz").json() == {"ready": True, "reasons": []}
    log = server.log.read_text()
    assert not [package for package in PACKAGES if str(ROOT / package) in log]


def required(wheel: Path, extra: str) -> list[importlib.metadata.Distribution]:
    """Return the installed distributions that a wheel and its extra require, and those that these require."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    waiting = [(line, extra) for line in metadata.get_all("Requires-Dist", [])]
    found: dict[tuple[str, str], importlib.metadata.Distribution] = {}
    while waiting:
        line, extra = waiting.pop()
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        for wanted in ("", *requirement.extras):
            key = requirement.name.lower().replace("_", "-"), wanted
            if key in found:
                continue
            try:
                found[key] = importlib.metadata.distribution(requirement.name)
            except importlib.metadata.PackageNotFoundError:  # left out of the lock on purpose
                continue
            waiting += [(line, wanted) for line in found[key].requires or []]
    return list(found.values())


def link(distribution: importlib.metadata.Distribution, site: Path) -> None:
    """Link the files of an installed distribution into another environment's site-packages."""
    for top in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
        there = Path(str(distribution.locate_file(top)))
        if there.exists() and not (site / top).exists():
            (site / top).symlink_to(there)


def site_packages(environment: Path) -> Path:
    (found,) = environment.glob("lib/python*/site-packages")
    return found


def run(environment: Path, program: str, *options: str) -> "subprocess.CompletedProcess[str]":
    command = [str(environment / "bin" / program), *options]
    return subprocess.run(command, env=OUTSIDE, capture_output=True, text=True, check=False)
