"""The name of a device, and what distinguishes it from the devices of other ranks."""

import platform
from typing import Any

import torch


def device_name(device: torch.device) -> str:
    """The GPU's product name, or the device's type."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def device_identity(device: torch.device) -> list[Any]:
    """What distinguishes a rank's device: host, name, number of threads."""
    return [platform.node(), device_name(device), torch.get_num_threads()]
