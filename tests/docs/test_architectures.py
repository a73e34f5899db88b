"""The table of architectures on the page is the recorded result of `make model-test`."""

from tests.architectures import table
from tests.architectures.models import ARCHITECTURES


def test_the_page_shows_the_recorded_result() -> None:
    page = table.PAGE.read_text(encoding="utf-8")
    assert table.on_page(page) == table.markdown(table.load()), "run python -m tests.architectures --write"


def test_every_architecture_is_recorded() -> None:
    assert {row.architecture: row.kind for row in table.load()} == {
        name: architecture.kind for name, architecture in ARCHITECTURES.items()
    }
    assert len(ARCHITECTURES) >= 24


def test_a_no_names_its_reason() -> None:
    for row in table.load():
        for cell in (row.all_layers, row.trained, row.peft, row.engine):
            answer, _, reason = cell.partition(": ")
            assert answer == "yes" or (answer == "no" and reason)
