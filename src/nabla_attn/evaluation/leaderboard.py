"""The leaderboard of methods: mass, error and seconds of each at equal densities.

Queries, keys and values come from dense videos of a model, layer by layer through all steps, so
that methods that keep something between steps can. A method's knob is set once, on the first
prompt, for the density that is asked for in the mean over its calls; then all prompts are measured.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from math import exp
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from nabla_attn import methods
from nabla_attn.attention import attend
from nabla_attn.block_selection import select_blocks
from nabla_attn.config import SparseConfig, as_config, parse
from nabla_attn.core.block_map import BlockMap
from nabla_attn.core.grid import TokenGrid
from nabla_attn.core.order import TokenLayout, block_order
from nabla_attn.generation.generate import generate
from nabla_attn.generation.request import GenerationRequest
from nabla_attn.methods import Moment, Parameter
from nabla_attn.models import AttentionCall
from nabla_attn.record import RunRecord, check_settings, collect_versions, describe_device
from nabla_attn.schedule import Schedule

DENSITIES = (0.05, 0.1, 0.2, 0.3)
EVERYTHING = "nabla-1"
LAYERS_PER_PROMPT = 2
BRACKET = (-24.0, -12.0, -6.0, -3.0, -1.5, 0.0, 0.5, 1.5, 3.0, 6.0, 12.0)
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
WINDOWS = tuple((f, h, w) for f in (1, 3, 5, 7, 9, 11) for h in (1, 3, 5) for w in (1, 3, 5))


@dataclass(frozen=True, eq=False)
class Call:
    """One attention call of a dense run: fp32 [1, heads, tokens, dim] in raster order."""

    q: Tensor
    k: Tensor
    v: Tensor
    grid: TokenGrid
    moment: Moment

    @cached_property
    def dense(self) -> Tensor:
        """Dense attention's output."""
        return scaled_dot_product_attention(self.q, self.k, self.v)

    @cached_property
    def probabilities(self) -> Tensor:
        """Exact attention of every query token, [heads, tokens, tokens]."""
        scores = self.q[0] @ self.k[0].transpose(-1, -2) * self.q.shape[-1] ** -0.5
        return scores.softmax(dim=-1)

    def block_mass(self, layout: TokenLayout) -> Tensor:
        """Probability of pairs of blocks, summed over query tokens: [heads, blocks, blocks]."""
        if layout not in self._masses:
            block = block_order(layout, self.q.device).to_raster // layout.grid.block.tokens
            shape = (len(self.probabilities), layout.num_blocks, layout.num_tokens)
            rows = torch.zeros(shape).index_add_(1, block, self.probabilities)
            square = torch.zeros(shape[0], layout.num_blocks, layout.num_blocks)
            self._masses[layout] = square.index_add_(2, block, rows)
        return self._masses[layout]

    @cached_property
    def _masses(self) -> dict[TokenLayout, Tensor]:
        return {}


Series = list[Call]
"""The calls of one layer and guidance branch, in the order of steps."""


class Collector:
    """Keeps the calls of some layers and branches of a dense run.

    Args:
        pairs: Numbers of a layer and of a call in its step.
        num_steps: Denoising steps of the run.
    """

    def __init__(self, pairs: Sequence[tuple[int, int]], num_steps: int) -> None:
        self.series: dict[tuple[int, int], Series] = {pair: [] for pair in pairs}
        self._num_steps = num_steps
        self._seen: dict[tuple[int | None, int], int] = {}

    def attach(self, handle: Any) -> None:
        """Observe all layers of a handle."""
        self._num_layers = handle.num_layers
        handle.observe(self._observe)

    def _observe(self, seen: AttentionCall) -> None:
        key = (seen.step, seen.layer)
        branch = self._seen[key] = self._seen.get(key, -1) + 1
        if (seen.layer, branch) not in self.series:
            return
        q, k, v = (x[-1:].float().clone() for x in (seen.q, seen.k, seen.v))
        moment = Moment(
            step=seen.step,
            num_steps=self._num_steps,
            layer=seen.layer,
            num_layers=self._num_layers,
        )
        self.series[seen.layer, branch].append(Call(q, k, v, seen.layout.grid, moment))


def collect(pipeline: Any, request: GenerationRequest, number: int) -> list[Series]:
    """The calls of two layers and branches of a dense video; other prompts take others in turn.

    Args:
        pipeline: A text-to-video pipeline without joint text in its attention.
        request: The run.
        number: The prompt's number, which decides which.
    """
    depth = len(pipeline.transformer.blocks)
    every = [(layer, branch) for layer in range(depth) for branch in (0, 1)]
    # The stride has no factor in common with the number of pairs, so that all come in turn.
    picked = [
        every[(number * LAYERS_PER_PROMPT + i) * 5 % len(every)] for i in range(LAYERS_PER_PROMPT)
    ]
    collector = Collector(picked, request.steps)
    everything = Schedule(algorithm=parse(EVERYTHING))
    run = replace(request, sparse_algo=EVERYTHING, schedule=everything)
    generate(pipeline, run, on_apply=collector.attach)
    return [series for series in collector.series.values() if series]


@dataclass(frozen=True)
class Measured:
    """One algorithm on one series, sums over its calls.

    Attributes:
        density: Kept token pairs over all, summaries of a tail included.
        recall: Probability of exact attention inside the kept blocks.
        error: Distance of the output from dense over the length of the latter, mean over heads.
        select_seconds: Seconds that choosing took.
        seconds: Seconds of the whole attention, choosing included.
    """

    density: float
    recall: float
    error: float
    select_seconds: float
    seconds: float


def densities_of(config: SparseConfig, series: Series) -> float:
    """The mean density of a method over the calls of a series."""
    memory: dict[str, Any] = {}
    found = []
    for call in series:
        layout = TokenLayout(call.grid.with_block(config.block))
        options: dict[str, Any] = {
            "v": call.v,
            "moment": call.moment,
            "memory": memory,
            "is_raster": True,
        }
        found.append(select_blocks(call.q, call.k, layout, config, **options).density)
    return sum(found) / len(found)


def measure(config: SparseConfig, series: Series) -> list[Measured]:
    """Mass, error and seconds of an algorithm on every call of a series."""
    memory: dict[str, Any] = {}
    return [_measure(config, call, memory) for call in series]


def _measure(config: SparseConfig, call: Call, memory: dict[str, Any]) -> Measured:
    spent = 0.0

    def select(*args: Any, **options: Any) -> BlockMap:
        nonlocal spent
        start = time.perf_counter()
        found = select_blocks(*args, **options, moment=call.moment, memory=memory)
        spent = time.perf_counter() - start
        return found

    layout = TokenLayout(call.grid)
    start = time.perf_counter()
    with torch.no_grad():
        run = partial(attend, backend="gather", measure=config.tail is not None, select=select)
        out, block_map = run(call.q, call.k, call.v, layout, config)
    seconds = time.perf_counter() - start
    assert block_map is not None
    distance = (out - call.dense).flatten(2).norm(dim=2) / call.dense.flatten(2).norm(dim=2)
    tail = block_map.tail_density
    density = block_map.density + (0.0 if tail is None else tail.mean().item())
    layout = TokenLayout(call.grid.with_block(config.block))
    recall = mass_of(block_map, layout, call)
    return Measured(density, recall, distance.mean().item(), spent, seconds)


def mass_of(block_map: BlockMap, layout: TokenLayout, call: Call) -> float:
    """Exact probability inside the kept blocks, mean over query tokens and heads."""
    if block_map.q_order is None or block_map.kv_order is None:
        kept = call.block_mass(layout) * block_map.mask[0]
        return kept.sum(dim=(1, 2)).mean().item() / layout.num_tokens
    heads, size = len(call.probabilities), block_map.block_tokens
    q_slots = block_map.q_order.slots[0].expand(heads, -1)
    tokens = block_map.kv_order.tokens[0].expand(heads, -1)
    column = torch.arange(tokens.shape[1]) // size
    totals = []
    for head, probs in enumerate(call.probabilities):
        # A token may stand in several slots, of which a row sees one.
        kept = block_map.mask[0, head][q_slots[head] // size][:, column] & (tokens[head] >= 0)
        totals.append((probs[:, tokens[head].clamp_min(0)] * kept).sum(dim=1).mean().item())
    return sum(totals) / heads


@dataclass(frozen=True)
class Setting:
    """A method at a density: what its knob was set to, and the density that gave.

    Attributes:
        method: Its name.
        wanted: The density asked for; None where the method has no knob.
        algorithm: The string.
        density: What it came to on the calls that set it.
    """

    method: str
    wanted: float | None
    algorithm: str
    density: float


def set_knob(
    name: str,
    wanted: float,
    density_of: Callable[[SparseConfig], float],
    *,
    suffix: str = "",
    num_tries: int = 9,
) -> Setting | None:
    """Set the first parameter of a method so that it keeps about a share of the token pairs.

    Args:
        name: The method.
        wanted: The density.
        density_of: Measures the density of an algorithm.
        suffix: What stands behind the method, such as "_block-4-4-4".
        num_tries: Bisections of the bracket.

    Returns:
        The nearest setting found; None where the method has no parameter.
    """
    method = methods.find(name)
    if not method.parameters:
        return None
    knob = method.parameters[0]
    rest = [_default(parameter) for parameter in method.parameters[1:]]

    def at(value: Any) -> Setting | None:
        try:
            use = methods.make_use(name, value, *rest)
            config = parse(f"{use}{suffix}")
            return Setting(name, wanted, str(config), density_of(config))
        except ValueError:
            return None

    if knob.num_parts == 3:
        tried = [at(window) for window in WINDOWS]
    elif knob.is_share:
        tried = _bisect(lambda odds: at(_share(odds)), wanted, -7.0, 9.0, num_tries)
    elif type(knob.read("1")) is int:
        tried = [at(count) for count in COUNTS]
    else:
        ends = [setting for value in BRACKET if (setting := at(value)) is not None]
        tried = [*ends, *_refine(at, ends, wanted, num_tries)]
    found = [setting for setting in tried if setting is not None]
    return min(found, key=lambda setting: abs(setting.density - wanted), default=None)


def _default(parameter: Parameter) -> Any:
    return parameter.read(parameter.example) if parameter.default is None else parameter.default


def _bisect(
    at: Callable[[Any], Setting | None],
    wanted: float,
    low: float,
    high: float,
    num_tries: int,
    *,
    rises: bool = True,
) -> list[Setting | None]:
    tried = []
    for _ in range(num_tries):
        middle = float(f"{(low + high) / 2:.4g}")
        setting = at(middle)
        tried.append(setting)
        is_over = setting is not None and (setting.density > wanted) == rises
        low, high = (low, middle) if is_over else (middle, high)
    return tried


def _share(odds: float) -> float:
    """A share from the logarithm of its odds: fine near 0 and near 1."""
    return float(f"{1 / (1 + exp(-odds)):.5g}")


def _refine(
    at: Callable[[Any], Setting | None], ends: list[Setting], wanted: float, num_tries: int
) -> list[Setting | None]:
    """Bisect between the two neighbours of a bracket that have the density between them."""
    values = [parse(end.algorithm).uses[0].values[0] for end in ends]
    for (low, a), (high, b) in zip(
        zip(values, ends, strict=True), list(zip(values, ends, strict=True))[1:], strict=False
    ):
        if min(a.density, b.density) <= wanted <= max(a.density, b.density):
            return _bisect(at, wanted, low, high, num_tries, rises=a.density < b.density)
    return []


class Leaderboard:
    """Measures methods on a model's prompts, a record for each; what is there is kept.

    Args:
        pipeline: A text-to-video pipeline.
        request: The dense runs; prompt is replaced.
        folder: Where the records are.
        names: Methods; None is all that need no table.
        densities: Densities asked for.
        suffixes: What is put behind methods in turn; each is a column of its own.
    """

    def __init__(
        self,
        pipeline: Any,
        request: GenerationRequest,
        folder: Path,
        *,
        names: Sequence[str] | None = None,
        densities: Sequence[float] = DENSITIES,
        suffixes: Sequence[str] = ("",),
    ) -> None:
        self.pipeline, self.request, self.folder = pipeline, request, folder
        every = [name for name in methods.names() if "table" not in methods.find(name).needs]
        self.names = list(every if names is None else names)
        self.densities, self.suffixes = list(densities), list(suffixes)

    def settings(self, prompt: str) -> list[Setting]:
        """The knobs, from their record or set anew on the calls of a prompt."""
        path = self.folder / "settings.json"
        asked = self._config() | {"prompt": prompt}
        known: dict[str, list[dict[str, Any]]] = {}
        if path.is_file():
            known = check_settings(path, asked).numbers["settings"]
        missing: list[tuple[str, str, list[float]]] = []
        for name in self.names:
            for suffix in self.suffixes:
                set_for = [each["wanted"] for each in known.get(f"{name}{suffix}", [])]
                lacking = [wanted for wanted in self.densities if wanted not in set_for]
                if lacking and None not in set_for:
                    missing.append((name, suffix, lacking))
        if missing:
            series = collect(self.pipeline, self._request(prompt), 0)
            for name, suffix, lacking in missing:
                found = [vars(each) for each in self._set(name, suffix, lacking, series)]
                known.setdefault(f"{name}{suffix}", []).extend(found)
                self._save(path, asked, {"settings": known})
        return [
            Setting(**values)
            for name in self.names
            for suffix in self.suffixes
            for values in known[f"{name}{suffix}"]
            if values["wanted"] is None or values["wanted"] in self.densities
        ]

    def _set(
        self, name: str, suffix: str, densities: list[float], series: list[Series]
    ) -> list[Setting]:
        def density_of(config: SparseConfig) -> float:
            return sum(densities_of(config, each) for each in series) / len(series)

        if not methods.find(name).parameters:
            config = parse(f"{name}{suffix}")
            return [Setting(name, None, str(config), density_of(config))]
        found = [set_knob(name, wanted, density_of, suffix=suffix) for wanted in densities]
        return [setting for setting in found if setting is not None]

    def measure(
        self, prompts: Sequence[str], *, on_progress: Callable[[str, int, int], None]
    ) -> list[RunRecord]:
        """Measure all settings on all prompts.

        Args:
            prompts: What the videos show; the first sets the knobs.
            on_progress: Told of prompts that are done.
        """
        settings = self.settings(prompts[0])
        records = []
        for number, prompt in enumerate(prompts):
            records.append(self._measure_prompt(number, prompt, settings))
            on_progress("prompts", number + 1, len(prompts))
        return records

    def _measure_prompt(self, number: int, prompt: str, settings: list[Setting]) -> RunRecord:
        path = self.folder / f"p{number:04d}.json"
        asked = self._config() | {"prompt": prompt}
        known: dict[str, Any] = {}
        if path.is_file():
            known = check_settings(path, asked).numbers["algorithms"]
        missing = [setting for setting in settings if setting.algorithm not in known]
        if missing:
            series = collect(self.pipeline, self._request(prompt), number)
            for setting in missing:
                config = as_config(setting.algorithm)
                found = [each for calls in series for each in measure(config, calls)]
                known[setting.algorithm] = _means(found)
                self._save(path, asked, {"algorithms": known})
        return RunRecord.load(path)

    def _request(self, prompt: str) -> GenerationRequest:
        return replace(self.request, prompt=prompt)

    def _config(self) -> dict[str, Any]:
        values = self.request.to_dict()
        return {key: value for key, value in values.items() if key != "prompt"}

    def _save(self, path: Path, config: dict[str, Any], numbers: dict[str, Any]) -> None:
        device = describe_device(self.pipeline.device)
        versions = collect_versions()
        RunRecord("leaderboard", config, self.request.seed, versions, device, numbers).save(path)


def _means(found: list[Measured]) -> dict[str, float]:
    names = [field.name for field in fields(Measured)]
    return {
        name: round(sum(getattr(each, name) for each in found) / len(found), 6) for name in names
    }


def rows_of(records: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """Means over the prompts of records, a row for each algorithm that all of them have.

    `error_spread` is the standard error of the mean error over prompts.
    """
    tables = [record.numbers["algorithms"] for record in records]
    rows = []
    for algorithm in tables[0]:
        found = [table[algorithm] for table in tables if algorithm in table]
        if len(found) < len(tables):
            continue
        row: dict[str, Any] = {"algorithm": algorithm, "prompts": len(found)}
        for name in found[0]:
            row[name] = sum(each[name] for each in found) / len(found)
        spread = torch.tensor([each["error"] for each in found]).std(correction=1).item()
        row["error_spread"] = spread / len(found) ** 0.5 if len(found) > 1 else None
        rows.append(row)
    return rows
