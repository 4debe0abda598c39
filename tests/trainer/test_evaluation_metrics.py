"""torchmetrics over ranks that evaluate different numbers of samples are those of one process."""

import pickle
import warnings
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAUROC, MulticlassConfusionMatrix, MulticlassF1Score
from torchmetrics.detection import MeanAveragePrecision
from torchmetrics.regression import SpearmanCorrCoef

from tests.ranks import run_ranks
from tests.trainer.fits import Numbers, Regression, make_trainer
from tests.trainer.loading import once, quiet

TORCHMETRICS = Metric.sync


class Boxes(Dataset[Any]):
    """Images with one to three boxes each, and predictions that are a bit off; each has a mask."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        generator = torch.Generator().manual_seed(index)
        n = 1 + index % 3
        corner = 20 * torch.rand(n, 2, generator=generator)
        boxes = torch.cat([corner, corner + 6 + 5 * torch.rand(n, 2, generator=generator)], dim=1)
        labels = torch.randint(2, (n,), generator=generator)
        moved = boxes + torch.randn(n, 4, generator=generator)
        scores = torch.rand(n, generator=generator)
        masks, others = (torch.stack([self._mask(box) for box in some]) for some in (boxes, moved))
        target = {"boxes": boxes, "labels": labels, "masks": masks}
        return {"boxes": moved, "labels": labels, "scores": scores, "masks": others}, target

    @staticmethod
    def _mask(box: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros(40, 40, dtype=torch.bool)
        x0, y0, x1, y1 = box.round().int().clamp(0, 40).tolist()
        mask[y0:y1, x0:x1] = True
        return mask


class Detection(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.map = MeanAveragePrecision(iou_type=("bbox", "segm"))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.map.update([p for p, _ in batch], [t for _, t in batch])

    def on_validation_epoch_end(self) -> None:
        self.values = {k: v.tolist() for k, v in self.map.compute().items()}
        self.map.reset()


class Anew(Detection):
    """Makes its metric when an evaluation begins, as scripts do; the strategy has not seen it before."""

    def on_validation_epoch_start(self) -> None:
        self.map = MeanAveragePrecision(iou_type=("bbox", "segm"))


class Classifying(Regression):
    """States that are counts, lists to be concatenated (of two shapes and types), and a collection of metrics."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.confusion = MulticlassConfusionMatrix(4)
        self.collection = MetricCollection(
            {"auroc": MulticlassAUROC(4), "f1": MulticlassF1Score(4), "confusion": MulticlassConfusionMatrix(4)}
        )
        self.rank_correlation = SpearmanCorrCoef()
        self.head = torch.nn.Linear(5, 4).double()
        self.steps = 0

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.steps += 1
        logits = self.head(batch["x"])
        self.confusion(logits, batch["label"])
        self.confusion.compute()  # of all ranks, which are in step
        self.collection.update(logits, batch["label"])
        self.rank_correlation.update(logits[:, 0], batch["y"])

    def on_validation_epoch_end(self) -> None:
        self.values = {k: v.tolist() for k, v in self.collection.compute().items()}
        self.values["own confusion"] = self.confusion.compute().tolist()
        self.values["spearman"] = self.rank_correlation.compute().tolist()
        for metric in (self.confusion, self.collection, self.rank_correlation):
            metric.reset()


def as_lists(samples: list[Any]) -> list[Any]:
    return samples


RUNS: dict[str, tuple[type, int, list[int]]] = {  # module, samples, shares
    "5 + 2 images": (Detection, 7, [5, 2]),
    "5 + 2 images, a metric made in a hook": (Anew, 7, [5, 2]),
    "3 + 0 images, a metric made in a hook": (Anew, 3, [1, 0]),
    "3 + 0 images": (Detection, 3, [1, 0]),
    "0 + 3 images": (Detection, 3, [0, 1]),
    "50 + 11": (Classifying, 61, [5, 1]),
    "61 + 0": (Classifying, 61, [1, 0]),
    "0 + 61": (Classifying, 61, [0, 1]),
}


def validated(strategy: str) -> dict[str, Any]:
    from lightning_hetero import HeteroStrategy

    quiet()
    warnings.filterwarnings("ignore", message="Metric `.*` will save all targets")
    results = {}
    for name, (module_type, size, shares) in RUNS.items():
        module = module_type()
        detects = issubclass(module_type, Detection)
        data = DataLoader(
            Boxes(size) if detects else Numbers(size), batch_size=4, collate_fn=as_lists if detects else None
        )
        hetero = strategy == "hetero"
        trainer = make_trainer(
            HeteroStrategy(shares=shares) if hetero else "auto", torch.distributed.get_world_size() if hetero else 1
        )
        trainer.validate(module, data, verbose=False)
        results[name] = module.values
        if not detects:
            results[f"steps {name}"] = module.steps
    return results


@once
def runs() -> tuple[list[dict[str, Any]], dict[str, Any]]:
    return run_ranks(2, validated, "hetero"), run_ranks(1, validated, "auto")[0]


@pytest.mark.parametrize("name", RUNS)
def test_metrics_are_those_of_one_process(name):
    ranks, one = runs()
    for rank in ranks:
        if issubclass(RUNS[name][0], Detection):
            assert rank[name].keys() == one[name].keys()
            for key, value in one[name].items():
                assert rank[name][key] == pytest.approx(value, abs=1e-6), key
            assert 0 < rank[name]["bbox_map"] < 1
        else:
            assert rank[name]["own confusion"] == one[name]["own confusion"]
            assert rank[name]["confusion"] == one[name]["confusion"]
            for key in ("auroc", "f1", "spearman"):
                assert rank[name][key] == pytest.approx(one[name][key], abs=1e-6)
    if RUNS[name][0] is Classifying:
        assert [rank[f"steps {name}"] for rank in ranks] == [8, 8]


def copies() -> float:
    """A clone, and what comes out of a pickle, gather like the metric that the strategy has never seen."""
    from lightning_hetero import HeteroStrategy

    rank = torch.distributed.get_rank()
    quiet()
    warnings.filterwarnings("ignore", message="Metric `.*` will save all targets")
    found = []

    class Copying(Regression):
        def validation_step(self, batch: Any, batch_idx: int) -> None: ...

        def on_validation_epoch_end(self) -> None:
            metric = pickle.loads(pickle.dumps(MeanAveragePrecision().clone()))
            for index in range(3 - 2 * rank):
                prediction, target = Boxes(9)[index + 5 * rank]
                metric.update([prediction], [target])
            found.append(metric.compute()["map"].item())

    make_trainer(HeteroStrategy(), 2).validate(Copying(), DataLoader(Numbers(8), batch_size=4), verbose=False)
    assert Metric.sync is TORCHMETRICS, "torchmetrics is left as it was"
    return found[0]


def test_a_copy_of_a_metric_gathers_too():
    metric = MeanAveragePrecision()
    for index in (0, 1, 2, 5):
        prediction, target = Boxes(9)[index]
        metric.update([prediction], [target])
    assert run_ranks(2, copies) == 2 * [pytest.approx(metric.compute()["map"].item())]
