"""The root of all errors that a user's input can cause, and one-line texts of errors.

Imports only the standard library.
"""

import re


class AstraError(ValueError):
    """An error whose message is one line with the fault and its remedy; commands print it and exit with status 2.

    AstraError
    ├── AdapterError    converter: an adapter folder or a base model
    ├── TrainerError    trainer: settings, data or a run of `astra-train`
    └── ServeError      astra_serve: a document, a source, a version or the engine
    """


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text without secrets, or the error's class name if it has no text."""
    return without_secrets((str(error).strip() or type(error).__name__).splitlines()[0])


def without_secrets(text: str) -> str:
    """Return `text` without the passwords and query strings of the URLs in it."""
    return re.sub(r"(://[^\s'\"?]*)\?[^\s'\"]*", r"\1", re.sub(r"//[^/\s]*@", "//", text))
