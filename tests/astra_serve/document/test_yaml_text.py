"""Values from a YAML text: the same as PyYAML's, or a fault of one line, whatever the text is."""

import json
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from astra_serve.document import yaml_text
from astra_serve.document.yaml_text import MAX_DEPTH, MAX_SCALAR, BadYaml, load

TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=20)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.datetimes() | TEXTS
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4))
LAUGHS = "a0: &a0 [x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 20)
)  # 2 * 10^19 values
MERGED = "a0: &a0 {k: v}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 20))


@given(VALUES, st.booleans())
def test_values_are_those_of_pyyaml(value: Any, flow: bool) -> None:
    text = yaml.safe_dump(value, default_flow_style=flow, allow_unicode=True)
    assert load(text) == yaml.safe_load(text)


@given(st.text("ab:-[]{}&*<!|>'\"#,? \n01", max_size=40))
def test_any_text_gives_the_value_of_pyyaml_or_a_fault(text: str) -> None:
    value, fault = None, ""
    try:
        value = load(text)
    except BadYaml as error:
        fault = str(error)
    assert len(fault.splitlines()) <= 1
    if not fault:
        try:
            expected = yaml.load(text, yaml_text.LOADER)  # noqa: S506 (a safe one)
        except yaml.constructor.ConstructorError:
            assert "<<" in text  # a value, which PyYAML does not construct, and which is text here
        else:
            assert value == expected


def test_json_and_anchors_and_merged_mappings_are_read() -> None:
    assert load(json.dumps({"a": [1, 2.5, None, True, "x"]})) == {"a": [1, 2.5, None, True, "x"]}
    text = "- &one {a: 1, b: 2}\n- {<<: *one, b: 3}\n- {b: 4, <<: [{c: 5}, *one]}\n- *one\n- <<\n"
    assert load(text) == [{"a": 1, "b": 2}, {"a": 1, "b": 3}, {"a": 1, "b": 4, "c": 5}, {"a": 1, "b": 2}, "<<"]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[" * 25_000, "values are nested more than 32 deep"),
        ("- " * 25_000, "values are nested more than 32 deep"),
        ("{a: " * 25_000, "values are nested more than 32 deep"),
        ("".join(" " * n + "a:\n" for n in range(100)), "values are nested more than 32 deep"),
        (LAUGHS, "there are more than 2000000 values"),
        (MERGED, "there are more than 2000000 values"),
        ("&a [*a]", "the alias 'a' has no anchor before it"),
        ("a: 1\nb: 2\na: 3", "the key 'a' is there twice"),
        ("[a]: 1", "a key must be a text"),
        ("1: a", "a key must be a text"),
        ("<<: 1", "'<<' takes a mapping"),
        ("a: 1:" + ":".join(["59"] * MAX_SCALAR), "characters; the limit is 8192"),
        ("a: " + "9" * 5000, "'9999999999999999999999999999999999999999' is no value of its kind"),
        ("a: 2026-13-40", "'2026-13-40' is no value of its kind"),
        ("!!python/object/apply:os.system [ls]", "is not known"),
        ("a: !!binary aGk=", "is not known"),
        ("--- a\n--- b", "there is a second document"),
        ("\ud800", "surrogates not allowed"),
        ("\x00", "control characters are not allowed"),
    ],
)
def test_a_fault_is_one_line(text: str, fault: str) -> None:
    with pytest.raises(BadYaml) as caught:
        load(text)
    assert fault in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_values_may_be_as_deep_as_the_limit() -> None:
    assert load("[" * MAX_DEPTH + "]" * MAX_DEPTH)


def test_the_number_of_values_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yaml_text, "MAX_VALUES", 10)
    assert load("[1, 2, 3, 4, 5, 6, 7, 8, 9]")
    with pytest.raises(BadYaml, match="there are more than 10 values"):
        load("[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]")
