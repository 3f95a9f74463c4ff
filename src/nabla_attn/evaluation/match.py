"""Equal terms: find the number of an algorithm that gives a density or a time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nabla_attn.config import parse
from nabla_attn.evaluation.prompts import Item
from nabla_attn.generation.generate import generate, warm_up
from nabla_attn.generation.request import GenerationRequest

LOW, HIGH = 0.01, 1.0
QUANTITIES = {
    "density": lambda record: record.numbers["attention"]["density"],
    "seconds": lambda record: record.numbers["seconds"]["transformer"],
}


@dataclass(frozen=True)
class Match:
    """What bisection found.

    Attributes:
        value: The number.
        reached: What it gives.
        tried: (number, what it gave), in order.
    """

    value: float
    reached: float
    tried: tuple[tuple[float, float], ...]


def bisect(
    measure: Callable[[float], float], target: float, *, tolerance: float, max_tries: int = 10
) -> Match:
    """Find where a measure that rises from 0.01 to 1 reaches a target.

    Args:
        measure: The number -> what it gives; never falling.
        target: What is wanted.
        tolerance: How near, relative to the target.
        max_tries: Measurements at most.

    Returns:
        The nearest that was measured.

    Raises:
        ValueError: The target is outside what the ends give.
    """
    low, high = LOW, HIGH
    tried = [(low, measure(low)), (high, measure(high))]
    if not tried[0][1] * (1 - tolerance) <= target <= tried[1][1] * (1 + tolerance):
        raise ValueError(
            f"{target:g} cannot be reached: the number {low} gives {tried[0][1]:.4g} and {high} "
            f"gives {tried[1][1]:.4g}. Pass a target between them."
        )
    while len(tried) < max_tries and _nearest(tried, target)[1] > tolerance * target:
        middle = round((low + high) / 2, 4)
        tried.append((middle, measure(middle)))
        if tried[-1][1] < target:
            low = middle
        else:
            high = middle
    value, reached = _nearest(tried, target)[0]
    return Match(value, reached, tuple(tried))


def match_algorithm(
    pipeline: Any,
    request: GenerationRequest,
    template: str,
    items: Sequence[Item],
    *,
    by: str,
    target: float,
    tolerance: float = 0.02,
    on_try: Callable[[str, float], None] = lambda algo, value: None,
) -> tuple[str, Match]:
    """Fill the `*` of an algorithm such as `nabla-*_sta-3-3-3` so that runs reach a target.

    Args:
        pipeline: A text-to-video pipeline.
        request: The run; prompt, seed and algorithm are replaced.
        template: An algorithm with `*` in the place of its threshold or share.
        items: Videos that are made for each number tried; their mean counts.
        by: A name of `QUANTITIES`.
        target: The density, or the transformer's seconds.
        tolerance: How near, relative to the target.
        on_try: Called with each algorithm tried and what it gave.

    Raises:
        ValueError: No `*`, an unknown quantity, or a target that cannot be reached.
    """
    if template.count("*") != 1:
        raise ValueError(f"{template!r} must have one * for the number to find, as nabla-* has.")
    if by not in QUANTITIES:
        raise ValueError(f"unknown quantity {by!r}; expected one of {', '.join(QUANTITIES)}.")

    def measure(value: float) -> float:
        algo = _fill(template, value)
        asked = [
            replace(request, prompt=item.prompt, seed=item.seed).with_algo(algo) for item in items
        ]
        if by == "seconds":
            warm_up(pipeline, asked[0])
        values = [QUANTITIES[by](generate(pipeline, one)[1]) for one in asked]
        on_try(algo, sum(values) / len(values))
        return sum(values) / len(values)

    found = bisect(measure, target, tolerance=tolerance)
    return _fill(template, found.value), found


def fill_algorithms(
    pipeline: Any,
    request: GenerationRequest,
    algos: Sequence[str],
    items: Sequence[Item],
    by: str,
    target: float,
    *,
    on_found: Callable[[str, Match], None] = lambda algo, found: None,
    **options: Any,
) -> list[str]:
    """Algorithms with each `*` filled by `match_algorithm`; the others as they are.

    Args:
        pipeline: A pipeline of diffusers.
        request: The run; prompt, seed and algorithm are replaced.
        algos: Algorithms, of which some have a `*`.
        items: The videos that are made for each number tried.
        by: A name of `QUANTITIES`.
        target: The value to reach.
        on_found: Called with each filled algorithm and what was found.
        options: Further arguments of `match_algorithm`.
    """
    filled = []
    for algo in algos:
        if "*" in algo:
            algo, found = match_algorithm(
                pipeline, request, algo, items, by=by, target=target, **options
            )
            on_found(algo, found)
        filled.append(algo)
    return filled


def read_target(text: str, algos: Sequence[str]) -> tuple[str, float]:
    """`"density=0.3"` as a quantity and a number; `("", 0)` of an empty text.

    Raises:
        ValueError: The text is not like that, an algorithm is unknown, or only one of text and
            algorithms asks for a match.
    """
    if any("*" in algo for algo in algos) != bool(text):
        raise ValueError(
            "--match and algorithms with a * belong together: --sparse-algo 'nabla-*' --match "
            "density=0.3."
        )
    for algo in algos:
        parse(algo.replace("*", "0.5"))
    by, _, target = text.partition("=")
    try:
        return by, float(target) if text else 0.0
    except ValueError:
        raise ValueError(f"--match takes NAME=NUMBER such as density=0.3: got {text!r}.") from None


def _fill(template: str, value: float) -> str:
    return str(parse(template.replace("*", f"{value:.4f}")))


def _nearest(tried: list[tuple[float, float]], target: float) -> tuple[tuple[float, float], float]:
    best = min(tried, key=lambda pair: abs(pair[1] - target))
    return best, abs(best[1] - target)
