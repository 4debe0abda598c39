"""Which parameters of a module train, and where ranks differ in it."""

import contextlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from zlib import crc32

from torch import nn
from torch.distributed.distributed_c10d import Store

from lightning_hetero.exchange.calls import numbered

_KEY = "lightning_hetero/trainable/{}"
_NAMED = 3
"""Parameters of a kind that an error names; a backbone may have hundreds."""


def trainable_ids(module: nn.Module) -> list[int]:
    """The identities of a module's trainable parameters; several times as fast as `Module.parameters`."""
    found: list[int] = []
    layers = [module]
    while layers:
        layer = layers.pop()
        found += [id(one) for one in layer._parameters.values() if one is not None and one.requires_grad]  # noqa: SLF001 - for its speed
        layers += [child for child in layer._modules.values() if child is not None]  # noqa: SLF001
    return found


@dataclass(frozen=True)
class TrainableSet:
    """The trainable parameters of a module that DDP takes care of, by name, at one moment."""

    named: Mapping[str, nn.Parameter]
    changes: int = 0  # how often it has changed before: other parameters may have the same names and shapes

    @classmethod
    def of(cls, module: nn.Module, changes: int = 0) -> "TrainableSet":
        ignored = getattr(module, "_ddp_params_and_buffers_to_ignore", ())
        named = {name: one for name, one in module.named_parameters() if one.requires_grad and name not in ignored}
        return cls(named, changes)

    @property
    def shapes(self) -> dict[str, list[int]]:
        return {name: list(one.shape) for name, one in self.named.items()}

    @cached_property
    def checksum(self) -> int:
        return crc32(repr((self.changes, self.shapes, [one.dtype for one in self.named.values()])).encode())

    def is_same(self, other: "TrainableSet") -> bool:
        """Whether the other set has the same parameters: the same objects in the same order."""
        return list(map(id, self.named.values())) == list(map(id, other.named.values()))


class TrainableParameters:
    """Notices that other parameters of a module train than when DDP has wrapped it, at the cost of looking at each.

    Args:
        module: that is wrapped now, on all ranks.
        rank: of this process.
        store: that all ranks share, if there is one. A rank whose set changes writes it there before it sends its
            message, so that no rank has to wait for another one to say what differs.
    """

    def __init__(self, module: nn.Module, rank: int, store: Store | None) -> None:
        self.wrapped = self.current = TrainableSet.of(module)
        self._module = module
        self._rank = rank
        self._store = store
        self._ids = trainable_ids(module)
        self._equal = {id(one): one for one in module.parameters()}  # those with the same values on all ranks
        self._publish()

    def has_changed(self, *, may_pause: bool) -> bool:
        """Whether other parameters train than at the last `look`; if some may pause, only whether there are more."""
        ids = trainable_ids(self._module)
        return ids != self._ids and not (may_pause and set(ids) <= set(self._ids))

    @property
    def is_wrapped(self) -> bool:
        """Whether DDP's wrapper knows the parameters that train, as of the last `look`."""
        return self.current is self.wrapped

    def look(self) -> None:
        """Look which parameters train now."""
        ids = trainable_ids(self._module)
        if ids == self._ids:
            return
        self._ids = ids
        found = TrainableSet.of(self._module, self.wrapped.changes + 1)
        if found.is_same(self.wrapped):
            self.current = self.wrapped
            return
        self.current = found
        self._publish()

    def bypass(self) -> list[nn.Parameter]:
        """Other parameters train since the last `look`, in the middle of a step, and the wrapper must not act any more.

        Returns:
            Those that trained before, and those that do now: their gradients have to be averaged without the wrapper.
        """
        self.look()
        parameters = self.wrapped_or_current()
        self.wrapped = TrainableSet({}, self.current.changes)
        self._ids = []  # whatever trains in the next step is another set than that of the wrapper
        return parameters

    def wrapped_or_current(self) -> list[nn.Parameter]:
        """The parameters that train, as of the last `look`, or did when the module was wrapped."""
        both = (*self.wrapped.named.values(), *self.current.named.values())
        return list({id(one): one for one in both}.values())

    def check(self, checksums: Sequence[float], step: int) -> None:
        """Check that the current sets of all ranks are equal.

        Args:
            checksums: of all ranks' current sets.
            step: the global batch, for the message.

        Raises:
            RuntimeError: they are not; it says which parameters differ, on every rank.
        """
        if len(set(checksums)) == 1:
            return
        shapes = [self._shapes(rank) for rank in range(len(checksums))]
        anew = [rank for rank, checksum in enumerate(checksums) if checksum != self.wrapped.checksum]
        raise RuntimeError(
            f"the ranks do not train the same parameters in global batch {step}: {describe_difference(shapes, anew)}. "
            "Set requires_grad and add layers on all ranks alike."
        )

    def _publish(self) -> None:
        if self._store is not None:
            self._store.set(_KEY.format(self._rank), json.dumps(self.current.shapes))

    def _shapes(self, rank: int) -> Mapping[str, Sequence[int]]:
        """What a rank trains."""
        if rank == self._rank or self._store is None:
            return self.current.shapes
        shapes: dict[str, list[int]] = {}
        with contextlib.suppress(Exception):  # rank 0 hosts the store, and may have ended with this error already
            shapes = json.loads(self._store.get(_KEY.format(rank)))
        return shapes

    def take_new(self) -> list[nn.Parameter]:
        """The current parameters that were not there when the module was wrapped: ranks may differ in their values."""
        present = {id(one): one for one in self._module.parameters()}
        new = [one for one in self.current.named.values() if id(one) not in self._equal]
        self._equal = {key: one for key, one in present.items() if key in self._equal or one.requires_grad}
        return new

    def set_wrapped(self) -> None:
        """DDP's wrapper was made anew on all ranks, for the current parameters."""
        self.wrapped = self.current


def describe_difference(shapes: Sequence[Mapping[str, Sequence[int]]], anew: Sequence[int]) -> str:
    """Where ranks differ in what they train, as part of a sentence.

    Args:
        shapes: of each rank's trainable parameters, by name; W mappings.
        anew: the ranks whose parameters have changed, for the case that neither names nor shapes differ.
    """
    names: dict[str, None] = dict.fromkeys(name for mapping in shapes for name in mapping)
    groups = defaultdict[tuple[tuple[int, ...], tuple[int, ...]], list[str]](list)
    parts = []
    for name in names:
        training = tuple(rank for rank, mapping in enumerate(shapes) if name in mapping)
        others = tuple(rank for rank in range(len(shapes)) if rank not in training)
        if others:
            groups[training, others].append(name)
        elif len({tuple(mapping[name]) for mapping in shapes}) > 1:
            sizes = ", ".join(f"{tuple(mapping[name])} on rank {rank}" for rank, mapping in enumerate(shapes))
            parts.append(f"{name} has the shape {sizes}")
    for (training, others), listed in groups.items():
        more = f" and {len(listed) - _NAMED} more" if len(listed) > _NAMED else ""
        verb = "trains" if len(listed) == 1 else "train"
        parts.append(
            f"{', '.join(listed[:_NAMED])}{more} {verb} on {numbered(training)}, but not on {numbered(others)}"
        )
    return "; ".join(parts) or f"those of {numbered(anew)} have been replaced, reordered or converted"
