"""How large a local batch each rank's memory allows: models of peak memory, and the caps that follow. Pure.

A model never promises less memory than was seen. Ranks that are fed the same numbers come to the same caps.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lightning_hetero.planning.allocation import proportional

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
        fits: the largest local batch that is known to fit, learnt from running out of memory; 0 if that never happened.
        fails: the smallest one that is known not to; 0 for none, and then nothing above `fits` is tried.
    """

    held: float
    peak: float
    resting: float
    fits: float
    fails: float = 0.0


class _Rank:
    def __init__(self) -> None:
        self.peaks: dict[int, float] = {}
        self.resting = 0.0
        self.fits = UNLIMITED
        self.fails = UNLIMITED + 1
        self.ran = 0  # the largest local batch so far

    def update(self, report: Report) -> bool:
        """Whether there was news, which is rare: peaks repeat."""
        before = self._known(report)
        self.resting = report.resting
        self.fits = int(report.fits) or self.fits
        self.fails = max(int(report.fails), self.fits + 1)  # what fits counts for more: memory may be in pieces
        if report.held > 0:
            held = int(report.held)
            self.ran = max(self.ran, held)
            if report.peak > 0:
                self.peaks[held] = max(report.peak, self.peaks.get(held, 0.0))
        return before != self._known(report)

    def _known(self, report: Report) -> tuple[float | None, ...]:
        return self.resting, self.fits, self.fails, self.ran, self.peaks.get(int(report.held))

    def largest(self, limit: float) -> int:
        """What its memory is known to allow."""
        return min(self._modelled(limit), self.fits)

    def possible(self, limit: float) -> int:
        """What its memory may allow, for all that is known.

        A batch that was cut in halves until they fitted tells that a half fits, and that the whole does not. And one
        point within the limit bounds no slope: what all samples take together may be in it.
        """
        most = self._modelled(limit)
        if len(self.peaks) == 1 and max(self.peaks.values()) <= limit:
            most = max(most, 2 * max(self.peaks))
        return min(most, self.fails - 1)

    def _modelled(self, limit: float) -> int:
        if not self.peaks:
            return UNLIMITED
        # The line lies above most observations, so it may deny what has been seen to fit.
        seen = max((local_batch for local_batch, peak in self.peaks.items() if peak <= limit), default=0)
        return max(MemoryModel.fit(self.peaks, self.resting).largest(limit), seen)

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
        self._look_again()

    def update(self, reports: Sequence[Report]) -> tuple[str, ...]:
        """Take in what all ranks tell.

        Returns:
            A sentence for each rank that has run out of memory since the last call.

        Raises:
            ValueError: the global batch does not fit into the memory of all ranks together.
        """
        said, news = [], False
        for number, (rank, report) in enumerate(zip(self._ranks, reports, strict=True)):
            known = rank.fits
            news |= rank.update(report)
            if rank.fits < known:
                said.append(self._ran_out(number))
        if news:
            self._look_again()
            self._check()
        return tuple(said)

    def peaks(self) -> list[float]:
        """W numbers of bytes, the most that each rank is known to have held; 0 where nothing is known."""
        return [max(rank.peaks.values(), default=0.0) for rank in self._ranks]

    def fits_in_memory(self, local_batches: Sequence[int]) -> bool:
        """Whether all ranks are sure to have memory for W local batches.

        They are where they have computed as many samples, or nearly as many and their models, of two local batches at
        least, see room for the rest.
        """
        return all(
            local_batch <= rank.ran or (len(rank.peaks) > 1 and local_batch <= min(most, _NEARLY * rank.ran))
            for local_batch, rank, most in zip(local_batches, self._ranks, self._sure, strict=True)
        )

    def maximum(self, current: Sequence[int]) -> tuple[int, ...]:
        """W largest local batches, multiples of the granularity; their sum is at least the global batch.

        Args:
            current: W samples, of the newest plan.
        """
        hard = self.allowed
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

    def _look_again(self) -> None:
        ranks = list(zip(self._ranks, self._limits, strict=True))
        self._sure = [self._rounded(min(rank.largest(limit), UNLIMITED)) for rank, limit in ranks]
        self._possible = [self._rounded(min(rank.possible(limit), UNLIMITED)) for rank, limit in ranks]
        self.allowed = self._what_memory_allows()
        """W local batches that memory allows, not looking at how far a next step may go."""

    def _what_memory_allows(self) -> tuple[int, ...]:
        """What is sure to fit; where that is too little for the global batch, so much of what may fit as it takes.

        Whoever runs out of memory then has learnt more, and has lost nothing.
        """
        allowed = [max(sure, min(self._minimum, most)) for sure, most in zip(self._sure, self._possible, strict=True)]
        rooms = [
            min(most, self._global_batch) - min(cap, self._global_batch)
            for cap, most in zip(allowed, self._possible, strict=True)
        ]
        missing = self._global_batch - sum(min(cap, self._global_batch) for cap in allowed)
        if not 0 < missing <= sum(rooms):
            return tuple(allowed)
        more = proportional(missing, rooms, minimum=0, maximum=rooms, granularity=self._granularity)
        return tuple(map(int.__add__, allowed, more))

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
        unable = [number for number, cap in enumerate(self.allowed) if cap < self._minimum]
        if not unable and sum(min(cap, self._global_batch) for cap in self.allowed) >= self._global_batch:
            return
        caps = self._sure
        fits, may = (sum(min(b, self._global_batch) for b in bound) for bound in (caps, self._possible))
        perhaps = f" (or perhaps up to {may})" if may > fits else ""
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
            f"many (samples that fit: {each}); use a global batch of at most {fits}{perhaps}, accumulate_grad_batches, "
            "more devices, or a higher memory_limit"
        )


def _size(count: float) -> str:
    """Bytes as a person reads them."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{count:.0f} bytes"
