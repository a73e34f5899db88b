"""The errors of adapter folders and base models."""

from converter.errors import AstraError


class AdapterError(AstraError):
    """A fault of an adapter folder or its base; the message is one line with the fault and its remedy.

    AdapterError
    ├── NotAnAdapter        the folder is missing, or a file that every adapter has
    ├── MalformedAdapter    its files contradict each other or contain unusable numbers
    ├── UnsafeAdapter       reading it could run code (pickles) or read files outside the folder (links)
    ├── WrongBase           it was trained on another base model
    ├── BaseNotFound        the base model is neither a local model folder nor on the hub
    ├── OutputExists        the output folder exists already
    ├── CannotWrite         the output folder cannot be written
    └── VerificationFailed  converter.check_factors: the written LoRA differs from the adapter that was read
    """


class NotAnAdapter(AdapterError):
    """The folder is missing, or a file that every adapter has."""


class MalformedAdapter(AdapterError):
    """The adapter's files contradict each other or contain unusable numbers."""


class UnsafeAdapter(AdapterError):
    """Reading the adapter could run code or read files outside its folder."""


class WrongBase(AdapterError):
    """The adapter was trained on another base model."""


class BaseNotFound(AdapterError):
    """The base model is neither a local model folder nor on the hub."""


class OutputExists(AdapterError):
    """The output folder exists already."""


class CannotWrite(AdapterError):
    """The output folder cannot be written."""
