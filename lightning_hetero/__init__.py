"""Heterogeneous data parallelism for PyTorch Lightning, by one flag: `Trainer(strategy="hetero")`."""

from importlib.util import find_spec

from lightning_hetero.planning.plan import Plan

# Importing `lightning_hetero.planning`, which needs numpy only, runs this file too. So the strategy is left out where
# Lightning is not installed; where it is, importing the package registers it.
if find_spec("lightning") is not None:
    from lightning.pytorch.strategies import StrategyRegistry

    from lightning_hetero.step.loss_count import cross_entropy_count
    from lightning_hetero.strategy import HeteroStrategy

    HeteroStrategy.register_strategies(StrategyRegistry)

__all__ = ["HeteroStrategy", "Plan", "cross_entropy_count"]
