"""The folder of a run, where its user has chosen one."""

import os
from pathlib import Path

import lightning.pytorch as pl


def run_folder(trainer: pl.Trainer) -> Path | None:
    """The folder of the Trainer's first logger, or else the ``default_root_dir`` that it was given.

    All ranks have to call this together: ``Trainer.log_dir`` is broadcast.

    Returns:
        None where neither is a local folder, or is one only because the user named none: for ``default_root_dir``
        Lightning then takes the working directory, and so do loggers such as ``WandbLogger``.
    """
    logged = trainer.log_dir if trainer.loggers else None
    if logged and _is_local(logged) and Path(logged).resolve() != Path.cwd():
        return Path(logged)
    root = trainer.default_root_dir
    # Whoever says "." has chosen it: Lightning itself fills in the whole path.
    return Path(root) if _is_local(root) and root != os.getcwd() else None  # noqa: PTH109 - as Lightning does


def _is_local(folder: str) -> bool:
    return "://" not in folder
