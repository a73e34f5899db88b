"""What can be wrong with what a user hands to the trainer."""


class TrainerError(ValueError):
    """The message is one line that says what is wrong and what to do.

    TrainerError
    ├── ConfigError  an unknown key, or a value that cannot be used
    ├── DataError    the data file, or one row of it, cannot be used
    └── TargetError  the target layers do not exist or are too small for the rank
    """


class ConfigError(TrainerError):
    """An unknown key, or a value that cannot be used."""


class DataError(TrainerError):
    """The data file, or one row of it, cannot be used."""


class TargetError(TrainerError):
    """The target layers do not exist or are too small for the rank."""
