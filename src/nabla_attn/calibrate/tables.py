"""Tables of methods that need one: dense videos -> an entry for each layer, inside a schedule."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from nabla_attn import methods
from nabla_attn.calibrate.run import EVERYTHING
from nabla_attn.calibrated_for import CalibratedFor
from nabla_attn.config import SparseConfig, parse
from nabla_attn.core.order import block_order
from nabla_attn.generation.generate import generate
from nabla_attn.generation.request import GenerationRequest
from nabla_attn.methods.contract import Calibrator, State
from nabla_attn.models import AttentionCall
from nabla_attn.progress import ProgressCallback
from nabla_attn.schedule import Schedule


class TableProbe:
    """Gives the calls of a dense run to the calibrators of a method, one for each layer.

    Args:
        config: An algorithm with one method that needs a table.
        num_steps: Denoising steps of the run.

    Raises:
        ValueError: None of its methods needs a table, or more than one does.
    """

    def __init__(self, config: SparseConfig, num_steps: int) -> None:
        uses = [use for use in config.uses if "table" in methods.find(use.name).needs]
        if len(uses) != 1:
            raise ValueError(f"a table is made for one method that needs one: got {config}.")
        self.config, self.use = config, uses[0]
        self._num_steps = num_steps
        self._calibrators: dict[int, Calibrator] = {}
        self.calibrated_for: CalibratedFor | None = None

    def attach(self, handle: Any) -> None:
        """Observe all layers of a handle."""
        self._handle = handle
        handle.observe(self._observe)

    def table(self) -> list[Any]:
        """The entry of each layer."""
        return [self._calibrators[layer].entry() for layer in sorted(self._calibrators)]

    def _observe(self, seen: AttentionCall) -> None:
        call = seen.last_sample(replace(parse(EVERYTHING), block=self.config.block))
        layout, method = call.layout, methods.find(self.use.name)
        assert method.calibrate is not None
        if seen.layer not in self._calibrators:
            params = method.params(self.use.values)
            self._calibrators[seen.layer] = method.calibrate(params, layout.grid)
        state = State(
            scale=call.scale,
            counts=block_order(layout, call.q.device).counts[: layout.grid.num_blocks],
            step=seen.step,
            num_steps=self._num_steps,
            layer=seen.layer,
            num_layers=self._handle.num_layers,
        )
        video = slice(layout.grid.num_slots)
        q, k, v = (x[:, :, video].float() for x in (call.q, call.k, call.v))
        self._calibrators[seen.layer].observe(q, k, v, state)
        if self.calibrated_for is None:
            self.calibrated_for = CalibratedFor(
                model=self._handle.model_class,
                layers=self._handle.num_layers,
                heads=call.q.shape[1],
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
        tables={probe.use.name: probe.table()},
        calibrated_for=probe.calibrated_for,
    )
