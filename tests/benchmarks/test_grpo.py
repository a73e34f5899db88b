"""The reward of the GRPO run: which answers are SQL on the table of the question."""

import pytest

from benchmarks.grpo import is_valid
from trainer.embedded import tasks

QUESTION = "Table posts (points, status, order)\nShow average points by status.\nSQL:"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (" SELECT status, AVG(points) FROM posts GROUP BY status;", True),
        (" SELECT * FROM posts ORDER BY points DESC LIMIT 3;", True),
        (" SELECT rating FROM posts;", False),  # no such column
        (" SELECT points FROM comments;", False),  # no such table
        (" SELECT points FROM", False),
        (" SELECT points FROM posts; SELECT points FROM posts;", False),
        (" DROP TABLE posts;", False),
        ("", False),
        ("\0", False),
    ],
)
def test_the_reward_is_for_one_statement_on_the_columns_of_the_table(answer: str, expected: bool) -> None:
    assert is_valid(QUESTION, answer) is expected


def test_all_right_answers_have_the_reward() -> None:
    assert all(is_valid(row["prompt"], row["completion"]) for row in tasks.rows("sql", test=True, n=200))
