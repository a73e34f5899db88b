"""Which modules a PEFT config means: by rank_pattern, alpha_pattern, target_modules, exclude_modules, and by
target_parameters, which name weights of linear layers.

PEFT evaluates them as regular expressions of Python's `re`, whose time can grow exponentially with the length of a
name: `(a+)+$` never ends. Here RE2 matches them, in time proportional to the name. An expression that RE2 cannot
express (a look-ahead, a back-reference), or reads differently from `re`, is refused. Keys that are plain names, of
which a large adapter has thousands, are looked up.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import re2

from converter.adapter_dir.errors import MalformedAdapter
from converter.adapter_dir.folder import Json

V = TypeVar("V")

MAX_LENGTH = 4000  # characters of an expression
MAX_MATCHES = 200_000  # expressions x modules: RE2 needs about 10 microseconds for each, called from Python
MAX_COMPARED = 2 * 10**7  # characters of names that are compared with keys of the same length: about 2 s
# Syntax that both libraries accept with different meanings, or only RE2: classes by name, \Q...\E, {,n}, global flags.
_READ_DIFFERENTLY = re.compile(r"\\[pPQECzx]|\[:|\{,|\(\?[a-zA-Z^-]+\)|\(\?<|\(\?[a-zA-Z-]*U[a-zA-Z-]*:")
_NAME = re.compile(r"\^?[\w.-]+")


def first_matches(keys: Collection[str], modules: Sequence[str], where: str) -> dict[str, str]:
    """Return, by module, the first of the `keys` of rank_pattern or alpha_pattern that means it.

    As in PEFT, a key means a module if `(.*\\.)?(key)$` matches the whole name. `where` names the config and its field.
    Raises MalformedAdapter.
    """
    position = {key: number for number, key in enumerate(keys)}
    names = [key for key in keys if _NAME.fullmatch(key)]
    expressions = [key for key in keys if not _NAME.fullmatch(key)]
    _check_number(len(expressions), modules, where)
    compiled = [(key, _compiled(rf"(.*\.)?({key})$", key, where)) for key in expressions]
    found = {}
    for module, candidates in _by_name(names, modules, where):
        candidates += [key for key, expression in compiled if expression.match(module)]
        if candidates:
            found[module] = min(candidates, key=position.__getitem__)
    return found


def untargeted(config: Json, modules: Sequence[str], where: str) -> list[str]:
    """Return the modules that PEFT would not adapt with this config, and whose tensors it would ignore.

    A config without target_modules and target_parameters, or with "all-linear", targets all. Raises MalformedAdapter.
    """
    weights = {name.removesuffix(".weight") for name in names_in(config, "target_parameters", where)}
    target, exclude = (_names_or_expression(config, name, where) for name in ("target_modules", "exclude_modules"))
    if target == "all-linear" or not (target or weights):
        targeted = set(modules)
    else:
        targeted = _meant(target, modules, f"target_modules in {where}")
    if exclude:
        targeted -= _meant(exclude, modules, f"exclude_modules in {where}")
    layers = config.get("layers_to_transform")
    layers = (
        [layers]
        if type(layers) is int
        else [one for one in layers if type(one) is int]
        if isinstance(layers, list)
        else []
    )
    if layers and not config.get("layers_pattern") and not isinstance(target, str):
        numbers = {module: _layer_number(module) for module in targeted}
        named = set(target)  # by their whole names, which PEFT adapts in any layer
        targeted = {module for module, number in numbers.items() if module in named or number in layers}
    targeted |= {module for module in modules if any(end in weights for end in _ends(module))}
    return [module for module in modules if module not in targeted]


def names_in(config: Json, key: str, where: str) -> list[str]:
    """Return the list of names under a key of a config; `where` names the config. Raises MalformedAdapter."""
    value = config.get(key) or []
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise MalformedAdapter(f"{where}: {key} must be a list of names")
    return value


def pattern_value(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """Return the value of a pattern whose keys are plain names, as `adapter_dir` writes them, for `module`.

    The first key counts that equals the module's name or its end after a dot; a key with a leading ^ must equal the
    whole name. Without such a key, `default`.
    """
    parts = module.split(".")
    keys = {f"^{module}", *(".".join(parts[i:]) for i in range(len(parts)))}
    found = [key for key in keys if key in (pattern or {})]
    if len(found) > 1:
        found = [next(key for key in pattern or {} if key in keys)]
    return (pattern or {})[found[0]] if found else default


def _by_name(names: Sequence[str], modules: Sequence[str], where: str) -> Iterator[tuple[str, list[str]]]:
    """Yield each module with the keys of `names` that mean it; a dot in a key is any character, as in PEFT.

    Raises MalformedAdapter.
    """
    groups: dict[int, dict[tuple[int, ...], set[str]]] = defaultdict(lambda: defaultdict(set))
    for name in names:
        plain = name.removeprefix("^")
        dots = tuple(i for i, character in enumerate(plain) if character == ".")
        groups[len(plain)][dots].add(name)
    compared = 0
    for module in modules:
        found = []
        for end in _ends(module):
            compared += len(end) * len(groups.get(len(end), {}))
            if compared > MAX_COMPARED:
                raise MalformedAdapter(f"{where} has {len(names)} keys, too many for {len(modules)} modules")
            for dots, keys in groups.get(len(end), {}).items():
                masked = list(end)
                for i in dots:
                    masked[i] = "."
                key = "".join(masked)
                found += [key] if key in keys else []
                found += [f"^{key}"] if end == module and f"^{key}" in keys else []
        yield module, found


def _meant(target: str | list[str], modules: Sequence[str], where: str) -> set[str]:
    if isinstance(target, str):
        _check_number(1, modules, where)
        expression = _compiled(target, target, where)
        return {module for module in modules if expression.fullmatch(module)}
    names = set(target)
    return {module for module in modules if any(end in names for end in _ends(module))}


def _layer_number(module: str) -> int | None:
    """Return the first number in a module's name, as PEFT finds it: model.layers.3.mlp has 3."""
    return next((int(part[:10]) for part in module.split(".")[2:-1] if part.isdecimal()), None)


def _ends(module: str) -> Iterator[str]:
    """Yield a module's name, and each end of it after a dot."""
    yield module
    for i, character in enumerate(module):
        if character == ".":
            yield module[i + 1 :]


def _names_or_expression(config: Json, name: str, where: str) -> str | list[str]:
    value = config.get(name) or []
    if not isinstance(value, str) and not (isinstance(value, list) and all(isinstance(one, str) for one in value)):
        raise MalformedAdapter(f"{where}: {name} must be a list of module names, or one regular expression")
    return value


def _check_number(expressions: int, modules: Sequence[str], where: str) -> None:
    if expressions * len(modules) > MAX_MATCHES:
        raise MalformedAdapter(
            f"{where} has {expressions} regular expressions for {len(modules)} modules: give module names"
        )
    if expressions and not all(map(str.isascii, modules)):
        raise MalformedAdapter(f"{where} has a regular expression, and a module's name is not ASCII: give module names")


def _compiled(expression: str, shown: str, where: str) -> Any:
    options = re2.Options()
    options.log_errors = False
    try:
        if len(shown) <= MAX_LENGTH and shown.isprintable() and not _READ_DIFFERENTLY.search(shown):
            return re2.compile(expression, options=options)
        reason = f"longer than {MAX_LENGTH} characters" if len(shown) > MAX_LENGTH else "not read alike by re and RE2"
    except re2.error as error:
        text = error.args[0] if error.args else ""
        reason = text.decode(errors="replace") if isinstance(text, bytes) else str(text)
    raise MalformedAdapter(
        f"{where}: {shown[:100]!r} is a regular expression that cannot be matched in linear time (RE2: "
        f"{reason[:100]}): give module names"
    )
