"""`astra-serve`: starts a server.

With `adapters` or `usage` as its first word it calls the admin API of servers that run; with `keys` it edits a keys
document.
"""

import sys


def main(argv: list[str] | None = None) -> int:
    """Run `astra-serve` and return its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    # Each branch imports its own modules: the client does not wait for torch, and a server that starts hears signals.
    if argv[:1] == ["adapters"]:
        from astra_serve.client import adapters_cli

        return adapters_cli.main(argv[1:])
    if argv[:1] == ["usage"]:
        from astra_serve.client import usage_cli

        return usage_cli.main(argv[1:])
    if argv[:1] == ["keys"]:
        from astra_serve.client import keys_cli

        return keys_cli.main(argv[1:])
    from astra_serve.engine.process_guard import ended_by_signals
    from astra_serve.observe.json_lines import JsonLines

    lines = JsonLines()
    with ended_by_signals(lines.close):
        from astra_serve import start

        return start.main(argv, lines)
