"""The kinds of a model's layers, such as q_proj: one for all blocks."""

from collections.abc import Sequence


def kinds_of(names: Sequence[str]) -> dict[str, str]:
    """Return the kind of each layer: its name without numbers, and with as few leading parts as keep kinds distinct."""
    full = {name: ".".join("*" if part.isdigit() else part for part in name.split(".")) for name in names}
    kinds = set(full.values())
    short = {}
    for kind in kinds:
        parts = kind.split(".")
        ends = (".".join(parts[-n:]) for n in range(1, len(parts)))
        short[kind] = next((end for end in ends if sum(f".{k}".endswith(f".{end}") for k in kinds) == 1), kind)
    return {name: short[kind] for name, kind in full.items()}
