"""The key-value store through which ranks met: it answers also where collective calls can't, as after a failure."""

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store


def default_store() -> Store | None:
    """The store of the default process group; None where there is none."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    # There is no public way to it; without it, only the explanation of a failure is lost.
    get = getattr(dist.distributed_c10d, "_get_default_store", None)
    return get() if get is not None else None
