"""Idioms of prediction: https://lightning.ai/docs/pytorch/stable/deploy/production_basic.html."""

from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import BasePredictionWriter, Callback
from torch.utils.data import DataLoader

from tests.idioms.gallery import PerSample, Run, Topic
from tests.idioms.modules import Linear
from tests.trainer.fits import Numbers

TOPIC = Topic("Prediction")


def loader(run: Run, samples: int = 30, **options: Any) -> Any:
    """Without a sampler: for prediction Lightning has one that repeats nothing."""
    return DataLoader(Numbers(samples), batch_size=run.batch(4), **options)


def by_index(batches: Any) -> PerSample:
    """From pairs of indices and predictions."""
    found = PerSample()
    for indices, values in batches:
        found.update(zip(indices.tolist(), values.tolist(), strict=True))
    return found


@TOPIC.idiom("`trainer.predict`, predictions with their indices")
def predict(run: Run) -> Any:
    return {"predictions": by_index(run.trainer().predict(Linear(), loader(run)))}


@TOPIC.idiom("`trainer.predict` on several loaders")
def several(run: Run) -> Any:
    first, second = run.trainer().predict(Linear(), [loader(run), loader(run, 9)])
    return {"first": by_index(first), "second": by_index(second)}


@TOPIC.idiom("`trainer.predict` on fewer samples than ranks")
def few(run: Run) -> Any:
    return {"predictions": by_index(run.trainer().predict(Linear(), loader(run, 1)) or [])}


@TOPIC.idiom("predictions gathered with `all_gather_object` in `on_predict_epoch_end`")
def gathered(run: Run) -> Any:
    class Module(Linear):
        def on_predict_start(self) -> None:
            self.found: dict[int, float] = {}

        def predict_step(self, batch: Any, batch_idx: int) -> None:
            self.found.update(zip(batch["index"].tolist(), self(batch["x"]).tolist(), strict=True))

        def on_predict_epoch_end(self) -> None:
            if self.trainer.world_size > 1:
                ranks: list[Any] = [None] * self.trainer.world_size
                dist.all_gather_object(ranks, self.found)
                self.found = {index: value for rank in ranks for index, value in rank.items()}

    module = Module()
    run.trainer().predict(module, loader(run))
    return {"predictions": [module.found[index] for index in sorted(module.found)]}


class Writer(BasePredictionWriter):
    def __init__(self, interval: Any) -> None:
        super().__init__(interval)
        self.found = PerSample()

    def write_on_batch_end(
        self, trainer: Any, pl_module: Any, prediction: Any, batch_indices: Any, batch: Any, *_: Any
    ) -> None:
        self.found.update(zip(batch_indices, prediction[1].tolist(), strict=True))

    def write_on_epoch_end(self, trainer: Any, pl_module: Any, predictions: Any, batch_indices: Any) -> None:
        for prediction, indices in zip(predictions, batch_indices[0], strict=True):
            self.found.update(zip(indices, prediction[1].tolist(), strict=True))


for interval in ("batch", "epoch"):

    def _write(run: Run, interval: Any = interval) -> Any:
        writer = Writer(interval)
        run.trainer(callbacks=[writer]).predict(Linear(), loader(run), return_predictions=False)
        return {"predictions": writer.found}

    TOPIC.idiom(f"`BasePredictionWriter('{interval}')` with `batch_indices`")(_write)


@TOPIC.idiom("outputs read in `on_predict_batch_end` of a callback, a sum reduced at the end")
def outputs(run: Run) -> Any:
    class Sum(Callback):
        total = torch.zeros((), dtype=torch.float64)

        def on_predict_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
            self.total = self.total + outputs[1].sum()

        def on_predict_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            self.total = trainer.strategy.reduce(self.total, reduce_op="sum")

    callback = Sum()
    run.trainer(callbacks=[callback]).predict(Linear(), loader(run))
    return {"total": callback.total}


@TOPIC.idiom("`limit_predict_batches=2`")
def limited(run: Run) -> Any:
    return {"predictions": by_index(run.trainer(limit_predict_batches=2).predict(Linear(), loader(run)))}


@TOPIC.idiom("`predict` after `fit`, `dropout` switched on by hand in `predict_step`")
def after_fit(run: Run) -> Any:
    class Module(Linear):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            generator = torch.Generator()
            masks = [torch.rand(5, generator=generator.manual_seed(int(i))) > 0.5 for i in batch["index"]]
            return batch["index"], self(batch["x"] * torch.stack(masks))

    trainer, module = run.trainer(), Module()
    trainer.fit(module, run.loader(32))
    return {"predictions": by_index(trainer.predict(module, loader(run)))}


@TOPIC.idiom("`predict` with loader workers and `drop_last=True`")
def workers(run: Run) -> Any:
    # Predictions are complete: Lightning sets drop_last=False there.
    return {"predictions": by_index(run.trainer().predict(Linear(), loader(run, 29, num_workers=1, drop_last=True)))}


@TOPIC.idiom("a barrier in `predict_step`")
def barrier(run: Run) -> Any:
    class Module(Linear):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            self.trainer.strategy.barrier()
            return super().predict_step(batch, batch_idx)

    return {"predictions": by_index(run.trainer().predict(Module(), loader(run)))}
