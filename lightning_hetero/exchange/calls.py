"""Calls that all ranks make together: how they are told apart, and the sentence where ranks make different ones."""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_BYTES = 6
"""Bytes of text in one number: a float64 holds integers of up to 53 bits exactly."""

TEXT_COLUMNS = 12
"""Numbers that hold a text; a longer one is cut."""

INTERNAL, OF_USER, BACKWARD_PASS = 0, 1, 2
"""Kinds of calls: the strategy's own; those of the user and of Lightning; those that average gradients."""


@dataclass(frozen=True)
class Call:
    """A call that all ranks make together, in the same order.

    Attributes:
        name: what it is; the same on all ranks.
        text: for errors, the call and where this rank makes it.
        kind: `INTERNAL`, `OF_USER` or `BACKWARD_PASS`.
    """

    name: str
    text: str
    kind: int = INTERNAL

    @property
    def checksum(self) -> int:
        """A number that differs between names."""
        return zlib.crc32(self.name.encode())


@dataclass(frozen=True)
class Place:
    """Where a rank is: the call that it has made, in which it waits for the others.

    Attributes:
        rank: the rank and its device, for errors.
        text: the call, see `Call.text`.
        kind: see `Call.kind`.
    """

    rank: str
    text: str
    kind: int = INTERNAL


class UnmatchedCallError(RuntimeError):
    """Ranks wait for each other in different calls; not a lost connection, so it has a type of its own."""


def unmatched(places: Sequence[Place]) -> UnmatchedCallError:
    """The error where ranks are in different calls, of which none can end; the same on all ranks."""
    groups: dict[str, list[Place]] = {}
    for place in places:
        groups.setdefault(place.text, []).append(place)
    first, *others = sorted(groups.values(), key=lambda group: (group[0].kind != OF_USER, len(group)))
    alone = " alone" if len(first) == 1 and first[0].kind == OF_USER else ""
    sentence = f"{_verb(first)}{alone} in {first[0].text}, while " + ", and ".join(
        f"{_verb(group)} in {group[0].text}" for group in others
    )
    skipped = [group for group in groups.values() if group[0].kind != BACKWARD_PASS]
    if first[0].kind == OF_USER:
        advice = (
            "no rank can go on. All ranks have to make this call, in the same order: don't make it under a condition "
            "that differs between them, such as `if trainer.is_global_zero`"
        )
    elif len(skipped) < len(groups):
        ranks = listed([place.rank for group in skipped for place in group])
        advice = f"{ranks} skipped a backward pass that the others made. Make all ranks run the same backward passes"
    else:
        advice = "no rank can go on. Make all ranks take the same steps and make the same calls, in the same order"
    return UnmatchedCallError(f"the ranks went different ways: {sentence}: {advice}.")


_MOST_NAMES = 4
"""Names of ranks in a sentence; there may be thousands of ranks."""


def listed(names: Sequence[str]) -> str:
    """Names in a sentence."""
    more = len(names) - _MOST_NAMES
    shown = list(names[:_MOST_NAMES]) + ([f"{more} more"] if more > 0 else [])
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"


def numbered(ranks: Sequence[int]) -> str:
    """Ranks in a sentence, by their numbers."""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _verb(group: Sequence[Place]) -> str:
    return f"{listed([place.rank for place in group])} {'is' if len(group) == 1 else 'are'}"


def pack(text: str) -> list[float]:
    """A text as `TEXT_COLUMNS` numbers."""
    data = text.encode()[: _BYTES * TEXT_COLUMNS].ljust(_BYTES * TEXT_COLUMNS, b"\0")
    return [float(int.from_bytes(data[i : i + _BYTES], "big")) for i in range(0, len(data), _BYTES)]


def unpack(numbers: Sequence[float]) -> str:
    """The text that `pack` has turned into numbers."""
    data = b"".join(int(number).to_bytes(_BYTES, "big") for number in numbers)
    return data.rstrip(b"\0").decode(errors="ignore")


@dataclass(frozen=True)
class Wait:
    """A wait of a rank for the others, as it tells them.

    Attributes:
        place: where it is.
        channel: the sequence of calls that this one belongs to; all ranks make the calls of a sequence in order.
        number: of the call in its sequence.
        begun: by channel, how many calls this rank has made.
    """

    place: Place
    channel: str
    number: int
    begun: Mapping[str, int]

    def has_reached(self, other: "Wait") -> bool:
        """Whether this rank has made the call in which another one waits."""
        return self.begun.get(other.channel, 0) > other.number


def stuck(waits: Mapping[int, Wait]) -> list[int]:
    """The ranks whose wait can never end: they wait for ranks that wait for each other; `waits` by rank.

    A rank that is not among them computes: nothing is known of it, and whoever waits for it may go on.
    """
    found = set(waits)
    while True:
        left = {a for a in found if any(a != b and not waits[b].has_reached(waits[a]) for b in found)}
        if left == found:
            return sorted(found)
        found = left
