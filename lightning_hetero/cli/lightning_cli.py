"""LightningCLI as TorchGeo sets it up, with the strategy's names registered and its options in the help.

Whatever `torchgeo fit --config FILE` takes, `lightning-hetero fit --config FILE` takes too.
"""

import argparse
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lightning_hetero import HeteroStrategy

GDAL: Final = {
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
    "AWS_NO_SIGN_REQUEST": "YES",
    "GDAL_MAX_RAW_BLOCK_CACHE_SIZE": "200000000",
    "GDAL_SWATH_SIZE": "200000000",
    "VSI_CURL_CACHE_SIZE": "200000000",
}
"""Environment variables that TorchGeo's command sets for reading rasters; those that the user has set are kept."""

_CLASSES: Final = ("torchgeo.datamodules", "torchgeo.trainers", "torchgeo.tasks")  # tasks: from torchgeo 0.10 on
_NAME: Final = "lightning-hetero"
_STRATEGY: Final = "lightning_hetero.HeteroStrategy"


class Parser(LightningArgumentParser):
    """Lightning's parser, with the strategy's options in its help, and one sentence for each error."""

    @override
    def format_help(self, *args: Any, **kwargs: Any) -> str:
        more = (
            f"All options of the strategy, including those of Lightning's DDPStrategy and of torch's DDP:\n"
            f"  --trainer.strategy.help {_STRATEGY}\n"
        )
        return f"{super().format_help(*args, **kwargs)}\n{_strategy_options()}\n\n{more}"

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
        # A command's parser has "[options]" in its name; nested parsers are named after the script.
        name = self.prog.replace(" [options]", "") if self.prog.startswith(_NAME) else _NAME
        print(f"{name}: {' '.join(line for line in lines if line)}", file=sys.stderr)
        sys.exit(2)


def _strategy_options() -> str:
    """The help for the options that the strategy adds to Lightning's, from its docstring."""
    parser = ArgumentParser(usage=argparse.SUPPRESS, add_help=False)
    own = {name for name, p in inspect.signature(HeteroStrategy).parameters.items() if p.kind != p.VAR_KEYWORD}
    every = ArgumentParser(add_help=False).add_class_arguments(HeteroStrategy, fail_untyped=False)
    parser.add_class_arguments(HeteroStrategy, "trainer.strategy", fail_untyped=False, skip={*every} - own)
    return parser.format_help().strip()


class HeteroCLI(LightningCLI):
    """LightningCLI for one command, since preparing the parsers of all four takes seconds.

    Where the configuration can't be used, the command ends with one sentence.
    """

    def __init__(self, command: str, **options: Any) -> None:
        self._command = command
        super().__init__(**options)

    @override
    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override] # depends on the instance, not only on the class
        return {self._command: LightningCLI.subcommands()[self._command]}

    @override
    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except (ValueError, TypeError, MisconfigurationException) as error:
            # Errors of the strategy, the Trainer and modules; nothing has been trained yet.
            self._parser(self.subcommand).error(str(error))


def main(arguments: Sequence[str] | None = None) -> HeteroCLI:
    """Run `fit`, `validate`, `test` or `predict`; returns the CLI with its trainer, model and data.

    The arguments begin with the command; None: those of this process. Lightning starts the other ranks by running this
    process's arguments again, so it has to be None where Lightning starts them.

    Raises:
        SystemExit: the configuration can't be used; the status is 2.
    """
    for name, value in GDAL.items():
        os.environ.setdefault(name, value)
    if (here := str(Path.cwd())) not in sys.path:  # as `python -m` does: for the user's own modules
        sys.path.append(here)
    for module in _CLASSES:  # imported classes can be named without their modules
        if importlib.util.find_spec(module) is not None:
            importlib.import_module(module)
    options: dict[str, Any] = {
        "seed_everything_default": 0,
        "save_config_kwargs": {"overwrite": True},
        "trainer_defaults": {"strategy": {"class_path": _STRATEGY}},
        "parser_class": Parser,
        "parser_kwargs": {"prog": _NAME},
    }
    command = (sys.argv[1:] if arguments is None else arguments)[0]
    return HeteroCLI(command, args=None if arguments is None else list(arguments), **options)
