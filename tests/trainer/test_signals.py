"""The handler of SIGTERM, without a Trainer: it never exchanges anything."""

from signal import SIGTERM
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.trainer.states import TrainerFn

from lightning_hetero.trainer.signals import StopRequest


def trainer_of(fn: TrainerFn, *, launches: bool = True) -> tuple[Any, list[int]]:
    """What the handler needs of a Trainer, and the signals that were passed on to processes that it has started."""
    killed: list[int] = []
    launcher = SimpleNamespace(kill=killed.append) if launches else None
    connector = SimpleNamespace(received_sigterm=False)
    trainer = SimpleNamespace(
        strategy=SimpleNamespace(launcher=launcher), state=SimpleNamespace(fn=fn), _signal_connector=connector
    )
    return trainer, killed


def test_in_a_fit_the_handler_only_asks() -> None:
    """All ranks have to stop at the same step, so it is the messages that let them."""
    trainer, killed = trainer_of(TrainerFn.FITTING)
    stop = StopRequest(trainer)
    assert not stop.requested
    stop.handle(SIGTERM, None)
    assert stop.requested
    assert not trainer._signal_connector.received_sigterm
    assert killed == [SIGTERM]
    stop.stop()
    assert trainer._signal_connector.received_sigterm


@pytest.mark.parametrize("fn", [TrainerFn.VALIDATING, TrainerFn.TESTING, TrainerFn.PREDICTING])
def test_elsewhere_the_rank_stops_by_itself(fn: TrainerFn) -> None:
    """Ranks exchange nothing while they evaluate."""
    trainer, _ = trainer_of(fn)
    stop = StopRequest(trainer)
    stop.handle(SIGTERM, None)
    assert stop.requested
    assert trainer._signal_connector.received_sigterm


def test_a_second_signal_is_not_passed_on_again() -> None:
    """Each process would pass it on to all others for ever."""
    trainer, killed = trainer_of(TrainerFn.FITTING)
    stop = StopRequest(trainer)
    for _ in range(3):
        stop.handle(SIGTERM, None)
    assert killed == [SIGTERM]


def test_processes_that_somebody_else_has_started_are_left_to_them() -> None:
    trainer, _ = trainer_of(TrainerFn.FITTING, launches=False)
    stop = StopRequest(trainer)
    stop.handle(SIGTERM, None)
    assert stop.requested
