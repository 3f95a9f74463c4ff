"""Search spaces: what an architecture may be, drawn at random and changed a little."""

import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from isynet.architecture import Architecture, Stage
from isynet.counting import count
from nabla_attn.cost.rates import Rates


@dataclass(frozen=True)
class SpaceMem:
    """MEM over architectures drawn from a space.

    Attributes:
        values: MEM of each architecture, in the order drawn.
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over the architectures."""
        return float(np.mean(self.values))

    def quantile(self, share: float) -> float:
        """Value that a share of the architectures does not exceed."""
        return float(np.quantile(self.values, share))


@dataclass(frozen=True)
class SearchSpace:
    """The architectures that a search may draw.

    The published space has five stages for 224 pixels; smaller images want fewer strides, and at
    their size the head of 1280 channels takes a quarter of the time, so both are part of the space.

    Attributes:
        stages: Numbers of stages.
        edges: Edges of a block. The first of a block is drawn from those above 1x1 where there are
            any, since it halves the resolution.
        max_edges: Most edges of a block.
        max_blocks: Most blocks of a stage.
        widths: Doublings of a stage's channels.
        expansions: Widths inside a block, in channels of the stage.
        heads: Widths of the head.
    """

    stages: tuple[int, ...] = (3, 4)
    edges: tuple[str, ...] = ("1", "3", "5", "3s", "5s")
    max_edges: int = 4
    max_blocks: int = 6
    widths: tuple[int, ...] = (0, 1, 2)
    expansions: tuple[int, ...] = (1, 2)
    heads: tuple[int, ...] = (0, 256, 1280)

    def __post_init__(self) -> None:
        for name in ("stages", "edges", "widths", "expansions", "heads"):
            if not getattr(self, name):
                raise ValueError(f"a search space needs {name}, got none.")
        for stages in self.stages:
            for head in self.heads:
                # The limits of an architecture are checked where they are written.
                stage = Stage(self.edges[:1] * self.max_edges, self.max_blocks)
                Architecture((stage,) * stages, head)
        for edge in self.edges:
            Stage((edge,), 1, width_log2=max(self.widths), expansion=max(self.expansions))

    def twin(self) -> "SearchSpace":
        """The same space with depthwise convolutions in place of all above 1x1."""
        edges = dict.fromkeys(edge if edge == "1" else f"{edge[0]}d" for edge in self.edges)
        return replace(self, edges=tuple(edges))

    def sample(self, rng: random.Random) -> Architecture:
        """Draw an architecture."""
        count = rng.choice(self.stages)
        stages = [self._sample_stage(rng) for _ in range(count)]
        return self._with_plain_stem(Architecture(tuple(stages), rng.choice(self.heads)))

    def mutate(self, architecture: Architecture, rng: random.Random) -> Architecture:
        """Change one or two things of an architecture; the result is never the same."""
        result = architecture
        for _ in range(100):
            for _ in range(rng.choice((1, 1, 2))):
                result = self._with_plain_stem(rng.choice(_CHANGES)(self, result, rng))
            if result != architecture:
                return result
        raise ValueError(f"the search space has only one architecture, {architecture}.")

    def mem(
        self,
        samples: int = 60,
        *,
        size: int = 224,
        rates: Rates | None = None,
        seed: int = 0,
    ) -> SpaceMem:
        """MEM of architectures drawn at random: what the measure was made for.

        Args:
            samples: Number of architectures.
            size: Pixels of the images.
            rates: A machine; plain MEM without.
            seed: Seed of the draws.
        """
        rng = random.Random(seed)
        works = [count(self.sample(rng), size) for _ in range(samples)]
        return SpaceMem(tuple(rates.mem(work) if rates else work.mem for work in works))

    def to_dict(self) -> dict[str, Any]:
        """The space as plain values."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }

    def _sample_stage(self, rng: random.Random) -> Stage:
        edges = [self._first_edge(rng)]
        for _ in range(rng.randint(1, self.max_edges) - 1):
            edges.append(rng.choice(self.edges))
        return Stage(
            tuple(edges),
            rng.randint(1, self.max_blocks),
            has_skip=rng.random() < 0.9,
            width_log2=rng.choice(self.widths),
            expansion=rng.choice(self.expansions),
            is_linear=rng.random() < 0.3,
        )

    def _first_edge(self, rng: random.Random) -> str:
        return rng.choice([edge for edge in self.edges if edge != "1"] or self.edges)

    def _with_plain_stem(self, architecture: Architecture) -> Architecture:
        """The first convolution sees three channels, where depthwise is no convolution at all."""
        first, *rest = architecture.stages
        edge = first.edges[0].replace("d", "")
        return replace(architecture, stages=(replace(first, edges=(edge, *first.edges[1:])), *rest))


Change = Callable[[SearchSpace, Architecture, random.Random], Architecture]


def _change_stage(change: Callable[[SearchSpace, Stage, random.Random], Stage]) -> Change:
    def apply(space: SearchSpace, old: Architecture, rng: random.Random) -> Architecture:
        place = rng.randrange(len(old.stages))
        stages = list(old.stages)
        stages[place] = change(space, stages[place], rng)
        return replace(old, stages=tuple(stages))

    return apply


def _blocks(space: SearchSpace, stage: Stage, rng: random.Random) -> Stage:
    count = stage.num_blocks + rng.choice((-1, 1, 2))
    return replace(stage, num_blocks=min(max(count, 1), space.max_blocks))


def _width(space: SearchSpace, stage: Stage, rng: random.Random) -> Stage:
    return replace(stage, width_log2=rng.choice(space.widths))


def _expansion(space: SearchSpace, stage: Stage, rng: random.Random) -> Stage:
    return replace(stage, expansion=rng.choice(space.expansions))


def _edge(space: SearchSpace, stage: Stage, rng: random.Random) -> Stage:
    edges = list(stage.edges)
    place = rng.randrange(len(edges))
    edges[place] = rng.choice(space.edges) if place else space._first_edge(rng)
    return replace(stage, edges=tuple(edges))


def _length(space: SearchSpace, stage: Stage, rng: random.Random) -> Stage:
    edges = list(stage.edges)
    if len(edges) > 1 and (rng.random() < 0.5 or len(edges) == space.max_edges):
        edges.pop(rng.randrange(1, len(edges)))
    elif len(edges) < space.max_edges:
        edges.append(rng.choice(space.edges))
    return replace(stage, edges=tuple(edges))


def _skip_or_linear(space: SearchSpace, stage: Stage, rng: random.Random) -> Stage:
    if rng.random() < 0.5:
        return replace(stage, has_skip=not stage.has_skip)
    return replace(stage, is_linear=not stage.is_linear)


def _head(space: SearchSpace, old: Architecture, rng: random.Random) -> Architecture:
    return replace(old, head_width=rng.choice(space.heads))


def _stages(space: SearchSpace, old: Architecture, rng: random.Random) -> Architecture:
    count = rng.choice(space.stages)
    added = [space._sample_stage(rng) for _ in range(count - len(old.stages))]
    return replace(old, stages=(*old.stages[:count], *added))


_CHANGES: tuple[Change, ...] = (
    *(_change_stage(each) for each in (_blocks, _blocks, _width, _edge, _edge, _length)),
    *(_change_stage(each) for each in (_expansion, _skip_or_linear)),
    _head,
    _stages,
)
