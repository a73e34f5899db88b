"""An adapter that is served while transformers' own Trainer trains it; the engine is a stand-in."""

import logging
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from astra_serve.client import Client, PublishCallback
from astra_serve.client.publish_callback import improved
from astra_serve.errors import BadDocument, NotPublished, ServeError
from tests.astra_serve.client.conftest import Admin
from tests.astra_serve.world import TOKEN
from tests.support.server import free_port

ROWS = [{"input_ids": [5 + n, 6, 7, 8], "labels": [5 + n, 6, 7, 8]} for n in range(8)]


class Written:
    """Writes LoRAs as PEFT does, and keeps their tensors by the step."""

    def __init__(self) -> None:
        self.tensors: list[dict[str, torch.Tensor]] = []

    def __call__(self, model: Any, folder: Path) -> None:
        model.save_pretrained(folder)
        self.tensors.append(load_file(folder / "adapter_model.safetensors"))


class At(TrainerCallback):
    """Calls functions at the end of some steps."""

    def __init__(self, functions: dict[int, Callable[[], object]]) -> None:
        self.functions = functions

    def on_step_end(self, _args: Any, state: TrainerState, *_: Any, **__: Any) -> None:
        self.functions.get(state.global_step, lambda: None)()


@pytest.fixture
def trainer(tiny_base, tmp_path: Path) -> Callable[..., Trainer]:
    """Return a trainer of a LoRA on the tiny base."""

    def make(*callbacks: TrainerCallback, steps: int = 4, **settings: Any) -> Trainer:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(tiny_base)
        config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
        args = TrainingArguments(
            output_dir=str(tmp_path / "out"),
            max_steps=steps,
            learning_rate=0.1,
            per_device_train_batch_size=2,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            label_names=["labels"],
            dataloader_pin_memory=False,
            **settings,
        )
        return Trainer(get_peft_model(model, config), args, None, ROWS, ROWS, callbacks=list(callbacks))

    return make


@pytest.fixture
def callback(admin: Admin) -> Callable[..., PublishCallback]:
    def make(write_lora: Any = None, **settings: Any) -> PublishCallback:
        settings = {"allow_no_effect": True, **settings}  # the stand-in's effect is one number of the trained ones
        return PublishCallback(admin.url, TOKEN, "a", write_lora=write_lora or Written(), timeout_s=20, **settings)

    return make


def published(trainer: Trainer) -> list[dict[str, Any]]:
    """Return the entries of the trainer's log that are about a publish."""
    return [entry for entry in trainer.state.log_history if "publish_step" in entry]


def served(admin: Admin) -> tuple[str, dict[str, torch.Tensor]]:
    """Return the version that serves, and its tensors."""
    with Client(admin.url, TOKEN) as client:
        version = client.get("a").version
    assert version is not None
    return version.name, load_file(admin.world.store.folder(version.digest) / "adapter_model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_last_snapshot_serves_when_the_training_ends(
    admin: Admin, trainer, callback, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    write = Written()
    training = trainer(callback(write, every=2))
    training.train()
    assert len(write.tensors) == 2
    name, tensors = served(admin)
    assert same(tensors, write.tensors[-1])
    last = published(training)[-1]
    assert (last["publish_step"], last["publish_version"]) == (4, name)
    assert last["publish_effect"] > 0
    assert last["publish_seconds"] >= 0
    assert list(tmp_path.glob("astra-publish-*")) == []


def test_a_snapshot_has_the_weights_of_its_step_and_the_training_goes_on_meanwhile(
    admin: Admin, trainer, callback
) -> None:
    """Step 2 waits at the engine until step 5 has ended; step 4 is replaced by step 6."""
    admin.engine.gate.clear()
    write, loaded = Written(), []

    def at_the_gate() -> None:
        while "loading" not in admin.world.seen("a"):
            threading.Event().wait(0.01)

    def open_the_gate() -> None:
        loaded.extend(admin.engine.loads)
        admin.release()

    training = trainer(callback(write, every=2), At({3: at_the_gate, 6: open_the_gate}))
    training.args.max_steps = 6
    training.train()
    assert loaded == []
    assert [entry["publish_step"] for entry in published(training)] == [2, 6]
    assert not same(write.tensors[0], write.tensors[2])  # the weights have moved since
    with Client(admin.url, TOKEN) as client:
        previous = client.get("a").previous[0]
    first = load_file(admin.world.store.folder(previous.digest) / "adapter_model.safetensors")
    assert same(first, write.tensors[0])
    assert same(served(admin)[1], write.tensors[2])


def test_a_failed_publish_stops_the_training(admin: Admin, trainer, callback) -> None:
    admin.engine.refuse.add("a@")
    training = trainer(callback(every=1), steps=100_000)
    with pytest.raises(NotPublished, match=r"^'a' was not published at step 1: 'a' was not published: .*it said no"):
        training.train()
    assert "it said no" in published(training)[0]["publish_error"]
    assert training.state.global_step < 100_000


def test_a_failed_publish_is_a_warning_if_that_is_wanted(admin: Admin, trainer, callback, caplog) -> None:
    admin.engine.refuse.add("a@")
    training = trainer(callback(every=4, on_failure="warn"))
    with caplog.at_level(logging.WARNING):
        training.train()
    assert training.state.global_step == 4
    assert "it said no" in published(training)[0]["publish_error"]
    assert "'a' was not published at step 4" in caplog.text


def test_a_lora_that_cannot_be_written_is_a_failed_publish(trainer, callback) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("weights that are not finite")

    with pytest.raises(NotPublished, match="'a' was not published at step 2: weights that are not finite"):
        trainer(callback(fails, every=2)).train()


@pytest.mark.parametrize("token", [TOKEN, "wrong"])
def test_a_server_that_does_not_answer_is_found_before_the_first_step(admin: Admin, trainer, token: str) -> None:
    url = admin.url if token == "wrong" else f"http://127.0.0.1:{free_port()}"  # noqa: S105
    training = trainer(PublishCallback(url, token, "a", write_lora=Written(), every=1))
    with pytest.raises(NotPublished, match=r"at step 0: (http.* does not answer|the admin token is missing or wrong)"):
        training.train()
    assert training.state.global_step == 0


def test_the_evaluations_that_improve_are_published(admin: Admin, trainer, callback) -> None:
    def worsen() -> None:
        with torch.no_grad():
            for name, weights in training.model.named_parameters():
                weights.mul_(-30.0 if "lora_B" in name else 1.0)

    write = Written()
    settings = {"steps": 6, "eval_strategy": "steps", "eval_steps": 1}
    training = trainer(At({3: worsen}), callback(write, when="improved"), **settings)
    training.train()
    losses = [entry["eval_loss"] for entry in training.state.log_history if "eval_loss" in entry]
    best = [loss for number, loss in enumerate(losses) if loss < min(losses[:number], default=float("inf"))]
    assert 0 < len(write.tensors) == len(best) < 6
    assert published(training)[-1]["publish_step"] == losses.index(min(losses)) + 1
    assert same(served(admin)[1], write.tensors[-1])
    training.evaluate()  # after the training nothing is published
    assert len(write.tensors) == len(best)


def test_a_training_without_evaluations_publishes_no_improvement_and_says_so(trainer, callback) -> None:
    with pytest.raises(NotPublished, match="no evaluation had eval_loss: set eval_strategy"):
        trainer(callback(when="improved")).train()


@pytest.mark.parametrize(
    ("value", "best", "greater", "expected"),
    [
        (1.0, None, False, True),
        (float("nan"), None, False, False),
        (float("nan"), 1.0, True, False),
        (1.0, 2.0, False, True),
        (2.0, 2.0, False, False),
        (1.0, 2.0, True, False),
        (3.0, 2.0, True, True),
    ],
)
def test_a_metric_improves_in_its_direction(value: float, best: float | None, greater: bool, expected: bool) -> None:
    assert improved(value, best, greater=greater) is expected


def test_a_folder_that_the_server_sees_is_not_uploaded_and_stays(admin: Admin, trainer, callback, tmp_path) -> None:
    trainer(callback(every=4, folder=tmp_path / "seen")).train()
    trainer(callback(every=4, folder=tmp_path / "seen")).train()
    assert {path.name for path in (tmp_path / "seen").iterdir()} == {"a-4", "a-4-2"}
    with Client(admin.url, TOKEN) as client:
        assert client.get("a").source == str(tmp_path / "seen" / "a-4-2")


@pytest.mark.parametrize("seen", [True, False], ids=["in a folder", "uploaded"])
def test_a_name_with_a_namespace_makes_one_folder_and_none_inside_of_it(
    admin: Admin, trainer, tmp_path, monkeypatch, seen: bool
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = tmp_path / "seen" if seen else None
    found = PublishCallback(
        admin.url, TOKEN, "team/a", every=2, folder=folder, write_lora=Written(), allow_no_effect=True, timeout_s=20
    )
    trainer(found, steps=2).train()
    with Client(admin.url, TOKEN) as client:
        assert client.get("team/a").state == "serving"
    if folder:
        assert [path.name for path in folder.iterdir()] == ["team--a-2"]
    assert list(tmp_path.glob("astra-publish-*")) == []


def test_a_snapshot_that_was_not_written_does_not_stay(trainer, callback, tmp_path) -> None:
    def broken(_: Any, folder: Path) -> None:
        folder.mkdir()
        (folder / "adapter_config.json").write_text("{}")
        raise OSError("no space left on the disk")

    trainer(callback(every=2, folder=tmp_path / "seen", write_lora=broken, on_failure="warn")).train()
    assert list((tmp_path / "seen").iterdir()) == []


def test_reporters_get_the_entries_if_the_trainer_logs_them(trainer, callback) -> None:
    reported: list[dict[str, Any]] = []

    class Reporter(TrainerCallback):
        def on_log(self, *_: Any, logs: Any = None, **__: Any) -> None:
            reported.append(logs)

    found = callback(every=1)
    wait = At({3: found._publisher.wait})  # so that step 4, which is logged, notices a publish
    training = trainer(Reporter(), found, wait, logging_steps=1)
    found.log = training.log
    training.train()
    assert [entry for entry in reported if "publish_version" in entry]
    assert len([entry for entry in reported if "loss" in entry]) == 4


def test_only_the_main_process_publishes(callback) -> None:
    def fails(*_: object) -> None:
        raise AssertionError("a snapshot is taken")

    found, state, control = callback(fails, every=1), TrainerState(is_world_process_zero=False), TrainerControl()
    args = TrainingArguments(use_cpu=True)
    state.global_step = 1
    for event in (found.on_train_begin, found.on_step_end, found.on_evaluate, found.on_train_end):
        event(args, state, control, model=None)
    assert state.log_history == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give one"),
        ({"every": 10, "when": "improved"}, "give one"),
        ({"every": 0}, "give one"),
        ({"when": "never"}, "give one"),
        ({"every": 10, "on_failure": "ignore"}, "on_failure is 'ignore'"),
    ],
)
def test_settings_that_make_no_sense_are_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ServeError, match=message):
        PublishCallback("http://h:1", TOKEN, "a", write_lora=Written(), **settings)
    with pytest.raises(BadDocument, match="use up to 128 letters"):
        PublishCallback("http://h:1", TOKEN, "a b", write_lora=Written(), every=1)
