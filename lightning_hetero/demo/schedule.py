"""Which steps of the demo measure the devices, are compared, or just train."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """What happens at which optimizer step of the `hetero` run, during which the other sides have their turns.

    Args:
        max_steps: of the whole `hetero` run.
        learning: its first steps, in which it measures how fast the devices are; they are not compared.
        rounds: how many turns each side has.
        steps: the number of compared steps in a turn.
        warm_up: steps at the beginning of each turn of another side that are not compared, as each turn is a new run.
    """

    max_steps: int = 180
    learning: int = 12
    rounds: int = 6
    steps: int = 5
    warm_up: int = 2

    @classmethod
    def within(cls, max_steps: int | None) -> "Schedule":
        """The usual schedule, or for fewer steps one that still leaves some for training after the comparison.

        Raises:
            ValueError: there are too few steps for a comparison.
        """
        usual = cls()
        if max_steps is None:
            return usual
        if max_steps < 6:
            raise ValueError(f"--max-steps {max_steps} leaves no steps to compare: give 6 or more")
        if max_steps - usual.last_compared >= usual.steps:
            return cls(max_steps)
        return cls(max_steps, learning=max_steps // 3, rounds=1, steps=max(2, max_steps // 6), warm_up=1)

    @property
    def last_compared(self) -> int:
        """Steps of `hetero` up to the end of the comparison."""
        return self.learning + self.rounds * self.steps

    def is_others_turn(self, step: int) -> bool:
        """Whether the other sides have their turn after this many steps of `hetero`."""
        return self.learning < step <= self.last_compared and (step - self.learning) % self.steps == 0

    def is_compared(self, step: int) -> bool:
        """Whether step number `step` of `hetero`, counted from 0, is compared; the first after a turn is not."""
        return self.learning <= step < self.last_compared and (step - self.learning) % self.steps != 0
