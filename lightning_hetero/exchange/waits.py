"""Waiting for other ranks: where each rank waits, whether that can still end, and who is waited for."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from time import monotonic

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from lightning_hetero.exchange.calls import INTERNAL, Call, Place, Wait, listed, stuck, unmatched
from lightning_hetero.exchange.store import ask, lives_in_a_rank, value

_WAIT = "lightning_hetero/wait/{}"
_DEVICE = "lightning_hetero/device/{}"
_FAILURE = "lightning_hetero/failure/{}"
_KNOWN = "lightning_hetero/failure/{}/known"
_LOST = "lightning_hetero/lost/{}/{}"

_RUNS = "runs"
"""The channel in which a rank says that its run is over."""

_DEFAULT_TIMEOUT = timedelta(minutes=30)
"""PyTorch's own, of a gloo group."""

_LONG = 5.0
"""Seconds. Chosen: longer than most waits, so the store is rarely written to; short for a user who waits."""

_INTERVAL = 1.0
"""Seconds between two looks at a wait. Chosen: far longer than the wait in a normal step."""

_CAUSE_TIMEOUT = timedelta(seconds=2)
"""How long to wait for the cause of a lost connection. Chosen: a rank publishes it before its connections close, so it
is usually there already; on a busy machine it may arrive later."""

_LAST_WORDS = timedelta(seconds=5)
"""How long a store stays, once its process has failed, for those who have not read why. Chosen: a few intervals."""


class LostConnectionError(RuntimeError):
    """A collective call has failed, or was given up: another rank has exited, or has failed."""


class GaveUpError(LostConnectionError):
    """This rank has given up waiting, since another one has failed."""


class WaitTimeoutError(RuntimeError):
    """Another rank has not come within the timeout, for no known reason."""


@dataclass(frozen=True)
class _Waiting:
    """A wait of this rank."""

    call: Call
    channel: str
    number: int
    since: float


class Waits:
    """The waits of this rank, which it tells the others in the store that all ranks share, if they take long.

    All calls that ranks make together belong to channels, in each of which all ranks make the same calls in order. So
    where a rank waits, and how many calls of each channel it has made, says whom it waits for. If these wait too, and
    for this rank, then none of them can ever go on. A rank that computes says nothing, and may be waited for. Nothing
    of this depends on a clock, but when it is looked at: a slow rank is never taken for one that does not come.

    Args:
        rank: this rank.
        world_size: W; with a single rank nobody waits.
        device: the name of its device.
        store: shared by all ranks; None if there is none: then a wait ends with its timeout.
        timeout: of the process groups.
        current_hook: the hook of the user's code that is running, for errors.
        long: seconds after which a wait is published, and looked into.
        interval: seconds between two looks at a wait.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        device: str,
        store: Store | None,
        timeout: timedelta | None,
        *,
        current_hook: Callable[[], str | None] = lambda: None,
        long: float = _LONG,
        interval: float = _INTERVAL,
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self._device = device
        self._store = store if world_size > 1 else None
        self._timeout = (timeout or _DEFAULT_TIMEOUT).total_seconds()
        self._current_hook = current_hook
        self._long = long
        self._interval = interval
        self._run = 0
        # Held also while writing to the store, so that nothing is published after a wait has ended.
        self._lock = threading.Lock()
        self._begun: dict[str, int] = {}
        self._waiting: list[_Waiting] = []  # the innermost one last
        self._broken: tuple[_Waiting, float] | None = None  # the wait that has failed, and its seconds
        self._is_published = False
        self._failure: str | None = None  # of any rank in this run
        self._has_left_word = False
        self._looked = 0.0
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        ask(self._store, lambda store: store.set(_DEVICE.format(rank), device))

    # ---- a run ----

    def begin_run(self, number: int) -> None:
        """A run begins, with a number that is the same on all ranks; failures of earlier ones are over."""
        self._run, self._failure, self._broken, self._has_left_word = number, None, None, False
        with self._lock:
            self._clear()

    def end_run(self) -> None:
        """A run is over on this rank: it makes no call of it any more, and says so to ranks that wait."""
        with self._lock:
            self._clear()
            if self._store is not None and self._failure is None:
                self._publish(_Waiting(Call("end", "the end of the run"), _RUNS, self._run, monotonic()))

    def watch(self) -> None:
        """Begin to look at waits from a thread: during a backward pass the main thread is blocked."""
        if self._store is not None and self._thread is None:
            self._stopped.clear()
            self._thread = threading.Thread(target=self._watch, name="waits for other ranks", daemon=True)
            self._thread.start()

    def stop_watching(self) -> None:
        """Stop the thread; does nothing if there is none."""
        if self._thread is not None:
            self._stopped.set()
            self._thread.join()
            self._thread = None

    # ---- this rank's waits ----

    def call(self, name: str, kind: int = INTERNAL) -> Call:
        """A call that is known by its name and the hook that makes it."""
        hook = self._current_hook()
        return Call(name, f"{name} in {hook}" if hook else name, kind)

    def begin(self, channel: str) -> int:
        """This rank makes the next call of a channel; returns its number."""
        with self._lock:
            self._clear()  # which says that this rank has not made this call
            number = self._begun.get(channel, 0)
            self._begun[channel] = number + 1
        return number

    @contextmanager
    def inside(self, call: Call, channel: str, number: int) -> Iterator[None]:
        """Inside, this rank waits for the others in a call that it has begun.

        A wait that fails stays published until the next call, so that others see that this rank was there.
        """
        waiting = _Waiting(call, channel, number, monotonic())
        with self._lock:
            self._waiting.append(waiting)
        try:
            yield
        except BaseException:
            with self._lock:
                self._broken = waiting, monotonic() - waiting.since
                self._waiting.pop()
            raise
        with self._lock:
            self._waiting.pop()
            self._clear()

    def complete(self, work: dist.Work, call: Call, channel: str, number: int) -> None:
        """Wait for a collective call that this rank has begun.

        Raises:
            UnmatchedCallError: it can't end, since ranks wait for each other in different calls.
            LostConnectionError: another rank has exited or failed.
            WaitTimeoutError: another rank has not come within the timeout.
        """
        with self.inside(call, channel, number):
            try:
                while not _completes_within(work, timedelta(seconds=self._interval)):
                    self.check()
            except LostConnectionError as error:
                if (sentence := self._timeout_sentence()) is not None:
                    raise WaitTimeoutError(f"{sentence} ({error})") from None
                waits = ask(self._store, lambda _: self._all_waits(self._waiting[-1])) or {}
                if self.rank in (ranks := stuck(waits)):  # another rank has come to its end
                    raise unmatched([waits[rank].place for rank in ranks]) from None
                raise LostConnectionError(f"in {call.text}: {error}") from None

    def check(self) -> None:
        """Look whether this rank's wait can still end; called now and then while it lasts.

        Raises:
            UnmatchedCallError: ranks wait for each other in different calls.
            GaveUpError: another rank has failed.
        """
        self._look()
        waiting = self._waiting[-1] if self._waiting else None
        if waiting is None or self._store is None:
            return
        now = monotonic()
        if now - waiting.since > self._long and now - self._looked > self._long:
            self._looked = now
            # A rank whose run is over may still begin another one.
            waits = {rank: wait for rank, wait in self._all_waits(waiting).items() if wait.channel != _RUNS}
            if self.rank in (ranks := stuck(waits)):
                raise unmatched([waits[rank].place for rank in ranks])
        if self._failure is not None:
            raise GaveUpError(f"in {waiting.call.text}")

    # ---- failures ----

    @property
    def place(self) -> str:
        """This rank and its device, for errors."""
        return f"rank {self.rank} ({self._device})"

    def publish_failure(self, text: str) -> str:
        """Publish why this rank fails, if no other has failed before; returns the text of the first one."""
        key = _FAILURE.format(self._run)
        self._failure = ask(self._store, lambda store: store.compare_set(key, "", text).decode()) or text
        self._leave_word()
        return self._failure

    def failure(self) -> str | None:
        """Why a rank has failed first; waits a moment for it to be published. None if nothing was."""
        key = _FAILURE.format(self._run)
        if self._failure is None:
            ask(self._store, lambda store: store.set(_LOST.format(self._run, self.rank), ""))
            ask(self._store, lambda store: store.wait([key], _CAUSE_TIMEOUT))
            self._failure = ask(self._store, lambda store: value(store, key))
        if self._failure is not None:
            self._leave_word()
        return self._failure

    def broken(self) -> str:
        """What can be said of a lost connection whose cause nobody has published."""
        if self._broken is not None and self._broken[1] >= self._timeout:
            return self._awaited(*self._broken)
        where = f" while {self.place} was in {self._broken[0].call.text}" if self._broken is not None else ""
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        heard = ask(self._store, lambda store: [store.check([_LOST.format(self._run, rank)]) for rank in others])
        if heard is None:
            if not lives_in_a_rank(self._store):
                return f"another rank ended without saying why{where}; it may have been killed"
            return f"rank 0, whose process hosts the rendezvous, ended before it could say why{where}: see its output"
        silent = [rank for rank, has_lost in zip(others, heard, strict=True) if not has_lost] or others
        waits = ask(self._store, lambda _: self._all_waits(self._broken[0] if self._broken is not None else None)) or {}
        if ended := [self.name(rank) for rank in silent if rank in waits and waits[rank].channel == _RUNS]:
            return f"{listed(ended)} had come to the end of the run{where}"
        names = " or ".join(self.name(rank) for rank in silent[:4])
        return (
            f"{names if len(silent) <= 4 else 'another rank'} ended without saying why{where}; it may have been killed"
        )

    def _leave_word(self) -> None:
        """This rank knows the cause; where its own process hosts the store, it stays until all know it."""
        if self._has_left_word:
            return
        self._has_left_word = True
        store, key = self._store, _KNOWN.format(self._run)
        known = ask(store, lambda store: store.add(key, 1))
        if known == self.world_size:
            ask(store, lambda store: store.set(f"{key}/all", ""))
        elif self.rank == 0 and lives_in_a_rank(store):
            ask(store, lambda store: store.wait([f"{key}/all"], _LAST_WORDS))

    # ---- within ----

    def _timeout_sentence(self) -> str | None:
        """Who was waited for, if the innermost wait has lasted as long as the process groups allow."""
        waiting = self._waiting[-1]
        seconds = monotonic() - waiting.since
        return self._awaited(waiting, seconds) if seconds >= self._timeout else None

    def _awaited(self, waiting: _Waiting, seconds: float) -> str:
        waits = ask(self._store, lambda _: self._all_waits(waiting)) or {}
        own = self._wait(waiting)
        missing = [
            f"{self.name(rank)}, which is in {waits[rank].place.text}" if rank in waits else self.name(rank)
            for rank in range(self.world_size)
            if rank != self.rank and not (rank in waits and waits[rank].has_reached(own))
        ]
        whom = listed(missing) if missing else "an answer of the others, which are there too"
        return f"{self.place} has waited for {seconds:.0f} s in {waiting.call.text} for {whom}"

    def name(self, rank: int) -> str:
        """A rank and its device, for errors."""
        device = ask(self._store, lambda store: value(store, _DEVICE.format(rank)))
        return f"rank {rank} ({device})" if device else f"rank {rank}"

    def _wait(self, waiting: _Waiting) -> Wait:
        return Wait(
            Place(self.place, waiting.call.text, waiting.call.kind), waiting.channel, waiting.number, dict(self._begun)
        )

    def _all_waits(self, waiting: _Waiting | None) -> dict[int, Wait]:
        """By rank: this rank's wait, if it waits, and those that others have published."""
        waits = {self.rank: self._wait(waiting)} if waiting is not None else {}
        assert self._store is not None
        for rank in range(self.world_size):
            if rank != self.rank and (text := value(self._store, _WAIT.format(rank))):
                fields = json.loads(text)
                waits[rank] = Wait(**fields | {"place": Place(**fields["place"])})
        return waits

    def _watch(self) -> None:
        while not self._stopped.wait(self._interval):
            self._look()

    def _look(self) -> None:
        """Publish a wait that takes long, and look whether another rank has failed; from any thread."""
        with self._lock:
            if not self._waiting or self._store is None:
                return
            seconds = monotonic() - self._waiting[-1].since
            if seconds > self._long and not self._is_published:
                self._publish(self._waiting[-1])
            if self._failure is not None or seconds < self._interval:
                return
            self._failure = ask(self._store, lambda store: value(store, _FAILURE.format(self._run)))
            if self._failure is not None and self.rank:
                self._leave_word()

    def _publish(self, waiting: _Waiting) -> None:
        self._is_published = True
        with suppress(Exception):  # without the store nothing can be published
            assert self._store is not None
            self._store.set(_WAIT.format(self.rank), json.dumps(asdict(self._wait(waiting))))

    def _clear(self) -> None:
        if self._is_published:
            self._is_published = False
            ask(self._store, lambda store: store.set(_WAIT.format(self.rank), ""))


def _completes_within(work: dist.Work, timeout: timedelta) -> bool:
    """Wait for a collective call for at most `timeout`; returns whether it has succeeded by then."""
    try:
        work.wait(timeout)
    except RuntimeError:
        if not work.is_completed():
            return False
        try:
            work.wait()  # it has failed, or has succeeded just after the timeout
        except RuntimeError as error:
            raise LostConnectionError(str(error)) from None
    return True
