"""Exchanges that Lightning and the user's code ask the strategy for; none of them is a rank's own work."""

from typing import Any

from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from typing_extensions import override

from lightning_hetero.device.step_timer import ComputeTimer, HostClock


class Communicating(DDPStrategy):
    """DDP whose clock of a rank's own work stands still while the rank exchanges."""

    def __init__(self, **ddp_options: Any) -> None:
        super().__init__(**ddp_options)
        self._clock = ComputeTimer(HostClock())

    @override
    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        if isinstance(tensor, Tensor) and reduce_op in ("mean", "avg") and not tensor.is_floating_point():
            # Lightning averages the sample counts of logged values as whole numbers, rounded down: 55 on 3 ranks is 18.
            tensor = tensor.double()
        with self._clock.waiting():
            return super().reduce(tensor, group, reduce_op)

    @override
    def barrier(self, *args: Any, **kwargs: Any) -> None:
        # A rank that fails runs hooks with barriers in them, while the others sit in another exchange.
        module = self.lightning_module
        if module is not None and module._trainer is not None and module.trainer.interrupted:  # noqa: SLF001 - `trainer` raises
            return
        with self._clock.waiting():
            super().barrier(*args, **kwargs)

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        with self._clock.waiting():
            return super().broadcast(obj, src)

    @override
    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        with self._clock.waiting():
            return super().all_gather(tensor, group, sync_grads)
