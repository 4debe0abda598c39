"""Real ranks for tests: W processes in a gloo group, connected by a file, with a deadline and every traceback."""

import faulthandler
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

_PRELOADED = [
    "torch",
    "lightning.pytorch",
    "torchmetrics",
    "torchgeo.trainers",
    "torchgeo.datamodules",
    "lightning_hetero",
]
_CHILD = 90
"""Seconds after which a rank shows its stacks and ends; pytest's own deadline lies beyond."""


def _child(rank: int, world_size: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    out = Path(folder)
    with (out / f"stacks{rank}").open("w") as stacks:
        faulthandler.dump_traceback_later(_CHILD, exit=True, file=stacks)
        try:
            import torch
            import torch.distributed as dist

            torch.set_num_threads(1)
            # Loader workers are forked, which is quick, unless a test asks for something else.
            multiprocessing.set_start_method("fork", force=True)
            warnings.simplefilter("error")
            for text in _tolerated():
                warnings.filterwarnings("ignore", message=text)
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
            dist.init_process_group(
                "gloo",
                init_method=f"file://{out / 'meeting'}",
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=_CHILD - 30),
            )
            result: tuple[str, Any] = ("value", function(*args))
        except BaseException:  # noqa: BLE001 - whatever it was, the test shows it
            result = ("error", traceback.format_exc())
        (out / f"result{rank}.part").write_bytes(pickle.dumps(result))
        (out / f"result{rank}.part").rename(out / f"result{rank}")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # without destroying the group, which would wait for ranks that failed


def _tolerated() -> list[str]:
    """The warnings of others that `pyproject.toml` tolerates, and those of running many ranks on few cores."""
    import tomllib

    table = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    filters = table["tool"]["pytest"]["ini_options"]["filterwarnings"]
    ignored = [entry.split(":")[1] for entry in filters if entry.startswith("ignore:")]
    return [*ignored, r".*CPU ranks share"]


class RanksFailedError(AssertionError):
    """Some ranks did not return; `errors` has their tracebacks by rank."""

    def __init__(self, errors: dict[int, str]) -> None:
        super().__init__("\n".join(f"--- rank {rank} ---\n{text}" for rank, text in sorted(errors.items())))
        self.errors = errors


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call `function(*args)` on W ranks and return what each returned.

    Raises:
        RanksFailedError: a rank raised, died or did not come to an end.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_child, args=(rank, world_size, folder, function, args))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + _CHILD + 10
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join()
        values: list[Any] = []
        errors: dict[int, str] = {}
        for rank, process in enumerate(processes):
            file = Path(folder) / f"result{rank}"
            if not file.exists():
                stacks = Path(folder) / f"stacks{rank}"
                errors[rank] = f"no result, exit code {process.exitcode}\n{stacks.read_text()}"
                continue
            kind, value = pickle.loads(file.read_bytes())
            if kind == "error":
                errors[rank] = value
            values.append(value)
    if errors:
        raise RanksFailedError(errors)
    return values


def fails_on_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> dict[int, str]:
    """The tracebacks of ranks that are expected to fail, by rank."""
    with pytest.raises(RanksFailedError) as caught:
        run_ranks(world_size, function, *args)
    return caught.value.errors
