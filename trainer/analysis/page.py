"""`astra-train analyze DIR`: the report about a run, as one HTML page without external resources."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from converter.adapter_dir import CannotWrite
from trainer.analysis import figures
from trainer.analysis.figures import Curve, Picture
from trainer.analysis.measures import Layer, measure
from trainer.analysis.read_run import read_run
from trainer.report import Run, facts, unit

_MIN_START_NORM = 1e-4  # |A0| / |W| below this is round-off: A0 = 0

# The columns of the table of layers: heading, value, format
_COLUMNS: tuple[tuple[str, Callable[[Layer], object], str], ...] = (
    ("layer", lambda layer: layer.name, ""),
    ("outputs", lambda layer: layer.shape[0], ""),
    ("inputs", lambda layer: layer.shape[1], ""),
    ("rank", lambda layer: layer.rank, ""),
    ("tokens", lambda layer: layer.spectrum and layer.spectrum.n_tokens, ""),
    ("energy", lambda layer: layer.spectrum and layer.spectrum.energy, ".3g"),
    ("energy share\nof subspace", lambda layer: layer.spectrum and layer.spectrum.subspace_energy_share, ".2g"),
    ("zero\neigenvalues", lambda layer: layer.spectrum and layer.spectrum.null_directions, ""),
    ("|A0|\n/ |W|", lambda layer: layer.spectrum and _start_norm(layer.spectrum.start_norm), ".2g"),
    ("effective\nrank before", lambda layer: layer.effective_rank_before, ".1f"),
    ("effective\nrank after", lambda layer: layer.effective_rank_after, ".1f"),
    ("|A - A0|\n/ |A0|", lambda layer: layer.change_a, ".3g"),
    ("|B - B0|\n/ |B0|", lambda layer: layer.change_b, ".3g"),
    ("|delta W|", lambda layer: layer.delta_norm, ".3g"),
)


@dataclass(frozen=True)
class Section:
    """A section of the page: its figures with an explanation, or the reason why there are none."""

    title: str
    text: str
    pictures: Sequence[Picture] = ()


def analyze(folder: Path, out: Path) -> str:
    """Write the report about `folder`, an output of astra-train, to the file `out`; return one line as a summary.

    An existing file is replaced. Raises NotAnAdapter, MalformedAdapter and CannotWrite.
    """
    run, adapter = read_run(folder)
    layers = measure(run, adapter) if adapter else []
    sections = [_training(run), *_spectra(run, layers), _changes(layers), _convergence(run)]
    warnings = [*run.warnings(), *_convergence_warnings(run)]
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    head, rows = _table(layers)
    page = templates.get_template("report.html.jinja").render(
        base=run.origin["base"]["id"],
        facts=facts(run, [layer.rank for layer in layers]),
        warnings=warnings,
        sections=sections,
        head=head,
        rows=rows,
    )
    try:
        out.write_bytes(page.encode("utf-8", "backslashreplace"))  # JSON strings may hold unpaired surrogates
    except OSError as error:
        raise CannotWrite(f"report {out} cannot be written: {error.strerror}") from error
    drawn = sum(len(section.pictures) for section in sections)
    return f"{out}: method {run.config.method}, {len(layers)} layers, {drawn} figures, warnings: {len(warnings)}"


def _convergence_warnings(run: Run) -> list[str]:
    """Return a warning if calibration ended before the subspaces had converged."""
    threshold = run.config.calibration_overlap
    last = [group[-1] for group in figures.by_group(run.start.convergence)]
    if not last or threshold == 1 or min(estimate.lowest for estimate in last) >= threshold:
        return []
    worst = min(last, key=lambda estimate: estimate.lowest)
    return [
        f"at the last check ({worst.n_tokens} tokens) a layer's subspace had an overlap of {worst.lowest:.3f} with the "
        f"previous subspace, below calibration_overlap ({threshold:g}): raise calibration_rows"
    ]


def _training(run: Run) -> Section:
    curve, result = run.result.curve, run.result
    if not curve:
        return Section("Training", "The folder has no loss.jsonl, so there is no curve.")
    text = "The training loss of a step is the loss on the batch of that step."
    if result.best_step is not None:
        text += " The weights of the result are those of the best step on the held-out rows."
    pictures = figures.training(curve, result.evaluations, result.best_step, run.config.max_grad_norm, unit(run))
    return Section("Training", text, pictures)


def _spectra(run: Run, layers: Sequence[Layer]) -> list[Section]:
    """Return the two sections about the recorded eigenvalues."""
    titles = "Spectra of the outputs before training", "Effective rank of the outputs"
    values, config = run.start.eigenvalues, run.config
    known = [layer for layer in layers if layer.name in values]
    if not known:
        reason = "The folder has no spectra.safetensors: the run had spectra=false, or the file was removed."
        if config.method != "astra":
            reason = f"Only method=astra records the spectra of the layers' outputs, not method={config.method}."
        return [Section(title, reason) for title in titles]
    spectra, ranks = [], []
    for kind in _kinds(known):
        same_kind = [layer for layer in known if layer.kind == kind]
        curves = [Curve(layer.block, layer.shape[0], layer.rank, values[layer.name]) for layer in same_kind]
        spectra.append(figures.spectra(kind, curves, config.subspace))
        before = [(layer.block, r) for layer in same_kind if (r := layer.effective_rank_before) is not None]
        after = [(layer.block, r) for layer in same_kind if (r := layer.effective_rank_after) is not None]
        series = {"before training": before, "after training": after}
        ranks.append(figures.by_block(kind, "effective rank", series))
    band = f"The red band marks the {config.subspace} subspace, from which A and B start."
    if config.subspace == "random":
        band = "A random subspace does not belong to a range of eigenvalues, so there is no band."
    text = (
        "The d_out eigenvalues of the mean of y y^T over the calibration tokens, one line per block. In a layer with "
        "more outputs than inputs, d_out - d_in eigenvalues are exactly zero. They are hatched, because a log scale "
        f"cannot show them. {band} Values below 1e-12 of the largest are round-off and lie outside the axes."
    )
    entropy = "exp(entropy of the normalised eigenvalues): the number of directions that the outputs use."
    return [Section(titles[0], text, spectra), Section(titles[1], f"The effective rank is {entropy}", ranks)]


def _changes(layers: Sequence[Layer]) -> Section:
    title = "Change of the layers by training"
    if not layers:
        return Section(title, "The run was full fine-tuning: there is no adapter to measure.")
    measured: tuple[tuple[str, str, Callable[[Layer], float | None]], ...] = (
        ("Relative change of A", "|A - A0| / |A0|", lambda layer: layer.change_a),
        ("Relative change of B", "|B - B0| / |B0|", lambda layer: layer.change_b),
        ("Size of delta W", "Frobenius norm", lambda layer: layer.delta_norm),
    )
    pictures = []
    for name, axis, value in measured:
        series = {
            kind: [(layer.block, v) for layer in layers if layer.kind == kind and (v := value(layer)) is not None]
            for kind in _kinds(layers)
        }
        if any(series.values()):
            pictures.append(figures.by_block(name, axis, series, log=True))
    text = "Frobenius norms; delta W = s (B A - B0 A0). An A0 or B0 of zero has no relative change and is not drawn."
    return Section(title, text, pictures)


def _convergence(run: Run) -> Section:
    title, config, estimates = "Convergence of the calibration", run.config, run.start.convergence
    if config.method != "astra":
        return Section(title, f"Only method=astra calibrates subspaces, not method={config.method}.")
    if not estimates:
        reason = "No check was recorded: the rows ended before the second check, calibration_overlap is 1, the run "
        return Section(title, f"{reason}used calibration_cache, or all subspaces are null spaces.")
    text = (
        "Each time the number of tokens has doubled, each new subspace is compared with the previous one: the mean "
        "squared cosine of their principal angles is 1 for equal subspaces. Calibration stops when the lowest value "
        "reaches the dashed line."
    )
    return Section(title, text, [figures.convergence(estimates, config.calibration_overlap)])


def _table(layers: Sequence[Layer]) -> tuple[list[str], list[list[str]]]:
    """Return the headings and rows of the table of layers, without the columns that have no value in any layer."""
    known = [c for c in _COLUMNS if any(c[1](layer) is not None for layer in layers)]
    rows = [["undefined" if (value := c[1](layer)) is None else f"{value:{c[2]}}" for c in known] for layer in layers]
    return [c[0] for c in known], rows


def _start_norm(value: float) -> float:
    return value if value >= _MIN_START_NORM else 0.0


def _kinds(layers: Iterable[Layer]) -> list[str]:
    return list(dict.fromkeys(layer.kind for layer in layers))
