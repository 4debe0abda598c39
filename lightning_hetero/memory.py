"""How large a local batch each rank's memory allows: models of peak memory, and the caps that follow. Pure.

A model never promises less memory than was seen. Ranks that are fed the same numbers come to the same caps.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

UNLIMITED = 2**40
"""A local batch that no one has; stands for no cap."""


@dataclass(frozen=True)
class MemoryModel:
    """Peak memory of a rank as a line over its local batch, with all that was observed on or below it.

    Attributes:
        fixed: bytes that don't depend on the local batch, at least 0.
        per_sample: bytes for each sample, at least 0.
    """

    fixed: float
    per_sample: float

    @classmethod
    def fit(cls, peaks: Mapping[int, float], resting: float = 0.0) -> "MemoryModel":
        """The least-squares line, raised until no observation lies above it.

        One local batch alone tells nothing of the slope: then all that is held beyond `resting` counts for samples.

        Args:
            peaks: from local batches, at least 1, to the most bytes seen with them; not empty.
            resting: bytes that were held before the first step.

        Raises:
            ValueError: they can't have been observed.
        """
        if not peaks:
            raise ValueError("a memory model needs at least one local batch and its peak")
        for local_batch, peak in peaks.items():
            if local_batch < 1 or not (math.isfinite(peak) and peak >= 0):
                raise ValueError(f"{peak} bytes at a local batch of {local_batch} can't have been observed")
        if len(peaks) == 1:
            ((local_batch, peak),) = peaks.items()
            fixed = min(max(resting, 0.0), peak)
            return cls(fixed, (peak - fixed) / local_batch)
        x, y = np.array(list(peaks), dtype=np.float64), np.array(list(peaks.values()), dtype=np.float64)
        centred = x - x.mean()
        slope = max(0.0, float(centred @ (y - y.mean()) / (centred @ centred)))
        return cls(max(0.0, float((y - slope * x).max())), slope)

    def bytes(self, local_batch: int) -> float:
        """Peak memory of a local batch."""
        return self.fixed + self.per_sample * local_batch

    def largest(self, limit_bytes: float) -> int:
        """The largest local batch that stays within `limit_bytes`; 0 where not even one sample does."""
        room = limit_bytes - self.fixed
        if room < 0:
            return 0
        if room >= self.per_sample * UNLIMITED:
            return UNLIMITED
        local_batch = int(room / self.per_sample)
        while local_batch > 0 and self.bytes(local_batch) > limit_bytes:  # the division may be a rounding error off
            local_batch -= 1
        return local_batch


_NEARLY = 1.1
"""A local batch that is larger than the largest so far by this factor is nothing new, if the model agrees."""


@dataclass(frozen=True)
class Report:
    """What one rank tells of its memory with a step's message.

    Attributes:
        held: the local batch of its last step; 0 where it says nothing of memory.
        peak: most bytes held in that step; 0 where they are not known.
        resting: bytes held before its first step.
        fits: the largest local batch that fits, learnt from running out of memory; 0 if that never happened.
    """

    held: float
    peak: float
    resting: float
    fits: float


class _Rank:
    def __init__(self) -> None:
        self.peaks: dict[int, float] = {}
        self.resting = 0.0
        self.fits = UNLIMITED
        self.ran = 0  # the largest local batch so far

    def hear(self, report: Report) -> bool:
        """Whether there was news, which is rare: peaks repeat."""
        before = self.resting, self.fits, self.ran, self.peaks.get(int(report.held))
        self.resting = report.resting
        self.fits = int(report.fits) or self.fits
        if report.held > 0:
            held = int(report.held)
            self.ran = max(self.ran, held)
            if report.peak > 0:
                self.peaks[held] = max(report.peak, self.peaks.get(held, 0.0))
        return before != (self.resting, self.fits, self.ran, self.peaks.get(int(report.held)))

    def largest(self, limit: float) -> int:
        """What its memory allows."""
        if not self.peaks:
            return self.fits
        # The line lies above most observations, so it may deny what has been seen to fit.
        seen = max((local_batch for local_batch, peak in self.peaks.items() if peak <= limit), default=0)
        return min(max(MemoryModel.fit(self.peaks, self.resting).largest(limit), seen), self.fits)

    def reach(self) -> int:
        """How far a next step may go by what is known: twice as far as before, while the slope is not."""
        return 2 * self.ran if len(self.peaks) < 2 and self.ran > 0 else UNLIMITED


class Caps:
    """The largest local batches of all ranks, as far as is known.

    Args:
        limits: W numbers of bytes that a rank may hold; infinity for no limit.
        devices: W names, for messages.
        global_batch: samples of a step over all ranks.
        minimum: the least local batch.
        granularity: local batches are multiples of it.
    """

    def __init__(
        self, limits: Sequence[float], devices: Sequence[str], global_batch: int, *, minimum: int, granularity: int
    ) -> None:
        self._limits = tuple(limits)
        self._devices = tuple(devices)
        self._global_batch = global_batch
        self._minimum = minimum
        self._granularity = granularity
        self._ranks = [_Rank() for _ in limits]
        self._hard = self._what_memory_allows()

    def hear(self, reports: Sequence[Report]) -> tuple[str, ...]:
        """Take in what all ranks tell.

        Returns:
            A sentence for each rank that has run out of memory since the last call.

        Raises:
            ValueError: the global batch does not fit into the memory of all ranks together.
        """
        said, news = [], False
        for number, (rank, report) in enumerate(zip(self._ranks, reports, strict=True)):
            known = rank.fits
            news |= rank.hear(report)
            if rank.fits < known:
                said.append(self._ran_out(number))
        if news:
            self._hard = self._what_memory_allows()
            self._check()
        return tuple(said)

    def peaks(self) -> list[float]:
        """W numbers of bytes, the most that each rank is known to have held; 0 where nothing is known."""
        return [max(rank.peaks.values(), default=0.0) for rank in self._ranks]

    def vouch(self, local_batches: Sequence[int]) -> bool:
        """Whether all ranks are sure to have memory for W local batches.

        They are where they have computed as many samples, or nearly as many and their models, of two local batches at
        least, see room for the rest.
        """
        return all(
            local_batch <= rank.ran or (len(rank.peaks) > 1 and local_batch <= min(most, _NEARLY * rank.ran))
            for local_batch, rank, most in zip(local_batches, self._ranks, self._hard, strict=True)
        )

    def maximum(self, current: Sequence[int]) -> tuple[int, ...]:
        """W largest local batches, multiples of the granularity; their sum is at least the global batch.

        Args:
            current: W samples, of the newest plan.
        """
        hard = self._hard
        factor = 1
        while True:  # a reach that is too short for the global batch gives way, to what memory allows
            caps = [
                min(most, factor * max(self._rounded(rank.reach()), local_batch, self._minimum))
                for most, rank, local_batch in zip(hard, self._ranks, current, strict=True)
            ]
            if sum(caps) >= min(self._global_batch, sum(hard)):
                return tuple(caps)
            factor *= 2

    def _rounded(self, local_batch: int) -> int:
        return local_batch // self._granularity * self._granularity

    def _what_memory_allows(self) -> list[int]:
        return [
            min(self._rounded(rank.largest(limit)), self._rounded(UNLIMITED))
            for rank, limit in zip(self._ranks, self._limits, strict=True)
        ]

    def _ran_out(self, number: int) -> str:
        rank, limit = self._ranks[number], self._limits[number]
        known = f", of which it may use {_size(limit)}" if math.isfinite(limit) else ""
        peak = f" It has held up to {_size(max(rank.peaks.values()))}{known}." if rank.peaks else ""
        return (
            f"rank {number} ({self._devices[number]}) ran out of memory and computed its batch in parts; nothing was "
            f"lost. From now on it gets at most {rank.fits} sample{'s' if rank.fits != 1 else ''}.{peak}"
        )

    def _check(self) -> None:
        """See that there is a split.

        Raises:
            ValueError: there isn't.
        """
        caps = self._hard
        unable = [number for number, cap in enumerate(caps) if cap < self._minimum]
        fits = sum(min(cap, self._global_batch) for cap in caps)
        if not unable and fits >= self._global_batch:
            return
        each = ", ".join(
            f"{caps[number]} on rank {number} ({device}"
            + (f", {_size(self._limits[number])})" if math.isfinite(self._limits[number]) else ")")
            for number, device in enumerate(self._devices)
            if caps[number] < self._global_batch
        )
        if unable:
            names = ", ".join(map(str, unable))
            raise ValueError(
                f"the memory of rank{'s' if len(unable) > 1 else ''} {names} does not hold the smallest local batch, "
                f"{self._minimum} (samples that fit: {each}): raise memory_limit, make samples or the module smaller, "
                "or leave the device out"
            )
        raise ValueError(
            f"a global batch of {self._global_batch} does not fit into memory: {self._global_batch - fits} samples too "
            f"many (samples that fit: {each}); use a global batch of at most {fits}, accumulate_grad_batches, more "
            "devices, or a higher memory_limit"
        )


def _size(count: float) -> str:
    """Bytes as a person reads them."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{count:.0f} bytes"
