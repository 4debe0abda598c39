"""TorchGeo's tasks, recognized by class name, without importing torchgeo.

Old names (`torchgeo.trainers.SemanticSegmentationTask`) and those of 0.10 (`torchgeo.tasks.SemanticSegmentation`) are
treated alike.
"""

from torch import nn

TARGETS = {
    "Classification": "label",
    "Regression": "label",
    "SemanticSegmentation": "mask",
    "SpatioTemporalSegmentation": "mask",
    "ChangeDetection": "mask",
    "PixelwiseRegression": "mask",
    "SpatioTemporalPixelwiseRegression": "mask",
    "TemporalRegression": "target",
}
"""Tasks whose loss is one criterion on one target, with the target's key in the batch."""

IMAGE_TASKS = frozenset({"ObjectDetection", "InstanceSegmentation", "BYOL", "SimCLR", "MoCo", "MAE"})
"""Tasks whose losses are computed inside the model: only the images of a batch can be counted."""

_BATCH_STATISTICS = frozenset({"SimCLR", "MoCo", "MAE"})
"""Tasks that compute a standard deviation over the samples of a batch, which is NaN for a single one."""


def _names(module: nn.Module) -> list[str]:
    """Names of the TorchGeo classes in a module's MRO, the most derived first."""
    return [cls.__name__ for cls in type(module).__mro__ if cls.__module__.startswith("torchgeo.")]


def task_name(name: str) -> str:
    """TorchGeo 0.10's name of a task that older versions call `name`."""
    return name.removesuffix("Task")


def unchanged_task(module: nn.Module) -> str | None:
    """The name of the module's TorchGeo class, if `training_step` is TorchGeo's own; else None."""
    step: object = getattr(type(module), "training_step", None)
    if "training_step" in vars(module):
        # On a compiled module, Lightning sets the steps as instance attributes, and keeps the original ones.
        step = (getattr(module, "_compiler_ctx", None) or {}).get("original_training_step")
    if not str(getattr(step, "__module__", "")).startswith("torchgeo."):
        return None
    known = TARGETS.keys() | IMAGE_TASKS
    return next((name for name in _names(module) if task_name(name) in known), None)


def uses_batch_statistics(module: nn.Module) -> bool:
    """Whether the task computes statistics over the samples of a batch, besides those of BatchNorm."""
    return any(task_name(name) in _BATCH_STATISTICS for name in _names(module))
