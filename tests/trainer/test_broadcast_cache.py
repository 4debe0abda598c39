"""When `Trainer.log_dir` is answered from what was broadcast before; without a Trainer or other ranks."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.trainer.states import RunningStage

from lightning_hetero.trainer.log_dir import BroadcastCache, in_evaluation_batch

# ---- hooks ----


def module_in(stage: RunningStage | None, hook: str | None) -> Any:
    trainer = SimpleNamespace(state=SimpleNamespace(stage=stage))
    return SimpleNamespace(_trainer=trainer, _current_fx_name=hook)


EVALUATING = [
    RunningStage.VALIDATING,
    RunningStage.SANITY_CHECKING,
    RunningStage.TESTING,
    RunningStage.PREDICTING,
]
OF_A_BATCH = [
    "validation_step",
    "test_step",
    "predict_step",
    "on_validation_batch_start",
    "on_validation_batch_end",
    "on_test_batch_end",
    "on_predict_batch_start",
    "batch_to_device",
    "on_before_batch_transfer",
    "transfer_batch_to_device",
    "on_after_batch_transfer",
]
OTHERS = [
    "setup",
    "on_sanity_check_start",
    "on_validation_start",
    "on_validation_epoch_start",
    "on_validation_epoch_end",
    "on_validation_end",
    "on_predict_epoch_end",
    "on_save_checkpoint",
    "val_dataloader",
    None,
]


@pytest.mark.parametrize("stage", EVALUATING, ids=str)
def test_the_hooks_of_an_evaluation_batch(stage: RunningStage) -> None:
    for hook in OF_A_BATCH:
        assert in_evaluation_batch(module_in(stage, hook))
    for hook in OTHERS:
        assert not in_evaluation_batch(module_in(stage, hook))


@pytest.mark.parametrize("hook", ["training_step", "on_train_batch_end", "batch_to_device", "optimizer_step"])
@pytest.mark.parametrize("stage", [RunningStage.TRAINING, None], ids=str)
def test_hooks_of_training(stage: RunningStage | None, hook: str) -> None:
    assert not in_evaluation_batch(module_in(stage, hook))


def test_a_module_that_belongs_to_no_trainer_is_in_no_hook() -> None:
    assert not in_evaluation_batch(None)
    assert not in_evaluation_batch(SimpleNamespace(_trainer=None, _current_fx_name="validation_step"))  # type: ignore[arg-type]


# ---- broadcasts ----


def test_only_what_is_recorded_is_remembered() -> None:
    cache = BroadcastCache()
    cache.add("before", "x")
    with cache.recording():
        for own, result in (("mine", "rank 0's"), (Path("a"), Path("b")), (None, None)):
            cache.add(own, result)
        cache.add(["no", "path"], "x")
        cache.add(7, "x")
    cache.add("after", "x")
    assert [own in cache for own in ("before", "mine", Path("a"), None, ["no", "path"], 7, "after")] == [
        *(False, True, True, True),
        *(False, False, False),
    ]
    assert (cache["mine"], cache[Path("a")], cache[None]) == ("rank 0's", Path("b"), None)


def test_the_next_recording_forgets_the_last_one() -> None:
    cache = BroadcastCache()
    with cache.recording():
        cache.add("a", "b")
    with pytest.raises(ArithmeticError), cache.recording():
        raise ArithmeticError
    cache.add("c", "d")
    assert "a" not in cache
    assert "c" not in cache
