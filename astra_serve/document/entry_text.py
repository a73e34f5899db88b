"""One entry of a document's text: replaced, added or removed, while every other byte stays as it was.

The document is that of adapters, or that of keys, whose entries are tenants: a mapping with one list of named entries.

Comments, key order and quoting belong to the people who wrote the document. Inside an entry in block style, too, only
the keys whose values change are written again: a scalar where it stands, a new key below the others. An entry in flow
style (JSON), or one that refers to anchors or merges mappings, is written again as a whole.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import yaml
from pydantic import BaseModel

from astra_serve.document import desired, keys, yaml_text
from astra_serve.document.strict import dumped, plain
from astra_serve.errors import BadDocument

Edit = tuple[int, int, str]  # from here to there, the text that takes the place


@dataclass(frozen=True)
class Kind:
    """A kind of document: the key of its list, how a text is parsed, and the model of an entry."""

    key: str
    parse: Callable[[str, str], Any]
    entry: type[BaseModel]


ADAPTERS = Kind("adapters", desired.parse, desired.Adapter)
TENANTS = Kind("tenants", lambda text, origin: keys.parse(text, origin) if text.strip() else keys.Keys(), keys.Tenant)


def with_entry(
    text: str, origin: str, name: str, old: Any, new: Any, known: Any = None, kind: Kind = ADAPTERS
) -> tuple[Any, str]:
    """Return the document in `text` with the entry `new` in place of `old`, parsed and as text. None is no entry.

    `known` is the document in `text` if it was parsed before. Entries and document are those of `kind`.

    Raises BadDocument where `text` is no document, or other entries refer to anchors that would disappear; Conflict
    where it has another entry of this name.
    """
    document = (known or kind.parse(text, origin)).replacing(name, old, new)
    unix = text.replace("\r\n", "\n")
    found = _spliced(unix, _edits(unix, name, plain(new) if new else None, kind))
    found = found.replace("\n", "\r\n") if unix != text else found
    try:
        intended = kind.parse(found, origin) == document
    except BadDocument:
        intended = False
    if not intended:
        raise BadDocument(f"{origin}: the entry {name!r} is tied to others by YAML anchors: change it there by hand")
    return document, found


def _spliced(text: str, edits: list[Edit]) -> str:
    for start, end, found in sorted(edits, reverse=True):
        text = text[:start] + found + text[end:]
    return text


def _edits(text: str, name: str, new: dict[str, Any] | None, kind: Kind) -> list[Edit]:
    layout = _layout(text)
    number = next((n for n, entry in enumerate(layout.entries) if entry.name == name), None)
    if number is None:
        return [_addition(text, layout, new, kind)] if new else []
    entries, entry, items = layout.entries, layout.entries[number], layout.items
    assert items is not None
    start, end = entry.start, entry.end
    if items.flow and new is None:  # with one of the commas beside it
        if number:
            start = entries[number - 1].end
        elif len(entries) > 1:
            end = entries[1].start
    if entry.flow and (new or items.flow):
        return [(start, end, _flow(new) if new else "")]
    dash, end = text.rfind("-", 0, start), _line_end(text, entry.last)
    start = text.rfind("\n", 0, dash) + 1
    if new:
        return [(start, end, _patched(text[start:end], dash - start, new, kind))]
    return [(start, end, ""), *([(layout.colon, layout.colon, " []")] if len(entries) == 1 else [])]


def _addition(text: str, layout: "_Layout", new: dict[str, Any], kind: Kind) -> Edit:
    """Return the edit that adds an entry after all others."""
    items, entries = layout.items, layout.entries
    if items is None:  # the text is empty
        return len(text), len(text), _below(text, f"{kind.key}:\n{_block(new, 2)}")
    if entries and items.flow:
        return entries[-1].end, entries[-1].end, f", {_flow(new)}"
    if layout.flow:
        return items.start, items.end, f"[{_flow(new)}]"
    if entries:
        place = _line_end(text, entries[-1].last)
        return place, place, _below(text[:place], _block(new, items.column))
    rest = text[items.end : _line_end(text, items.last)]  # `adapters: []`, and perhaps a comment, which stays
    return layout.colon, items.end + len(rest), rest + (_below(rest or " ", _block(new, 2)))


@dataclass
class _Span:
    """The place of a list or a mapping in the text."""

    start: int
    end: int
    last: int  # the end of its last character; the `end` of a block is where the next token begins
    column: int
    flow: bool
    parts: int = 0  # keys and values until now
    key: str | None = None
    name: str | None = None  # of an entry


@dataclass
class _Layout:
    """The places of the entries of a document in its text."""

    flow: bool = False  # the document as a whole, as JSON is
    colon: int = 0  # the end of the list's key and its colon
    items: _Span | None = None  # the list of the entries; None in an empty text
    entries: list[_Span] = field(default_factory=list)


def _layout(text: str) -> _Layout:
    """Return where the entries of a document without faults are, in one pass without recursion."""
    layout = _Layout()
    open_: list[_Span] = []  # the document, the list of the entries, an entry, and what it contains
    anchors: dict[str, str] = {}
    for event in yaml_text.events(text):
        start, end = event.start_mark, event.end_mark
        assert start is not None
        assert end is not None
        if isinstance(event, yaml.CollectionStartEvent):
            if open_:
                open_[-1].parts += 1
            open_.append(_Span(start.index, end.index, end.index, start.column, bool(event.flow_style)))
        elif isinstance(event, yaml.CollectionEndEvent):
            _close(layout, open_, end.index)
        elif isinstance(event, yaml.ScalarEvent | yaml.AliasEvent):
            value = event.value if isinstance(event, yaml.ScalarEvent) else anchors.get(event.anchor or "")
            if event.anchor and value is not None:
                anchors[event.anchor] = value
            place = open_[-1]
            if place.parts % 2 == 0:
                place.key = value
            elif place.key == "name":
                place.name = value
            place.parts, place.last = place.parts + 1, end.index
            if len(open_) == 1:
                layout.colon = end.index + 1
    return layout


def _close(layout: _Layout, open_: list[_Span], end: int) -> None:
    done = open_.pop()
    done.end = end
    if done.flow:
        done.last = end
    if not open_:
        layout.flow = done.flow
        return
    open_[-1].last = done.last
    if len(open_) == 1:
        layout.items = done
    elif len(open_) == 2:
        layout.entries.append(done)


def _patched(item: str, dash: int, new: dict[str, Any], kind: Kind) -> str:
    """Return the lines of an entry in block style, whose dash is in column `dash`, with the values of `new`."""
    lines = f"{item[:dash]} {item[dash + 1 :]}"
    try:
        old = plain(kind.entry.model_validate(yaml_text.load(lines)))
        node: Any = yaml.compose(lines, yaml_text.LOADER)  # as deep as `load` allows
    except yaml_text.BadYaml:  # an anchor of another entry
        return _block(new, dash)
    nodes = {key.value: (key, value) for key, value in node.value}
    column, edits = node.start_mark.column, []
    for word in {**old, **new}:
        if old.get(word) == new.get(word):
            continue
        if word not in nodes:
            if word not in new:  # merged from another mapping
                return _block(new, dash)
            place = _line_end(lines, _last(node))
            edits.append((place, place, _below(lines[:place], _indented({word: new[word]}, column))))
            continue
        key, value = nodes[word]
        scalar = isinstance(value, yaml.ScalarNode) and value.style not in ("|", ">")
        if word in new and scalar and not isinstance(new[word], list | dict):
            edits.append((value.start_mark.index, value.end_mark.index, _scalar(new[word], value.style)))
        else:
            start, end = key.start_mark.index - key.start_mark.column, _line_end(lines, _last(value))
            edits.append((start, end, _indented({word: new[word]}, column) if word in new else ""))
    lines = _spliced(lines, edits)
    return f"{lines[:dash]}-{lines[dash + 1 :]}"


def _last(node: Any) -> int:
    """Return the end of the last character of a node; the end of a block is where the next token begins."""
    while isinstance(node, yaml.CollectionNode) and not node.flow_style:
        node = node.value[-1][1] if isinstance(node, yaml.MappingNode) else node.value[-1]
    return int(node.end_mark.index)


def _line_end(text: str, last: int) -> int:
    """Return where the line after the last character of a value begins, before comments that belong to others."""
    newline = text.find("\n", len(text[:last].rstrip()))  # without the blank lines after a block scalar
    return len(text) if newline < 0 else newline + 1


def _below(before: str, lines: str) -> str:
    return lines if before.endswith("\n") or not before else f"\n{lines}"


def _block(entry: dict[str, Any], column: int) -> str:
    lines = _indented(entry, column + 2)
    return f"{lines[:column]}-{lines[column + 1 :]}"


def _indented(content: dict[str, Any], column: int) -> str:
    return "".join(f"{' ' * column}{line}\n" for line in dumped(content).splitlines())


def _flow(entry: dict[str, Any]) -> str:
    return json.dumps(entry, ensure_ascii=False)


def _scalar(value: Any, style: str | None) -> str:
    """Return a scalar on one line, quoted as the one before it was."""
    quoted = style if isinstance(value, str) else None
    text = yaml.safe_dump(value, default_style=quoted, width=2**20, allow_unicode=True)
    return str(text).removesuffix("\n").removesuffix("\n...")
