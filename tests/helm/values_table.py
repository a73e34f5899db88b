"""The table of values in helm/README.md, generated from values.schema.json and values.yaml.

python -m tests.helm.values_table      # write the table into the README
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).parents[2] / "helm"
BEGIN, END = "<!-- values: python -m tests.helm.values_table -->\n", "<!-- end of values -->\n"
SCHEMA: dict[str, Any] = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
VALUES: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))


def resolved(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a schema with its reference replaced by the definition."""
    reference = schema.get("$ref") or (schema["allOf"][0]["$ref"] if "allOf" in schema else None)
    if reference is None:
        return schema
    return {**SCHEMA["definitions"][reference.rpartition("/")[2]], **schema}


def leaves(schema: dict[str, Any], values: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any], Any]]:
    """Yield path, schema and default of every value that is not a group of values."""
    for key, found in schema["properties"].items():
        inner = resolved(found)
        if "properties" in inner and isinstance(values.get(key), dict) and values[key]:
            yield from leaves(inner, values[key], f"{path}{key}.")
        elif key != "global":
            yield f"{path}{key}", inner, values.get(key)


def inside(schema: dict[str, Any], path: str) -> Iterator[tuple[str, str]]:
    """Yield path and description of every key inside a value, except those of Kubernetes' own types (a `$ref`)."""
    if "items" in schema:
        schema, path = schema["items"], f"{path}[]"
    for key, inner in schema.get("properties", {}).items():
        yield f"{path}.{key}", resolved(inner)["description"]
        yield from inside(inner, f"{path}.{key}")


def table() -> str:
    """Return the table in Markdown."""
    rows = ["| value | default | description |", "|---|---|---|"]
    for path, schema, default in leaves(SCHEMA, VALUES):
        shown = json.dumps(default)
        text = schema["description"]
        if "enum" in schema and not isinstance(schema["enum"][0], int):
            text += f" ({', '.join(map(str, schema['enum']))})"
        rows.append(f"| `{path}` | `{shown}` | {text} |")
        if "items" in schema:
            rows += [f"| `{inner}` | | {description} |" for inner, description in inside(schema, path)]
    return "\n".join(rows) + "\n"


def write() -> None:
    """Write the table into the README, between its two marks."""
    file = CHART / "README.md"
    before, _, rest = file.read_text(encoding="utf-8").partition(BEGIN)
    file.write_text(before + BEGIN + table() + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    write()
