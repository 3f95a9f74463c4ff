"""Independent pieces of one CPU call, side by side in threads.

A product of a few blocks does not gain from threads inside the operation; whole pieces side by
side do, since torch's operations let go of Python's lock.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from nabla_attn.backends.scratch import Scratch

Piece = TypeVar("Piece")

# More would wait for Python's lock; threads beyond it work inside the operations.
MAX_WORKERS = 8


def num_workers(device: torch.device) -> int:
    """Threads that `for_each` would use for many pieces."""
    return min(torch.get_num_threads(), MAX_WORKERS) if device.type == "cpu" else 1


def for_each(
    function: Callable[[Piece, Scratch], None], pieces: Iterable[Piece], device: torch.device
) -> None:
    """Call `function` with every piece, in any order, without gradients; raises its first error.

    Its second argument is memory that the pieces of one thread use in turn. Beside it, pieces must
    not write to the same place.
    """
    pending = deque(pieces)
    workers = min(num_workers(device), len(pending))
    if workers < 2:
        scratch = Scratch(device)
        for piece in pending:
            function(piece, scratch)
        return
    threads = torch.get_num_threads()
    # Threads start with neither the caller's inference mode nor its number of threads.
    is_inference = torch.is_inference_mode_enabled()

    def work() -> None:
        torch.set_num_threads(threads // workers)
        scratch = Scratch(device)
        with torch.inference_mode(is_inference), torch.no_grad():
            try:
                for piece in _take(pending):
                    function(piece, scratch)
            finally:
                # After an error nobody starts another piece.
                pending.clear()

    try:
        with ThreadPoolExecutor(workers) as pool:
            for future in [pool.submit(work) for _ in range(workers)]:
                future.result()
    finally:
        torch.set_num_threads(threads)


def _take(pending: deque[Piece]) -> Iterator[Piece]:
    while True:
        try:
            piece = pending.popleft()
        except IndexError:
            return
        yield piece
