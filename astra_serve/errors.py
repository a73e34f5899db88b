"""What can be wrong with what a user hands to the server, and with what it is asked to serve."""

from converter.errors import AstraError


class ServeError(AstraError):
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
