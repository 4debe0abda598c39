"""A device as a person calls it."""

import torch


def device_name(device: torch.device) -> str:
    """The GPU's product name, or the device's type."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
