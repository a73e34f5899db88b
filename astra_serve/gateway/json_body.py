"""JSON of clients, without what other parts of a server cannot hold: numbers that are not finite, halves of characters.

`json.loads` accepts NaN, 1e999 and a lone surrogate (half of a character of UTF-16, as "\\ud800"). None of them can be
written as JSON in UTF-8 again, so that an answer or a log line with one of them fails.
"""

import json
import math
import re
from collections.abc import Iterator
from typing import Any

LONE = re.compile(r"[\ud800-\udfff]")  # where escapes are resolved, the halves of a whole character are one character


class Unusable(ValueError):
    """Text that is JSON by Python's rules, with a value that this server does not accept; the message is one line."""


def parse(body: bytes) -> Any:
    """Return the JSON value. Raises Unusable, another ValueError if the text is no JSON, RecursionError."""
    text = body.decode(json.detect_encoding(body))  # refuses a half that is not escaped
    content = DECODER.decode(text)
    if ("\\ud" in text or "\\uD" in text) and any(LONE.search(one) for one in strings(content)):
        raise Unusable("the body has a lone surrogate, which is half of a character: send whole characters")
    return content


def fault(body: bytes) -> str | None:
    """Return why JSON in a body is not accepted, in one line; None also for an empty body."""
    try:
        if body:
            parse(body)
    except RecursionError:
        return "the body is nested too deeply"
    except Unusable as error:
        return str(error)
    except json.JSONDecodeError as error:
        return f"the body is no JSON: {error}"
    except ValueError:
        return "the body is not in UTF-8, or has a number with too many digits"
    return None


def strings(value: Any, *, keys: bool = True, but: frozenset[str] = frozenset()) -> Iterator[str]:
    """Yield every string of a JSON value, without those that are the values of the keys `but`."""
    left = [value]
    while left:
        one = left.pop()
        if isinstance(one, str):
            yield one
        elif isinstance(one, dict):
            if keys:
                yield from one
            left.extend(v for key, v in one.items() if not (key in but and isinstance(v, str)))
        elif isinstance(one, list) and not (one and isinstance(one[0], int) and all(type(x) is int for x in one)):
            left.extend(one)


def _not_finite(name: str) -> float:
    raise Unusable(f"the body has {name}, which is no number of JSON")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise Unusable(f"the body has {text[:40]}, which is too large for a number")
    return number


DECODER = json.JSONDecoder(parse_constant=_not_finite, parse_float=_finite)
