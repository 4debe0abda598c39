"""The largest local batch that each rank's memory allows: models of peak memory, and the caps that follow. Pure.

A model never predicts less memory than was measured. Given the same numbers, all ranks compute the same caps.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count

import numpy as np

from lightning_hetero.planning.allocation import proportional
from lightning_hetero.planning.reports import MemoryReports

UNLIMITED = 2**40
"""A local batch that no device has memory for; means no cap."""

# The largest completed local batch may be exceeded by this factor without risk, if the model predicts that it fits.
# Chosen, not tuned: later plans change a split by only a few samples.
_SAFE_GROWTH = 1.1


@dataclass(frozen=True)
class MemoryModel:
    """Peak memory of a rank, in bytes, as a line over its local batch: fixed bytes, and bytes for each sample."""

    fixed: float
    per_sample: float

    @classmethod
    def fit(cls, peaks: Mapping[int, float], resting: float = 0.0) -> "MemoryModel":
        """The least-squares line, raised until no observation lies above it.

        `peaks` are peak bytes by local batch. A single local batch does not determine the slope: then all bytes beyond
        `resting`, which were held before the first step, are attributed to the samples.
        """
        if not peaks:
            raise ValueError("a memory model needs at least one local batch and its peak")
        for local_batch, peak in peaks.items():
            if local_batch < 1 or not (math.isfinite(peak) and peak >= 0):
                raise ValueError(f"{peak} bytes at a local batch of {local_batch} can't have been measured")
        if len(peaks) == 1:
            ((local_batch, peak),) = peaks.items()
            fixed = min(max(resting, 0.0), peak)
            return cls(fixed, (peak - fixed) / local_batch)
        x, y = np.array(list(peaks), dtype=np.float64), np.array(list(peaks.values()), dtype=np.float64)  # (N,) each
        centered = x - x.mean()
        slope = max(0.0, float(centered @ (y - y.mean()) / (centered @ centered)))
        return cls(max(0.0, float((y - slope * x).max())), slope)

    def bytes(self, local_batch: int) -> float:
        """Predicted peak bytes at a local batch."""
        return self.fixed + self.per_sample * local_batch

    def largest(self, limit_bytes: float) -> int:
        """The largest local batch that stays within `limit_bytes`; 0 if not even one sample does."""
        for_samples = limit_bytes - self.fixed
        if for_samples < 0:
            return 0
        if for_samples >= self.per_sample * UNLIMITED:
            return UNLIMITED
        local_batch = int(for_samples / self.per_sample)
        while local_batch > 0 and self.bytes(local_batch) > limit_bytes:  # the division may be off by a rounding error
            local_batch -= 1
        return local_batch


@dataclass(frozen=True)
class MemoryLimits:
    """The memory that the ranks' devices may use; W values each."""

    bytes: tuple[float, ...]  # infinity for no limit
    devices: tuple[str, ...]  # names, for messages


@dataclass
class _RankMemory:
    """What is known about one rank's memory, in bytes and local batches; see `MemoryReports`."""

    limit: float
    peaks: dict[int, float] = field(default_factory=dict)  # by local batch
    resting: float = 0.0
    fits: int = UNLIMITED
    fails: int = UNLIMITED + 1
    largest_completed: int = 0

    def update(self, local_batch: int, peak: float, resting: float, fits: int, fails: int) -> bool:
        """Record a report; returns whether it changed anything, which is rare: peaks repeat."""
        before = self._state(local_batch)
        self.resting = resting
        self.fits = fits or self.fits
        self.fails = max(fails, self.fits + 1)  # `fits` takes precedence: memory may have been fragmented
        if local_batch > 0:
            self.largest_completed = max(self.largest_completed, local_batch)
            if peak > 0:
                self.peaks[local_batch] = max(peak, self.peaks.get(local_batch, 0.0))
        return before != self._state(local_batch)

    def _state(self, local_batch: int) -> tuple[float | None, ...]:
        return self.resting, self.fits, self.fails, self.largest_completed, self.peaks.get(local_batch)

    def may_fit(self) -> int:
        """The largest local batch that is not known to fail.

        A batch that was halved until its parts fitted leaves open what lies between part and whole. And a single peak
        within the limit does not bound the slope: most of it may not depend on the number of samples.
        """
        most = self.fits_by_model()
        if len(self.peaks) == 1 and max(self.peaks.values()) <= self.limit:
            most = max(most, 2 * max(self.peaks))
        return min(most, self.fails - 1)

    def fits_by_model(self) -> int:
        """The largest local batch that fits according to the model, or that has fitted before."""
        if not self.peaks:
            return UNLIMITED
        # The line lies above most measurements, so it may exclude a local batch that has fitted before.
        seen = max((local_batch for local_batch, peak in self.peaks.items() if peak <= self.limit), default=0)
        return max(MemoryModel.fit(self.peaks, self.resting).largest(self.limit), seen)

    def growth_limit(self) -> int:
        """The largest local batch to try next: twice the largest so far, as long as the slope is not known."""
        return 2 * self.largest_completed if len(self.peaks) < 2 and self.largest_completed > 0 else UNLIMITED


class Caps:
    """The largest local batches of all ranks, as far as they are known; multiples of the granularity."""

    def __init__(self, limits: MemoryLimits, global_batch: int, *, minimum: int, granularity: int) -> None:
        self._devices = limits.devices
        self._global_batch = global_batch
        self._minimum = minimum
        self._granularity = granularity
        self._ranks = [_RankMemory(limit) for limit in limits.bytes]
        self._update_bounds()

    def update(self, reports: MemoryReports) -> tuple[str, ...]:
        """Process the reports of all ranks; returns a warning for each rank that has newly run out of memory."""
        columns = (reports.local_batches, reports.peaks, reports.resting, reports.fits, reports.fails)  # (W,) each
        rows = zip(*(column.tolist() for column in columns), strict=True)
        warnings, changed = [], False
        for number, (rank, row) in enumerate(zip(self._ranks, rows, strict=True)):
            local_batch, peak, resting, fits, fails = row
            before = rank.fits
            changed |= rank.update(int(local_batch), peak, resting, int(fits), int(fails))
            if rank.fits < before:
                warnings.append(self._out_of_memory(number))
        if changed:
            self._update_bounds()
            self._check()
        return tuple(warnings)

    def peaks(self) -> list[float]:
        """W numbers: the most bytes that each rank has held; 0 for unknown."""
        return [max(rank.peaks.values(), default=0.0) for rank in self._ranks]

    def fits_in_memory(self, local_batches: Sequence[int]) -> bool:
        """Whether W local batches are known to fit on all ranks.

        Each rank has already computed at least that many samples; or nearly as many, and its model, fitted to at least
        two local batches, predicts that the rest fits too.
        """
        return all(
            local_batch <= rank.largest_completed
            or (len(rank.peaks) > 1 and local_batch <= min(most, _SAFE_GROWTH * rank.largest_completed))
            for local_batch, rank, most in zip(local_batches, self._ranks, self._known_to_fit, strict=True)
        )

    def maximum(self, current: Sequence[int]) -> tuple[int, ...]:
        """W largest local batches for the plan after the current one; they add up to at least the global batch."""
        factor = 1
        while True:  # growth limits too small for the global batch are doubled, up to what memory allows
            caps = [
                min(most, factor * max(self._rounded(rank.growth_limit()), local_batch, self._minimum))
                for most, rank, local_batch in zip(self.allowed, self._ranks, current, strict=True)
            ]
            if sum(caps) >= min(self._global_batch, sum(self.allowed)):
                return tuple(caps)
            factor *= 2

    def _rounded(self, local_batch: int) -> int:
        return local_batch // self._granularity * self._granularity

    def _update_bounds(self) -> None:
        self._known_to_fit = [self._rounded(min(rank.fits_by_model(), rank.fits)) for rank in self._ranks]
        self._may_fit = [self._rounded(rank.may_fit()) for rank in self._ranks]
        bounds = zip(self._known_to_fit, self._may_fit, strict=True)
        allowed = [max(fits, min(self._minimum, most)) for fits, most in bounds]
        untried = list(map(int.__sub__, self._within_global_batch(self._may_fit), self._within_global_batch(allowed)))
        missing = self._global_batch - sum(self._within_global_batch(allowed))
        # If too few samples are known to fit, those that may fit are used as far as the global batch needs them. A rank
        # that then runs out of memory reveals what fits, and no sample is lost.
        if 0 < missing <= sum(untried):
            more = proportional(missing, untried, minimum=0, maximum=untried, granularity=self._granularity)
            allowed = list(map(int.__add__, allowed, more))
        self.allowed = tuple(allowed)
        """W local batches that memory allows, however far beyond those tried so far."""

    def _within_global_batch(self, local_batches: Iterable[int]) -> list[int]:
        return [min(local_batch, self._global_batch) for local_batch in local_batches]

    def _out_of_memory(self, number: int) -> str:
        rank = self._ranks[number]
        known = f"; its limit is {_size(rank.limit)}" if math.isfinite(rank.limit) else ""
        peak = f" It has held up to {_size(max(rank.peaks.values()))}{known}." if rank.peaks else ""
        return (
            f"rank {number} ({self._devices[number]}) ran out of memory and computed its batch in parts; nothing was "
            f"lost. From now on it gets at most {rank.fits} sample{'s' if rank.fits != 1 else ''}.{peak}"
        )

    def _check(self) -> None:
        """Raise a ValueError if the global batch does not fit in the memory of all ranks together."""
        unable = [number for number, cap in enumerate(self.allowed) if cap < self._minimum]
        if not unable and sum(self._within_global_batch(self.allowed)) >= self._global_batch:
            return
        fits, may = (sum(self._within_global_batch(bound)) for bound in (self._known_to_fit, self._may_fit))
        perhaps = f" (or perhaps up to {may})" if may > fits else ""
        each = ", ".join(
            f"{cap} on rank {number} ({device}{f', {_size(rank.limit)}' if math.isfinite(rank.limit) else ''})"
            for number, rank, device, cap in zip(count(), self._ranks, self._devices, self._known_to_fit, strict=False)
            if cap < self._global_batch
        )
        if unable:
            ranks = f"rank{'s' if len(unable) > 1 else ''} {', '.join(map(str, unable))}"
            raise ValueError(
                f"the memory of {ranks} does not hold the smallest local batch, "
                f"{self._minimum} (samples that fit: {each}): raise memory_limit, make samples or the module smaller, "
                "or leave the device out"
            )
        raise ValueError(
            f"a global batch of {self._global_batch} does not fit into memory: {self._global_batch - fits} samples too "
            f"many (samples that fit: {each}); use a global batch of at most {fits}{perhaps}, accumulate_grad_batches, "
            "more devices, or a higher memory_limit"
        )


def _size(number: float) -> str:
    """Bytes in a readable unit."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if number >= unit:
            return f"{number / unit:.2f} {name}"
    return f"{number:.0f} bytes"
