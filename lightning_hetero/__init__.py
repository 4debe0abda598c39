"""Heterogeneous data parallelism for PyTorch Lightning, by one flag: `Trainer(strategy="hetero")`."""

from lightning.pytorch.strategies import StrategyRegistry

from lightning_hetero.planning.plan import Plan
from lightning_hetero.step.loss_count import cross_entropy_count
from lightning_hetero.strategy import HeteroStrategy

__all__ = ["HeteroStrategy", "Plan", "cross_entropy_count"]

HeteroStrategy.register_strategies(StrategyRegistry)
