"""What is evaluated: every prompt with every seed."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nabla_attn.files import parse_json
from nabla_attn.generation.prompt_list import read_prompt_list
from nabla_attn.generation.video import Scorer


@dataclass(frozen=True)
class Item:
    """One prompt and seed; all algorithms make its video from the same noise.

    Attributes:
        index: The prompt's place in the list.
        prompt: The text.
        seed: Seed of the noise.
    """

    index: int
    prompt: str
    seed: int

    @property
    def name(self) -> str:
        """File name without suffix."""
        return f"p{self.index:04d}-s{self.seed}"


def make_items(prompts: Sequence[str], seeds: Sequence[int]) -> list[Item]:
    """Every prompt with every seed, prompts first.

    Raises:
        ValueError: No prompts or seeds, or a repeated one.
    """
    if not prompts or not seeds:
        raise ValueError("there is nothing to evaluate: pass at least one prompt and one seed.")
    for name, values in (("prompt", prompts), ("seed", seeds)):
        if len(set(values)) != len(values):
            raise ValueError(f"a {name} is given twice; each must occur once.")
    return [Item(i, prompt, seed) for i, prompt in enumerate(prompts) for seed in seeds]


def take_prompts(path: Path | None, count: int | None, scorer: Scorer) -> list[str]:
    """The first prompts of a list, or of a scorer where there is no list.

    Args:
        path: The list, as `read_prompts` takes it.
        count: The number of prompts at most; None takes all of a list, and 4 of the scorer.
        scorer: The source of prompts without a list.

    Raises:
        ValueError: The list cannot be read or is empty, or the scorer has fewer prompts.
    """
    return scorer.prompts(count or 4) if path is None else read_prompts(path)[:count]


def read_prompts(path: str | Path) -> list[str]:
    """Prompts of a list as of `nabla generate`, or of a JSON list of strings or VBench entries.

    Raises:
        ValueError: The file cannot be read as one of these, or a line has a seed of its own.
    """
    path = Path(path)
    if path.suffix != ".json":
        lines = read_prompt_list(path)
        if own := [prompt for prompt, seed in lines if seed is not None]:
            raise ValueError(f"{path}: {own[0]!r} has a seed; here all prompts take --seeds.")
        return list(dict.fromkeys(prompt for prompt, _ in lines))
    try:
        entries = parse_json(path.read_text(encoding="utf-8-sig"))
        if not isinstance(entries, list):
            raise ValueError("expected a list")
        prompts = [entry if isinstance(entry, str) else entry["prompt_en"] for entry in entries]
        if wrong := [prompt for prompt in prompts if not isinstance(prompt, str)]:
            raise ValueError(f"{wrong[0]!r} is not a text")
        if not prompts:
            raise ValueError("it holds no prompt")
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot read prompts from {path}: {reason}.") from error
    return list(dict.fromkeys(prompts))
