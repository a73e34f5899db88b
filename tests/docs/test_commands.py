"""The commands of the pages: those that need no hub, GPU, cluster or much time are run, the others are parsed.

The pages are read in one order by one reader, in one folder: a page uses the files and servers of the pages before it.
"""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.pages import Command, commands
from tests.docs.parsers import parse
from tests.docs.shell import Shell

PAGES = (
    "trainer/README.md", "converter/README.md", "README.md", "astra_serve/README.md", "astra_serve/tenants.md",
    "benchmarks/README.md",
)  # fmt: skip
CLUSTER = "helm/README.md"  # all its commands need a cluster
EVERY_COMMAND = [command for page in (*PAGES, CLUSTER) for command in commands(page)]


class Reader:
    """Runs the commands of the pages in order, each page once."""

    def __init__(self, folder: Path) -> None:
        self._shell = Shell(folder)
        self._begun, self._done = set[str](), set[str]()

    def read(self, page: str) -> None:
        """Run the commands of a page, and before that those of the pages before it. Raises AssertionError."""
        for one in PAGES[: PAGES.index(page) + 1]:
            if one not in self._begun:
                self._begun.add(one)
                if one == "README.md":
                    self._stand_in_for_the_demo()
                for command in commands(one):
                    if not command.needs:
                        self._run(command)
                self._done.add(one)
            assert one in self._done, f"the commands of {one} have failed"

    def close(self) -> None:
        """End the servers of the pages."""
        self._shell.close()

    def _run(self, command: Command) -> None:
        result = self._shell.run(command.text)
        assert result.status == 0, f"{command} ends with status {result.status}:\n{result.output[-3000:]}"
        missing = first_missing(command.output, result.output)
        assert missing is None, f"{command} does not print {missing!r} there:\n{result.output[-3000:]}"

    def _stand_in_for_the_demo(self) -> None:
        """Put the adapters of the pages before where `make demo`, which takes minutes, puts its own."""
        folder = self._shell.folder
        for task in ("signature", "sql", "intent"):
            for kind in ("astra", "lora"):
                shutil.copytree(folder / f"sql-{kind}", folder / "demo-out" / "20260101-120000" / kind / task)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    found = Reader(tmp_path_factory.mktemp("reader"))
    yield found
    found.close()


@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_run_and_print_the_output_of_the_page(page: str, reader: Reader) -> None:
    reader.read(page)


@pytest.mark.parametrize("command", EVERY_COMMAND, ids=str)
def test_a_command_has_options_that_its_program_knows(command: Command) -> None:
    for words in command.words():
        parse(words)


def first_missing(shown: list[str], printed: str) -> str | None:
    """Return the first line of `shown` that is not in `printed` behind the ones before it; None where all are.

    Numbers, digests, widths of tables, and whether a version has a slot of the engine may differ. `...` stands for any
    text, on a line of its own for any lines.
    """
    lines = iter([_plain(line) for line in printed.replace("\r", "\n").splitlines()])
    for line in shown:
        if not line.strip() or line.strip() == "...":
            continue
        wanted = ".*".join(re.escape(_plain(part)) for part in line.split("..."))
        if not any(re.fullmatch(wanted, found) for found in lines):
            return line
    return None


def _plain(text: str) -> str:
    text = re.sub(r"(sha256:)?\b[0-9a-f]{12,64}\b", "DIGEST", text)
    text = re.sub(r"\d+([.,:]\d+)*", "0", text)
    text = re.sub(r"\bslot\b", "memory", text)
    return re.sub(r"([─━═ ])\1+", r"\1", text).strip()


@pytest.mark.parametrize(
    ("shown", "printed", "missing"),
    [
        (["loss 2.412 -> 0.377"], "warning\nloss 2.5 -> 0.1\n", None),
        (["a", "b"], "b\na\n", "b"),
        (["a", "...", "z"], "a\nb\nz\n", None),
        (['{"id":...,"text":"x"}'], '{"id":"cmpl-1","created":1795,"text":"x"}', None),
        (["sql@3ce4ab0d44dd"], "sql@0123456789ab", None),
        (["error: no"], "error: yes", "error: no"),
    ],
)
def test_shown_output_may_differ_in_numbers_and_digests(shown: list[str], printed: str, missing: str | None) -> None:
    assert first_missing(shown, printed) == missing


def test_a_command_has_its_words_without_comments_redirections_and_variables() -> None:
    text = "A=1 astra-train --base b \\\n  --out o > log & astra-convert o l || echo 'no; lora'  # a comment"
    words = Command("page", 1, text, frozenset()).words()
    assert words == [["astra-train", "--base", "b", "--out", "o"], ["astra-convert", "o", "l"], ["echo", "no; lora"]]
