"""The errors of settings, data and runs of the trainer."""

from converter.errors import AstraError


class TrainerError(AstraError):
    """The message is one line that says what is wrong and what to do.

    TrainerError
    ├── ConfigError    an unknown key, a value that cannot be used, or settings that exclude each other
    ├── DataError      the data, or one row of it, cannot be used
    ├── TargetError    the target layers do not exist or are too small for the rank
    ├── ResumeError    the unfinished run beside the output folder is another one, or is in the way
    ├── TrainingError  the loss or the adapter is no longer finite
    └── Interrupted    a person stopped the run; what was reached is saved
    """


class ConfigError(TrainerError):
    """An unknown key, a value that cannot be used, or settings that exclude each other."""


class DataError(TrainerError):
    """The data, or one row of it, cannot be used."""


class TargetError(TrainerError):
    """The target layers do not exist or are too small for the rank."""


class ResumeError(TrainerError):
    """The unfinished run beside the output folder is another one, or is in the way."""


class TrainingError(TrainerError):
    """The loss or the adapter is no longer finite."""


class Interrupted(TrainerError):
    """A person stopped the run; what was reached is saved."""
