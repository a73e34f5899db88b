"""What can be wrong with what a user hands to the server, and with what it is asked to serve."""

import re


class ServeError(ValueError):
    """The message is one line that says what is wrong and what to do.

    ServeError
    ├── BadDocument   the desired state cannot be understood
    ├── Conflict      somebody else has changed the document meanwhile
    ├── CannotFetch   an adapter's source cannot be read
    ├── Damaged       a version in the store is no longer what was published
    ├── InUse         another server has the store
    ├── ProbeFailed   the engine does not answer as the adapter should
    ├── Unavailable   an adapter that is known cannot answer now
    └── EngineLost    the engine has died, or has been silent for too long
    """


class BadDocument(ServeError):
    """The desired state cannot be understood."""


class Conflict(ServeError):
    """Somebody else has changed the document meanwhile."""


class CannotFetch(ServeError):
    """An adapter's source cannot be read; trying again may help."""


class Damaged(ServeError):
    """A version in the store is no longer what was published."""


class InUse(ServeError):
    """Another server has the store."""


class ProbeFailed(ServeError):
    """The engine does not answer as the adapter should."""


class Unavailable(ServeError):
    """An adapter that is known cannot answer now."""

    def __init__(self, message: str, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s  # None: trying again does not help


class EngineLost(ServeError):
    """The engine has died, or has been silent for too long; a supervisor should start the server again."""


def first_line(error: BaseException) -> str:
    """Return what an error of somebody else's says, in one line and without secrets."""
    return without_secrets((str(error).strip() or type(error).__name__).splitlines()[0])


def without_secrets(text: str) -> str:
    """Return `text` without what URLs may carry before an @ and behind a ?."""
    return re.sub(r"\?[^\s'\"]*", "", re.sub(r"//[^/\s]*@", "//", text))
