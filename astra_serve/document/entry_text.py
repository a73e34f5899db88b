"""One entry of a document's text: replaced, added or removed, while every other byte stays as it was.

Comments, key order and quoting belong to the people who wrote the document. Inside an entry in block style, too, only
the keys whose values change are written again: a scalar where it stands, a new key below the others. An entry in flow
style (JSON), or one that refers to anchors or merges mappings, is written again as a whole.
"""

import json
from typing import Any

import yaml

from astra_serve.document import desired
from astra_serve.document.desired import LOADER, Adapter, Document
from astra_serve.errors import BadDocument

Edit = tuple[int, int, str]  # from here to there, the text that takes the place


def with_entry(text: str, origin: str, name: str, old: Adapter | None, new: Adapter | None) -> tuple[Document, str]:
    """Return the document in `text` with the entry `new` in place of `old`, parsed and as text. None is no entry.

    Raises BadDocument where `text` is no document, or other entries refer to anchors that would disappear; Conflict
    where it has another entry of this name.
    """
    document = desired.parse(text, origin).replacing(name, old, new)
    unix = text.replace("\r\n", "\n")
    found = _spliced(unix, _edits(unix, name, desired.plain(new) if new else None))
    found = found.replace("\n", "\r\n") if unix != text else found
    try:
        intended = desired.parse(found, origin) == document
    except BadDocument:
        intended = False
    if not intended:
        raise BadDocument(f"{origin}: the entry {name!r} is tied to others by YAML anchors: change it there by hand")
    return document, found


def _spliced(text: str, edits: list[Edit]) -> str:
    for start, end, found in sorted(edits, reverse=True):
        text = text[:start] + found + text[end:]
    return text


def _edits(text: str, name: str, new: dict[str, Any] | None) -> list[Edit]:
    root: Any = yaml.compose(text, LOADER)
    nothing: tuple[Any, Any] = None, None
    key, items = next((pair for pair in root.value if pair[0].value == "adapters"), nothing) if root else nothing
    entries = items.value if isinstance(items, yaml.SequenceNode) else []
    number = next((n for n, entry in enumerate(entries) if _name(entry) == name), None)
    if number is None:
        return [_addition(text, root, key, items, entries, new)] if new else []
    entry = entries[number]
    start, end = entry.start_mark.index, entry.end_mark.index
    if items.flow_style and new is None:  # with one of the commas beside it
        if number:
            start = entries[number - 1].end_mark.index
        elif len(entries) > 1:
            end = entries[1].start_mark.index
    if entry.flow_style and (new or items.flow_style):
        return [(start, end, _flow(new) if new else "")]
    dash, end = text.rfind("-", 0, start), _line_end(text, entry)
    start = text.rfind("\n", 0, dash) + 1
    if new:
        return [(start, end, _patched(text[start:end], dash - start, new))]
    colon = key.end_mark.index + 1
    return [(start, end, ""), *([(colon, colon, " []")] if len(entries) == 1 else [])]


def _addition(text: str, root: Any, key: Any, items: Any, entries: list[Any], new: dict[str, Any]) -> Edit:
    """Return the edit that adds an entry after all others."""
    if key is None and root is not None and root.flow_style:  # {}
        return root.start_mark.index, root.end_mark.index, f'{{"adapters": [{_flow(new)}]}}'
    if key is None:
        return len(text), len(text), _below(text, f"adapters:\n{_block(new, 2)}")
    if entries and items.flow_style:
        place = entries[-1].end_mark.index
        return place, place, f", {_flow(new)}"
    if root.flow_style:
        return items.start_mark.index, items.end_mark.index, f"[{_flow(new)}]"
    if entries:
        place = _line_end(text, entries[-1])
        return place, place, _below(text[:place], _block(new, items.start_mark.column))
    rest = text[items.end_mark.index : _line_end(text, items)]  # `adapters: []` and perhaps a comment, which stays
    return key.end_mark.index + 1, items.end_mark.index + len(rest), rest + (_below(rest or " ", _block(new, 2)))


def _patched(item: str, dash: int, new: dict[str, Any]) -> str:
    """Return the lines of an entry in block style, whose dash is in column `dash`, with the values of `new`."""
    lines = f"{item[:dash]} {item[dash + 1 :]}"
    try:
        old = desired.plain(Adapter.model_validate(yaml.load(lines, LOADER)))  # noqa: S506 (a safe one)
        node: Any = yaml.compose(lines, LOADER)
    except yaml.YAMLError:  # an anchor of another entry
        return _block(new, dash)
    nodes = {key.value: (key, value) for key, value in node.value}
    column, edits = node.start_mark.column, []
    for word in {**old, **new}:
        if old.get(word) == new.get(word):
            continue
        if word not in nodes:
            if word not in new:  # merged from another mapping
                return _block(new, dash)
            place = _line_end(lines, node)
            edits.append((place, place, _below(lines[:place], _indented({word: new[word]}, column))))
            continue
        key, value = nodes[word]
        scalar = isinstance(value, yaml.ScalarNode) and value.style not in ("|", ">")
        if word in new and scalar and not isinstance(new[word], list | dict):
            edits.append((value.start_mark.index, value.end_mark.index, _scalar(new[word], value.style)))
        else:
            start, end = key.start_mark.index - key.start_mark.column, _line_end(lines, value)
            edits.append((start, end, _indented({word: new[word]}, column) if word in new else ""))
    lines = _spliced(lines, edits)
    return f"{lines[:dash]}-{lines[dash + 1 :]}"


def _name(entry: Any) -> Any:
    return next((value.value for key, value in entry.value if key.value == "name"), None)


def _line_end(text: str, node: Any) -> int:
    """Return where the line after the last character of a node begins.

    The end of a node in block style is where the next token begins, behind comments that belong to others.
    """
    while isinstance(node, yaml.CollectionNode) and not node.flow_style:
        node = node.value[-1][1] if isinstance(node, yaml.MappingNode) else node.value[-1]
    newline = text.find("\n", len(text[: node.end_mark.index].rstrip()))  # without the blank lines after a block scalar
    return len(text) if newline < 0 else newline + 1


def _below(before: str, lines: str) -> str:
    return lines if before.endswith("\n") or not before else f"\n{lines}"


def _block(entry: dict[str, Any], column: int) -> str:
    lines = _indented(entry, column + 2)
    return f"{lines[:column]}-{lines[column + 1 :]}"


def _indented(content: dict[str, Any], column: int) -> str:
    return "".join(f"{' ' * column}{line}\n" for line in desired.dump(content).splitlines())


def _flow(entry: dict[str, Any]) -> str:
    return json.dumps(entry, ensure_ascii=False)


def _scalar(value: Any, style: str | None) -> str:
    """Return a scalar on one line, quoted as the one before it was."""
    quoted = style if isinstance(value, str) else None
    text = yaml.safe_dump(value, default_style=quoted, width=2**20, allow_unicode=True)
    return str(text).removesuffix("\n").removesuffix("\n...")
