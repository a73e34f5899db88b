"""The Markdown pages of the project: their command blocks, headings, links and code spans.

A command block is fenced as `console` (prompts `$ `, each with the output that the page shows) or as `bash`. A comment
`<!-- needs: WORDS -->` right before a block says that its commands need a hub, a gpu, a cluster, time or a server, and
are not run.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
NEEDS = {"hub", "gpu", "cluster", "time", "server"}
_FENCE = re.compile(r"^```(\w*)\s*$")
_NEEDS = re.compile(r"^<!-- needs: ([\w ]+) -->$")


@dataclass
class Command:
    """One command of a block, and the lines of output that the page shows."""

    page: str
    line: int
    text: str
    needs: frozenset[str]
    output: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text.splitlines()[0]}"

    def words(self) -> list[list[str]]:
        """Return the words of each simple command, without comments, redirections and variables of the environment."""
        text = re.sub(r"\\\n", " ", self.text)
        lexer = shlex.shlex(text, posix=True, punctuation_chars="&|;<>")
        lexer.whitespace_split = True
        found: list[list[str]] = [[]]
        for word in lexer:
            if set(word) <= set("&|;"):
                found.append([])
            elif set(word) <= set("<>&"):
                next(lexer)
            else:
                found[-1].append(word)
        return [_without_environment(words) for words in found if words]


def pages() -> list[Path]:
    """Return every page of the project."""
    own = ("astra_serve", "benchmarks", "converter", "helm", "tests", "trainer")
    return sorted([*ROOT.glob("*.md"), *(page for folder in own for page in (ROOT / folder).rglob("*.md"))])


def commands(page: str) -> list[Command]:
    """Return the commands of a page, in order. Raises AssertionError for a block or a comment that cannot be read."""
    found: list[Command] = []
    for line, language, needs, lines in _blocks(page):
        if language == "console":
            found += _console(page, line, needs, lines)
        elif language in ("bash", "sh", "shell"):
            found += [Command(page, line + n, text, needs) for n, text in _commands(lines)]
    return found


def prose(page: Path) -> str:
    """Return the text of a page without its fenced blocks."""
    return re.sub(r"^```.*?^```\s*$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def links(page: Path) -> list[str]:
    """Return the targets of a page's links and images."""
    return re.findall(r"\]\(([^)\s]+)\)", prose(page))


def code_spans(page: Path) -> list[str]:
    """Return the text of each code span of a page."""
    return re.findall(r"`([^`\n]+)`", prose(page))


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    found: list[str] = []
    for heading in re.findall(r"^#+ +(.+?) *#*$", prose(page), flags=re.MULTILINE):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower()
        slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        found.append(f"{slug}-{found.count(slug)}" if slug in found else slug)
    return set(found)


def _blocks(page: str) -> Iterator[tuple[int, str, frozenset[str], list[str]]]:
    """Yield the fenced blocks: number of the first line, language, needs, lines."""
    needs: frozenset[str] = frozenset()
    block: list[str] | None = None
    language, first = "", 0
    for number, line in enumerate((ROOT / page).read_text(encoding="utf-8").splitlines(), 1):
        if block is not None:
            if line == "```":
                yield first, language, needs, block
                block, needs = None, frozenset()
            else:
                block.append(line)
        elif fence := _FENCE.match(line):
            block, language, first = [], fence[1], number + 1
        elif marked := _NEEDS.match(line):
            needs = frozenset(marked[1].split())
            assert needs <= NEEDS, f"{page}:{number}: there is no need called {sorted(needs - NEEDS)}"
        elif line.strip():
            assert not needs, f"{page}:{number}: the comment before this line is not followed by a block"
    assert block is None, f"{page}: a fence is not closed"


def _console(page: str, line: int, needs: frozenset[str], lines: list[str]) -> list[Command]:
    found: list[Command] = []
    while lines:
        if lines[0].startswith("$ "):
            text, used = _command([lines[0].removeprefix("$ "), *lines[1:]])
            found.append(Command(page, line, text, needs))
        else:
            assert found, f"{page}:{line}: a console block begins with a prompt"
            used = 1
            found[-1].output.append(lines[0])
        lines, line = lines[used:], line + used
    return found


def _commands(lines: list[str]) -> Iterator[tuple[int, str]]:
    """Yield the commands of a script and the numbers of their first lines, from 0."""
    number = 0
    while number < len(lines):
        if not lines[number].strip() or lines[number].lstrip().startswith("#"):
            number += 1
            continue
        text, used = _command(lines[number:])
        yield number, text
        number += used


def _command(lines: list[str]) -> tuple[str, int]:
    """Return the first command of some lines, and the number of its lines."""
    used = 1
    while used < len(lines) and not _complete("\n".join(lines[:used])):
        used += 1
    return "\n".join(lines[:used]), used


def _complete(text: str) -> bool:
    here = re.search(r"<<-?['\"]?(\w+)", text)
    if here:
        return text.splitlines()[-1] == here[1]
    if text.endswith("\\"):
        return False
    try:
        shlex.split(text, comments=True)
    except ValueError:  # a quotation is open
        return False
    return True


def _without_environment(words: list[str]) -> list[str]:
    while words and re.match(r"\w+=", words[0]):
        words = words[1:]
    return words
