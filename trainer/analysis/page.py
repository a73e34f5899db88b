"""`astra-train analyze DIR`: what a run did to each layer, as one HTML page that needs nothing else."""

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

_LEAST_START = 1e-4  # |A0| / |W| below this is round-off: A0 = 0

# the table of the layers: heading, what it shows, and how
_COLUMNS: tuple[tuple[str, Callable[[Layer], object], str], ...] = (
    ("layer", lambda layer: layer.name, ""),
    ("outputs", lambda layer: layer.shape[0], ""),
    ("inputs", lambda layer: layer.shape[1], ""),
    ("rank", lambda layer: layer.rank, ""),
    ("tokens", lambda layer: layer.found and layer.found.n_tokens, ""),
    ("energy", lambda layer: layer.found and layer.found.energy, ".3g"),
    ("share of it\nchosen", lambda layer: layer.found and layer.found.subspace_energy_share, ".2g"),
    ("zero\neigenvalues", lambda layer: layer.found and layer.found.null_directions, ""),
    ("|A0|\n/ |W|", lambda layer: layer.found and _start_norm(layer.found.start_norm), ".2g"),
    ("effective\nrank before", lambda layer: layer.rank_before, ".1f"),
    ("after", lambda layer: layer.rank_after, ".1f"),
    ("|A - A0|\n/ |A0|", lambda layer: layer.move_a, ".3g"),
    ("|B - B0|\n/ |B0|", lambda layer: layer.move_b, ".3g"),
    ("|delta W|", lambda layer: layer.delta_norm, ".3g"),
)


@dataclass(frozen=True)
class Section:
    """A part of the page: its pictures and how to read them, or why there are none."""

    title: str
    text: str
    pictures: Sequence[Picture] = ()


def analyze(folder: Path, out: Path) -> str:
    """Write the page about `folder`, which astra-train wrote, to the file `out`; return a line that says so.

    A file that is there already is replaced. Raises NotAnAdapter, MalformedAdapter and CannotWrite.
    """
    run, adapter = read_run(folder)
    layers = measure(run, adapter) if adapter else []
    sections = [_training(run), *_spectra(run, layers), _moves(layers), _convergence(run)]
    warnings = [*run.warnings(), *_unsettled(run)]
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
        out.write_bytes(page.encode("utf-8", "backslashreplace"))  # JSON can hold what UTF-8 cannot
    except OSError as error:
        raise CannotWrite(f"report {out} cannot be written: {error.strerror}") from error
    drawn = sum(len(section.pictures) for section in sections)
    return f"{out}: method {run.config.method}, {len(layers)} layers, {drawn} figures, warnings: {len(warnings)}"


def _unsettled(run: Run) -> list[str]:
    """Return a warning where calibration ended before the subspaces kept still."""
    enough = run.config.calibration_overlap
    last = [group[-1] for group in figures.groups(run.start.convergence)]
    if not last or enough == 1 or min(estimate.lowest for estimate in last) >= enough:
        return []
    worst = min(last, key=lambda estimate: estimate.lowest)
    return [
        f"at the last check ({worst.n_tokens} tokens) a layer's subspace had an overlap of {worst.lowest:.3f} with the "
        f"one before, less than calibration_overlap ({enough:g}): more calibration_rows make it steadier"
    ]


def _training(run: Run) -> Section:
    curve, result = run.result.curve, run.result
    if not curve:
        return Section("Training", "This folder has no loss.jsonl, so there is no curve to draw.")
    text = "The training loss is that of each step's own batch."
    if result.best_step is not None:
        text += " The weights are those of the step that did best on the held-out rows."
    pictures = figures.training(curve, result.evaluations, result.best_step, run.config.max_grad_norm, unit(run))
    return Section("Training", text, pictures)


def _spectra(run: Run, layers: Sequence[Layer]) -> list[Section]:
    """Return the sections that need recorded eigenvalues."""
    titles = "Spectra of the outputs before training", "Effective rank of the outputs"
    values, config = run.start.eigenvalues, run.config
    known = [layer for layer in layers if layer.name in values]
    if not known:
        why = "This folder has no spectra.safetensors: the run had spectra=false, or the file was not kept."
        if config.method != "astra":
            why = (
                f"Only method=astra starts from the spectrum of a layer's outputs; method={config.method} records none."
            )
        return [Section(title, why) for title in titles]
    spectra, ranks = [], []
    for kind in _kinds(known):
        alike = [layer for layer in known if layer.kind == kind]
        curves = [Curve(layer.block, layer.shape[0], layer.rank, values[layer.name]) for layer in alike]
        spectra.append(figures.spectra(kind, curves, config.subspace))
        ends = {
            "before training": [(layer.block, r) for layer in alike if (r := layer.rank_before) is not None],
            "after training": [(layer.block, r) for layer in alike if (r := layer.rank_after) is not None],
        }
        ranks.append(figures.over_blocks(kind, "effective rank", ends))
    chosen = f"The red band is the {config.subspace} subspace, from which A and B start."
    if config.subspace == "random":
        chosen = "The subspace is a random one: it has no place among the eigenvectors, and no band."
    text = (
        "All d_out eigenvalues of the mean of y y^T over the calibration tokens, one line for each block. A layer with "
        "more outputs than inputs has d_out - d_in that are exactly zero: they are hatched, and no line can show them "
        f"on a log scale. {chosen} What is below 1e-12 of the largest value is round-off and lies outside the frame."
    )
    entropy = "exp of the entropy of the normalised eigenvalues: how many directions the outputs really use."
    return [Section(titles[0], text, spectra), Section(titles[1], f"The effective rank is {entropy}", ranks)]


def _moves(layers: Sequence[Layer]) -> Section:
    title = "How far the layers moved"
    if not layers:
        return Section(title, "The whole model was trained: there is no adapter whose move could be measured.")
    measured: tuple[tuple[str, str, Callable[[Layer], float | None]], ...] = (
        ("Relative move of A", "|A - A0| / |A0|", lambda layer: layer.move_a),
        ("Relative move of B", "|B - B0| / |B0|", lambda layer: layer.move_b),
        ("Size of delta W", "Frobenius norm", lambda layer: layer.delta_norm),
    )
    pictures = []
    for name, axis, value in measured:
        series = {
            kind: [(layer.block, v) for layer in layers if layer.kind == kind and (v := value(layer)) is not None]
            for kind in _kinds(layers)
        }
        if any(series.values()):
            pictures.append(figures.over_blocks(name, axis, series, log=True))
    text = "Frobenius norms; delta W = s (B A - B0 A0). An A0 or B0 of zero has no relative move and is left out."
    return Section(title, text, pictures)


def _convergence(run: Run) -> Section:
    title, config, estimates = "Convergence of the calibration", run.config, run.start.convergence
    if config.method != "astra":
        return Section(title, f"Only method=astra calibrates a subspace; method={config.method} has none to converge.")
    if not estimates:
        why = "Nothing was recorded: the rows ended before a second check, calibration_overlap is 1, the Gram matrices "
        return Section(title, f"{why}came from the cache, or every subspace is a null space that cannot move.")
    text = (
        "Each time the tokens had doubled, the new subspaces were compared with the last ones: the mean squared cosine "
        "of their principal angles is 1 when they are the same. Calibration stops once the lowest is above the line."
    )
    return Section(title, text, [figures.convergence(estimates, config.calibration_overlap)])


def _table(layers: Sequence[Layer]) -> tuple[list[str], list[list[str]]]:
    """Return the headings and rows of the table of layers, without the columns of which nothing is known."""
    known = [c for c in _COLUMNS if any(c[1](layer) is not None for layer in layers)]
    rows = [["undefined" if (value := c[1](layer)) is None else f"{value:{c[2]}}" for c in known] for layer in layers]
    return [c[0] for c in known], rows


def _start_norm(value: float) -> float:
    return value if value >= _LEAST_START else 0.0


def _kinds(layers: Iterable[Layer]) -> list[str]:
    return list(dict.fromkeys(layer.kind for layer in layers))
