"""The command `lightning-hetero`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_hetero.exchange.consistency import package_version

_TRAINER = {
    "fit": "train",
    "validate": "evaluate on the validation data",
    "test": "evaluate on the test data",
    "predict": "compute predictions",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with these arguments, or with those of this process; returns the exit status."""
    parser = argparse.ArgumentParser(
        "lightning-hetero", description="Train on devices of unequal speed with Lightning."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {package_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command, what in _TRAINER.items():
        commands.add_parser(command, add_help=False, help=f"{what}, as a configuration says (LightningCLI)")

    demo = commands.add_parser(
        "demo",
        help="train a land-cover model on two unequal devices, compared with plain DDP",
        description=(
            "Train TorchGeo's SemanticSegmentationTask on a Sentinel-2 scene that the package carries, on unequal GPUs "
            "where there are any, else on two CPU cores of which one is shared with competing processes. Compares "
            "plain DDP, hetero and the fast device alone. About three minutes on two cores."
        ),
    )
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("lightning-hetero-demo"),
        metavar="DIR",
        help="folder for landcover.png, summary.json, the checkpoint and plan.jsonl (default: %(default)s)",
    )
    steps = "optimizer steps of the hetero run, the comparison included; fewer than usual compare and learn less"
    demo.add_argument("--max-steps", type=int, metavar="N", help=steps)
    given = sys.argv[1:] if arguments is None else arguments
    if given and given[0] in _TRAINER:
        # Imported here: it imports Lightning and TorchGeo, which takes seconds.
        from lightning_hetero.cli.lightning_cli import main as run_trainer

        run_trainer(arguments)  # LightningCLI reads what follows the command, `--help` too
        return 0
    return _demo(parser.parse_args(arguments))


def _demo(options: argparse.Namespace) -> int:
    try:
        from lightning_hetero.demo.processes import Interrupted
        from lightning_hetero.demo.run import main as run
    except KeyboardInterrupt:
        return 130
    try:
        run(options.out, options.max_steps)
    except (KeyboardInterrupt, Interrupted):
        print("\nstopped; all processes have ended", file=sys.stderr)
        return 130
    except (RuntimeError, ValueError) as error:
        print(f"lightning-hetero demo: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
