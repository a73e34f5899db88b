"""The errors of a server and of its clients."""

from converter.errors import AstraError


class ServeError(AstraError):
    """The message is one line that says what is wrong and what to do.

    ServeError
    ├── BadDocument    the desired state cannot be understood
    ├── Conflict       somebody else has changed the document meanwhile
    ├── Superseded     a newer change of the same adapter took the place of this one
    ├── UnknownAdapter no adapter has this name
    ├── NotPublished   a version was not served: it could not be prepared, or served
    ├── CannotFetch    an adapter's source cannot be read
    ├── CannotStore    the store cannot be written: its disk is full, or read-only
    ├── BadUpload      the bytes of an upload are no adapter that may be received
    ├── Damaged        a version in the store is no longer as it was published
    ├── InUse          another server uses the store
    ├── ProbeFailed    the engine does not answer as the adapter should
    ├── TemplateFailed a chat template of an adapter cannot be compiled, or makes no prompt of a request
    ├── Unavailable    an adapter that is known cannot answer now
    ├── BadQuery       a parameter of a question cannot be understood
    ├── LimitExceeded  a tenant has used what it may use for now
    ├── EngineLost     the engine has died, or has been silent for too long
    ├── Refused        a server has refused a call of a client, for a reason that is none of these
    └── NoAnswer       no server answers a client there, or none with the admin API
    """


class BadDocument(ServeError):
    """The desired state cannot be understood."""


class Conflict(ServeError):
    """Somebody else has changed the document meanwhile."""


class Superseded(ServeError):
    """A newer change of the same adapter took the place of this one."""


class UnknownAdapter(ServeError):
    """No adapter has this name."""


class NotPublished(ServeError):
    """A version was not served: it could not be prepared, or served; the message has the reason."""


class CannotFetch(ServeError):
    """An adapter's source cannot be read; trying again may help."""


class CannotStore(ServeError):
    """The store cannot be written, as when its disk is full or read-only; trying again may help."""


class BadUpload(ServeError):
    """The bytes of an upload are no adapter that may be received."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status  # of HTTP


class Damaged(ServeError):
    """A version in the store is no longer as it was published."""


class InUse(ServeError):
    """Another server uses the store."""


class ProbeFailed(ServeError):
    """The engine does not answer as the adapter should."""


class TemplateFailed(ServeError):
    """A chat template of an adapter cannot be compiled, or makes no prompt of a request; the message is the reason."""


class Unavailable(ServeError):
    """An adapter that is known cannot answer now."""

    def __init__(self, message: str, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s  # None: trying again does not help


class BadQuery(ServeError):
    """A parameter of a question cannot be understood."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param  # its name


class LimitExceeded(ServeError):
    """A tenant has used what it may use for now; the message names the limit."""

    def __init__(self, message: str, retry_after_s: int | None, kind: str = "requests") -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s  # None: trying again does not help
        self.kind = kind  # the unit of the limit, as OpenAI's type of the error: requests or tokens


class EngineLost(ServeError):
    """The engine has died, or has been silent for too long; a supervisor should start the server again."""


class Refused(ServeError):
    """A server has refused a call of a client, for a reason that is none of the others; the message is the server's."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status  # of HTTP


class NoAnswer(ServeError):
    """No server answers a client there, or none with the admin API; the call may have been carried out."""
