"""`astra-serve`: starts a server, or with `adapters` as its first word asks one that runs."""

import sys


def main(argv: list[str] | None = None) -> int:
    """Run `astra-serve` and return its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    # Each imports what it needs alone: who asks a server does not wait for torch.
    if argv[:1] == ["adapters"]:
        from astra_serve.client import adapters_cli

        return adapters_cli.main(argv[1:])
    from astra_serve import start

    return start.main(argv)
