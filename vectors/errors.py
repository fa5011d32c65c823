"""Every error the project raises on purpose, as one tree.

    WorkbenchError                     exit 1   ours to mend
    ├── InputError                     exit 2   theirs to mend: bad input, said in one sentence
    │   ├── GrammarError                        a steering or task term that does not parse
    │   ├── NameNotFound                        no such model, vector, task, set, run
    │   ├── NameTaken                           the name is in use
    │   ├── ContrastSetError                    a contrast file that cannot be used, with line numbers
    │   ├── VectorFileError                     a vector file that cannot be read
    │   ├── ModelMismatch                       made for another base
    │   ├── ShapeMismatch                       tensors that do not fit each other
    │   ├── BlockNotFound                       a block that the model does not have
    │   ├── DoseError                           a dose that is not a finite number in range
    │   ├── ModelNotSupported                   a model that cannot be steered, and why
    │   ├── NotSteerable                        a set with no direction in it
    │   └── PromptTooLong                       longer than the model's window
    ├── BackendUnavailable             exit 3   something this machine lacks, with the command that mends it
    │   ├── EngineFailed                        the engine did not start, or died
    │   ├── DownloadFailed                      a download that failed or arrived changed
    │   └── OutOfSpace                          no disk space, or a folder that cannot be written
    ├── StoreCorrupt                   exit 1   an object whose bytes are not what its name says
    ├── SignatureInvalid               exit 1   a signature that is missing, broken, or another's
    ├── SteeringNotApplied             exit 1   steering was asked for and no receipt proves it
    ├── RunFailed                      exit 1   a run that ended without a result
    └── Cancelled                      exit 1   the user stopped it

Each message is one sentence: what is wrong, which input, what to do.
"""

from __future__ import annotations

__all__ = [
    "BackendUnavailable",
    "BlockNotFound",
    "Cancelled",
    "ContrastSetError",
    "DoseError",
    "DownloadFailed",
    "EngineFailed",
    "GrammarError",
    "InputError",
    "ModelMismatch",
    "ModelNotSupported",
    "NameNotFound",
    "NameTaken",
    "NotSteerable",
    "OutOfSpace",
    "PromptTooLong",
    "RunFailed",
    "ShapeMismatch",
    "SignatureInvalid",
    "SteeringNotApplied",
    "StoreCorrupt",
    "VectorFileError",
    "WorkbenchError",
    "error_named",
]


class WorkbenchError(Exception):
    """Base of every error raised on purpose; `exit_code` is what the command line ends with."""

    exit_code = 1


class InputError(WorkbenchError):
    """The input is wrong, and the message says which and what to do."""

    exit_code = 2


class GrammarError(InputError):
    """A steering or task term does not parse."""


class NameNotFound(InputError):
    """Nothing goes by this name."""


class NameTaken(InputError):
    """The name is already in use."""


class ContrastSetError(InputError):
    """A contrast set cannot be used."""


class VectorFileError(InputError):
    """A vector file cannot be read."""


class ModelMismatch(InputError):
    """A vector or a task vector was made for another base."""


class ShapeMismatch(InputError):
    """Tensors that should fit each other do not."""


class BlockNotFound(InputError):
    """The model or the vector has no such block."""


class DoseError(InputError):
    """A dose is not a finite number in range."""


class ModelNotSupported(InputError):
    """A model that cannot be used here, and why."""


class NotSteerable(InputError):
    """The contrast set holds no usable direction for this model."""


class PromptTooLong(InputError):
    """The prompt does not fit the model's window."""


class BackendUnavailable(WorkbenchError):
    """Something that this machine lacks."""

    exit_code = 3


class EngineFailed(BackendUnavailable):
    """The engine did not start, or died."""


class DownloadFailed(BackendUnavailable):
    """A download failed, or arrived changed."""


class OutOfSpace(BackendUnavailable):
    """No disk space, or a folder that cannot be written."""


class StoreCorrupt(WorkbenchError):
    """An object's bytes are not what its name says."""


class SignatureInvalid(WorkbenchError):
    """What should be signed is not, or not by the key that was meant, or was changed since."""


class SteeringNotApplied(WorkbenchError):
    """Steering was asked for and no receipt proves it."""


class RunFailed(WorkbenchError):
    """A run ended without a result."""


class Cancelled(WorkbenchError):
    """The user stopped the work."""


def error_named(name: str) -> type[WorkbenchError]:
    """Return the class called `name`, so that an error can cross a process as its name and text."""
    found = globals().get(name) if name in __all__ else None
    return found if isinstance(found, type) else WorkbenchError
