"""`astra-train analyze`: the content of the report, its independence of other files, and its errors."""

import base64
import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from converter.adapter_dir import AstraLayer, CannotWrite, MalformedAdapter, NotAnAdapter, load_astra
from converter.delta import delta_weight
from trainer.analysis.figures import Curve, by_block, by_group, spectra, subspace_range
from trainer.analysis.measures import delta_norm, measure
from trainer.analysis.page import analyze
from trainer.analysis.read_run import read_run
from trainer.cli import main
from trainer.config import Subspace
from trainer.layer_kinds import kinds_of
from trainer.start.calibration import Gram
from trainer.start.eigenspace import effective_rank, eigenvalues, spectrum, subspace
from trainer.start.initialise import Estimate

HOSTILE = "<img src=x onerror=alert(1)>&'\".jsonl"
FAST = (
    "rank=4",
    "steps=6",
    "batch_size=4",
    "max_length=32",
    "learning_rate=1e-2",
    "forgetting_rows=2",
    "eval_share=.2",
    "calibration_rows=2",  # too few: a warning
)


class Page(HTMLParser):
    """The parsed page: its tags with their attributes, and its figures by alternative text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    @property
    def drawings(self) -> dict[str, str]:
        """Return the SVGs by alternative text; matplotlib writes each label as a comment beside its glyphs."""
        sources = {a["alt"] or "": a["src"] or "" for tag, a in self.tags if tag == "img"}
        return {alt: base64.b64decode(source.partition("base64,")[2]).decode() for alt, source in sources.items()}

    def drawing(self, start: str) -> str:
        return next(svg for alt, svg in self.drawings.items() if alt.startswith(start))


@pytest.fixture(scope="module")
def folders(tiny_base, rows, tmp_path_factory) -> Callable[[str], Path]:
    """A function that returns the folder of a finished run of a method; each method is trained once."""
    place = tmp_path_factory.mktemp("runs")
    data = place / HOSTILE
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def folder(method: str) -> Path:
        if not (place / method).exists():
            options = [word for setting in (*FAST, f"method={method}") for word in ("--set", setting)]
            assert main(["--base", str(tiny_base), "--data", str(data), "--out", str(place / method), *options]) == 0
        return place / method

    return folder


@pytest.fixture
def copied(folders, tmp_path) -> Path:
    """A copy of the Astra run's folder, for tests that damage it."""
    return Path(shutil.copytree(folders("astra"), tmp_path / "copied"))


@pytest.fixture(scope="module")
def html(folders, tmp_path_factory) -> str:
    """The report about the Astra run."""
    return report(folders("astra"), tmp_path_factory.mktemp("report") / "report.html")


def report(folder: Path, out: Path) -> str:
    analyze(folder, out)
    return out.read_text(encoding="utf-8")


def change(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}), encoding="utf-8")


def test_the_report_is_one_file_without_external_resources(html) -> None:
    page = Page(html)
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object", "embed", "base"})
    for _, attributes in page.tags:
        for name in ("src", "srcset", "href", "action", "data", "background", "style"):
            assert (attributes.get(name) or "data:").startswith("data:")
    assert "url(" not in html
    assert "@import" not in html
    assert page.drawings
    for svg in page.drawings.values():
        assert re.findall(r'(?:href|src)="(?!#)', svg) == []
        assert re.findall(r"url\((?!#)", svg) == []


def test_the_same_folder_gives_the_same_bytes(html, copied) -> None:
    assert report(copied, copied / "anything.html") == html


def test_only_the_report_is_written_and_an_existing_report_is_replaced(folders, tmp_path) -> None:
    (tmp_path / "report.html").write_text("an older one")
    before = sorted(folders("full").iterdir())
    assert report(folders("full"), tmp_path / "report.html").startswith("<!doctype html>")
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    assert sorted(folders("full").iterdir()) == before


def test_a_hostile_data_file_name_is_escaped(html) -> None:
    assert "&lt;img src=x onerror=alert(1)&gt;&amp;&#39;&#34;.jsonl, 40 rows" in html
    assert all("onerror" not in attributes for _, attributes in Page(html).tags)


def test_a_layer_name_is_not_drawn_as_a_formula() -> None:
    name = "$q_{^$"
    assert by_block(name, "norm", {name: [(0, 1.0), (1, 2.0)]}).source.startswith("data:image/svg+xml;base64,")


def test_the_summary_and_the_warnings_are_at_the_top(folders, html) -> None:
    run, _ = read_run(folders("astra"))
    facts = re.findall(r'<th scope="row">([^<]+)</th>', html)
    assert facts == ["base", "data", "method", "rank", "steps", "loss", "held out", "forgetting"]
    assert "4, scaling 1, on 14 layers" in html
    assert run.warnings()
    for line in run.warnings():
        assert line in html
    assert html.index("<h2>Warnings</h2>") < html.index("<h2>Training</h2>")


def test_the_table_has_all_layers_in_the_order_of_blocks(folders, html) -> None:
    listed = re.findall(r"<tr><td>([^<]+)</td>", html)
    assert sorted(listed) == sorted(load_astra(folders("astra")).layers)
    assert [name.rpartition(".")[2] for name in listed[:7]] == [
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    ]  # fmt: skip
    assert all(name.startswith("model.layers.0.") for name in listed[:7])


def test_the_held_out_loss_and_the_best_step_are_marked(folders, html) -> None:
    run, _ = read_run(folders("astra"))
    svg = Page(html).drawing("loss over the steps")
    assert "<!-- held out -->" in svg
    assert f"<!-- best step, {run.result.best_step}: weights of the result -->" in svg


def test_the_subspace_and_the_zero_eigenvalues_are_marked(html) -> None:
    page = Page(html)
    assert "<!-- 1 to 4: tail subspace -->" in page.drawing("eigenvalues of the outputs of q_proj")
    gate = page.drawing("eigenvalues of the outputs of gate_proj")  # 48 outputs, 32 inputs
    assert "<!-- 1 to 16: zero (more outputs than inputs) -->" in gate
    assert "<!-- 1 to 4: tail subspace, all zero -->" in gate


@pytest.mark.parametrize("kind", ["tail", "principal", "middle"])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24)], ids=["wide", "tall"])
def test_the_marked_eigenvalues_are_those_of_the_subspace(kind: Subspace, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(shape, generator=generator, dtype=torch.float64)
    x = torch.randn(500, shape[1], generator=generator, dtype=torch.float64)
    y, tall = x @ w.T, shape[0] > shape[1]
    gram = Gram((x.T @ x if tall else y.T @ y) / 500, 500, float(y.square().sum() / 500), tall)
    values = eigenvalues(gram, w)
    every = torch.cat([torch.zeros(shape[0] - len(values), dtype=torch.float64), values])
    marked = subspace_range(kind, shape[0], 5)
    assert marked is not None
    found = spectrum(gram, w, subspace(gram, w, 5, kind, generator))
    held = float(every[marked.start : marked.stop].sum())
    assert found.subspace_energy_share * found.energy == pytest.approx(held, rel=1e-4, abs=1e-9)


def test_a_random_subspace_is_not_marked() -> None:
    assert subspace_range("random", 24, 5) is None
    curve = Curve(0, 24, 5, torch.linspace(1, 2, 24))
    assert "subspace" not in base64.b64decode(spectra("q_proj", [curve], "random").source.partition(",")[2]).decode()


def test_the_effective_ranks_are_those_of_the_recorded_eigenvalues(folders) -> None:
    run, adapter = read_run(folders("astra"))
    assert adapter is not None
    for layer in measure(run, adapter):
        assert layer.effective_rank_before == pytest.approx(effective_rank(run.start.eigenvalues[layer.name]), rel=1e-5)
        assert layer.effective_rank_after == pytest.approx(effective_rank(run.eigenvalues_after[layer.name]), rel=1e-5)


@pytest.mark.parametrize("step", [1e-6, 1e-2, 10.0])
def test_the_norm_of_delta_w_equals_that_of_the_matrix(step: float) -> None:
    torch.manual_seed(0)
    a0, b0 = torch.randn(4, 30), torch.randn(20, 4)
    layer = AstraLayer(a0 + step * torch.randn(4, 30), b0 + step * torch.randn(20, 4), a0, b0)
    assert delta_norm(layer, 0.5) == pytest.approx(float(delta_weight(layer, 0.5).norm()), rel=1e-9)


def test_a_change_relative_to_zero_is_undefined(folders, tmp_path) -> None:
    run, adapter = read_run(folders("astra"))
    assert adapter is not None
    for layer in measure(run, adapter):
        assert (layer.change_a is None) == (layer.kind in ("gate_proj", "up_proj"))  # their tail is a null space of W
        assert layer.change_b is not None
    run, adapter = read_run(folders("lora"))
    assert adapter is not None
    assert all(layer.change_b is None for layer in measure(run, adapter))  # LoRA's B starts at zero
    assert "|B" not in report(folders("lora"), tmp_path / "lora.html").partition("<thead>")[2]


def test_the_report_of_a_method_without_spectra_gives_the_reason(folders, tmp_path) -> None:
    html = report(folders("lora"), tmp_path / "report.html")
    drawings = Page(html).drawings
    reason = "Only method=astra records the spectra of the layers&#39; outputs, not method=lora."
    assert html.count(reason) == 2
    assert "Only method=astra calibrates subspaces" in html
    assert not any(alt.startswith("eigenvalues") for alt in drawings)
    assert any(alt.startswith("Relative change of A") for alt in drawings)


def test_full_fine_tuning_has_a_report_without_layers(folders, tmp_path) -> None:
    html = report(folders("full"), tmp_path / "report.html")
    assert list(Page(html).drawings) == ["loss over the steps", "gradient norm over the steps"]
    assert "none: full fine-tuning" in html
    assert "there is no adapter to measure" in html


def test_a_missing_file_is_named_in_the_report(copied, tmp_path) -> None:
    (copied / "spectra.safetensors").unlink()
    (copied / "loss.jsonl").unlink()
    change(copied / "astra.json", convergence=[], evaluations=[], best_step=None, forgetting=None)
    html = report(copied, tmp_path / "report.html")
    for sentence in ("has no spectra.safetensors", "has no loss.jsonl", "no rows were held out", "not measured"):
        assert sentence in html
    assert "No check was recorded: the rows ended before the second check" in html


def test_a_calibration_that_did_not_converge_gives_a_warning(copied, tmp_path) -> None:
    (copied / "spectra.safetensors").unlink()  # fewer figures to draw
    first, second = {"n_tokens": 99, "lowest": 0.5, "median": 0.9}, {"n_tokens": 198, "lowest": 0.997, "median": 1.0}
    change(copied / "astra.json", convergence=[first, second])
    assert "at the last check" not in report(copied, tmp_path / "converged.html")
    change(copied / "astra.json", convergence=[first, second, first])  # a second group of layers, with one check
    html = report(copied, tmp_path / "warning.html")
    assert "at the last check (99 tokens) a layer&#39;s subspace had an overlap of 0.500" in html
    assert "<!-- calibration_overlap 0.99 -->" in Page(html).drawing("overlap of successive subspaces")


def test_the_count_of_tokens_restarts_with_each_group() -> None:
    estimates = [Estimate(n, 0.5, 0.5) for n in (10, 20, 40, 10, 20, 10)]
    assert [[e.n_tokens for e in group] for group in by_group(estimates)] == [[10, 20, 40], [10, 20], [10]]
    assert list(by_group([])) == []


def test_kinds_have_the_shortest_distinct_names() -> None:
    names = ["h.0.attn.c_proj", "h.10.attn.c_proj", "h.0.mlp.c_proj", "h.0.mlp.experts.3.up", "h.0.mlp.experts.4.up"]
    assert list(kinds_of(names).values()) == ["attn.c_proj", "attn.c_proj", "mlp.c_proj", "up", "up"]


def test_a_folder_without_an_adapter_is_refused(tmp_path) -> None:
    with pytest.raises(NotAnAdapter, match="no folder"):
        analyze(tmp_path / "missing", tmp_path / "report.html")
    with pytest.raises(NotAnAdapter, match=r"has no adapter_config\.json"):
        analyze(tmp_path, tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("loss.jsonl", b'{"step": 1}\n', "loss.jsonl has a line without"),
        ("loss.jsonl", b"\xff", "loss.jsonl has a line without"),
        ("spectra.safetensors", b"no tensors", "spectra.safetensors cannot be read"),
        ("astra.json", b"{", "astra.json is not JSON"),
    ],
)
def test_the_error_names_the_damaged_file(copied, tmp_path, name: str, content: bytes, message: str) -> None:
    (copied / name).write_bytes(content)
    with pytest.raises(MalformedAdapter, match=message):
        analyze(copied, tmp_path / "report.html")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"file": "x"}}, r"data\.digest"),
        ({"config": {"rnak": 4}}, r"config\.rnak"),
        ({"spectra": {}}, "has no such spectrum"),
        ({"evaluations": [{"step": 1}]}, "eval_loss"),
    ],
)
def test_the_error_names_the_missing_provenance(copied, tmp_path, changes: dict[str, Any], message: str) -> None:
    change(copied / "astra.json", **changes)
    with pytest.raises(MalformedAdapter, match=message):
        analyze(copied, tmp_path / "report.html")


def test_an_output_that_cannot_be_written_gives_one_line(folders, tmp_path, capsys) -> None:
    out = tmp_path / "missing" / "report.html"
    with pytest.raises(CannotWrite, match="cannot be written: No such file or directory"):
        analyze(folders("full"), out)
    assert main(["analyze", str(folders("full")), "--out", str(out)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_command_prints_the_path_of_the_report(folders, capsys) -> None:
    folder = folders("full")
    assert main(["analyze", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder / 'report.html'}: method full, 0 layers, 2 figures, warnings: 0\n"
    assert (folder / "report.html").is_file()
