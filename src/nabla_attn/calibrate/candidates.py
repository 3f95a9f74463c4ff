"""The algorithms that calibration chooses from."""

from collections.abc import Iterable

from nabla_attn.config import DENSE, SparseConfig, parse

THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
SHARES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7)
DEFAULT = ("nabla-*", "topk-*", "nabla-*_sta-3-3-3")


def read_candidates(texts: Iterable[str]) -> list[SparseConfig]:
    """Algorithms of strings in which a ``*`` stands for `THRESHOLDS` or `SHARES`; dense goes last.

    Raises:
        ValueError: a string is no algorithm, or none is given.
    """
    configs: list[SparseConfig] = []
    for text in texts:
        numbers = SHARES if "topk" in text else THRESHOLDS
        filled = [text.replace("*", str(number)) for number in numbers] if "*" in text else [text]
        configs += map(parse, filled)
    configs = list(dict.fromkeys(config for config in configs if not config.is_dense))
    if not configs:
        raise ValueError("there is nothing to choose from: pass an algorithm such as nabla-*.")
    return [*configs, DENSE]
