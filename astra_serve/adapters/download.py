"""Downloads one adapter, in a process of its own: `python -m astra_serve.adapters.download`, the order on stdin.

A source that accepts a connection and sends nothing cannot be interrupted in a thread; a process can be ended. The
order is JSON, {"source", "folder", "files", "optional"}: a source may hold a password, and arguments are public.
"""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from astra_serve.parent_death import end_with_parent
from converter.errors import first_line


def main() -> int:
    """Fetch the files; return 1 with one line on stderr when that fails."""
    end_with_parent()
    order = json.load(sys.stdin)
    try:
        (_from_hub if order["source"].startswith("hf://") else _from_url)(order, Path(order["folder"]))
    except Exception as error:  # each file system has errors of its own
        print(first_line(error), file=sys.stderr)
        return 1
    return 0


def _from_hub(order: dict[str, Any], folder: Path) -> None:
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    from huggingface_hub import snapshot_download  # half a second that no other source needs

    repository, _, revision = order["source"].removeprefix("hf://").partition("@")
    found = Path(snapshot_download(repository, revision=revision or None, allow_patterns=order["files"]))
    for name in order["files"]:
        if (found / name).is_file():
            shutil.copyfile(found / name, folder / name)


def _from_url(order: dict[str, Any], folder: Path) -> None:
    import fsspec

    system, path = fsspec.core.url_to_fs(order["source"])
    for name in order["files"]:
        remote = f"{path.rstrip('/')}/{name}"
        if name not in order["optional"] or system.exists(remote):
            system.get_file(remote, str(folder / name))


if __name__ == "__main__":
    sys.exit(main())
