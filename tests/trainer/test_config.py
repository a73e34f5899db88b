"""The settings: sources, their precedence, and the errors for invalid ones."""

import pytest

from trainer.cli import main
from trainer.config import TrainConfig, describe, load_config
from trainer.errors import ConfigError


def test_set_overrides_the_file_and_the_file_overrides_the_defaults(tmp_path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("rank: 8\nsteps: 7\n")
    config = load_config(file, ["rank=4", "learning_rate=4e-3", "target_modules=[q_proj, v_proj]", "train_b=false"])
    assert (config.rank, config.steps, config.learning_rate) == (4, 7, 0.004)
    assert config.target_modules == ["q_proj", "v_proj"]
    assert config.train_b is False


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learning_rat=1", "unknown setting 'learning_rat': the nearest name is 'learning_rate'"),
        ("rank", "--set takes key=value, not 'rank'"),
        ("rank=0", "setting rank=0: input should be greater than or equal to 1"),
        ("subspace=top", "setting subspace='top': input should be 'tail', 'principal', 'middle' or 'random'"),
        ("rank=[1", "is not YAML"),
    ],
)
def test_an_invalid_setting_gives_one_line(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ("q_proj", ["q_proj"]),
        ("q_proj,v_proj", ["q_proj", "v_proj"]),
        ("q_proj, v_proj", ["q_proj", "v_proj"]),
        ("[q_proj]", ["q_proj"]),
        ("all-linear", "all-linear"),
    ],
)
def test_names_may_be_given_without_brackets(given: str, names) -> None:
    assert load_config(None, [f"target_modules={given}"]).target_modules == names
    if given != "all-linear":
        assert load_config(None, [f"report_to={given}"]).report_to == names


def test_an_unreadable_config_file_is_refused(tmp_path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "none.yaml", [])
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(ConfigError, match="key: value"):
        load_config(tmp_path / "list.yaml", [])


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (["method=lora", "subspace=principal"], "require method=astra"),
        (["method=pissa", "train_b=false"], "require method=astra"),
        (["method=full", "rank_pattern={q: 2}"], "method=full has no ranks"),
        (["rank_pattern={q: 2}", "rank_allocation=tail_energy"], "both set ranks"),
        (["rank_pattern={q: 0}"], "a rank must be at least 1"),
        (["rank_pattern={'q(': 2}"], "is not a regular expression"),
        (["method=full", "quantization=nf4"], "quantised weights cannot be trained"),
        (["method=corda", "quantization=int8"], "full-precision weights"),
        (["method=pissa", "shard_base=true"], "cannot be combined with shard_base"),
        (["quantization=int8", "shard_base=true"], "cannot be sharded"),
        (["task=classification", "packing=true"], "packing requires task=causal_lm"),
        (["task=classification", "method=eva"], "supports language models only"),
        (["task=classification", "eval_share=0.1", "eval_metric=exact_match"], "choose loss or accuracy"),
        (["eval_share=0.1", "eval_metric=accuracy"], "choose loss or exact_match"),
        (["eval_share=0.1", "eval_data=x.jsonl"], "not both"),
        (["patience=2"], "need held-out rows"),
        (["batch_size=6", "gradient_accumulation=4"], "multiple of gradient_accumulation"),
        (["task=classification", "chat_template=x"], "chat_template and generation require task=causal_lm"),
        (["method=full", "generation={top_k: 3}"], "remove generation"),
        (["generation={topk: 3}"], "generation has no 'topk': the nearest name is 'top_k'"),
    ],
    ids=" ".join,
)
def test_conflicting_settings_are_refused_with_the_reason(settings: list[str], reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, settings)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_memory_may_have_a_unit() -> None:
    assert load_config(None, ["calibration_memory=512MiB"]).calibration_memory == 2**29


def test_none_is_null_for_optional_settings_and_text_for_others() -> None:
    config = load_config(None, ["alpha=none", "quantization=none", "rank_allocation=none", "patience=none"])
    assert (config.alpha, config.quantization, config.rank_allocation, config.patience) == (None, "none", "none", None)


@pytest.mark.parametrize(
    ("settings", "scaling"),
    [([], 1), (["alpha=32"], 2), (["use_rslora=true"], 4), (["method=rslora", "alpha=8"], 2), (["method=lora"], 1)],
    ids=str,
)
def test_the_scaling_is_alpha_over_rank_or_over_its_square_root(settings: list[str], scaling: float) -> None:
    assert load_config(None, settings).scaling == scaling


def test_help_lists_each_setting_once_with_its_default(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for key, (description, _) in describe().items():
        assert text.count(f" --{key.replace('_', '-')} VALUE ") == 1
        assert description[:60] in text.replace("- ", "-") or description[:40] in text
    assert set(describe()) == set(TrainConfig.model_fields)


def test_an_unknown_flag_is_refused_with_the_nearest_name(capsys) -> None:
    assert main(["--base", "b", "--data", "d", "--out", "o", "--leraning-rate", "1"]) == 2
    assert "unknown option '--leraning-rate': the nearest name is '--learning-rate'" in capsys.readouterr().err
