"""Admission: the adapters that may reach the engine, and the one line for each other one."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from astra_serve.adapters.admission import ENGINE_RANKS, engine_rank, open_base, parse_adapter
from astra_serve.adapters.schedule import HEADROOM
from astra_serve.cli import main
from astra_serve.errors import ServeError
from converter import adapter_dir
from converter.adapter_dir import AdapterError, LoraAdapter

MODULE = "model.layers.0.self_attn.q_proj"  # 32 x 32 in the tiny base


def write_lora(folder: Path, base: Path | None, rank: int = 4, d: int = 32) -> Path:
    layers = {MODULE: (torch.zeros(rank, d), torch.zeros(d, rank))}
    provenance = {} if base is None else {"base": {"digest": adapter_dir.base_digest(base)}}
    with adapter_dir.new_folder(folder) as partial:
        adapter_dir.save_lora(partial, LoraAdapter(layers, {"r": rank, "lora_alpha": rank}, provenance))
    return folder


def test_adapters_that_fit_are_admitted_with_their_rank(tiny_base: Path, tmp_path: Path) -> None:
    ours = write_lora(tmp_path / "ours", tiny_base)
    plain = write_lora(tmp_path / "plain", None, rank=20)
    (plain / "astra.json").unlink()  # somebody else's LoRA
    base = open_base(str(tiny_base))
    assert [base.check(ours).rank, base.check(plain).rank] == [4, 20]


def test_more_patterns_than_the_base_has_layers_are_refused_and_one_that_matches_none_is_ignored(
    tiny_base: Path, tmp_path: Path
) -> None:
    base = open_base(str(tiny_base))
    folder = write_lora(tmp_path / "lora", tiny_base)
    config = json.loads((folder / "adapter_config.json").read_text())
    for most, refused in ((len(base.shapes), False), (len(base.shapes) + 1, True), (20_000, True)):
        patterns = {key: {f"{key}{n}": 4 for n in range(most)} for key in ("rank_pattern", "alpha_pattern")}
        (folder / "adapter_config.json").write_text(json.dumps({**config, **patterns}))
        with pytest.raises(ServeError, match="keys in rank_pattern") if refused else nullcontext():
            header = base.check(folder)
            assert (header.rank, len(header.unmatched)) == (4, 2 * most)


def test_weights_that_are_not_finite_are_refused_before_the_engine_reads_them(tiny_base: Path, tmp_path: Path) -> None:
    layers = {MODULE: (torch.full((4, 32), float("nan")), torch.zeros(32, 4))}
    with adapter_dir.new_folder(tmp_path / "nan") as partial:
        adapter_dir.save_lora(partial, LoraAdapter(layers, {"r": 4, "lora_alpha": 4}, {}))
    with pytest.raises(AdapterError, match="contains NaN or infinite values"):
        open_base(str(tiny_base)).check(tmp_path / "nan")


def test_the_engines_rank_is_the_smallest_that_holds_every_adapter() -> None:
    assert engine_rank([]) == 1
    for rank in range(1, ENGINE_RANKS[-1] + 1):
        chosen = engine_rank([1, rank])
        assert chosen in ENGINE_RANKS
        assert rank <= chosen
        assert not any(rank <= smaller < chosen for smaller in ENGINE_RANKS)


@pytest.mark.parametrize(
    "text",
    [
        "name",
        "=dir",
        "name=",
        "../x=dir",
        "a b=dir",
        "-a=dir",
        "a/b/c=dir",
        "a/=dir",
        "/a=dir",
        "a/..=dir",
        f"{'a' * 129}=d",
    ],
)
def test_an_adapter_option_that_is_no_name_and_folder_is_refused(text: str) -> None:
    with pytest.raises(ServeError):
        parse_adapter(text)


def test_names_as_on_the_hub_are_accepted() -> None:
    assert parse_adapter("team-a_sql.v2=some/dir=x") == ("team-a_sql.v2", Path("some/dir=x"))
    assert parse_adapter("team/sql=some/dir") == ("team/sql", Path("some/dir"))
    part = 128 * "a"
    assert parse_adapter(f"{part}/{part}=dir") == (f"{part}/{part}", Path("dir"))


def test_bad_input_gives_one_line_and_status_2_before_the_engine_starts(
    tiny_base: Path, tmp_path: Path, capsys
) -> None:
    good = write_lora(tmp_path / "good", tiny_base)
    other = tmp_path / "other"
    other.mkdir()
    for name in ("config.json", "model.safetensors"):
        (other / name).write_bytes((tiny_base / name).read_bytes() + b" ")
    wrong_base = write_lora(tmp_path / "wrong", other)
    wrong_shape = write_lora(tmp_path / "shape", None, d=33)
    too_large = write_lora(tmp_path / "large", None, rank=513)
    for options, message in [
        (["--adapter", f"a={good}", "--adapter", f"a={good}"], "two adapters are named 'a'"),
        (["--adapter", f"tiny={good}"], "has the base's name"),
        (["--adapter", "a"], "takes name=DIR"),
        (["--adapter", f"a={good}", "--max-loras", "0"], "--max-loras is 0"),
        (["--adapter", f"a={tmp_path / 'none'}"], "there is no folder"),
        (["--adapter", f"a={wrong_base}"], "was trained on another base"),
        (["--adapter", f"a={wrong_shape}"], "does not fit this base"),
        (["--adapter", f"a={too_large}"], "rank 513; the engine serves at most 512"),
    ]:
        assert main(["--base", str(tiny_base), *options]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("astra-serve: ")
        assert message in line
    assert main(["--base", str(tmp_path / "none")]) == 2
    assert "is not a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "extra",
    [["--model", "other"], ["--lora-modules", "b=/any/path"], ["--lora_modules=b=/x"], ["--served-model-name", "x"]],
    ids=str,
)
def test_no_vllm_option_serves_an_adapter_that_was_not_admitted(tiny_base: Path, tmp_path: Path, capsys, extra) -> None:
    good = write_lora(tmp_path / "good", tiny_base)
    assert main(["--base", str(tiny_base), "--adapter", f"a={good}", *extra]) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("is not for vLLM here: use --base and --adapter")


def test_slots_and_memory_of_the_engine_follow_the_options(tiny_base: Path) -> None:
    from astra_serve.engine import options as engine

    args = engine.parse(str(tiny_base), 32, 2, 3, ["--max-model-len", "64"])
    assert (args.max_loras, args.max_cpu_loras, args.max_lora_rank, args.max_model_len) == (2, 3 + HEADROOM, 32, 64)
    assert engine.parse(str(tiny_base), 32, 5, 3, []).max_cpu_loras == 5 + HEADROOM
    assert not engine.parse(str(tiny_base), 0, 1, 0, []).enable_lora


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--adapters", "{tmp}/a.yaml", "--adapter", "a=b"], "give one"),
        (["--admin-port", "1"], "--admin-port needs a token in ASTRA_ADMIN_TOKEN"),
        (["--adapters", "{tmp}/bad.yaml"], "adapters.0.source: Field required"),
    ],
)
def test_a_bad_document_or_an_open_admin_port_gets_one_line(tiny_base, tmp_path, capsys, options, message) -> None:
    (tmp_path / "bad.yaml").write_text("adapters: [{name: a}]")
    assert main(["--base", str(tiny_base), *(option.format(tmp=tmp_path) for option in options)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_the_weights_of_the_base_are_read_once_and_only_for_an_adapter_that_records_its_base(
    tiny_base, tmp_path, monkeypatch
) -> None:
    """Hundreds of gigabytes take minutes, in which a server is alive and may serve what records nothing."""
    reads = []

    def slow(folder: Path) -> str:
        reads.append(folder)
        time.sleep(0.1)
        return base_digest(folder)

    base_digest = adapter_dir.base_digest
    recorded, plain = write_lora(tmp_path / "recorded", tiny_base), write_lora(tmp_path / "plain", None)
    monkeypatch.setattr(adapter_dir, "base_digest", slow)
    base = open_base(str(tiny_base))
    base.check(plain)
    assert reads == []
    with ThreadPoolExecutor() as pool:
        list(pool.map(base.check, [recorded] * 4))
    replace(base, max_rank=8).check(recorded)
    assert len(reads) == 1


def test_an_adapter_of_transposed_layers_is_refused_with_the_reason(tiny_base: Path, tmp_path: Path) -> None:
    folder = write_lora(tmp_path / "lora", tiny_base)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "fan_in_fan_out": True}))
    with pytest.raises(ServeError, match="store their weights transposed"):
        open_base(str(tiny_base)).check(folder)
