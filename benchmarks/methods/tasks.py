"""The data sets: generated problems, and text from this Python installation; nothing is downloaded.

    math     word problems -> two steps of arithmetic and the number             (generated)
    intent   a support ticket -> which of six intents, product and order number  (generated, classification)
    cpp      C++ headers of the installed torch                                  (real text)
    python   the standard library                                                (real text)
    topic    a docstring of the standard library -> its package, of eight        (real text, classification)

    chain_sum, sentence_reordering, gsm_symbolic     tasks of reasoning-gym, made by others, as chats (pip install
                                                     reasoning-gym==0.1.25)
    family_relationships, syllogism                  the same, for classification: 12 relations; yes or no

The digest of a problem, a file's path or a docstring determines its split, so none of them is in two splits. A few
windows of boilerplate occur in several files.
"""

import ast
import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch

from trainer.data import Row
from trainer.embedded import stdlib
from trainer.embedded import tasks as embedded

Split = Literal["train", "validation", "test"]
NAMES = "Anna Ben Carla David Emma Felix Greta Henry Iris Jonas Karin Leo Maria Noah Olga Paul".split()
THINGS = "apples books coins stamps pens cards shells marbles stickers buttons cups keys".split()
TOPICS = "tkinter asyncio importlib email distutils logging multiprocessing xml".split()
# Sizes with which a small model does a part of the problems: with reasoning-gym's defaults nearly none.
PUBLIC: dict[str, dict[str, int]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2},
    "sentence_reordering": {"min_words_in_sentence": 3, "max_words_in_sentence": 8},
    "gsm_symbolic": {},
    "family_relationships": {},
    "syllogism": {},
}
RELATIONS = (
    "brother daughter father father-in-law grandfather grandmother husband mother mother-in-law sister son wife"
).split()
CLASSES = {"topic": TOPICS, "family_relationships": RELATIONS, "syllogism": ["No", "Yes"]}  # of classification tasks
WINDOW = 120  # characters of a row of text


def rows(task: str, split: Split, n: int) -> list[Row]:
    """Return `n` distinct rows of a task's split, always the same ones, or fewer if there are no more."""
    found: dict[str, Row] = {}
    for row in islice(TASKS[task](random.Random(f"{task} {split}"), split), 10 * n):
        found.setdefault(json.dumps(row), row)
        if len(found) == n:
            break
    return list(found.values())


def math_rows(rng: random.Random, split: Split) -> Iterator[Row]:
    """Yield word problems with two steps of arithmetic, which the answer shows as in GSM8K."""
    while True:
        name, other = rng.sample(NAMES, 2)
        thing = rng.choice(THINGS)
        a, b, c = rng.randint(5, 14), rng.randint(2, 9), rng.randint(2, 6)
        x, y = rng.randint(2, 5), rng.randint(2, 5)
        text, first, sign, last = rng.choice(
            [
                (f"{name} has {a} {thing}, gets {b} more and gives {c} to {other}.", (a, "+", b), "-", c),
                (f"{name} has {a} {thing}. {other} has {b} more than {name}.", (a, "+", b), "+", a),
                (f"{name} buys {x} boxes of {y} {thing} and finds {c}.", (x, "*", y), "+", c),
                (f"{name} and {other} find {a} and {b} {thing} and sell {c}.", (a, "+", b), "-", c),
                (f"{name} has {a + b} {thing}, loses {b} and buys {c}.", (a + b, "-", b), "+", c),
            ]
        )
        middle = _calculate(*first)
        result = _calculate(middle, sign, last)
        steps = f"{' '.join(map(str, first))} = {middle}, {middle} {sign} {last} = {result}"
        if _split(text) == split:
            yield {"prompt": f"{text} How many in all?\n", "completion": f"{steps}. Answer: {result}"}


def _calculate(a: int, sign: str, b: int) -> int:
    return {"+": a + b, "-": a - b, "*": a * b}[sign]


def intent_rows(_: random.Random, split: Split) -> Iterator[Row]:
    """Yield support tickets with intent, product and order number: the embedded base's task; held-out products."""
    if split == "train":
        yield from embedded.rows("intent", test=False, n=4000)
    else:
        held_out = embedded.rows("intent", test=True, n=2000)
        yield from (row for row in held_out if (_split(json.dumps(row)) == "test") == (split == "test"))


def cpp_rows(rng: random.Random, split: Split) -> Iterator[Row]:
    """Yield windows of C++ headers, including comments."""
    return _text_rows(rng, headers(), split)


def python_rows(rng: random.Random, split: Split) -> Iterator[Row]:
    """Yield windows of the standard library."""
    return _text_rows(rng, library(), split)


def topic_rows(rng: random.Random, split: Split) -> Iterator[Row]:
    """Yield the first paragraphs of docstrings with the packages that they belong to."""
    found = [(text, label) for text, label in _docstrings().items() if _split(text) == split]
    for text, label in rng.sample(found, len(found)):
        yield {"text": text, "label": label}


def public_rows(name: str, settings: Mapping[str, Any], _: random.Random, split: Split) -> Iterator[Row]:
    """Yield problems of reasoning-gym as chats, or as texts with a label; the answer is learned without its working."""
    from reasoning_gym import create_dataset  # optional, and slow to import

    for problem in create_dataset(name, seed=0, size=8000, **settings):
        # A sentence is shuffled in several ways: all of them belong to one split.
        if _split(problem["answer" if name == "sentence_reordering" else "question"]) == split:
            if name in CLASSES:
                yield {"text": problem["question"], "label": problem["answer"]}
            else:
                yield embedded.as_chat({"prompt": problem["question"], "completion": problem["answer"]})


def random_rows(rng: random.Random, _: Split) -> Iterator[Row]:
    """Yield random printable characters, for calibration only."""
    while True:
        yield {"text": "".join(chr(rng.randint(32, 126)) for _ in range(WINDOW))}


TASKS: dict[str, Callable[[random.Random, Split], Iterator[Row]]] = {
    "math": math_rows,
    "intent": intent_rows,
    "cpp": cpp_rows,
    "python": python_rows,
    "topic": topic_rows,
    **{name: partial(public_rows, name, settings) for name, settings in PUBLIC.items()},
    "random": random_rows,
}


def windows(rng: random.Random, texts: Mapping[str, str], split: Split, size: int) -> Iterator[str]:
    """Yield windows of `size` characters, each from the start of a line, of the `texts` (by path) in `split`."""
    chosen = [text for path, text in texts.items() if _split(path) == split]
    lengths = [len(text) for text in chosen]
    while True:
        text = rng.choices(chosen, lengths)[0]
        start = text.rfind("\n", 0, rng.randrange(max(1, len(text) - size))) + 1
        window = text[start : start + size]
        if window.strip():
            yield window


@cache
def headers() -> dict[str, str]:
    """Return the C++ headers of the installed torch, by path."""
    root = Path(torch.__file__).parent / "include"
    paths = sorted(path for folder in ("ATen/core", "c10", "torch") for path in (root / folder).rglob("*.h"))
    return {str(path.relative_to(root)): path.read_text(encoding="utf-8", errors="replace") for path in paths}


@cache
def library() -> dict[str, str]:
    """Return the sources of the standard library on which the embedded base was trained, by path."""
    return dict(stdlib.sources(held_out=False))


def _text_rows(rng: random.Random, texts: Mapping[str, str], split: Split) -> Iterator[Row]:
    return ({"text": window} for window in windows(rng, texts, split, WINDOW))


@cache
def _docstrings() -> dict[str, str]:
    found = {}
    for held_out in (False, True):
        for path, source in stdlib.sources(held_out):
            package = path.split("/")[0]
            if package not in TOPICS:
                continue
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                    text = (ast.get_docstring(node) or "").split("\n\n")[0].replace("\n", " ")
                    if 30 <= len(text) <= 250:
                        found[text] = package
    return dict(sorted(found.items()))


def _split(text: str) -> Split:
    bucket = hashlib.sha256(text.encode()).digest()[0] % 8
    return "test" if bucket == 0 else "validation" if bucket == 1 else "train"
