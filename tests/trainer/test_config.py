"""Settings from a YAML file and from --set."""

import pytest

from trainer.config import TrainConfig, describe, load_config
from trainer.errors import ConfigError


def test_set_wins_over_the_file_and_the_file_over_the_defaults(tmp_path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("rank: 8\nsteps: 7\n")
    config = load_config(file, ["rank=4", "learning_rate=4e-3", "target_modules=[q_proj, v_proj]", "train_b=false"])
    assert (config.rank, config.steps, config.learning_rate) == (4, 7, 0.004)
    assert config.target_modules == ["q_proj", "v_proj"]
    assert config.train_b is False


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learning_rat=1", "unknown setting 'learning_rat': the nearest one is 'learning_rate'"),
        ("rank", "--set takes key=value, not 'rank'"),
        ("rank=0", "setting rank=0: input should be greater than or equal to 1"),
        ("subspace=top", "setting subspace='top': input should be 'tail', 'principal', 'middle' or 'random'"),
        ("rank=[1", "is not YAML"),
    ],
)
def test_a_setting_that_cannot_be_used_is_refused_in_one_line(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_or_unreadable_config_file_is_refused(tmp_path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "none.yaml", [])
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(ConfigError, match="key: value"):
        load_config(tmp_path / "list.yaml", [])


def test_help_documents_every_setting_once() -> None:
    text = describe()
    assert all(text.count(f"\n  {key} ") + text.startswith(f"  {key} ") == 1 for key in TrainConfig.model_fields)
