"""Logged values over ranks, without a Trainer: how they are combined, kept for a step, and exchanged."""

import math
import warnings
from dataclasses import replace
from datetime import timedelta
from functools import partialmethod
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.trainer.connectors.logger_connector.result import _Metadata
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric, SumMetric

from lightning_hetero.device.step_timer import ComputeTimer, HostClock
from lightning_hetero.exchange.groups import RankGroup
from lightning_hetero.trainer.logged_values import REDUCTIONS, LoggedKey, combined, on_host, union
from lightning_hetero.trainer.results import EvaluationResults, MetricExchange
from lightning_hetero.trainer.torchmetrics import MetricSync
from lightning_hetero.trainer.training_results import TrainingResults
from tests.ranks import fails_on_ranks, run_ranks

# ---- one value of many ----

ranks = st.lists(st.tuples(st.floats(-100, 100), st.integers(0, 50)), min_size=1, max_size=9)


@given(ranks, st.sampled_from(sorted(REDUCTIONS)))
def test_ranks_together_are_one_process(of_ranks: list[tuple[float, int]], reduction: str) -> None:
    """A mean over all samples, or the sum, minimum or maximum of all values, wherever they were logged."""
    values, weights = np.array([v for v, _ in of_ranks]), np.array([float(n) for _, n in of_ranks])
    found = combined(reduction, values * weights if reduction == "mean" else values, weights)
    if reduction == "mean" and not weights.any():
        assert math.isnan(found)
    elif reduction == "mean":
        assert found == pytest.approx(np.average(values, weights=weights), abs=1e-12)
    else:
        assert found == pytest.approx(
            float(REDUCTIONS[reduction.removeprefix("Python's ")](torch.tensor(values))), abs=1e-12
        )


@given(st.floats(-1e6, 1e6), st.lists(st.sampled_from([1.0, 2.0, 4.0]), min_size=1, max_size=9))
def test_a_mean_of_equal_values_is_exactly_that_value(value: float, weights: list[float]) -> None:
    """Such as a learning rate: no rounding makes it another one."""
    assert combined("mean", value * np.array(weights), np.array(weights)) == value


KEY = LoggedKey(
    "training_step.loss", _Metadata("training_step", "loss", on_step=True), "mean", is_tensor=True, sync_dist=False
)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({}, None),
        ({"meta": replace(KEY.meta, prog_bar=True)}, None),
        ({"sync_dist": True}, None),
        ({"reduction": "max"}, "reduction='mean' and reduction='max'"),
        ({"meta": replace(KEY.meta, on_epoch=False)}, "on_epoch=True and on_epoch=False"),
        ({"is_tensor": False}, "is_tensor=True and is_tensor=False"),
        ({"meta": replace(KEY.meta, dataloader_idx=1)}, "dataloader_idx=None and dataloader_idx=1"),
    ],
)
def test_what_makes_values_under_one_key_different(change: dict[str, Any], difference: str | None) -> None:
    """How a value is shown may differ between ranks; what it means may not."""
    assert KEY.difference(replace(KEY, **change)) == difference


def test_all_ranks_order_keys_alike() -> None:
    """By rank, and by what each logged first."""
    a, b, c = (replace(KEY, key=name) for name in "abc")
    assert union([[b], [c, b], [a]]) == [b, c, a]
    with pytest.raises(ValueError, match="ranks 1 and 2 log 'loss' in different ways"):
        union([[b], [a], [replace(a, reduction="max")]])


def test_a_key_makes_what_lightning_would_have_registered() -> None:
    """So that the rank may still log it by itself, with the same arguments."""
    results = training_results()
    results.log("training_step", "loss", torch.tensor(1.0), on_step=True, sync_dist_fn=sum)
    key = LoggedKey.of("training_step.loss", results["training_step.loss"])
    assert key == KEY
    assert key.make_metric(sum).meta == results["training_step.loss"].meta


def test_numbers_are_read_in_order() -> None:
    assert on_host([1, torch.tensor(2.5, dtype=torch.float64), 3.0]) == [1.0, 2.5, 3.0]


# ---- a training step of one rank ----


def exchange(module: nn.Module | None = None) -> MetricExchange:
    """Between all ranks of this test, or on one rank only."""
    import torch.distributed as dist

    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    group = RankGroup(rank, world_size, timedelta(seconds=30))
    return MetricExchange(group, ComputeTimer(HostClock()), no_reduction, module or nn.Module(), torch.device("cpu"))


def no_reduction(value: Any, *_: Any, **__: Any) -> Any:
    raise AssertionError("what is logged communicates only where it is exchanged")


def training_results() -> TrainingResults:
    return TrainingResults(exchange(), None)


def step(
    results: TrainingResults,
    loss: float,
    *,
    samples: int,
    weight: float | Tensor | None = None,
    borrowed: bool = False,
    empty: bool = False,
    count: Tensor | None = None,
) -> None:
    """A training step that logs its loss and the number of its samples."""
    results.count_batch(None, samples)
    results.set_batch(torch.zeros(samples), None)
    results.begin_step(borrowed=borrowed, empty=empty, count=count)
    value = torch.tensor(loss, dtype=torch.float64)
    results.log("training_step", "loss", value, on_step=True, sync_dist=True, sync_dist_fn=no_reduction)
    results.log("training_step", "samples", torch.tensor(float(samples)), reduce_fx=torch.sum)
    results.end_step(value)
    results.end_batch(weight)


def logged(results: TrainingResults, *, on_step: bool) -> dict[str, float]:
    return {name: float(value) for name, value in results.metrics(on_step)["callback"].items()}


def test_a_loss_has_its_weight_in_the_global_batch() -> None:
    """In the mean of an epoch; everything else counts as often as Lightning says."""
    results = training_results()
    step(results, 2.0, samples=4, weight=1.0)
    step(results, 4.0, samples=2, weight=3.0)
    assert logged(results, on_step=False)["loss"] == (2.0 * 1 + 4.0 * 3) / 4
    assert logged(results, on_step=False)["samples"] == 6
    assert logged(results, on_step=True)["loss_step"] == 4.0


@pytest.mark.parametrize("weight", [5.0, torch.tensor(5.0)])
def test_nothing_is_read_before_the_batch_is_over(weight: float | Tensor) -> None:
    """The weight is known only then; until then nothing has been logged."""
    results = training_results()
    results.count_batch(None, 3)
    results.begin_step(borrowed=False, empty=False, count=None)
    results.set_batch(torch.zeros(3), None)
    results.log("training_step", "loss", torch.tensor(7.0))
    assert float(results["training_step.loss"].cumulated_batch_size) == 0
    results.end_step(torch.tensor(7.0))
    results.end_batch(weight)
    assert float(results["training_step.loss"].cumulated_batch_size) == 5


def test_a_borrowed_step_registers_its_keys_and_adds_nothing() -> None:
    results = training_results()
    step(results, 9.0, samples=4, borrowed=True)
    assert set(results) == {"training_step.loss", "training_step.samples"}
    step(results, 2.0, samples=4)
    assert logged(results, on_step=False)["loss"] == 2.0
    assert logged(results, on_step=False)["samples"] == 4


@pytest.mark.parametrize("count", [None, torch.tensor(0.0)])
def test_nan_is_left_out_where_nothing_counts(count: Tensor | None) -> None:
    """Also where only the device knows that; where something counts, NaN stays NaN."""
    results = training_results()
    step(results, math.nan, samples=4, empty=count is None, count=count, weight=0.0)
    step(results, 2.0, samples=4)
    assert logged(results, on_step=False)["loss"] == 2.0
    step(results, math.nan, samples=4)
    assert math.isnan(logged(results, on_step=False)["loss"])


def in_parts(results: TrainingResults, sizes: list[int], values: Tensor) -> None:
    """A step that is computed in parts of a batch, one of which fails at first."""
    results.count_batch(None, sum(sizes))
    results.begin_step(borrowed=False, empty=False, count=None)
    with results.in_parts() as parts:
        parts.begin(values, len(values))
        results.log("training_step", "loss", values.mean())  # the part turns out not to fit
        for part in values.split(sizes):
            parts.begin(part, len(part))
            results.log("training_step", "loss", part.mean(), on_step=False, on_epoch=True)
            results.log("training_step", "most", part.max(), reduce_fx=torch.max)
            results.log("training_step", "sum", part.sum(), reduce_fx=torch.sum)
            parts.keep(part.mean(), float(len(part)))
    results.end_step(values.mean())
    results.end_batch(None)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_parts_log_what_the_whole_batch_would_have(sizes: list[int]) -> None:
    """Once, with the batch's size; and the batch is the loop's again."""
    results = training_results()
    results.set_batch("the loop's", None)
    values = torch.randn(sum(sizes), dtype=torch.float64, generator=torch.Generator().manual_seed(len(sizes)))
    in_parts(results, sizes, values)
    found = logged(results, on_step=False)
    assert found["loss"] == pytest.approx(float(values.mean()), abs=1e-12)
    assert found["most"] == float(values.max())
    assert found["sum"] == pytest.approx(float(values.sum()), abs=1e-12)
    assert float(results["training_step.loss"].cumulated_batch_size) == len(values)
    assert results.batch == "the loop's"


def test_a_part_in_which_nothing_counts_is_left_out() -> None:
    results = training_results()
    results.count_batch(None, 4)
    results.begin_step(borrowed=False, empty=False, count=None)
    with results.in_parts() as parts:
        for loss, count in ((math.nan, 0.0), (3.0, 2.0)):
            parts.begin(torch.zeros(2), 2)
            results.log("training_step", "loss", torch.tensor(loss))
            parts.keep(torch.tensor(loss), count)
    results.end_batch(None)
    assert logged(results, on_step=False)["loss"] == 3.0


# ---- between ranks ----


class Measures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mean = MeanMetric()
        self.total = SumMetric()


def training_on_ranks() -> Any:
    rank = torch.distributed.get_rank()
    results = TrainingResults(exchange(), None)
    seen = []
    for losses, samples, weights in (((1.0, 5.0), (3, 1), (3.0, 1.0)), ((2.0, 8.0), (3, 1), (6.0, 2.0))):
        step(results, losses[rank], samples=samples[rank], weight=weights[rank])
        if rank == 1:  # which the other rank does not know yet
            results.log("on_train_batch_end", "own", torch.tensor(7.0), on_step=True, on_epoch=False)
        before = logged(results, on_step=True)
        results.exchange_steps()
        seen.append((before, logged(results, on_step=True)))
    unknown = logged(results, on_step=False)
    results.exchange_epoch()
    return seen, unknown, logged(results, on_step=False), [key.meta.name for key in results.logged_keys]


def test_training_values_are_those_of_all_ranks_after_an_exchange() -> None:
    """Steps by the weights of their losses; before an exchange nobody sees a value that is a rank's own."""
    outs = run_ranks(2, training_on_ranks)
    for seen, unknown, epoch, keys in outs:
        (first, one), (second, two) = seen
        assert first == {}
        assert one == {"loss": (3 * 1.0 + 5.0) / 4, "loss_step": (3 * 1.0 + 5.0) / 4, "own": 7.0}
        assert second == one, "until the next exchange"
        assert two["loss_step"] == (6 * 2.0 + 2 * 8.0) / 8
        assert unknown == {}
        assert epoch == {"loss": 36 / 12, "loss_epoch": 36 / 12, "samples": 8}
        assert sorted(keys) == ["loss", "own", "samples"]


def _sync(metric: Metric, sync: MetricSync, *args: Any, **options: Any) -> None:
    sync.sync(metric, *args, **options)


def evaluation_results(module: Measures) -> EvaluationResults:
    connection = exchange(module)
    sync = MetricSync(connection.group, connection.timer)
    Metric.sync = partialmethod(_sync, sync)  # in this process, which ends with the test
    return EvaluationResults(connection, sync, count=lambda batch: float((batch >= 0).sum()))


def evaluation_on_ranks() -> Any:
    rank = torch.distributed.get_rank()
    module = Measures()
    results = evaluation_results(module)
    found = []
    for index in range(2):  # loaders; the same metric for both
        results.dataloader_idx = index
        for batch in (torch.tensor([1.0, 2.0 + index, 3.0 * rank]), torch.full((3,), -1.0)):  # the last counts nothing
            results.batch, results.batch_size = batch, None
            results.begin_batch(3)
            if batch[0] > 0:
                module.mean.update(batch)
                results.log("validation_step", "mean", module.mean, metric_attribute="mean")
            value = batch.mean() if batch[0] > 0 else torch.tensor(math.nan)
            results.log("validation_step", "loss", value, sync_dist=True, sync_dist_fn=no_reduction)
            results.end_batch()
        found.append(logged_evaluation(results))
        results.exchange_epoch()
        found.append(logged_evaluation(results))
    results.exchange_epoch()  # nothing is new
    return *found, logged_evaluation(results)


def logged_evaluation(results: EvaluationResults) -> dict[str, float]:
    found = {}
    for index in range(2):
        results.dataloader_idx = index
        found |= {name: float(value) for name, value in results.metrics(on_step=False)["callback"].items()}
    return found


def test_evaluation_values_are_those_of_all_ranks_after_an_exchange() -> None:
    """Each loader's at its end, though one metric is used for both; NaN is left out."""
    for nothing, first, unchanged, both, again in run_ranks(2, evaluation_on_ranks):
        assert nothing == {}
        assert first == pytest.approx({"mean/dataloader_idx_0": 9 / 6, "loss/dataloader_idx_0": 9 / 6})
        assert unchanged == first
        assert both == pytest.approx(first | {"mean/dataloader_idx_1": 20 / 12, "loss/dataloader_idx_1": 11 / 6})
        assert again == both


def borrowing_on_ranks() -> Any:
    """Rank 1 borrows a sample of rank 0 in the only step."""
    rank = torch.distributed.get_rank()
    module = Measures()
    results = evaluation_results(module)
    results.batch = torch.tensor([4.0])
    results.begin_batch(1 - rank)
    module.total.update(results.batch)
    for name, options in (("mean", {}), ("sum", {"reduce_fx": torch.sum}), ("most", {"reduce_fx": torch.max})):
        results.log("validation_step", name, results.batch.mean() + 9 * rank, **options)
    inside = float(module.total.compute())
    results.end_batch()
    results.log("on_validation_epoch_end", "end", torch.tensor(5.0 + rank))
    results.exchange_epoch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return logged(results, on_step=False), float(module.total.compute()), inside


def test_what_a_rank_borrows_is_left_out() -> None:
    for values, total, inside in run_ranks(2, borrowing_on_ranks):
        assert values == {"mean": 4.0, "sum": 4.0, "most": 4.0, "end": 5.0}
        assert total == inside == 4.0, "a metric of the module too, also while it is computed"


def lacking() -> None:
    module = Measures()
    results = evaluation_results(module)
    if torch.distributed.get_rank() == 0:
        module.total.update(1.0)
        results.log("validation_step", "total", module.total, metric_attribute="another")
    results.exchange_epoch()


def test_a_metric_that_a_rank_lacks() -> None:
    """One sentence that names the rank and the metric."""
    errors = fails_on_ranks(2, lacking)
    assert "rank 1 (cpu) has to compute the metric 'total'" in errors[1]
