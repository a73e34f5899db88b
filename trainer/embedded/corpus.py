"""The pre-training corpus of the embedded base: the standard library's source, and generated text.

About half of the text is windows of standard-library source, without the held-out modules. The rest is exercises for
copying and looking up, which a model of this size does not learn from code, and *unpaired* parts of the tasks:
questions without answers and answers without questions. So the base knows the words of the tasks, but cannot do them.
"""

import random
from collections.abc import Iterator, Sequence

from trainer.embedded import stdlib, tasks


def _word(rng: random.Random, words: Sequence[str]) -> str:
    """Return a known identifier, a made-up word, a compound of both or a number."""
    kind = rng.random()
    if kind < 0.45:
        return rng.choice(words)
    made_up = "".join(rng.choices(tasks.SYLLABLES, k=rng.randint(2, 4)))
    if kind < 0.75:
        return made_up
    if kind < 0.9:
        return f"{made_up}{rng.choice('_ ')}{rng.choice(words)}"
    return str(rng.randint(0, 99999))


def _exercise(rng: random.Random, words: Sequence[str]) -> str:
    """Return a document that can be predicted only by copying or looking up earlier parts of it."""
    items = [_word(rng, words) for _ in range(rng.randint(2, 7))]
    sep = rng.choice((", ", " ", "; ", "\n", " | "))
    text = sep.join(items)
    match rng.randrange(10):
        case 0:
            return f"{text}\n{text}\n{text}"
        case 1:
            return f"({text}) -> [{text}]"
        case 2:
            return f"<|user|>\nRepeat: {text}<|end|>\n<|assistant|>\n{text}<|end|>"
        case 3:
            pairs = {key: _word(rng, words) for key in items}
            asked = rng.sample(sorted(pairs), len(pairs))
            given = sep.join(f"{key}={value}" for key, value in pairs.items())
            return given + "".join(f"\n{key}: {pairs[key]}" for key in asked)
        case 4:
            removed = rng.choice(items)
            return f"{text}\nWithout {removed}: {sep.join(x for x in items if x != removed)}"
        case 5:
            k = rng.randrange(len(items))
            return f"{text}\nFirst: {items[0]}\nLast: {items[-1]}\nAfter {items[k - 1]}: {items[k]}"
        case 6:
            name = _word(rng, words).replace(" ", "_")
            return f"x = {name}({text})\ny = {name}({text})"
        case 7 | 8:
            start = rng.randrange(len(items))
            span = sep.join(items[start : rng.randint(start + 1, len(items))])
            return f'{text}\n"{span}"'
        case _:
            a, b = rng.randint(0, 99), rng.randint(0, 99)
            return f"{a} + {b} = {a + b}"


def _unpaired(rng: random.Random, task_rows: dict[str, Iterator[tasks.Row]]) -> str:
    """Return the question or the answer of one training row, never both."""
    row = next(task_rows[rng.choice(sorted(task_rows))])
    if "messages" in row:
        return str(rng.choice(row["messages"])["content"])
    if rng.random() < 0.5:
        return str(row["completion"]).strip()
    return "\n".join(str(row["prompt"]).split("\n")[:-1])  # without the cue "SQL:" or "Arguments:"


def documents(seed: int) -> Iterator[str]:
    """Yield an endless stream: of eight characters about four are library source, three exercises, one task parts."""
    rng = random.Random(seed)
    sources = [text for _, text in stdlib.sources(held_out=False)]
    words = stdlib.identifiers()
    lengths = [len(source) for source in sources]
    task_rows = {name: make(random.Random(seed), False, ()) for name, make in tasks.TASKS.items()}
    while True:
        source = rng.choices(sources, lengths)[0]
        start = rng.randrange(max(1, len(source) - 800))
        start = source.rfind("\n", 0, start) + 1
        yield source[start : start + 800]
        # An exercise has about 90 characters, an unpaired part about 60: together about as many as one window.
        yield from (_exercise(rng, words) for _ in range(6))
        yield from (_unpaired(rng, task_rows) for _ in range(3))
