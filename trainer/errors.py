"""The errors that settings, data and training runs can cause. Imports nothing heavy."""

from converter.errors import AstraError


class TrainerError(AstraError):
    """Root of the trainer's errors. The message is one line that states the fault and the remedy.

    TrainerError
    ├── ConfigError    an unknown key, an invalid value, or settings that exclude each other
    ├── DataError      the data, or one of its rows, cannot be used
    ├── TargetError    a target layer does not exist, or is smaller than the rank
    ├── ResumeError    the unfinished run beside the output folder has other settings, or --resume was not given
    ├── TrainingError  the loss or a trained parameter is not finite
    │   └── OutOfMemory    the GPU or the machine has too little memory
    └── Interrupted    the run was stopped by SIGINT; its last step is saved
    """


class ConfigError(TrainerError):
    """An unknown key, an invalid value, or settings that exclude each other."""


class DataError(TrainerError):
    """The data, or one of its rows, cannot be used."""


class TargetError(TrainerError):
    """A target layer does not exist, or is smaller than the rank."""


class ResumeError(TrainerError):
    """The unfinished run beside the output folder has other settings, or --resume was not given."""


class TrainingError(TrainerError):
    """The loss or a trained parameter is not finite."""


class OutOfMemory(TrainingError):
    """The GPU or the machine has too little memory for the run."""


class Interrupted(TrainerError):
    """The run was stopped by SIGINT; its last step is saved."""
