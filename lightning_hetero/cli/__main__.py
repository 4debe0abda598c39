"""`python -m lightning_hetero.cli` is the command `lightning-hetero`."""

import sys

from lightning_hetero.cli.main import main

sys.exit(main())
