"""The document: what it may say, and the one line that everything else gets."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from astra_serve.document import desired
from astra_serve.document.desired import Adapter, Canary, Document
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


@pytest.mark.parametrize("text", ["", " \n", "adapters: []", '{"adapters": []}'])
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
        ("adapters: [{name: a/b/c, source: c}]", "adapters.0.name: use up to 128 letters"),
        ("adapters: [{name: a/, source: c}]", "first; with a namespace before it, team/adapter"),
        ("adapters: [{name: /a, source: c}]", "adapters.0.name: use up to 128 letters"),
        ("adapters: [{name: a/.., source: c}]", "adapters.0.name: use up to 128 letters"),
        ('adapters: [{name: "a/b\\n", source: c}]', "adapters.0.name: use up to 128 letters"),
        ("adapters: [{name: a/b, source: x}, {name: a/b, source: c}]", "two adapters are named 'a/b'"),
        ("adapters: [{name: a, source: b}, {name: a, source: c}]", "two adapters are named 'a'"),
        ("adapters: [{name: a, source: b, digest: abc}]", "adapters.0.digest: a digest is sha256: and 64"),
        ("adapters: [{name: a, source: b, canary: {version: c, weight: 1}}]", "weight: Input should be less than 1"),
        ("!!python/object/apply:os.system [ls]", "x is not YAML"),
        ("# adapters: []", "x has no 'adapters': write 'adapters: []' to serve none"),
        ("null", "x has no 'adapters'"),
        ("{}", "x has no 'adapters'"),
        ("---\n", "x has no 'adapters'"),
        ("adapters: []\nadapters: []", "x is not YAML at line 2: the key 'adapters' is there twice"),
        ("adapters:\n- name: a\n  source: b\n  name: c", "x is not YAML at line 4: the key 'name' is there twice"),
        (
            "adapters: [{name: a, source: b, canary: {version: c, weight: %s}}]" % ("9" * 5000),
            "is no value of its kind",
        ),
        ("- a", "Input should be a valid dictionary"),
    ],
)
def test_a_fault_gets_one_line_that_names_the_place(text: str, message: str) -> None:
    with pytest.raises(BadDocument) as caught:
        desired.parse(text, "x")
    assert message in str(caught.value)
    assert not set("\n^") & set(str(caught.value))  # one line without a regular expression


@given(st.text(max_size=200))
def test_any_text_is_a_document_that_round_trips_or_an_error_of_one_line(text: str) -> None:
    found, fault = Document(), ""
    try:
        found = desired.parse(text, "x")
    except BadDocument as error:
        fault = str(error)
    assert len(fault.splitlines()) <= 1
    assert desired.parse(desired.dump(found), "x") == found


def test_equal_entries_of_two_documents_can_be_the_same_objects() -> None:
    before = desired.parse("adapters: [{name: a, source: x}, {name: b, source: y}]", "x")
    after = desired.parse("adapters: [{name: b, source: z}, {name: a, source: x}, {name: c, source: x}]", "x")
    shared = after.sharing(before)
    assert shared == after
    assert shared.get("a") is before.get("a")


def test_the_schema_has_every_key_and_no_other() -> None:
    schema = desired.json_schema()
    assert schema["additionalProperties"] is False
    assert set(schema["$defs"]["Adapter"]["properties"]) == set(Adapter.model_fields)
    assert all("description" in p for p in schema["$defs"]["Adapter"]["properties"].values())
    json.dumps(schema)
