"""What the command lines of all benchmarks have in common; needs no torch, so that help comes at once."""

import argparse
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from figures import Split, parse_split, show_split
from quotas import parse_quotas
from reports import say, write

MODELS = ("resnet18", "unet", "fcn")
CONFIGURATION = ("quotas", "global_batch", "model", "size", "allocator")


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """A parser that shows the defaults."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)


def add_common(parser: argparse.ArgumentParser, quotas: str = "100,25") -> None:
    """What is trained, on what, and how turns are taken."""
    add = parser.add_argument
    add("--quotas", type=parse_quotas, default=quotas, help="percent of a core for each rank, the fastest first")
    add("--global-batch", type=int, default=64, help="samples of a step over all ranks")
    add("--model", choices=MODELS, default="resnet18", help="what is trained")
    add("--size", type=int, default=64, help="pixels of an image's side")
    add(
        "--allocator",
        choices=("kept", "default"),
        default="kept",
        help="whether the C library keeps freed memory; the same for every side",
    )
    add("--warm-up", type=int, default=2, help="steps at the start of each turn that are not measured")
    add("--patience", type=float, default=120, help="seconds, in all, for letting others finish and repeating turns")
    add("--no-groups", action="store_true", help="competing processes instead of control groups")
    add_out(parser)


def add_out(parser: argparse.ArgumentParser) -> None:
    """Where the report goes."""
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the report")


def check_common(parser: argparse.ArgumentParser, options: argparse.Namespace, counts: Sequence[str]) -> None:
    """End with a message where the options can't be used.

    Args:
        parser: of the options.
        options: with those of `add_common`.
        counts: names of options that have to be at least 1.
    """
    if options.global_batch % len(options.quotas):
        parser.error(f"plain DDP can't split a global batch of {options.global_batch} over {len(options.quotas)} ranks")
    for name in ("warm_up", *counts):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} has to be at least 1")


def check_splits(parser: argparse.ArgumentParser, options: argparse.Namespace, splits: Sequence[Split]) -> None:
    """End with a message where splits are none of the global batch over the ranks."""
    for split in splits:
        if len(split) != len(options.quotas) or sum(split) != options.global_batch:
            parser.error(f"{show_split(split)} is no split of {options.global_batch} over {len(options.quotas)} ranks")


def splits_of(text: str) -> list[Split] | None:
    """48/16,60/4 as splits; None for auto."""
    return None if text == "auto" else [parse_split(part) for part in text.split(",")]


def name_of(question: str, options: argparse.Namespace) -> str:
    """A report's name, another one for each configuration."""
    quotas = "-".join(map(str, options.quotas))
    allocator = "" if options.allocator == "kept" else f"-allocator-{options.allocator}"
    return f"{question}-{options.model}-{options.size}px-{quotas}-b{options.global_batch}{allocator}"


def _stop(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)


def run(
    options: argparse.Namespace,
    name: str,
    measure: Callable[[argparse.Namespace], dict[str, Any]],
    table: Callable[[dict[str, Any]], str],
) -> Path:
    """Measure, write, show.

    Args:
        options: of the command line.
        name: of the report.
        measure: from the options to the report.
        table: the report for the eye.

    Returns:
        where the report is.
    """
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # also before torch is there
    signal.signal(signal.SIGTERM, _stop)
    try:
        report = measure(options)
    except KeyboardInterrupt:
        say("interrupted; all processes have been ended and control groups removed")
        raise SystemExit(130) from None
    path = options.out / f"{name}.json"
    write(report, path)
    print(table(report))
    print(f"\n{path}")
    return path
