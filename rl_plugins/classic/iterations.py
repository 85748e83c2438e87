"""The loader behind a training epoch: it yields no data, only the number of each iteration."""

from collections.abc import Iterator


class Iterations:
    """Counts to `length`, and remembers in a checkpoint how far it has come.

    Its length gives Lightning a progress bar and keeps it from fetching ahead; its state keeps Lightning from warning
    that a run which resumes in the middle would see data twice.

    Args:
        length: Number of iterations.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self.done = 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        # A restored position holds for the epoch that was interrupted; the next one starts anew.
        start, self.done = self.done % self.length, 0
        for index in range(start, self.length):
            self.done = index + 1
            yield index

    def state_dict(self) -> dict[str, int]:
        """Iterations handed out in this epoch."""
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after those that were handed out."""
        self.done = state["done"]
