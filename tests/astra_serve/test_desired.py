"""The document: what it may say, and the one line that everything else gets."""

import json
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from astra_serve import desired
from astra_serve.desired import Adapter, Canary, Document
from astra_serve.errors import BadDocument

DIGEST = "sha256:" + 64 * "a"


def test_a_document_says_which_adapters_are_served() -> None:
    text = f"""
adapters:
  - name: support
    source: ./support
    required: true
    previous: [{DIGEST}]
    canary: {{version: {DIGEST}, weight: 0.1}}
  - {{name: sql, source: "s3://bucket/sql", pin: true, digest: {DIGEST}}}
"""
    document = desired.parse(text, "adapters.yaml")
    support, sql = document.adapters
    assert (support.required, support.previous, support.canary) == (True, [DIGEST], Canary(version=DIGEST, weight=0.1))
    assert (sql.pin, sql.digest) == (True, DIGEST)
    assert desired.parse(desired.dump(document), "again") == document


@pytest.mark.parametrize("text", ["", "{}", "adapters: []"])
def test_an_empty_document_serves_the_base_alone(text: str) -> None:
    assert desired.parse(text, "x").adapters == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("adapters: [", "x is not YAML at line"),
        ("adapters: {}", "adapters: Input should be a valid list"),
        ("adapter: []", "adapter: no such key; did you mean 'adapters'?"),
        ("adapters: [{name: a, sorce: b}]", "adapters.0.source: Field required"),
        ("adapters: [{name: a, source: b, requird: true}]", "requird: no such key; did you mean 'required'?"),
        ("adapters: [{name: a, source: b, canary: {version: c, wait: 1}}]", "adapters.0.canary.weight: Field required"),
        ("adapters: [{name: a/b, source: c}]", "adapters.0.name: String should match pattern"),
        ("adapters: [{name: a, source: b}, {name: a, source: c}]", "two adapters are named 'a'"),
        ("adapters: [{name: a, source: b, digest: abc}]", "adapters.0.digest: String should match pattern"),
        ("adapters: [{name: a, source: b, canary: {version: c, weight: 1}}]", "weight: Input should be less than 1"),
        ("!!python/object/apply:os.system [ls]", "x is not YAML"),
        ("- a", "Input should be a valid dictionary"),
    ],
)
def test_a_fault_gets_one_line_that_names_the_place(text: str, message: str) -> None:
    with pytest.raises(BadDocument) as caught:
        desired.parse(text, "x")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.text(max_size=200))
def test_any_text_is_a_document_or_a_bad_one(text: str) -> None:
    with suppress(BadDocument):
        desired.parse(text, "x")


def test_the_schema_knows_every_key_and_no_other() -> None:
    schema = desired.json_schema()
    assert schema["additionalProperties"] is False
    assert set(schema["$defs"]["Adapter"]["properties"]) == set(Adapter.model_fields)
    assert all("description" in p for p in schema["$defs"]["Adapter"]["properties"].values())
    json.dumps(schema)


def test_a_file_is_replaced_in_one_step(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "adapters.yaml"
    for source in ("one", "two"):
        desired.write(Document(adapters=[Adapter(name="a", source=source)]), file)
        assert desired.parse(file.read_text(), "x").adapters[0].source == source
    assert [path.name for path in file.parent.iterdir()] == ["adapters.yaml"]


def test_a_file_that_is_replaced_keeps_its_mode_and_stays_where_its_link_points(tmp_path: Path) -> None:
    """Servers of other users read it."""
    file, link = tmp_path / "real" / "adapters.yaml", tmp_path / "adapters.yaml"
    desired.write(Document(), file)
    assert file.stat().st_mode & 0o777 == 0o644
    file.chmod(0o640)
    link.symlink_to(file)
    desired.write(Document(adapters=[Adapter(name="a", source="b")]), link)
    assert link.is_symlink()
    assert file.stat().st_mode & 0o777 == 0o640
    assert desired.parse(file.read_text(), "").get("a")


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "adapters.yaml"
    desired.write(Document(), file)

    def full(_: int) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(desired.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        desired.write(Document(adapters=[Adapter(name="a", source="b")]), file)
    assert [path.name for path in tmp_path.iterdir()] == ["adapters.yaml"]
    assert desired.parse(file.read_text(), "") == Document()
