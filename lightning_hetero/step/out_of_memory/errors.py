"""Out-of-memory errors: how they are recognized, and how they are explained to the user."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_MESSAGES = (
    "can't allocate memory",  # torch's allocator for the CPU
    "not enough memory",  # the same on Windows
    "bad_alloc",  # C++
    "STATUS_ALLOC_FAILED",  # cuBLAS, cuDNN and the like
    "CUDA error: out of memory",  # CUDA itself, not torch's allocator
)


class RankOutOfMemoryError(RuntimeError):
    """A rank ran out of memory, and the run can't continue; says where, why, and what to do."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on CUDA or on the CPU.

    Lightning's `is_oom_error` knows neither `MemoryError` nor most of the messages, and mistakes an input that cuDNN
    does not support for an out-of-memory error.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _MESSAGES)


_ADVICE = "use a smaller global_batch, shares that give this rank less, or a lower memory_limit"


@contextmanager
def explained(place: str, local_batch: int | None, reason: str, advice: str = _ADVICE) -> Iterator[None]:
    """Raise a RankOutOfMemoryError from an out-of-memory error inside; see `out_of_memory_error`."""
    try:
        yield
    except Exception as error:
        if isinstance(error, RankOutOfMemoryError) or not is_out_of_memory(error):
            raise
        raise out_of_memory_error(place, local_batch, reason, str(error), advice) from error


def out_of_memory_error(
    place: str, local_batch: int | None, reason: str, details: str, advice: str = _ADVICE
) -> RankOutOfMemoryError:
    """The error that ends the run.

    Args:
        place: rank and device, such as "rank 1 (cpu)".
        local_batch: the rank's samples; None if not known.
        reason: why the run can't continue, as the end of a sentence.
        details: the message of the original error.
        advice: what to do.
    """
    samples = f" at a local batch of {local_batch}" if local_batch is not None else ""
    return RankOutOfMemoryError(
        f"{place} ran out of memory{samples}, and {reason}; {advice} "
        f"({details.splitlines()[0] if details else 'no further details'})"
    )
