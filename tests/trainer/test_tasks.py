"""TorchGeo's tasks, unchanged: what they count, whether that is exact, and whole runs on unequal shares."""

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import BasePredictionWriter

from lightning_hetero import HeteroStrategy
from lightning_hetero.step.batch_contents import sample_count
from lightning_hetero.step.batch_norm import smallest_local_batch
from lightning_hetero.step.loss_count import find_loss_counter
from tests.ranks import run_ranks
from tests.trainer.fits import make_trainer, parameters_of, relative_error
from tests.trainer.geography import has, tolerate_torchgeo
from tests.trainer.tasks import CASES, Case, Images, bound, collate, off, param

PAGE = Path(__file__).parents[2] / "docs/torchgeo.md"


def table() -> dict[tuple[str, str], tuple[str, str]]:
    """From task and loss to what is counted and whether that is exact, as the documentation says."""
    text = PAGE.read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w+) \| (.+?) \| (.+?) \| (yes|no: .+?) \|$", text, re.MULTILINE)
    return {(task, loss): (counted, exact) for task, loss, counted, exact in rows}


@pytest.fixture
def case(request: pytest.FixtureRequest) -> Case:
    if not has(request.param.task):
        pytest.skip("the installed TorchGeo does not have this task")
    tolerate_torchgeo()  # pytest puts the filters back
    return request.param


def test_the_table_has_a_row_for_each_case() -> None:
    """And no others, so that each is checked below."""
    assert list(table()) == [(case.task, case.loss) for case in CASES]


@pytest.mark.parametrize("case", [param(case) for case in CASES], indirect=True)
def test_what_the_documentation_says(case: Case) -> None:
    """The rule that is found, and the gradient: exact where the table says so, and not where it says why not."""
    counted, exact = table()[case.task, case.loss]
    module = case.make()
    counter = find_loss_counter(module, None)
    rule = re.match(r"valid targets|target elements|images|samples", counter.rule)
    assert rule is not None
    assert counted.startswith(rule[0])
    if case.random:
        assert exact != "yes"
    elif exact == "yes":
        assert off(case, counter, (4, 2)) <= bound(case)
        assert off(case, counter, (5, 3)) <= bound(case)
    else:
        assert off(case, counter, (5, 3)) > 1e-6


def test_only_bce_is_computed_in_single_precision() -> None:
    """So that the wider bound is used for nothing else."""
    tolerate_torchgeo()
    single = {case.loss for case in CASES if has(case.task) and not case.random and bound(case) > 1e-9}
    assert single == {"`bce`", "`bce`, several labels"}


def test_batches_of_boxes_count_images() -> None:
    """Whatever comes first in the batch."""
    (detection,) = (case for case in CASES if case.loss == "RetinaNet")
    tolerate_torchgeo()
    module = detection.make()
    batch = collate([Images(3, "boxes")[i] for i in range(3)])
    assert sample_count(batch) != 3
    assert find_loss_counter(module, None)(module, batch) == 3


@pytest.mark.parametrize("synchronized", [False, True])
@pytest.mark.parametrize(
    ("task", "with_one"), [("SimCLR", False), ("MoCo", False), ("MAE", False), ("Regression", True)]
)
def test_tasks_with_statistics_of_their_own_need_two_samples(task: str, with_one: bool, synchronized: bool) -> None:
    """Also where BatchNorm is synchronized."""
    if not has(task):
        pytest.skip("the installed TorchGeo does not have this task")
    tolerate_torchgeo()
    module = next(case for case in CASES if case.task == task).make()
    assert smallest_local_batch(module, synchronized=synchronized) == (1 if with_one else 2)


# ---- whole runs ----

RUN = [case for case in CASES if case.strategy is not None and has(case.task)]


class Writer(BasePredictionWriter):
    """Keeps predictions by the index of the sample."""

    def __init__(self) -> None:
        super().__init__("batch")
        self.predictions: dict[int, Any] = {}

    def write_on_batch_end(self, trainer, module, prediction, batch_indices, batch, batch_idx, dataloader_idx) -> None:
        if isinstance(prediction, dict):  # segmentation from 0.10 on, with the place of each patch where there is one
            prediction = prediction["probabilities"]
        if prediction is None:
            prediction = [None] * len(batch_indices)
        assert len(prediction) == len(batch_indices)
        for index, one in zip(batch_indices, prediction, strict=True):
            assert index not in self.predictions
            self.predictions[index] = {"": one} if isinstance(one, torch.Tensor) else one


def numbers(trainer: Any) -> dict[str, float]:
    return {key: float(value) for key, value in trainer.callback_metrics.items() if value.numel() == 1}


def evaluate(trainer: Any, module: Any, case: Case, writer: Writer) -> dict[str, Any]:
    trainer.validate(module, case.loader(7, 4), verbose=False)
    validated = numbers(trainer)
    trainer.test(module, case.loader(9, 4), verbose=False)
    tested = numbers(trainer)
    trainer.predict(module, case.loader(5, 4), return_predictions=False)
    return {"metrics": validated | tested, "predictions": writer.predictions}


def run(case: Case, strategy: Any, devices: int, state: Any = None) -> dict[str, Any]:
    """Fit, or take over a state; then validate, test and predict."""
    tolerate_torchgeo()
    warnings.filterwarnings("ignore", message="predict returned None")  # self-supervised tasks do
    module, writer = case.make(), Writer()
    trainer = make_trainer(strategy, devices, max_epochs=1, callbacks=[writer], **case.trainer)
    if state is None:
        trainer.fit(module, case.loader(14, 8 // devices), case.loader(7, 4))
    else:
        module.load_state_dict(state)
    fitted = parameters_of(module)
    return {"parameters": fitted, "state": module.state_dict(), **evaluate(trainer, module, case, writer)}


def run_on_rank(number: int) -> dict[str, Any]:
    case = RUN[number]
    options = {"find_unused_parameters": True} if "unused" in str(case.strategy) else {}
    return run(case, HeteroStrategy(shares=[3, 1], **options), 2)


@pytest.mark.parametrize("number", range(len(RUN)), ids=[f"{case.task} {case.loss}" for case in RUN])
def test_a_task_runs_unchanged(number: int) -> None:
    """All ranks end alike, as one process does where the table says exact; evaluation is that of one process."""
    case = RUN[number]
    first, second = run_ranks(2, run_on_rank, number)
    assert torch.isfinite(first["parameters"]).all()
    assert relative_error(first["parameters"], second["parameters"]) == 0
    if table()[case.task, case.loss][1] == "yes":
        assert relative_error(first["parameters"], run(case, "auto", 1)["parameters"]) <= bound(case)
    alone = run(case, "auto", 1, first["state"])
    # Losses and average precisions are means over batches, and depend on how these are cut.
    metrics = {
        k: v for k, v in alone["metrics"].items() if not k.endswith("_loss") and "map" not in k and "mar" not in k
    }
    for rank in (first, second):
        assert {k: rank["metrics"][k] for k in metrics} == pytest.approx(metrics, rel=1e-5, nan_ok=True)
    assert not first["predictions"].keys() & second["predictions"].keys()
    predictions = first["predictions"] | second["predictions"]
    assert sorted(predictions) == sorted(alone["predictions"]) == list(range(5))
    for index, expected in alone["predictions"].items():
        if expected is not None:
            for key, value in expected.items():
                torch.testing.assert_close(predictions[index][key], value, rtol=1e-6, atol=1e-9)
