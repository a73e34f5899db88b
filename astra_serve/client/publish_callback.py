"""A callback for the trainers of transformers and TRL: the adapter that they train is served while it is trained.

    PublishCallback(url, token, "sql", write_lora=save_lora, every=100)            # every 100 steps
    PublishCallback(url, token, "sql", write_lora=save_lora, when="improved")      # at each evaluation that is the best

At such a step, in the thread of the training and before its next step, `write_lora` writes the LoRA of the present
weights into a new folder. The rest runs beside the next steps (`publisher`): the folder is published, and the publish
returns when it serves. A snapshot that still waits when a newer one is taken is never published. The end of the
training waits for the last publish, and does not take a snapshot of its own.

Each publish that ends is an entry of the trainer's log (`trainer.state.log_history`), at the step at which the training
notices it: `publish_step`, `publish_version`, `publish_effect` and `publish_deviation` (of the probe, in nats) and
`publish_seconds`, or `publish_error`. Reporters, as TensorBoard, get the same if `callback.log = trainer.log` is set.

A publish that fails, a `write_lora` that raises and a server that does not answer when the training starts raise
NotPublished with the reason in the training (`on_failure="stop"`), or are a warning of the log (`"warn"`).

Only the main process takes snapshots and publishes. A model whose parameters are spread over processes (FSDP, ZeRO-3)
has no process with all weights, and is not supported.
"""

import logging
import math
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from astra_serve.client import calls, exchange
from astra_serve.client.client import TIMEOUT_S, Client
from astra_serve.client.publisher import Outcome, Publisher, Snapshot
from astra_serve.client.state import AdapterState
from astra_serve.errors import NotPublished, ServeError

logger = logging.getLogger(__name__)

WriteLora = Callable[[Any, Path], object]  # called with the model and a folder that does not exist
Log = Callable[[dict[str, Any]], object]


class PublishCallback(TrainerCallback):
    """Publishes snapshots of a training to one server; the replicas of its document follow it."""

    def __init__(
        self,
        url: str,
        token: str | None,
        name: str,
        *,
        write_lora: WriteLora,
        every: int | None = None,
        when: Literal["steps", "improved"] = "steps",
        on_failure: Literal["stop", "warn"] = "stop",
        folder: Path | None = None,
        pin: bool | None = None,
        allow_no_effect: bool | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        """Publish as `name` at the admin port `url`; `token` None is that of the environment (ASTRA_ADMIN_TOKEN).

        `every` N steps, or with when="improved" at each evaluation whose metric (the trainer's `metric_for_best_model`,
        by default `eval_loss`) is better than all before. Without `folder` the bytes are uploaded, and the server needs
        `--upload-to`; otherwise `folder` is one that the server sees, the snapshots stay there, and the document refers
        to them. `pin` and `allow_no_effect` as in `Client.publish`; a publish may take `timeout_s`.

        Raises ServeError where the arguments make no sense.
        """
        if (
            (when == "improved") == (every is not None)
            or when not in ("steps", "improved")
            or (every is not None and every < 1)
        ):
            raise ServeError('a PublishCallback publishes at each `every` N steps, or with when="improved": give one')
        if on_failure not in ("stop", "warn"):
            raise ServeError(f'on_failure is {on_failure!r}: "stop" ends the training, "warn" does not')
        calls.get(name)  # raises where no adapter can have this name
        self.log: Log | None = None  # called with what is logged, in place of adding it to the trainer's log
        self._name, self._write_lora, self._every, self._stops = name, write_lora, every, on_failure == "stop"
        self._pin, self._allow_no_effect, self._folder = pin, allow_no_effect, folder
        self._connect = partial(Client, str(exchange.admin_url(url)), exchange.checked_token(token), timeout_s)
        self._publisher = Publisher(self._published)
        self._best: float | None = None
        self._active = self._evaluated = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Check that the server answers."""
        self._active = bool(state.is_world_process_zero)
        self._best = state.best_metric if args.metric_for_best_model else None
        self._evaluated = False
        if self._active:
            try:
                with self._connect() as client:
                    client.list()
            except ServeError as error:
                self._failed(state, control, state.global_step, error)

    def on_step_end(
        self,
        args: TrainingArguments,  # noqa: ARG002 (the trainer gives it by its place)
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **_: Any,
    ) -> None:
        """Log the publishes that have ended, and take a snapshot if it is time."""
        if self._active:
            self._notice(state, control)
            if self._every and state.global_step % self._every == 0:
                self._snapshot(state, control, model)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        metrics: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Take a snapshot if the evaluation improved."""
        value = (metrics or {}).get(_metric(args))
        if not self._active or self._every or value is None:
            return
        self._evaluated = True
        if improved(value, self._best, greater=bool(args.metric_for_best_model and args.greater_is_better)):
            self._best = value
            self._snapshot(state, control, model)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Wait for the last publish, and log it."""
        if not self._active:
            return
        self._active = False
        self._publisher.wait()
        self._notice(state, control)
        if not self._every and not self._evaluated:
            reason = f"no evaluation had {_metric(args)}: set eval_strategy and metric_for_best_model"
            self._failed(state, control, state.global_step, ServeError(reason))

    def _snapshot(self, state: TrainerState, control: TrainerControl, model: Any) -> None:
        snapshot = Snapshot(state.global_step, self._new_folder(state.global_step))
        try:
            self._write_lora(model, snapshot.folder)
        except Exception as error:  # of a function that others wrote
            self._remove(snapshot)
            self._failed(state, control, snapshot.step, error)
            return
        if replaced := self._publisher.submit(snapshot):
            logger.info("the snapshot of step %d is not published: step %d is newer", replaced.step, snapshot.step)
            self._remove(replaced)

    def _new_folder(self, step: int) -> Path:
        """Return a folder that does not exist: a training that was resumed takes some snapshots again."""
        if self._folder is None:
            return Path(tempfile.mkdtemp(prefix="astra-publish-")) / "adapter"
        self._folder.mkdir(parents=True, exist_ok=True)
        name = self._name.replace("/", "--")  # one folder, and none inside of a namespace's
        folder, number = self._folder / f"{name}-{step}", 2
        while folder.exists():
            folder, number = self._folder / f"{name}-{step}-{number}", number + 1
        return folder

    def _published(self, snapshot: Snapshot) -> AdapterState:
        """Publish a snapshot, and return its adapter when it serves; runs in the publisher's thread."""
        try:
            with self._connect() as client:
                return client.publish(
                    self._name,
                    snapshot.folder,
                    upload=self._folder is None,
                    pin=self._pin,
                    allow_no_effect=self._allow_no_effect,
                )
        finally:
            if self._folder is None:  # otherwise the document may refer to it
                self._remove(snapshot)

    def _remove(self, snapshot: Snapshot) -> None:
        temporary = self._folder is None
        shutil.rmtree(snapshot.folder.parent if temporary else snapshot.folder, ignore_errors=True)

    def _notice(self, state: TrainerState, control: TrainerControl) -> None:
        for outcome in self._publisher.outcomes():
            if isinstance(outcome.result, Exception):
                self._failed(state, control, outcome.snapshot.step, outcome.result)
            else:
                found = _described(outcome, outcome.result)
                logger.info("step %(publish_step)d serves as %(publish_version)s", found)
                self._log(state, control, found)

    def _failed(self, state: TrainerState, control: TrainerControl, step: int, error: Exception) -> None:
        """Log a failure, and raise NotPublished if it stops the training."""
        self._log(state, control, {"publish_step": step, "publish_error": str(error)})
        reason = f"{self._name!r} was not published at step {step}: {error}"
        if self._stops:
            raise NotPublished(reason) from error
        logger.warning("%s; the training goes on", reason)

    def _log(self, state: TrainerState, control: TrainerControl, values: dict[str, Any]) -> None:
        if self.log is None:
            state.log_history.append({**values, "step": state.global_step})
            return
        due = control.should_log
        self.log(values)
        control.should_log = due  # the trainer has cleared it, as after its own log of this step


def improved(value: float, best: float | None, *, greater: bool) -> bool:
    """Return whether a metric is better than the best before; None: there was none."""
    if math.isnan(value) or best is None:
        return not math.isnan(value)
    return value > best if greater else value < best


def _metric(args: TrainingArguments) -> str:
    name = args.metric_for_best_model or "eval_loss"
    return str(name if name.startswith("eval_") else f"eval_{name}")


def _described(outcome: Outcome, served: AdapterState) -> dict[str, Any]:
    """Return the log's entry of a publish."""
    version, probe = served.version, served.version.probe if served.version else None
    found = {
        "publish_step": outcome.snapshot.step,
        "publish_version": version.name if version else None,
        "publish_effect": probe.effect if probe else None,
        "publish_deviation": probe.deviation if probe else None,
        "publish_seconds": round(outcome.seconds, 3),
    }
    return {key: value for key, value in found.items() if value is not None}
