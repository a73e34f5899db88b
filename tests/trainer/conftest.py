"""Fixtures of the trainer's tests: tiny bases of real architectures."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.trainer.tiny_models import save_base


@pytest.fixture(scope="session")
def base_of(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Callable[[str], Path]:
    """Return the folder of a tiny base by the name of its architecture; it is made once."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = save_base(name, tmp_path_factory.mktemp("base") / name, tokenizer)
        return made[name]

    return get


@pytest.fixture
def copy_of(base_of: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """Return a copy of a tiny base that a test may change."""
    return lambda name: Path(shutil.copytree(base_of(name), tmp_path / f"copy-of-{name}"))
