"""The result of all architectures: a JSON file, and the table that trainer/README.md shows."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tests.architectures.row import YES, Row

RESULTS = Path(__file__).parent / "results.json"
PAGE = Path(__file__).parent.parent.parent / "trainer" / "README.md"
BEGIN, END = "<!-- architectures: begin -->", "<!-- architectures: end -->"
HEADINGS = {
    "architecture": "architecture",
    "kind": "kind",
    "all_layers": "every linear layer",
    "trained": "trained, converted",
    "peft": "plain PEFT",
    "engine": "vLLM",
}


def save(rows: Sequence[Row], file: Path = RESULTS) -> None:
    """Write the rows as JSON."""
    file.write_text(json.dumps([asdict(row) for row in rows], indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def load(file: Path = RESULTS) -> list[Row]:
    """Return the rows that `save` wrote; none if there is no file."""
    return [Row(**row) for row in json.loads(file.read_text(encoding="utf-8"))] if file.exists() else []


def markdown(rows: Sequence[Row]) -> str:
    """Return the table. Reasons are notes below it, numbered in the order of their first use."""
    notes = Counter[str]()
    lines = [f"| {' | '.join(HEADINGS.values())} |", "|---" * len(HEADINGS) + "|"]
    for row in rows:
        cells = [_with_note(row.cells[key], notes) for key in HEADINGS]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"{n}. {reason}" for n, reason in enumerate(notes, 1))])


def on_page(page: str) -> str:
    """Return the table in the text of a page."""
    return page.split(BEGIN)[1].split(END)[0].strip()


def with_table(page: str, table: str) -> str:
    """Return the text of a page with `table` between its marks."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}"


def differences(found: Sequence[Row], expected: Sequence[Row]) -> list[str]:
    """Return a line for each cell of `found` that is not as in `expected`; numbers are not compared.

    Nor is the reason for which the engine does not serve an architecture: it depends on the instructions of the CPU.
    """
    before = {row.architecture: row.cells for row in expected}
    return [
        f"{row.architecture}, {HEADINGS[key]}: {value!r}, in {RESULTS.name}: {old!r}"
        for row in found
        for key, value in row.cells.items()
        if (old := before.get(row.architecture, {}).get(key)) != value
        and not (key == "engine" and old is not None and not old.startswith(YES))
    ]


def _with_note(cell: str, notes: Counter[str]) -> str:
    """Return a cell with the number of its reason, which is counted in `notes`."""
    answer, colon, reason = cell.partition(": ")
    if not colon:
        return cell
    notes[reason] += 1
    return f"{answer} ({[*notes].index(reason) + 1})"
