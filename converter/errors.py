"""The root of every error that a user's input can cause, and how an error becomes one line. Imports nothing heavy."""

import re


class AstraError(ValueError):
    """An error whose message is one line that says what is wrong and what to do; commands print it and exit with 2.

    AstraError
    ├── AdapterError    converter.adapter_dir: a folder on disk
    ├── TrainerError    trainer: settings, data or a run of `astra-train`
    └── ServeError      astra_serve: a document, a source, a version or the engine
    """


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text without secrets; the error's class name where it has no text."""
    return without_secrets((str(error).strip() or type(error).__name__).splitlines()[0])


def without_secrets(text: str) -> str:
    """Return `text` without the passwords and query strings of the URLs in it."""
    return re.sub(r"(://[^\s'\"?]*)\?[^\s'\"]*", r"\1", re.sub(r"//[^/\s]*@", "//", text))
