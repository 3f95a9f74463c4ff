"""The leaderboard of methods: mass, error and seconds of each at equal densities.

A method's knob is set once, on the first prompts, for the density that is asked for in the mean
over their calls; then all prompts are measured. All densities of a method are timed in one process,
call by call in turn, and a reference beside them: what the machine did meanwhile cancels in the
ratio of the two.
"""

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor

from nabla_attn import methods
from nabla_attn.attention import attend
from nabla_attn.block_selection import select_blocks
from nabla_attn.config import SparseConfig, as_config, parse
from nabla_attn.core.block_map import BlockMap
from nabla_attn.core.order import to_blocks
from nabla_attn.core.tail import build_tail, tail_density
from nabla_attn.evaluation.calls import Call, CallSource, Series, Tables
from nabla_attn.evaluation.knobs import Knob, Setting
from nabla_attn.methods.contract import Method
from nabla_attn.record import RunRecord, check_settings, collect_versions

DENSITIES = (0.05, 0.1, 0.2, 0.3)
REFERENCE = "topk-0.1"
"""Timed before every call of every method."""


@dataclass(frozen=True, eq=False)
class Measured:
    """One algorithm on one call.

    Attributes:
        density: Kept token pairs over all, summaries of a tail included.
        recall: Probability of exact attention inside the kept blocks, of every head.
        error: Distance of the output from dense over the length of the latter, of every head.
        distance: That distance over the square root of the output's number of values.
        select_seconds: Seconds that choosing took.
        seconds: Seconds of the whole attention, choosing included.
    """

    density: float
    recall: Tensor
    error: Tensor
    distance: Tensor
    select_seconds: float
    seconds: float


class Runner:
    """An algorithm that follows a series of calls, with what its methods keep between them.

    Args:
        config: The algorithm.
        tables: The table of its method, where that needs one.
    """

    def __init__(self, config: SparseConfig, tables: Tables | None = None) -> None:
        self._config, self._tables = config, tables or {}
        self._memory: dict[str, Any] = {}

    def density(self, call: Call) -> float:
        """The density of the map alone."""
        layout = call.laid_out(self._config)
        options: dict[str, Any] = {"v": call.v, "is_raster": True, "text_valid": call.text_valid}
        options |= {"scale": call.scale} | self._options(call)
        found = select_blocks(call.q, call.k, layout, self._config, **options)
        has_finish = found.treatment is not None and found.treatment.finish is not None
        if has_finish and _needs(self._config, "memory"):
            # What it remembers of a call may come from the call's output.
            self._attend(call, lambda *args, **options: found)
        return found.density

    def measure(self, call: Call) -> Measured:
        """Mass, error and seconds of one call."""
        out, block_map, chosen, seconds = self._run(call)
        if block_map is None:
            ones = torch.ones(call.q.shape[1])
            return Measured(1.0, ones, 0 * ones, 0 * ones, 0.0, seconds)
        density = block_map.density + self._tail_density(call, block_map)
        recall = call.mass_of(block_map, call.laid_out(self._config))
        away = (call.video(out) - call.dense).norm(dim=1)
        error = away / call.dense.norm(dim=1)
        return Measured(density, recall, error, away / call.dense.shape[1] ** 0.5, chosen, seconds)

    def _tail_density(self, call: Call, block_map: BlockMap) -> float:
        """What the summaries of a tail count as, apart from the run that is timed."""
        if self._config.tail is None:
            return 0.0
        layout = call.laid_out(self._config)
        k, v = (to_blocks(x, layout) for x in (call.k, call.v))
        tail = build_tail(k, v, block_map, layout, self._config.tail)
        return tail_density(tail, block_map).mean().item()

    def seconds(self, call: Call) -> float:
        """Seconds of one call."""
        return self._run(call)[3]

    def _run(self, call: Call) -> tuple[Tensor, BlockMap | None, float, float]:
        """The output, its map, and seconds of choosing and of all."""
        spent = 0.0

        choose: Callable[..., BlockMap] = partial(select_blocks, **self._options(call))

        def select(*args: Any, **options: Any) -> BlockMap:
            nonlocal spent
            start = time.perf_counter()
            found = choose(*args, **options)
            spent = time.perf_counter() - start
            return found

        start = time.perf_counter()
        out, block_map = self._attend(call, select)
        return out, block_map, spent, time.perf_counter() - start

    def _attend(
        self, call: Call, select: Callable[..., BlockMap]
    ) -> tuple[Tensor, BlockMap | None]:
        """The output with the map that `select` gives, and that map."""
        options: dict[str, Any] = {"scale": call.scale, "text_valid": call.text_valid}
        if not self._config.is_dense:
            options["backend"] = "gather"
        with torch.no_grad():
            return attend(
                call.q, call.k, call.v, call.layout, self._config, select=select, **options
            )

    def _options(self, call: Call) -> dict[str, Any]:
        tables = {name: entries[call.moment.layer] for name, entries in self._tables.items()}
        return {"moment": call.moment, "memory": self._memory, "tables": tables}


def density_of(config: SparseConfig, series: Sequence[Series], tables: Tables | None) -> float:
    """The mean density of an algorithm's maps over the calls of some series."""
    found = []
    for calls in series:
        runner = Runner(config, tables)
        found += [runner.density(call) for call in calls]
    return fmean(found)


def measure_together(
    configs: Sequence[SparseConfig],
    series: Sequence[Series],
    *,
    tables: Sequence[Tables | None] | None = None,
    head_names: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Measure algorithms call by call in turn, the reference before each turn.

    Args:
        configs: The algorithms.
        series: The calls.
        tables: The table of each algorithm, where it needs one.
        head_names: Names of the heads where each has its own error in the result.

    Returns:
        For each algorithm its means over the calls, as records have them.
    """
    tables = tables or [None] * len(configs)
    reference = parse(REFERENCE)
    found: list[list[tuple[Call, Measured]]] = [[] for _ in configs]
    spent = []
    for calls in series:
        for config, table in zip((reference, *configs), (None, *tables), strict=True):
            if not config.is_dense:
                # Code and index tables are loaded before anything is timed.
                Runner(config, table).density(calls[0])
        runners = [Runner(*each) for each in zip(configs, tables, strict=True)]
        for call in calls:
            spent.append(Runner(reference).seconds(call))
            for runner, mine in zip(runners, found, strict=True):
                mine.append((call, runner.measure(call)))
    beside = {"reference_seconds": round(fmean(spent), 6)}
    return [summarise(mine, head_names) | beside for mine in found]


def summarise(found: Sequence[tuple[Call, Measured]], head_names: Sequence[str]) -> dict[str, Any]:
    """Means over calls; of recall and error also the worst head's, and those of half the steps."""
    measured = [each for _, each in found]
    plain: dict[str, float] = {
        name: fmean(getattr(each, name) for each in measured)
        for name in ("density", "select_seconds", "seconds")
    }
    halves: dict[str, list[Measured]] = {"early": [], "late": []}
    for call, each in found:
        step, steps = call.moment.step or 0, call.moment.num_steps or 1
        halves["early" if 2 * step < steps else "late"].append(each)
    for name, worst in (("recall", torch.amin), ("error", torch.amax), ("distance", torch.amax)):
        values = [getattr(each, name) for each in measured]
        plain[name] = fmean(value.mean().item() for value in values)
        plain[f"{name}_worst_head"] = fmean(worst(value).item() for value in values)
        for half, mine in halves.items():
            if mine:
                plain[f"{name}_{half}"] = fmean(getattr(each, name).mean().item() for each in mine)
    result: dict[str, Any] = {name: round(value, 6) for name, value in plain.items()}
    if head_names:
        errors = torch.stack([each.error for each in measured]).mean(dim=0).tolist()
        pairs = zip(head_names, errors, strict=True)
        result["error_of_heads"] = {name: round(error, 6) for name, error in pairs}
    return result


class Leaderboard:
    """Measures methods, a record for each prompt; what is there is kept.

    Args:
        source: Where calls come from.
        folder: Where the records are.
        names: Methods, with numbers as `Knob` takes them; None is all that need no table.
        densities: Densities asked for.
        suffixes: What is put behind methods in turn; each is a column of its own.
    """

    def __init__(
        self,
        source: CallSource,
        folder: Path,
        *,
        names: Sequence[str] | None = None,
        densities: Sequence[float] = DENSITIES,
        suffixes: Sequence[str] = ("",),
    ) -> None:
        self.source, self.folder = source, folder
        every = [name for name in methods.names() if "table" not in methods.find(name).needs]
        self.names = list(every if names is None else names)
        for name in self.names:
            _row_of(name)
        self.densities, self.suffixes = list(densities), list(suffixes)
        self._tables: dict[str, Tables] = {}
        self._densities: dict[SparseConfig, float] = {}

    def settings(self) -> list[Setting]:
        """The knobs, from their record or set anew on the calls of the first prompts."""
        path = self.folder / "settings.json"
        asked = self.source.describe(0)
        known = _known(path, asked, "settings")
        missing: list[tuple[str, str, list[float]]] = []
        for name in self.names:
            for suffix in self.suffixes:
                set_for = [each["wanted"] for each in known.get(f"{name}{suffix}", [])]
                lacking = [wanted for wanted in self.densities if wanted not in set_for]
                if lacking and None not in set_for:
                    missing.append((name, suffix, lacking))
        prompts = range(self.source.knob_prompts if missing else 0)
        series = [calls for number in prompts for calls in self.source.collect(number)]
        for name, suffix, lacking in missing:
            try:
                found = [vars(each) for each in self._set(name, suffix, lacking, series)]
            except ValueError as error:
                warnings.warn(f"{name}{suffix} is left out: {error}", stacklevel=2)
                continue
            known.setdefault(f"{name}{suffix}", []).extend(found)
            self._save(path, asked, {"settings": known})
        return [
            Setting(**values)
            for name in self.names
            for suffix in self.suffixes
            for values in known.get(f"{name}{suffix}", [])
            if values["wanted"] is None or values["wanted"] in self.densities
        ]

    def _set(
        self, name: str, suffix: str, densities: list[float], series: list[Series]
    ) -> list[Setting]:
        def density(config: SparseConfig) -> float:
            # What is dropped is the same with any tail.
            plain = replace(config, tail=None)
            if plain not in self._densities:
                self._densities[plain] = density_of(plain, series, self._tables_of(plain))
            return self._densities[plain]

        knob = Knob(name, density, suffix=suffix)
        wanted = densities if _row_of(name).parameters else densities[:1]
        return [knob.set(each) for each in wanted]

    def measure(
        self, num_prompts: int, *, on_progress: Callable[[str, int, int], None]
    ) -> list[RunRecord]:
        """Measure all settings on all prompts.

        Args:
            num_prompts: Prompts of the source, from the first.
            on_progress: Told of methods that are done, over all prompts.
        """
        groups: dict[str, list[str]] = {"dense": ["dense"]}
        for setting in self.settings():
            _, _, suffix = setting.algorithm.partition("_")
            mine = groups.setdefault(f"{setting.method}_{suffix}", [])
            # Two densities may have the same nearest setting.
            mine += [setting.algorithm] if setting.algorithm not in mine else []
        records, total = [], num_prompts * len(groups)
        for number in range(num_prompts):
            done = partial(_tell, on_progress, number * len(groups), total)
            records.append(self._measure_prompt(number, list(groups.values()), done))
        return records

    def _measure_prompt(
        self, number: int, groups: list[list[str]], on_group: Callable[[int], None]
    ) -> RunRecord:
        path = self.folder / f"p{number:04d}.json"
        asked = self.source.describe(number)
        known = _known(path, asked, "algorithms")
        series: list[Series] = []
        for index, group in enumerate(groups):
            missing = [algorithm for algorithm in group if algorithm not in known]
            if missing:
                series = series or self.source.collect(number)
                configs = [as_config(algorithm) for algorithm in missing]
                found = measure_together(
                    configs,
                    series,
                    tables=[self._tables_of(config) for config in configs],
                    head_names=self.source.head_names,
                )
                known |= dict(zip(missing, found, strict=True))
                self._save(path, asked, {"reference": REFERENCE, "algorithms": known})
            on_group(index + 1)
        return RunRecord.load(path)

    def _tables_of(self, config: SparseConfig) -> Tables | None:
        """The table of an algorithm, made once in this process; None where it needs none."""
        if not _needs(config, "table"):
            return None
        key = str(config)
        if key not in self._tables:
            self._tables[key] = self.source.make_tables(config)
        return self._tables[key]

    def _save(self, path: Path, config: dict[str, Any], numbers: dict[str, Any]) -> None:
        source, versions = self.source, collect_versions()
        RunRecord("leaderboard", config, source.seed, versions, source.device, numbers).save(path)


def _row_of(name: str) -> Method:
    """The row of a method that may have numbers behind its name."""
    return methods.find(name.partition("-")[0])


def _needs(config: SparseConfig, what: str) -> bool:
    """Whether a method of an algorithm needs something beside queries and keys."""
    return any(what in methods.find(use.name).needs for use in config.uses)


def _known(path: Path, asked: dict[str, Any], name: str) -> dict[str, Any]:
    """What a record holds under a name; nothing where there is no record."""
    return dict(check_settings(path, asked).numbers[name]) if path.is_file() else {}


def _tell(on_progress: Callable[[str, int, int], None], before: int, total: int, done: int) -> None:
    on_progress("methods", before + done, total)


def read_records(folder: Path) -> list[RunRecord]:
    """Read the records of prompts that a leaderboard left in a folder."""
    return [RunRecord.load(path) for path in sorted(folder.glob("p????.json"))]


def rows_of(records: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """Means over the prompts of records, a row for each algorithm that all of them have.

    Where the reference was timed, seconds are the median ratio to it over the prompts times the
    reference's median over the whole record. `errors` are those of each prompt, `error_spread` is
    the standard error of their mean, and `ideal` the share of ideal: dense attention's seconds
    times the density over the seconds, where dense attention was timed.
    """
    tables = [record.numbers["algorithms"] for record in records]
    usual = median(
        entry.get("reference_seconds", 1.0) for table in tables for entry in table.values()
    )
    rows = []
    for algorithm in tables[0] if tables else ():
        found = [table[algorithm] for table in tables if algorithm in table]
        if len(found) == len(tables):
            rows.append({"algorithm": algorithm} | _row(found, usual))
    dense = next((row["seconds"] for row in rows if row["algorithm"] == "dense"), None)
    for row in rows:
        row["ideal"] = None if dense is None else dense * row["density"] / row["seconds"]
    return rows


def left_out(records: Sequence[RunRecord]) -> list[str]:
    """The algorithms that some of the records have and others lack, of which there is no row."""
    tables = [record.numbers["algorithms"] for record in records]
    every = dict.fromkeys(algorithm for table in tables for algorithm in table)
    return [each for each in every if not all(each in table for table in tables)]


def _row(found: Sequence[dict[str, Any]], usual: float) -> dict[str, Any]:
    """One algorithm's numbers over its prompts."""
    row: dict[str, Any] = {"prompts": len(found)}
    for name, value in found[0].items():
        if not isinstance(value, dict):
            row[name] = fmean(each[name] for each in found)
        else:
            row[name] = {key: fmean(each[name][key] for each in found) for key in value}
    row["errors"] = [each["error"] for each in found]
    for name in ("select_seconds", "seconds"):
        if all("reference_seconds" in each for each in found):
            row[name] = usual * median(each[name] / each["reference_seconds"] for each in found)
    spread = torch.tensor(row["errors"]).std(correction=1).item() if len(found) > 1 else None
    row["error_spread"] = None if spread is None else spread / len(found) ** 0.5
    return row
