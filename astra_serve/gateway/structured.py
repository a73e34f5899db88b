"""Limits of structured output: the schemas and grammars that the engine would compile for too long, or not at all.

- `GRAMMAR_BYTES`: all grammars of a request together;
- `PROPERTIES`: of one object: the time grows with their square (500 take 1 s, 2,000 a minute);
- `ITEMS`: `maxItems`: vLLM's second compiler (guidance) reserves memory for each, and 10**9 end the server;
- `DEPTH`: of objects and lists in each other;
- a schema must not refer to itself without a value in between: `{"$ref": "#"}` allows no text at all.

The engine decides on everything else.
"""

import json
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from typing import Any
from urllib.parse import unquote

GRAMMAR_BYTES = 64 * 2**10
PROPERTIES = 500
ITEMS = 10_000
DEPTH = 64
FIELDS = ("response_format", "structured_outputs", "text", "output_config")
COMBINED = ("allOf", "anyOf", "oneOf")


def fault(content: dict[str, Any]) -> tuple[str, str] | None:
    """Return why the structured output that a request asks for is refused, and its parameter; otherwise None."""
    size = 0
    for param, asked in [*((name, content.get(name)) for name in FIELDS), *_tools(content)]:
        size += len(json.dumps(asked)) if asked else 0
        if size > GRAMMAR_BYTES:
            return f"the schemas and grammars of a request have at most {GRAMMAR_BYTES} bytes: send less", param
    for param, schema in _grammars(content):
        if isinstance(schema, dict) and (reason := _schema_fault(schema)):
            return f"the schema cannot be served: {reason}", param
    return None


def _grammars(content: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield each schema of a request with its parameter, and structural tags, which have schemas in them."""
    for param, wanted in (
        ("response_format", content.get("response_format")),
        ("text", _get(content.get("text"), "format")),
        ("output_config", _get(content.get("output_config"), "format")),
    ):
        if _get(wanted, "type") not in (None, "text", "json_object"):
            schema = _get(wanted, "schema", _get(_get(wanted, "json_schema"), "schema"))
            yield param, wanted if schema is None else schema
    for name in ("json", "structural_tag"):
        yield "structured_outputs", _read(_get(content.get("structured_outputs"), name))
    yield from _tools(content)


def _tools(content: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the schemas of the tools that the answer has to follow."""
    forced = isinstance(content.get("tool_choice"), dict) or content.get("tool_choice") in ("required", "any")
    for tool in content["tools"] if isinstance(content.get("tools"), list) else ():
        function = _get(tool, "function", tool)
        if forced or _get(function, "strict"):
            yield "tools", _get(function, "parameters", _get(function, "input_schema"))


def _get(value: Any, name: str, default: Any = None) -> Any:
    return value.get(name, default) if isinstance(value, dict) else default


def _read(schema: Any) -> Any:
    """Return a schema that is written as a text; the text itself where it is too long, or no JSON."""
    if not isinstance(schema, str) or len(schema) > GRAMMAR_BYTES:
        return schema
    try:
        return json.loads(schema)
    except RecursionError:
        return {"": schema}
    except ValueError:
        return schema


def _schema_fault(schema: dict[str, Any]) -> str | None:
    refers: dict[int, list[int]] = {}
    level: list[Any] = [schema]
    for _ in range(DEPTH):
        for node in level:
            if isinstance(node, dict):
                if reason := _node_fault(node):
                    return reason
                refers[id(node)] = [id(other) for other in _same_value(schema, node)]
        level = [child for node in level for child in _children(node)]
        if not level:
            break
    else:
        return f"it is nested more than {DEPTH} levels deep"
    try:
        TopologicalSorter(refers).prepare()
    except CycleError:
        return "it refers to itself without a value in between"
    return None


def _node_fault(node: dict[str, Any]) -> str | None:
    properties, items = node.get("properties"), node.get("maxItems")
    if isinstance(properties, dict) and len(properties) > PROPERTIES:
        return f"an object has {len(properties)} properties, at most {PROPERTIES} are served"
    if isinstance(items, int | float) and items > ITEMS:
        return f"maxItems is {items}, at most {ITEMS} are served: leave it out for lists of any length"
    return None


def _children(node: Any) -> Iterator[Any]:
    values = node.values() if isinstance(node, dict) else node
    return (child for child in values if isinstance(child, dict | list))


def _same_value(root: dict[str, Any], node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the schemas that the same value has to match: the one that `node` refers to, and those that it combines."""
    target = _target(root, node.get("$ref"))
    if target is not None:
        yield target
    for name in COMBINED:
        if isinstance(node.get(name), list):
            yield from (one for one in node[name] if isinstance(one, dict))


def _target(root: dict[str, Any], reference: Any) -> dict[str, Any] | None:
    """Return the schema at a JSON pointer of the same document, as "#/$defs/a"."""
    if not isinstance(reference, str) or not reference.startswith("#"):
        return None
    found: Any = root
    for part in reference.removeprefix("#").split("/")[1:]:
        name = unquote(part).replace("~1", "/").replace("~0", "~")
        if isinstance(found, list) and name.isdecimal() and int(name) < len(found):
            found = found[int(name)]
        else:
            found = _get(found, name)
    return found if isinstance(found, dict) else None
