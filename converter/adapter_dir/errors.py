"""The errors of folders on disk."""

from converter.errors import AstraError


class AdapterError(AstraError):
    """What can be wrong with an adapter folder; the message is one line that says what to do.

    AdapterError
    ├── NotAnAdapter      the folder is missing, or files that make it an adapter are
    ├── MalformedAdapter  its files contradict each other or hold unusable numbers
    ├── UnsafeAdapter     reading it could do more than read it: pickles, links that lead out of it
    ├── WrongBase         it was trained on another base model
    ├── BaseNotFound      the base model is not a folder with a model, nor on the hub
    ├── OutputExists      the output folder is already there
    └── CannotWrite       the output folder cannot be made
    """


class NotAnAdapter(AdapterError):
    """The folder is missing, or files that make it an adapter are."""


class MalformedAdapter(AdapterError):
    """The adapter's files contradict each other or hold unusable numbers."""


class UnsafeAdapter(AdapterError):
    """Reading the adapter could do more than read it."""


class WrongBase(AdapterError):
    """The adapter was trained on another base model."""


class BaseNotFound(AdapterError):
    """The base model is not a folder with a model, nor on the hub."""


class OutputExists(AdapterError):
    """The output folder is already there."""


class CannotWrite(AdapterError):
    """The output folder cannot be made."""
