"""What a report was measured with, in words."""

from collections.abc import Mapping
from typing import Any

Report = Mapping[str, Any]

MODELS = {"resnet18": "ResNet-18", "unet": "U-Net", "fcn": "FCN"}


def allocator_of(report: Report) -> str:
    """How the C library's allocator was set; reports from before there was a choice had it as it is."""
    return str(report["configuration"].get("allocator", "default"))


def name_of(report: Report) -> str:
    """A configuration in words."""
    configuration = report["configuration"]
    if "filters" in configuration:
        return f"FCN, {configuration['size']} px, B {configuration['global_batch']}, {report['hardware']['gpu']}"
    if "model" not in configuration:
        return f"{configuration['ranks']} ranks"
    quotas = "/".join(map(str, configuration["quotas"]))
    words = f"{MODELS[configuration['model']]}, {configuration['size']} px, {quotas}, B {configuration['global_batch']}"
    return words + (", allocator as it is" if allocator_of(report) == "default" else "")
