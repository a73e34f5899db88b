"""YAML (and JSON) from a text that was not checked: bounded, and without recursion.

libyaml's composer and PyYAML's constructors call themselves for each level: 25,000 `[` end the process with SIGSEGV.
Here one loop builds the values from the parser's events, which need no stack. Every limit holds before the value that
exceeds it is built. Aliases count with all values that they stand for.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from converter.errors import first_line

# libyaml's, where PyYAML was built with it: ten thousand adapters are parsed in 0.5 s instead of 5.
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
MAX_DEPTH = 32  # a document of adapters needs 6
MAX_SCALAR = 8192  # characters; numbers and dates of more take quadratic time
MAX_VALUES = 2_000_000  # of a hundred thousand adapters with history
_MAPPING, _SEQUENCE = "tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"
_TEXT, _MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"
_SCALARS = {f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "timestamp")}


class BadYaml(ValueError):
    """The message is one line; `where` is " at line 3", or empty where the line is not known."""

    def __init__(self, fault: str, mark: Any = None) -> None:
        super().__init__(fault)
        self.where = f" at line {mark.line + 1}" if mark else ""


@dataclass
class _Open:
    """A list or a mapping whose end has not been read."""

    content: list[Any] | dict[Any, Any]
    anchor: str | None
    values_before: int
    key: Any = None
    has_key: bool = False
    merged: list[dict[Any, Any]] = field(default_factory=list)  # by the key `<<`


_MERGE_KEY = object()


def events(text: str) -> Iterator[yaml.Event]:
    """Yield the parser's events. Raises BadYaml."""
    try:
        yield from yaml.parse(text, LOADER)
    except (yaml.YAMLError, ValueError) as error:  # a ValueError: a lone surrogate
        fault = getattr(error, "problem", None) or first_line(error)
        raise BadYaml(fault, getattr(error, "problem_mark", None)) from error


def load(text: str) -> Any:
    """Return the value in `text`; None where it has none. Raises BadYaml."""
    return _Builder().build(text)


class _Builder:
    def __init__(self) -> None:
        self._scalars = yaml.SafeLoader("")
        self._open: list[_Open] = []
        self._anchors: dict[str, tuple[Any, int]] = {}  # with the number of values
        self._values = 0
        self._root: Any = None
        self._documents = 0

    def build(self, text: str) -> Any:
        for event in events(text):
            if isinstance(event, yaml.ScalarEvent):
                self._add(self._scalar(event), event, event.anchor, 1)
            elif isinstance(event, yaml.MappingStartEvent):
                self._begin({}, event, _MAPPING)
            elif isinstance(event, yaml.SequenceStartEvent):
                self._begin([], event, _SEQUENCE)
            elif isinstance(event, yaml.CollectionEndEvent):
                self._end(event)
            elif isinstance(event, yaml.AliasEvent):
                self._alias(event)
            elif isinstance(event, yaml.DocumentStartEvent):
                self._documents += 1
                if self._documents > 1:
                    raise _at(event, "there is a second document")
        return self._root

    def _scalar(self, event: yaml.ScalarEvent) -> Any:
        if len(event.value) > MAX_SCALAR:
            raise _at(event, f"a value has {len(event.value)} characters; the limit is {MAX_SCALAR}")
        tag = event.tag
        if tag is None or tag == "!":
            tag = self._scalars.resolve(yaml.ScalarNode, event.value, event.implicit)  # type: ignore[no-untyped-call]
        if tag == _TEXT or (event.tag is None and tag == "tag:yaml.org,2002:value"):  # the text `=`
            return event.value
        if tag == _MERGE:
            return _MERGE_KEY
        if tag not in _SCALARS:
            raise _at(event, f"the tag {tag[:100]!r} is not known")
        node = yaml.ScalarNode(tag, event.value)
        try:
            return yaml.SafeLoader.yaml_constructors[tag](self._scalars, node)
        except (yaml.YAMLError, ValueError, OverflowError, KeyError, AttributeError) as error:
            raise _at(event, f"{event.value[:40]!r} is no value of its kind") from error

    def _begin(self, content: list[Any] | dict[Any, Any], event: yaml.CollectionStartEvent, kind: str) -> None:
        if event.tag not in (None, "!", kind):
            raise _at(event, f"the tag {event.tag[:100]!r} is not known")
        if len(self._open) == MAX_DEPTH:
            raise _at(event, f"values are nested more than {MAX_DEPTH} deep")
        self._open.append(_Open(content, event.anchor, self._values))

    def _end(self, event: yaml.Event) -> None:
        done = self._open.pop()
        if isinstance(done.content, dict) and done.merged:
            explicit, done.content = done.content, {}
            for merged in reversed(done.merged):
                done.content.update(merged)
            done.content.update(explicit)
        self._add(done.content, event, done.anchor, 1, self._values - done.values_before + 1)

    def _alias(self, event: yaml.AliasEvent) -> None:
        if event.anchor not in self._anchors:  # also inside of the anchor itself
            raise _at(event, f"the alias {str(event.anchor)[:100]!r} has no anchor before it")
        value, values = self._anchors[event.anchor]
        self._add(value, event, None, values)

    def _add(self, value: Any, event: yaml.Event, anchor: str | None, new: int, values: int = 1) -> None:
        """Put a value in its place: `new` values more, of which an alias of it stands for `values`."""
        self._values += new
        if self._values > MAX_VALUES:
            raise _at(event, f"there are more than {MAX_VALUES} values")
        if anchor is not None:
            self._anchors[anchor] = value, values
        place = self._open[-1] if self._open else None
        if place and isinstance(place.content, dict) and not place.has_key:
            self._key(place, value, event)
            return
        value = "<<" if value is _MERGE_KEY else value
        if place is None:
            self._root = value
        elif isinstance(place.content, list):
            place.content.append(value)
        else:
            place.has_key = False
            if place.key is _MERGE_KEY:
                place.merged += self._mappings(value, event)
            else:
                place.content[place.key] = value

    def _key(self, place: _Open, key: Any, event: yaml.Event) -> None:
        if key is not _MERGE_KEY and not isinstance(key, str):
            raise _at(event, "a key must be a text")
        if key is not _MERGE_KEY and key in place.content:
            raise _at(event, f"the key {str(key)[:100]!r} is there twice")
        place.key, place.has_key = key, True

    @staticmethod
    def _mappings(value: Any, event: yaml.Event) -> list[dict[Any, Any]]:
        found = value if isinstance(value, list) else [value]
        if not all(isinstance(one, dict) for one in found):
            raise _at(event, "'<<' takes a mapping, or a list of mappings")
        return found


def _at(event: yaml.Event, fault: str) -> BadYaml:
    return BadYaml(fault, event.start_mark)
