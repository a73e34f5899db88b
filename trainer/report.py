"""The files beside the weights of a finished run: provenance, loss curve (JSONL, PNG), spectra and model card."""

import json
import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from matplotlib.figure import Figure
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from converter import adapter_dir
from converter.adapter_dir import PROVENANCE, AdapterError, Json, base_digest, write_json
from trainer.config import TrainConfig
from trainer.evaluate import Forgetting
from trainer.layer_kinds import kinds_of
from trainer.loop import Point, Result
from trainer.start.eigenspace import Spectrum
from trainer.start.initialise import Initialisation

SPECTRA = "spectra.safetensors"
CARD = """---
base_model: {base}
library_name: astra
tags: [astra, peft]
---
# {title} for {base}

| | |
|---|---|
{rows}

![loss](loss.png)

{use}{layers}"""


LAYERS = """
## Initialisation of the layers

| kind of layer | layers | outputs | rank | tokens | norm of A0 / norm of W | |
|---|---|---|---|---|---|---|
{rows}

The report of `astra-train analyze THIS_FOLDER` has every layer.
"""


@dataclass(frozen=True)
class Run:
    """A finished run.

    `origin` is the result of `provenance`; `eigenvalues_after` holds the eigenvalues of each layer's outputs with its
    trained adapter, ascending.
    """

    origin: Json
    config: TrainConfig
    start: Initialisation
    result: Result
    forgetting: Forgetting | None
    eigenvalues_after: Mapping[str, torch.Tensor]

    def provenance(self) -> Json:
        """Return the content of `astra.json`, without its format."""
        return {
            **self.origin,
            "spectra": {name: found.as_json() for name, found in self.start.spectra.items()},
            "convergence": [asdict(estimate) for estimate in self.start.convergence],
            "evaluations": self.result.evaluations,
            "best_step": self.result.best_step,
            "learning_rate": self.result.learning_rate,
            "forgetting": self.forgetting and {**asdict(self.forgetting), "change": self.forgetting.change},
        }

    def warnings(self) -> list[str]:
        """Return one line about layers with too few calibration tokens, if there are any."""
        found = self.start.spectra.values()
        few = [s for s in found if s.n_tokens < s.dimension]
        if not few or self.config.subspace == "random":
            return []
        return [
            f"{len(few)} of {len(found)} layers have fewer calibration tokens ({min(s.n_tokens for s in few)}) "
            f"than outputs ({max(s.dimension for s in few)}), so their tail is arbitrary: raise calibration_rows"
        ]


def provenance(base: str, base_folder: Path, base_dtype: str, data: Json | None, config: TrainConfig) -> Json:
    """Return the origin of an adapter: base, data (file, digest, rows), settings and versions of the packages."""
    packages = ("astra-serve", "torch", "transformers", "peft", "trl")
    return {
        "method": config.method,
        "base": {"id": base, "digest": base_digest(base_folder), "dtype": base_dtype.removeprefix("torch.")},
        "data": data,
        "config": config.model_dump(mode="json"),
        "seed": config.seed,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
    }


def write(folder: Path, run: Run) -> None:
    """Write loss.jsonl, loss.png, spectra.safetensors (if recorded) and the model card into `folder`."""
    curve = run.result.curve
    (folder / "loss.jsonl").write_text("".join(json.dumps(asdict(p)) + "\n" for p in curve), encoding="utf-8")
    _plot_loss(folder / "loss.png", curve, unit(run))
    spectra = {f"{name}.before": values for name, values in run.start.eigenvalues.items()}
    spectra |= {f"{name}.after": values for name, values in run.eigenvalues_after.items()}
    if spectra:
        save_file(spectra, folder / SPECTRA)
    (folder / "README.md").write_text(_card(run), encoding="utf-8")


def save_whole_model(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, run: Run) -> None:
    """Write a fully fine-tuned model in transformers' layout, with its tokenizer and provenance."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_json(folder / PROVENANCE, {"format": "astra-full/1", **run.provenance()})


def write_defaults(folder: Path, base: Path, tokenizer: PreTrainedTokenizerBase, config: TrainConfig) -> None:
    """Write the chat template and the defaults of generation into `folder` where the run has others than `base`."""
    of_base, defaults = None, {}
    with suppress(AdapterError):  # transformers reads more than servers take from an adapter: links, for one
        of_base, defaults = adapter_dir.read_chat_template(base), adapter_dir.read_generation_config(base)
    texts = {adapter_dir.DEFAULT: tokenizer.chat_template}
    if config.chat_template and not (of_base and of_base.texts == texts):
        (folder / adapter_dir.CHAT_TEMPLATE).write_text(tokenizer.chat_template, encoding="utf-8")
    if other := {name: value for name, value in config.generation.items() if defaults.get(name) != value}:
        write_json(folder / adapter_dir.GENERATION_CONFIG, other)


def _plot_loss(file: Path, curve: Sequence[Point], unit: str) -> None:
    """Plot the loss and the gradient norm against the step."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    steps = [p.step for p in curve]
    axes.plot(steps, [p.loss for p in curve], color="C0", linewidth=1.2)
    axes.set(xlabel="step", ylabel=f"loss ({unit})", yscale="log")
    axes.yaxis.label.set_color("C0")
    norms = axes.twinx()
    norms.plot(steps, [p.grad_norm for p in curve], color="C1", linewidth=0.8, alpha=0.6)
    norms.set(ylabel="gradient norm before clipping", yscale="log")
    norms.yaxis.label.set_color("C1")
    figure.savefig(file, dpi=120, metadata={"Software": None})


def facts(run: Run, ranks: Sequence[int]) -> dict[str, str]:
    """Return a summary of a run whose adapted layers have `ranks` (empty for full fine-tuning): label and text."""
    base, data, config, curve = run.origin["base"], run.origin["data"], run.config, run.result.curve
    remarks = "".join(f"; {n} {remark}" for remark, n in data.get("remarks", {}).items())
    found = {
        "base": f"{base['id']}, {base['dtype']}, {base['digest']}",
        "data": f"{data['file']}, {data['rows']} rows, {data['digest']}{remarks}",
        "method": config.method,
        "rank": "none: full fine-tuning",
        "steps": f"{config.steps} of {config.batch_size} rows, learning rate {run.result.learning_rate:.3g}"
        f"{' (auto)' if config.learning_rate == 'auto' else ''}, seed {config.seed}",
        "loss": "not recorded in this folder",
        "held out": "no rows were held out",
        "forgetting": "not measured",
    }
    if config.method == "astra":
        trained = "A and B trained" if config.train_b else "B frozen"
        found["method"] = f"Astra, {config.subspace} subspace ({trained}), arXiv 2602.19111"
    if ranks:
        spread = f"{min(ranks)} to {max(ranks)} (mean {sum(ranks) / len(ranks):.3g})"
        rank = str(ranks[0]) if min(ranks) == max(ranks) else spread
        found["rank"] = f"{rank}, scaling {config.scaling:g}, on {len(ranks)} layers"
    if curve:
        tail = [point.loss for point in curve[-max(1, len(curve) // 10) :]]
        last = sum(tail) / len(tail)
        found["loss"] = f"{curve[0].loss:.3f} at the first step, {last:.3f} over the last tenth ({unit(run)})"
        if curve[-1].step < config.steps:
            found["steps"] = f"{curve[-1].step} (stopped early) of {found['steps']}"
    for best in (e for e in run.result.evaluations if e["step"] == run.result.best_step):
        values = (f"{key.removeprefix('eval_')} {value:.4g}" for key, value in best.items() if key != "step")
        found["held out"] = f"{', '.join(values)} at step {best['step']}, the best"
    if run.forgetting:
        f = run.forgetting
        found["forgetting"] = f"{f.change:+.3f} nats per token ({f.before:.3f} to {f.after:.3f}) on text {f.text}"
    return found


def unit(run: Run) -> str:
    """Return the unit of the run's loss."""
    return {"classification": "nats per row", "dpo": "nats per pair"}.get(run.config.task, "nats per target token")


def _card(run: Run) -> str:
    ranks = [start.rank for start in run.start.starts.values()]
    use = "Convert it to a standard LoRA with `astra-convert THIS_FOLDER OUT_DIR`. All settings are in `astra.json`.\n"
    if not ranks:
        use = "This is a complete model: transformers and vLLM load it directly.\n"
    return CARD.format(
        base=run.origin["base"]["id"],
        title="Adapter" if ranks else "Fine-tuned model",
        rows="\n".join(f"| {key} | {value} |" for key, value in facts(run, ranks).items()),
        use=use,
        layers=_layer_table(run.start.spectra),
    )


def _layer_table(spectra: Mapping[str, Spectrum]) -> str:
    if not spectra:
        return ""
    lines = []
    kinds = kinds_of(list(spectra))
    for kind in dict.fromkeys(kinds.values()):
        found = [s for name, s in spectra.items() if kinds[name] == kind]
        remark = "fewer tokens than outputs" if any(s.n_tokens < s.dimension for s in found) else ""
        if all(s.start_norm < 1e-4 for s in found):
            remark = "the tail is a null space of W: A0 = 0"
        spans = (
            _span([s.dimension for s in found]),
            _span([s.rank for s in found]),
            _span([s.n_tokens for s in found]),
            _span([s.start_norm for s in found]),
        )
        lines.append(f"| {kind} | {len(found)} | {' | '.join(spans)} | {remark} |")
    return LAYERS.format(rows="\n".join(lines))


def _span(values: Sequence[float]) -> str:
    low, high = (f"{value:,}" if isinstance(value, int) else f"{value:.2g}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"
