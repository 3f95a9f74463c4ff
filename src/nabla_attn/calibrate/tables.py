"""Tables of methods that need one: dense videos -> an entry for each layer, inside a schedule."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from nabla_attn.calibrate.run import EVERYTHING
from nabla_attn.calibrated_for import CalibratedFor
from nabla_attn.config import SparseConfig, parse
from nabla_attn.generation.generate import generate
from nabla_attn.generation.request import GenerationRequest
from nabla_attn.methods import Moment
from nabla_attn.methods.calibration import TableMaker
from nabla_attn.models import AttentionCall
from nabla_attn.progress import ProgressCallback
from nabla_attn.schedule import Schedule


class TableProbe:
    """Makes a method's table from the calls of dense runs, and says what it is calibrated for.

    Args:
        config: An algorithm with one method that needs a table.
        num_steps: Denoising steps of the run.

    Raises:
        ValueError: None of its methods needs a table, or more than one does.
    """

    def __init__(self, config: SparseConfig, num_steps: int) -> None:
        self._config, self._num_steps = config, num_steps
        self._maker = TableMaker(config.uses)
        self.calibrated_for: CalibratedFor | None = None

    def attach(self, handle: Any) -> None:
        """Observe all layers of a handle."""
        self._handle = handle
        handle.observe(self._observe)

    def tables(self) -> dict[str, list[Any]]:
        """The method's name -> the entry of each layer."""
        return {self._maker.use.name: list(self._maker.entries().values())}

    def _observe(self, seen: AttentionCall) -> None:
        q, k, v, layout = seen.last_in_blocks(self._config)
        num_layers = self._handle.num_layers
        moment = Moment(
            step=seen.step, num_steps=self._num_steps, layer=seen.layer, num_layers=num_layers
        )
        self._maker.add(q, k, v, layout, moment, seen.factor)
        if self.calibrated_for is None:
            self.calibrated_for = CalibratedFor(
                model=self._handle.model_class,
                layers=num_layers,
                heads=q.shape[1],
                tokens=(layout.grid.frames, layout.grid.height, layout.grid.width),
                steps=self._num_steps,
            )


def calibrate_method(
    pipeline: Any,
    request: GenerationRequest,
    config: SparseConfig,
    prompts: Sequence[str],
    *,
    progress: Callable[[str], ProgressCallback] = lambda label: lambda *stage: None,
) -> Schedule:
    """Make a video of each prompt with everything kept, and a schedule with the method's table.

    Args:
        pipeline: A text-to-video pipeline.
        request: The runs; prompt and algorithm are replaced, rules of its schedule stay.
        config: The algorithm, with one method that needs a table.
        prompts: What the videos show.
        progress: From a prompt to what is told about the stages of its run.

    Raises:
        ValueError: No method of the algorithm needs a table.
    """
    probe = TableProbe(config, request.steps)
    everything = Schedule(algorithm=parse(EVERYTHING))
    for prompt in prompts:
        run = replace(request, prompt=prompt, sparse_algo=EVERYTHING, schedule=everything)
        generate(pipeline, run, on_progress=progress(prompt), on_apply=probe.attach)
    return replace(
        request.schedule or Schedule(algorithm=config),
        algorithm=config,
        tables=probe.tables(),
        calibrated_for=probe.calibrated_for,
    )
