"""Real `astra-train` processes: killed, interrupted, resumed, and several at once."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from converter.adapter_dir import load_astra
from tests.support.server import BIN
from trainer.cli import main

SETTINGS = ["--rank", "4", "--batch-size", "4", "--max-length", "32", "--forgetting-rows", "2", "--eval-share", "0.2"]
RUN = [*SETTINGS, "--steps", "150", "--eval-steps", "10"]


def options(base: Path, data: Path, out: Path) -> list[str]:
    return ["--base", str(base), "--data", str(data), "--out", str(out)]


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, rows) -> Path:
    file = tmp_path_factory.mktemp("data") / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def uninterrupted(tiny_base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of the same run without interruption."""
    out = tmp_path_factory.mktemp("uninterrupted") / "out"
    assert main([*options(tiny_base, data, out), *RUN]) == 0
    return out


@pytest.fixture
def process(tiny_base: Path, data: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    command = [str(BIN / "astra-train"), *options(tiny_base, data, tmp_path / "out"), *RUN]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as running:
        yield running
        running.kill()


def wait_for(pattern: str, folder: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not list(folder.glob(pattern)):
        assert process.poll() is None, "the run ended before it was stopped"
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    "moment",
    ["out.unfinished", "out.unfinished/checkpoint-10", "out.unfinished/checkpoint-20/complete"],
    ids=["before any checkpoint", "while a checkpoint is written", "between checkpoints"],
)
def test_resume_after_a_kill_gives_the_same_bytes(
    tiny_base, data, tmp_path, uninterrupted, process, moment: str
) -> None:
    wait_for(moment, tmp_path, process)
    process.kill()
    process.wait()
    assert not (tmp_path / "out").exists()
    assert main([*options(tiny_base, data, tmp_path / "out"), *RUN, "--resume"]) == 0
    assert contents(tmp_path / "out") == contents(uninterrupted)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_kill_during_calibration_leaves_no_files(tiny_base, data, tmp_path, uninterrupted, process) -> None:
    time.sleep(2)  # the process is importing modules
    process.kill()
    process.wait()
    assert list(tmp_path.iterdir()) == []
    assert main([*options(tiny_base, data, tmp_path / "out"), *RUN, "--resume"]) == 0
    assert contents(tmp_path / "out") == contents(uninterrupted)


def test_sigint_saves_the_step_and_exits_with_130(tiny_base, data, tmp_path, uninterrupted, process) -> None:
    wait_for("out.unfinished/checkpoint-10/complete", tmp_path, process)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    line = stderr.strip().splitlines()[-1]
    assert line.startswith("astra-train: interrupted; step ")
    assert line.endswith("continue with --resume")
    step = line.split()[3]
    assert (tmp_path / "out.unfinished" / f"checkpoint-{step}" / "complete").exists()
    assert main([*options(tiny_base, data, tmp_path / "out"), *RUN, "--resume"]) == 0
    assert contents(tmp_path / "out") == contents(uninterrupted)


def test_an_unfinished_run_is_refused_without_resume_or_with_other_settings(
    tiny_base, data, tmp_path, process, capsys
) -> None:
    wait_for("out.unfinished/checkpoint-10/complete", tmp_path, process)
    process.kill()
    process.wait()
    again = [*options(tiny_base, data, tmp_path / "out"), *RUN]
    for arguments, message in [
        (again, "an unfinished run is in"),
        ([*again, "--resume", "--rank", "5"], "has rank=4, not 5"),
        ([*again, "--resume", "--seed", "1"], "has seed=0, not 1"),
    ]:
        assert main(arguments) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
    (tmp_path / "out.unfinished" / "run.json").write_text("{")
    assert main([*again, "--resume"]) == 2
    assert "is not an unfinished run" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("extra", [[], ["--shard-base", "true"]], ids=["data parallel", "base sharded by FSDP2"])
def test_two_processes_give_the_result_of_one(tiny_base, data, tmp_path, extra: list[str]) -> None:
    steps = [*SETTINGS, "--steps", "20", "--eval-steps", "10", "--eval-metric", "exact_match"]
    assert main([*options(tiny_base, data, tmp_path / "one"), *steps]) == 0
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    quiet = ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "trainer.cli"]
    command = [sys.executable, *launch, *quiet, *options(tiny_base, data, tmp_path / "two"), *steps, *extra]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2  # only one process prints
    one, two = (load_astra(tmp_path / name) for name in ("one", "two"))
    for name, layer in one.layers.items():
        torch.testing.assert_close(two.layers[name].b0, layer.b0, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(two.layers[name].a - two.layers[name].a0, layer.a - layer.a0, rtol=1e-2, atol=1e-4)
    for ours, theirs in zip(one.provenance["evaluations"], two.provenance["evaluations"], strict=True):
        assert theirs == pytest.approx(ours, abs=1e-4)
    assert two.provenance["forgetting"]["change"] == pytest.approx(one.provenance["forgetting"]["change"], abs=1e-4)
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / n / "loss.jsonl").read_text().splitlines()]
        for n in ("one", "two")
    ]
    assert losses[1] == pytest.approx(losses[0], abs=1e-3)


@pytest.mark.parametrize(("processes", "printed"), [("1", "at exit, finalised, "), ("2", "at exit, ")])
def test_one_of_several_processes_ends_without_finalising_python(processes: str, printed: str) -> None:
    """Finalisation could abort on a thread of gloo; exit handlers still run, and the exit status is kept."""
    program = """
import atexit, sys
from trainer.cli import main

class Last:
    def __del__(self):
        print("finalised", end=", ")

last = Last()
atexit.register(print, "at exit", end=", ")
sys.exit(main(["--base", "b", "--data", "d", "--out", "o", "--rankk", "8"]))
"""
    environment = {**os.environ, "WORLD_SIZE": processes}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout == printed
    assert done.returncode == 2
    assert "--rank" in done.stderr
