"""The exceptions that roll_gspo raises; all of them can be pickled, so that they cross process boundaries."""


class RollGspoError(Exception):
    """Base class; the message gives the place, the problem and the fix."""


class ConfigError(RollGspoError, ValueError):
    """An invalid configuration; the message lists every problem, one per line."""


class MissingDependencyError(RollGspoError, ImportError):
    """A missing optional package; the message gives the `pip install` command."""


class DataError(RollGspoError, ValueError):
    """A missing, empty or malformed data file; the message gives file and line."""


class RewardError(RollGspoError):
    """A reward worker that cannot be built, or a pool that cannot keep its workers alive."""


class PlayError(RollGspoError):
    """An environment that cannot be built, or a pool that cannot keep its workers alive."""


class WeightTransferError(RollGspoError):
    """A failed weight transfer: the generation engine does not hold the trainer's weights."""


class ResidencyError(RollGspoError):
    """An engine is asked to compute while its state is offloaded, or its state cannot be moved."""


class CheckpointError(RollGspoError):
    """A checkpoint that cannot be written, found or read."""


class TrainingError(RollGspoError):
    """Training cannot continue, e.g. after too many consecutive non-finite updates."""


class WorkerError(RollGspoError):
    """An unexpected exception in a worker; the message names role, rank, process, node and method."""


class WorkerDiedError(WorkerError):
    """A dead worker process; the message gives the cause if it is known."""


class WorkerHungError(WorkerError):
    """A worker process without a heartbeat, or a call that exceeded its timeout."""
