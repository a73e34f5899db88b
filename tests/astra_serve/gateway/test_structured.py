"""Which schemas and grammars are refused before the engine compiles them."""

from typing import Any

import pytest

from astra_serve.gateway import structured

TREE = {"$defs": {"a": {"properties": {"next": {"$ref": "#/$defs/a"}}}}, "$ref": "#/$defs/a"}
LIST = {"items": {"anyOf": [{"type": "string"}, {"$ref": "#"}]}}


def asked(schema: Any) -> list[dict[str, Any]]:
    """Return the requests that ask for a schema, in every way."""
    function = {"name": "f", "parameters": schema}
    return [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}},
        {"text": {"format": {"type": "json_schema", "name": "x", "schema": schema}}},
        {"output_config": {"format": {"type": "json_schema", "schema": schema}}},
        {"structured_outputs": {"json": schema}},
        {"tools": [{"type": "function", "function": function}], "tool_choice": "required"},
        {"tools": [{"type": "function", **function}], "tool_choice": {"type": "function", "name": "f"}},
        {"tools": [{"type": "function", "function": {**function, "strict": True}}]},
        {"tools": [{"name": "f", "input_schema": schema}], "tool_choice": {"type": "any"}},
    ]


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"$ref": "#"}, "refers to itself"),
        ({"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, "refers to itself"),
        ({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}, "refers to itself"),
        ({"$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}]}}}, "refers to itself"),
        ({"properties": {"x/y": {"$ref": "#/properties/x~1y"}}}, "refers to itself"),
        ({"anyOf": [{"$ref": "#/anyOf/0"}]}, "refers to itself"),
        ({"items": {"maxItems": 10**9}}, "maxItems is 1000000000"),
        ({"properties": {f"p{n}": {} for n in range(501)}}, "501 properties"),
        ({"enum": ["x" * 70_000]}, "at most 65536 bytes"),
        (nested(70), "nested more than 64 levels"),
    ],
)
def test_a_schema_that_the_engine_cannot_compile_is_refused_wherever_it_stands(schema: Any, reason: str) -> None:
    for content in asked(schema):
        found = structured.fault(content)
        assert found
        assert reason in found[0]
        assert found[1] in content


@pytest.mark.parametrize(
    "schema", [TREE, LIST, nested(60), {"$ref": "https://x/y"}, {"$ref": "#/none"}, {}, True, None]
)
def test_other_schemas_are_the_engines_to_judge(schema: Any) -> None:
    for content in asked(schema):
        assert structured.fault(content) is None


@pytest.mark.parametrize(
    "grammar",
    [{"grammar": "x" * 70_000}, {"regex": "x" * 70_000}, {"choice": ["x" * 1000] * 70}, {"json": "[" * 70_000}],
)
def test_other_grammars_have_a_size(grammar: dict[str, Any]) -> None:
    assert "at most 65536 bytes" in (structured.fault({"structured_outputs": grammar}) or ("",))[0]


def test_a_schema_as_text_is_read() -> None:
    assert structured.fault({"structured_outputs": {"json": '{"$ref": "#"}'}})
    assert structured.fault({"structured_outputs": {"json": "no JSON"}}) is None


@pytest.mark.parametrize("content", [{}, {"response_format": {"type": "text"}}, {"text": "x"}, {"tools": 3}])
def test_requests_without_structured_output_have_no_fault(content: dict[str, Any]) -> None:
    assert structured.fault({**content, "tool_choice": "required"}) is None
