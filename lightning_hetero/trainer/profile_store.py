"""What is known of the devices before the first step: what an earlier run of the job has learnt, or else a probe."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_hetero.device import speed_test
from lightning_hetero.exchange.consistency import job, machine
from lightning_hetero.exchange.groups import RankGroup
from lightning_hetero.planning.balancer import STATE_VERSION, Balancer
from lightning_hetero.planning.planner import SplitPlanner
from lightning_hetero.planning.shares import Shares
from lightning_hetero.trainer import profiles


class ProfileStore:
    """Reads and writes the profile of one job; all ranks begin with what the first one finds.

    Args:
        shares: the user's.
        exchange: between the ranks.
        device: of this rank.
    """

    def __init__(self, shares: Shares, exchange: RankGroup, device: torch.device) -> None:
        self._shares = shares
        self._exchange = exchange
        self._device = device
        self._facts: dict[str, Any] = {}  # what has to be equal for a profile to hold

    def find(self, module: "pl.LightningModule", global_batch: int) -> dict[str, Any] | None:
        """What an earlier run has learnt; None where there was none. All ranks have to ask.

        Raises:
            ValueError: the profile that the user names is none, or of another job.
        """
        if not self._shares.adaptive:
            return None
        facts = {
            "version": STATE_VERSION,
            **job(module, module.trainer.precision),
            "global batch": global_batch,
            "devices": self._exchange.gather(machine(self._device)),
        }
        self._facts = facts
        folder, given = run_folder(module.trainer), self._shares.profile

        def look() -> dict[str, Any] | None:
            state = profiles.read(given, facts) if given else profiles.find(folder, facts)
            if state is None:
                return None
            try:
                Balancer(self._exchange.world_size, global_batch, state=state).first_proposal()
            except (ValueError, KeyError, TypeError) as error:
                if given:
                    raise ValueError(f"the profile {given} can't be used: {error}") from None
                rank_zero_warn(f"a profile of an earlier run in {folder} or beside it can't be used: {error}")
                return None
            return state

        return self._exchange.from_rank_zero(look)

    def probe(self) -> list[float] | None:
        """How fast each of W CPU ranks is; None where nothing is to be learnt. All ranks have to ask."""
        if not self._shares.adaptive or self._exchange.world_size == 1:
            return None
        return self._exchange.gather(speed_test.speed())

    def keep(self, trainer: "pl.Trainer", planner: SplitPlanner | None) -> None:
        """Write the profile, on the first rank. All ranks have to call."""
        folder = run_folder(trainer)
        state = planner.state_dict() if planner is not None else None
        if self._exchange.rank == 0 and state is not None:
            try:
                profiles.write(folder, self._facts, state)
            except OSError as error:  # what was trained is worth more
                rank_zero_warn(f"what this run has learnt of its devices could not be written: {error}")


def run_folder(trainer: "pl.Trainer") -> str:
    """The run's folder; asks all ranks."""
    return trainer.log_dir or trainer.default_root_dir
