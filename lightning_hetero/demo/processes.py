"""Starts the demo's processes, and sees to it that none of them outlives it."""

import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.environments.lightning import find_free_network_port

from lightning_hetero.demo import competitor

PR_SET_PDEATHSIG = 1  # as the kernel numbers it

Ask = Callable[[Any], Any]
"""What a rank asks the demo's main process with; it waits for the answer."""


class Interrupted(Exception):  # noqa: N818 - nothing is wrong
    """Ctrl-C. Unlike KeyboardInterrupt it passes through Lightning, which would end the process in its own way."""


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside, Ctrl-C raises `Interrupted`."""

    def interrupt(*_: object) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def die_with(parent: int) -> None:
    """Have this process killed when its parent ends, however it ends."""

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)

    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before the kernel knew
            look()
    else:
        threading.Thread(target=look, daemon=True).start()


@contextmanager
def competing(count: int, core: int) -> Iterator[list[int]]:
    """Processes that compete for a core; gives their numbers.

    Args:
        count: how many.
        core: where; below 0 the system chooses.
    """
    command = [sys.executable, "-S", "-E", str(Path(competitor.__file__)), str(os.getpid()), str(core)]
    running = [subprocess.Popen(command, stdin=subprocess.DEVNULL) for _ in range(count)]
    try:
        yield [process.pid for process in running]
    finally:
        for process in running:
            process.kill()
        for process in running:
            process.wait()


def _rank(work: Callable[[int, Ask], Any], rank: int, parent: int, line: Connection) -> None:
    die_with(parent)
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0"}

    def ask(question: Any) -> Any:
        line.send(("asks", question))
        return line.recv()

    try:
        result = work(rank, ask)
    except BaseException:  # noqa: BLE001 - whatever it is, the main process has to know of it
        line.send(("failed", traceback.format_exc()))
    else:
        line.send(("done", result))


def run_ranks(work: Callable[[int, Ask], Any], world_size: int, answer: Ask, *, spawn: bool) -> list[Any]:
    """Do `work(rank, ask)` in a process for each rank, and give what each returned.

    Args:
        work: a function that can be pickled.
        world_size: how many ranks.
        answer: what this process does when a rank asks.
        spawn: start fresh interpreters, as CUDA needs it; otherwise on Linux they are forked, and need not import all
            that this process has imported.

    Raises:
        RuntimeError: a rank failed; all others are ended then.
    """
    context: Any = multiprocessing.get_context("fork" if sys.platform.startswith("linux") and not spawn else "spawn")
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(find_free_network_port())}
    ranks: list[Any] = []
    lines: dict[Connection, int] = {}
    results: dict[int, Any] = {}
    try:
        # A terminal sends Ctrl-C to all processes; it is for this one, which then ends the others.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            ranks.append(context.Process(target=_rank, args=(work, rank, os.getpid(), theirs), daemon=True))
            ranks[-1].start()
            theirs.close()
            lines[ours] = rank
        signal.signal(signal.SIGINT, before)
        while lines:
            for line in wait(list(lines)):
                assert isinstance(line, Connection)
                kind, content = _receive(line, lines[line])
                if kind == "asks":
                    line.send(answer(content))
                else:
                    results[lines.pop(line)] = content
    finally:
        for process in ranks:
            process.kill()
        for process in ranks:
            process.join()
    return [results[rank] for rank in range(world_size)]


def _receive(line: Connection, rank: int) -> tuple[str, Any]:
    try:
        kind, content = line.recv()
    except (EOFError, ConnectionError):
        raise RuntimeError(f"rank {rank} ended without an error message; did something kill it?") from None
    if kind == "failed":
        raise RuntimeError(f"rank {rank} failed:\n{content}")
    return kind, content
