"""Idioms of what replaced `validation_epoch_end`: lists and sums of a validation, and their values at its end."""

from typing import Any

import torch
import torch.distributed as dist
from torchmetrics.classification import MulticlassConfusionMatrix

from tests.idioms.gallery import Run, Topic
from tests.idioms.modules import Classifier

TOPIC = Topic("Values at the end of a validation")


class Collecting(Classifier):
    """Appends a loss for each batch, in place of the removed `validation_epoch_end`."""

    def on_validation_epoch_start(self) -> None:
        self.outs: list[torch.Tensor] = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.outs.append(self.loss(batch))


@TOPIC.idiom("a list of losses, `torch.stack(outs).mean()` logged at the end with `sync_dist=True`")
def stack_of_losses(run: Run) -> Any:
    # Global batches of equal size: the mean of unequal batches is no mean over samples in one process either.
    class Module(Collecting):
        def on_validation_epoch_end(self) -> None:
            self.log("val_loss", torch.stack(self.outs).mean(), sync_dist=True)

    return run.validate(Module(), run.loader(36, 6))


@TOPIC.idiom("the same without `sync_dist`, one value a batch")
def stack_of_values(run: Run) -> Any:
    class Module(Collecting):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.outs.append(batch["index"].double().mean())

        def on_validation_epoch_end(self) -> None:
            self.log("value", torch.stack(self.outs).mean())

    return run.validate(Module(), run.loader(40, 4))


@TOPIC.idiom("a list of predictions, the error of `torch.cat(outs)` logged at the end, batches of unequal size")
def cat_of_errors(run: Run) -> Any:
    class Module(Collecting):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.outs.append(self(batch["x"]).argmax(1) == batch["label"])

        def on_validation_epoch_end(self) -> None:
            self.log("accuracy", torch.cat(self.outs).double().mean())

    return run.validate(Module(), run.loader(31, 6))


@TOPIC.idiom("a sum and a number of samples kept by hand, divided at the end", tolerance=1e-6)
def running_sums(run: Run) -> Any:
    class Module(Classifier):
        def on_validation_epoch_start(self) -> None:
            self.total, self.samples = 0.0, 0

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.total += self.loss(batch).item() * len(batch["x"])
            self.samples += len(batch["x"])

        def on_validation_epoch_end(self) -> None:
            self.log("val_loss", self.total / self.samples)

    return run.validate(Module(), run.loader(30, 6))


@TOPIC.idiom("a value at the end logged with a `batch_size` of one's own")
def own_batch_size(run: Run) -> Any:
    class Module(Collecting):
        def on_validation_epoch_start(self) -> None:
            self.total, self.weight = 0.0, 0

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.total += float((batch["index"] * batch["label"]).sum())
            self.weight += int(batch["label"].sum())

        def on_validation_epoch_end(self) -> None:
            self.log("value", self.total / max(1, self.weight), batch_size=self.weight)

    return run.validate(Module(), run.loader(30, 6))


@TOPIC.idiom("a list for each of two validation loaders")
def lists_of_loaders(run: Run) -> Any:
    class Module(Classifier):
        def on_validation_epoch_start(self) -> None:
            self.outs: list[list[torch.Tensor]] = [[], []]

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.outs[dataloader_idx].append(self.loss(batch))

        def on_validation_epoch_end(self) -> None:
            for i, outs in enumerate(self.outs):
                self.log(f"val_loss_{i}", torch.stack(outs).mean(), sync_dist=True)

    return run.validate(Module(), [run.loader(24), run.loader(32)])


@TOPIC.idiom("`self.all_gather` of a scalar at the end of validation")
def gather_scalars(run: Run) -> Any:
    class Module(Classifier):
        def on_validation_epoch_start(self) -> None:
            self.total = torch.zeros((), dtype=torch.float64)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.total += self.loss(batch) * len(batch["x"])

        def on_validation_epoch_end(self) -> None:
            self.total = self.all_gather(self.total).sum()

    module = Module()
    run.validate(module, run.loader(30))
    return {"total": module.total}


@TOPIC.idiom(
    "`self.all_gather(torch.cat(outs))` at the end of validation, of unequal shapes",
    sentence=r"all_gather.*gather_object",
    reason="a sentence: ranks have different numbers of samples; metrics and `gather_object` gather them",
)
def gather_unequal(run: Run) -> Any:
    class Module(Collecting):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.outs.append(self(batch["x"]))

        def on_validation_epoch_end(self) -> None:
            self.outs = self.all_gather(torch.cat(self.outs))

    module = Module()
    run.validate(module, run.loader(30))
    return {"sum": module.outs.sum()}


@TOPIC.idiom("`all_gather_object` of what was collected, at the end of validation")
def gather_objects(run: Run) -> Any:
    class Module(Collecting):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.outs += batch["index"].tolist()

        def on_validation_epoch_end(self) -> None:
            if self.trainer.world_size > 1:
                ranks = [None] * self.trainer.world_size
                dist.all_gather_object(ranks, self.outs)
                self.outs = [index for outs in ranks for index in outs]

    module = Module()
    run.validate(module, run.loader(30))
    return {"indices": sorted(module.outs)}


@TOPIC.idiom("a confusion matrix of the module that is never reset, computed at each end")
def never_reset(run: Run) -> Any:
    class Module(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.confusion = MulticlassConfusionMatrix(4)
            self.sums: list[float] = []

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.confusion.update(self(batch["x"]), batch["label"])

        def on_validation_epoch_end(self) -> None:
            self.sums.append(self.confusion.compute().tolist())

    module = Module()
    run.fit(module, run.loader(16), run.loader(5, 1))
    return {"matrices": module.sums}
