"""Three task families that the embedded base cannot do, and that an adapter learns in about a minute.

    signature  a real `def` line of the standard library -> its argument names   (split by module)
    sql        a question about a small schema -> one SELECT statement           (split by table)
    intent     a support ticket -> intent, product and order number as JSON      (split by product)

No module, table or product of the training split appears in the test split.

    python -m trainer.embedded.tasks --out DIR    writes NAME.train.jsonl and NAME.test.jsonl for each family
"""

import argparse
import ast
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from trainer.embedded import stdlib

Row = dict[str, Any]  # {"prompt", "completion"} or {"messages": [...]}, as astra-train reads them

# The last quarter of TABLES and of PRODUCTS belongs to the test split.
TABLES = (
    "employees products orders flights books students movies songs cities hotels players teams courses patients "
    "rooms tickets cars houses stores invoices recipes museums rivers planets animals drivers events farms banks "
    "lakes pilots authors awards badges bills boats boxes brands buses cakes cameras cards chairs clients clubs "
    "coins comments contracts cooks crops customers dancers deals desks devices doors dresses drinks engines exams "
    "factories fields files films fish flowers forests fruits gifts goals guests guides horses islands jobs judges "
    "kitchens ladders laptops leagues lessons letters loans locks machines mails maps markets meals medals members "
    "messages mines monitors mountains nurses offices painters papers parcels photos plants poems ports posts "
    "presents printers prizes bridges parks schools ships trains games doctors lawyers phones shelves speakers "
    "stamps streets suppliers tables tasks taxis teachers tents theaters tools tours towers toys tractors trees "
    "trips trucks vendors villages wines"
).split()
PRODUCTS = (
    "kettle lamp chair keyboard backpack grinder toaster blender cooker bottle mat case clock iron dryer fan pump "
    "knife pot hose box brush blanket towel light frame dish mirror sofa carpet pillow bicycle helmet wallet belt "
    "scarf gloves printer router monitor speaker microphone tripod drill hammer saw ladder bucket broom vase candle "
    "bowl plate fork oven fridge freezer dishwasher vacuum stove headphones mug board mill tent shoes jacket hat "
    "puzzle drum stand guitar violin skateboard surfboard racket rod bag alarm curtain"
).split()
KINDS = (
    "steel wooden red blue large small travel garden kitchen office leather plastic glass copper folding electric "
    "camping wireless round square winter summer cotton silver"
).split()
NUMBERS = "price age salary weight height rating score year stock length cost speed size budget points".split()
LABELS = "name city country color brand genre status owner category region level type street language team".split()
SYLLABLES = (
    "ba ce di fo gu ka le mi no pu ra se ti vo zu bra cle dri flo gru sta spe tri plo sma an er in ol ut".split()
)
TICKETS = {
    "refund": (
        "I want my money back for the {p}, order {o}.",
        "Please refund order {o}, the {p} broke after one day.",
        "The {p} from order {o} is not what I paid for. Give me a refund.",
    ),
    "track": (
        "Where is my {p}? The order number is {o}.",
        "Order {o} has not arrived yet, when will the {p} be here?",
        "Can you tell me the delivery date of the {p} in order {o}?",
    ),
    "cancel": (
        "Please cancel order {o}, I no longer need the {p}.",
        "I ordered the {p} by mistake. Stop order {o} before it ships.",
        "Do not send the {p}, I changed my mind about order {o}.",
    ),
    "exchange": (
        "The {p} in order {o} is too small, can I swap it for a larger one?",
        "I would like to exchange the {p} from order {o} for another color.",
        "Order {o}: please replace the {p} with a different model.",
    ),
    "invoice": (
        "I need a receipt for the {p}, order {o}.",
        "Send me the invoice of order {o} for the {p}, please.",
        "My accountant asks for the bill of order {o}, it was a {p}.",
    ),
    "repair": (
        "The {p} from order {o} makes a strange noise, can you fix it?",
        "My {p} stopped working, please repair it. Order {o}.",
        "Who can mend the {p} of order {o}? It is still under warranty.",
    ),
}
GREETINGS = ("", "Hello. ", "Hi there! ", "Good morning. ", "Dear team, ")


def _nouns(words: list[str], test: bool, extra_words: Sequence[str]) -> list[str]:
    """Return the held-out quarter of `words`, or the rest and `extra_words`, with about equal weight."""
    cut = len(words) * 3 // 4
    if test:
        return words[cut:]
    return words[:cut] * max(1, len(extra_words) // cut) + [word for word in extra_words if word not in words[cut:]]


@cache
def _signatures(held_out: bool) -> dict[str, str]:
    """Return the argument names of each `def` line of one split, for functions with two to five arguments."""
    found = {}
    for _, source in stdlib.sources(held_out):
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            a = node.args
            every = [*a.posonlyargs, *a.args, a.vararg, *a.kwonlyargs, a.kwarg]
            names = [x.arg for x in every if x is not None and x.arg not in ("self", "cls")]
            line = f"def {node.name}({ast.unparse(a)}):"
            if 2 <= len(names) <= 5 and len(line) <= 80:
                found[line] = ", ".join(names)
    return found


def signature_rows(rng: random.Random, test: bool, _: Sequence[str] = ()) -> Iterator[Row]:
    """Yield real signatures; a line that is in both splits (`def get(self, key, default=None):`) is a training row."""
    found = _signatures(held_out=test)
    if test:
        seen = _signatures(held_out=False)
        found = {line: names for line, names in found.items() if line not in seen}
    while True:
        for line in rng.sample(sorted(found), len(found)):
            yield {"prompt": f"{line}\nArguments:", "completion": " " + found[line]}


def sql_rows(rng: random.Random, test: bool, extra_words: Sequence[str] = ()) -> Iterator[Row]:
    """Yield questions about a table with two label columns and two number columns."""
    tables = _nouns(TABLES, test, extra_words)
    while True:
        table = rng.choice(tables)
        if rng.random() < 0.5:
            table = f"{''.join(rng.choices(SYLLABLES, k=2))}_{table}"
        label, other = rng.sample(LABELS, 2)
        number, second = rng.sample(NUMBERS, 2)
        columns = rng.sample([label, other, number, second], 4)
        n = rng.randint(2, 99)
        question, sql = rng.choice(
            [
                (f"average {number} by {label}", f"SELECT {label}, AVG({number}) FROM {table} GROUP BY {label};"),
                (f"count of {table} by {label}", f"SELECT {label}, COUNT(*) FROM {table} GROUP BY {label};"),
                (f"all {table} with {number} over {n}", f"SELECT * FROM {table} WHERE {number} > {n};"),
                (f"{label} of {table} with {number} under {n}", f"SELECT {label} FROM {table} WHERE {number} < {n};"),
                (f"top {n} {table} by {number}", f"SELECT * FROM {table} ORDER BY {number} DESC LIMIT {n};"),
                (f"different values of {label}", f"SELECT DISTINCT {label} FROM {table};"),
                (f"highest {number} and lowest {second}", f"SELECT MAX({number}), MIN({second}) FROM {table};"),
                (f"total {number} of {table}", f"SELECT SUM({number}) FROM {table};"),
            ]
        )
        yield {"prompt": f"Table {table} ({', '.join(columns)})\nShow {question}.\nSQL:", "completion": " " + sql}


def intent_rows(rng: random.Random, test: bool, extra_words: Sequence[str] = ()) -> Iterator[Row]:
    """Yield support tickets as chats, answered in JSON."""
    kinds, products = _nouns(KINDS, False, ()), _nouns(PRODUCTS, test, extra_words)
    while True:
        intent = rng.choice(sorted(TICKETS))
        brand = "".join(rng.choices(SYLLABLES, k=rng.randint(2, 3))).capitalize()
        kind = f"{rng.choice(kinds)} " if rng.random() < 0.5 else ""
        product = f"{brand} {kind}{rng.choice(products)}"
        order = str(rng.randint(1000, 99999))
        ticket = rng.choice(GREETINGS) + rng.choice(TICKETS[intent]).format(p=product, o=order)
        answer = json.dumps({"intent": intent, "product": product, "order": order})
        yield {"messages": [{"role": "user", "content": ticket}, {"role": "assistant", "content": answer}]}


TASKS: dict[str, Callable[[random.Random, bool, Sequence[str]], Iterator[Row]]] = {
    "signature": signature_rows,
    "sql": sql_rows,
    "intent": intent_rows,
}


def rows(task: str, *, test: bool, n: int, seed: int = 0) -> list[Row]:
    """Return up to `n` distinct rows of one split of `task`; the same seed gives the same rows.

    About half of the nouns in training rows are words of the standard library, so that an adapter learns to copy the
    noun of the question instead of a short list. No noun of the test rows is in a training row. There are about 3,000
    training rows and 350 test rows of `signature`, so a larger `n` gives fewer than `n` rows.
    """
    extra_words = [] if test else [word for word in stdlib.identifiers() if re.fullmatch("[a-z]{4,10}", word)]
    stream = TASKS[task](random.Random(f"{task} {test} {seed}"), test, extra_words)
    found: dict[str, Row] = {}
    for _ in range(20 * n):
        row = next(stream)
        found.setdefault(json.dumps(row), row)
        if len(found) == n:
            break
    return list(found.values())


def as_chat(row: Row) -> Row:
    """Return `row` as {"messages": [question, answer]}, for bases that were trained on chats."""
    if "messages" in row:
        return row
    question, answer = str(row["prompt"]), str(row["completion"]).strip()
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write(out: Path, *, n_train: int = 3000, n_test: int = 100, chat: bool = False) -> None:
    """Write `NAME.train.jsonl` and `NAME.test.jsonl` of each task into `out`; with `chat`, every row as a chat."""
    out.mkdir(parents=True, exist_ok=True)
    for task in TASKS:
        for split, test, n in (("train", False, n_train), ("test", True, n_test)):
            found = rows(task, test=test, n=n)
            text = "".join(json.dumps(as_chat(row) if chat else row) + "\n" for row in found)
            (out / f"{task}.{split}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the training and test rows of the three tasks as JSONL.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the files")
    parser.add_argument("--chat", action="store_true", help="write every row as a chat, for a base trained on chats")
    args = parser.parse_args()
    write(args.out, chat=args.chat)
