"""Renders chat templates in a process of its own: `python -m astra_serve.adapters.template_worker`.

The publisher of an adapter wrote its template: one that computes or grows without end must harm nothing else. So this
process has little memory, opens no file and no socket once it has started, and ends with its parent, which kills it
when an answer takes too long. Each message is four bytes, the length, and JSON:

    {"ready": true}                                                                 the first message of the worker
    {"compile": TEXT}                               -> {"format": "string" or "openai"}
    {"template": TEXT, "messages": [...], "variables": {...}, "continue": false, "most": 1000}    -> {"text": ...}
    any order                                       -> {"error": REASON}, or {"fatal": REASON}, after which it ends

Templates have what transformers gives them (`transformers.utils.chat_template_utils`), which is not imported: it would
take seconds and hundreds of megabytes.
"""

import json
import resource
import signal
import struct
import sys
from copy import deepcopy
from datetime import datetime
from functools import lru_cache
from importlib import import_module
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from astra_serve.parent_death import end_with_parent

MIB = 2**20
MEMORY = 512 * MIB  # of addresses; Python and Jinja have 40 MiB of them
CPU_S = 2  # for one order; the parent's limit is shorter, and in seconds of the clock
LONGEST_REASON = 500  # characters
HEAD = struct.Struct(">I")
_TAG = "CONTINUE_FINAL_MESSAGE_TAG "
_PROBES = ("probe5d2f0c1e1", "probe5d2f0c1e2")
# Modules that Jinja, or Python, imports at the first use: later this process opens no file.
_LATER = ("jinja2.constants", "jinja2.debug", "pprint", "_strptime", "encodings.unicode_escape", "encodings.ascii")


class TooLong(ValueError):
    """The rendered prompt is longer than any prompt that is served."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, which marks what a model wrote: for training alone, its content is rendered."""

    tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    def _content(self, caller: Any) -> Any:
        return caller()


def environment() -> ImmutableSandboxedEnvironment:
    """Return the environment of a chat template."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(format: str) -> str:  # the name that templates may use
        return datetime.now().strftime(format)

    extensions = [_Generation, jinja2.ext.loopcontrols]
    found = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    found.filters["tojson"] = tojson
    found.globals["raise_exception"] = raise_exception
    found.globals["strftime_now"] = strftime_now
    return found


@lru_cache(maxsize=8)
def _compiled(text: str) -> jinja2.Template:
    return environment().from_string(text)


def content_format(text: str) -> str:
    """Return how a template takes the content of a message: "openai", as a list of parts, or "string".

    Raises jinja2.TemplateSyntaxError.
    """
    template = _compiled(text)
    parts = [{"type": "text", "text": probe} for probe in _PROBES]
    talks = [[{"role": "user", "content": parts}]]
    talks += [[{"role": "system", "content": "0"}, *talks[0]], [*talks[0], {"role": "assistant", "content": parts}]]
    for messages in talks:
        try:
            rendered = template.render(messages=messages, tools=None, documents=None, add_generation_prompt=True)
        except Exception:  # noqa: S112 (a template may refuse what it likes)
            continue
        if all(probe in rendered for probe in _PROBES) and not any(q in rendered for q in ("'type'", '"type"')):
            return "openai"
    return "string"


def render(text: str, messages: list[dict[str, Any]], *, go_on: Any, variables: dict[str, Any], most: int) -> str:
    """Return the prompt of a conversation; with `go_on` it ends inside the last message, as in transformers.

    `variables` are what the template may read beside the messages; the prompt has up to `most` characters. Raises
    whatever the template raises, ValueError where the last message cannot be continued, and TooLong.
    """
    if not go_on:
        return _bounded(_compiled(text).render(**{**variables, "messages": messages}), most)
    key = go_on if isinstance(go_on, str) else "content"
    messages = deepcopy(messages)
    last = messages[-1].get(key)
    if last is None or key not in text:
        raise ValueError(f"the last message has no {key!r} to continue, or the template does not read it")
    if isinstance(last, list):
        block = next((one for one in reversed(last) if isinstance(one, dict) and "text" in one), None)
        if block is None:
            raise ValueError("the last message has no text to continue")
        last, block["text"] = block["text"], block["text"] + _TAG
    else:
        messages[-1][key] = last + _TAG
    rendered = _bounded(_compiled(text).render(**{**variables, "messages": messages}), most + len(_TAG))
    if last.strip() not in rendered or _TAG.strip() not in rendered:
        raise ValueError("the template does not render the last message as it is: it cannot be continued")
    at = rendered.rindex(_TAG.strip())
    return rendered[:at] if rendered[at : at + len(_TAG)] == _TAG else rendered[:at].rstrip()


def answer(order: dict[str, Any]) -> dict[str, Any]:
    """Return the answer to one order; "fatal" where this process may not be as it was."""
    try:
        if "compile" in order:
            return {"format": content_format(order["compile"])}
        return {
            "text": render(
                order["template"],
                order["messages"],
                go_on=order["continue"],
                variables=order["variables"],
                most=order["most"],
            )
        }
    except MemoryError:
        return {"fatal": f"needs more than {MEMORY // MIB} MiB of memory"}
    except RecursionError:
        return {"fatal": "calls itself too deeply"}
    except jinja2.TemplateSyntaxError as error:
        return {"error": f"line {error.lineno}: {error.message}"[:LONGEST_REASON]}
    except Exception as error:
        return {"error": str(error)[:LONGEST_REASON] or type(error).__name__}


def main() -> None:
    """Answer orders until the parent closes its end, or is killed."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group, and requests of the server go on
    reading, writing = sys.stdin.buffer, sys.stdout.buffer
    for name in _LATER:
        import_module(name)
    datetime.now().astimezone().strftime("%c %Z")  # reads the time zone and the locale
    answer(
        {
            "template": "{{ raise_exception('\\n' | pprint) }}",
            "messages": [],
            "continue": False,
            "variables": {},
            "most": 0,
        }
    )
    limits = {"AS": MEMORY, "CORE": 0, "FSIZE": 0, "NOFILE": 3}  # stdin, stdout and stderr are open
    for name, most in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))
    _send(writing, {"ready": True})
    while head := reading.read(HEAD.size):
        used = resource.getrusage(resource.RUSAGE_SELF)
        resource.setrlimit(
            resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + CPU_S + 1, resource.RLIM_INFINITY)
        )
        found = answer(json.loads(reading.read(HEAD.unpack(head)[0])))
        _send(writing, found)
        if "fatal" in found:
            return


def _bounded(text: str, most: int) -> str:
    if len(text) > most:
        raise TooLong(f"makes a prompt of {len(text)} characters, and one of this model has at most {most}")
    text.encode()  # raises for half a character, which no tokenizer takes
    return text


def _send(writing: Any, message: dict[str, Any]) -> None:
    body = json.dumps(message, ensure_ascii=False).encode(errors="replace")
    writing.write(HEAD.pack(len(body)) + body)
    writing.flush()


if __name__ == "__main__":
    main()
