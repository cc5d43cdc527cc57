"""What hvdx raises. Every message names the value, the rank and the remedy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any


class HvdxError(Exception):
    """Base of every error that hvdx itself raises."""

    # TensorFlow's AutoGraph raises errors of a traced function anew: those with this very
    # constructor as what they are, others as its own StagingError.
    if not TYPE_CHECKING:
        __init__ = Exception.__init__


class NotInitializedError(HvdxError, ValueError):
    """A call that needs a running Horovod came before ``hvd.init()``.

    A ``ValueError`` because that is what Horovod raises here.
    """


class HorovodMissingError(HvdxError, ImportError):
    """Horovod is absent, or was built for other frameworks than those installed."""


class MismatchError(HvdxError, RuntimeError):
    """Ranks disagree: in a tensor's shape or dtype, a model, a framework, an option.

    Raised on every rank. Not Horovod's ``HorovodInternalError``, which elastic training
    answers by trying again: trying again mends no disagreement.
    """


class StallError(HvdxError, RuntimeError):
    """A collective can never finish: some ranks have not called it, or have left the job.

    Raised on every rank that waits, after ``HVDX_TIMEOUT`` seconds, and on the others at their
    next collective; the message says what each rank waits for. Horovod has been stopped by then.
    Not Horovod's ``HorovodInternalError``, which elastic training answers by trying again.
    """


class PlanError(HvdxError, ValueError):
    """A model cannot be cut, placed or scheduled as asked; the message says what would do."""


class PipelineError(HvdxError, RuntimeError):
    """A stage of a pipeline failed, here or on another rank; raised on every rank.

    Attributes:
        failure: where and why, as plain data: a :class:`hvdx.pipeline.channel.Failure`.
    """

    failure: Any = None


class CheckpointError(HvdxError, OSError):
    """A checkpoint cannot be written or read, or is of something else; raised on every rank."""


class LaunchError(HvdxError, RuntimeError):
    """A job could not be started: hosts, slots, network interface or environment."""


class ConnectError(LaunchError):
    """Horovod did not start: a rank has ended meanwhile, or cannot be reached.

    In an elastic job raised only where the ranks did not come together several times in a row.
    """


class InstallError(HvdxError, RuntimeError):
    """Building or installing Horovod failed; the message holds cause, remedy and log file."""
