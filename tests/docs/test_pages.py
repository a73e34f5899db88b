"""The texts of the pages: links, anchors, names of files and options, the length of the first page."""

import re
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, anchors, code_spans, links, pages, prose
from tests.docs.parsers import PARSERS, of_vllm, options

MOST_LINES = 150  # of README.md
OTHERS = {"--help", "--json"}  # of every program; of `astra-convert inspect`
PACKAGES = ("astra_serve/", "benchmarks/", "converter/", "helm/", "tests/", "trainer/")


def relative(page: Path) -> str:
    return str(page.relative_to(ROOT))


def test_the_first_page_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= MOST_LINES


@pytest.mark.parametrize("page", pages(), ids=relative)
def test_links_lead_to_files_and_headings_that_exist(page: Path) -> None:
    for target in links(page):
        if target.startswith(("https://", "http://", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        there = (page.parent / name).resolve() if name else page
        assert there.exists(), f"{target} leads nowhere"
        assert not anchor or anchor in anchors(there), f"{target}: there is no such heading"


@pytest.mark.parametrize("page", pages(), ids=relative)
def test_files_of_the_project_that_a_page_names_exist(page: Path) -> None:
    for text in code_spans(page):
        if text.startswith(PACKAGES) and re.fullmatch(r"[\w./-]+", text):
            assert (ROOT / text).exists(), f"there is no {text}"


@pytest.mark.parametrize("program", PARSERS)
def test_every_option_is_named_on_a_page(program: str) -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages())
    missing = options(PARSERS[program]()) - named(text)
    assert not missing, f"options of {program} that no page names: {sorted(missing)}"


@pytest.mark.parametrize(
    ("page", "programs"),
    [
        ("README.md", [*PARSERS]),
        ("trainer/README.md", ["astra-train", "astra-convert"]),
        ("converter/README.md", ["astra-convert", "astra-train"]),
        ("astra_serve/README.md", ["astra-serve", "astra-serve adapters", "astra-convert"]),
    ],
)
def test_options_in_the_text_of_a_page_exist(page: str, programs: list[str]) -> None:
    known = {name for program in programs for name in options(PARSERS[program]())} | options(of_vllm()) | OTHERS
    text = re.sub(r"`python -m [^`]*`", "", prose(ROOT / page))
    assert named(text) <= known, f"no program has {sorted(named(text) - known)}"


def named(text: str) -> set[str]:
    """Return the long options in a text."""
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))
