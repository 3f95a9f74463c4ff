"""The protocol of what scores videos by their prompts: how this package knows a world."""

from typing import Protocol

import numpy as np


class Scorer(Protocol):
    """Prompts whose facts can be read back from a video."""

    @property
    def name(self) -> str:
        """The key of its scores in records."""

    def prompts(self, count: int) -> list[str]:
        """Different prompts that training does not show.

        Raises:
            ValueError: There are fewer.
        """

    def score(self, frames: np.ndarray, prompt: str) -> dict[str, bool] | None:
        """Fact -> whether the video shows it, "all" among them; None for prompts of others.

        Args:
            frames: uint8 [frames, height, width, 3].
            prompt: The text.
        """
