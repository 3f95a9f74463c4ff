"""What the page's buttons do: one video at a time, with the last model kept loaded."""

import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from html import escape
from math import isfinite
from pathlib import Path
from typing import Any

from nabla_attn.config import TAILS, parse
from nabla_attn.evaluation.metrics import measure_fidelity
from nabla_attn.generation.pipeline import model_directory
from nabla_attn.generation.request import GenerationRequest, ModelDefaults
from nabla_attn.generation.video import write_video
from nabla_attn.studio.pair import FinishedVideo, Step, make_pair
from nabla_attn.viz.view import build_view, net_seconds

NO_ADAPTER = "none"
SPARSE = "nabla-0.7"  # where a model's own default is dense
RULES = ("NABLA", "top-k", "window only")
NO_WINDOW, MODEL_BLOCK = "none", "default"
WINDOWS = (NO_WINDOW, "3-3-3", "5-5-5", "11-3-3", "17-1-1")
BLOCKS = (MODEL_BLOCK, "1-8-8", "1-16-16", "2-8-8", "4-4-4")
NO_TAIL = "none"
ESTIMATES = (NO_TAIL, *TAILS)

LoadPipeline = Callable[[str, Sequence[str]], Any]
"""Loads the pipeline of a model with adapters."""


def compose_algorithm(
    rule: str, number: float, window: str, block: str, tail: str = NO_TAIL
) -> str:
    """Return the algorithm string that the page's controls stand for.

    Args:
        rule: One of `RULES`.
        number: Threshold of NABLA, or share of top-k.
        window: One of `WINDOWS`.
        block: One of `BLOCKS`.
        tail: One of `ESTIMATES`, how dropped blocks are estimated.

    Raises:
        ValueError: The controls fit no algorithm.
    """
    if rule not in RULES:
        raise ValueError(f"unknown rule {rule!r}. Known: {', '.join(RULES)}.")
    if rule == "window only" and window == NO_WINDOW:
        raise ValueError("a window alone needs the sides of the window.")
    kept = {"NABLA": [f"nabla-{number:g}"], "top-k": [f"topk-{number:g}"]}.get(rule, [])
    sides = [] if window == NO_WINDOW else [f"sta-{window}"]
    shape = [] if block == MODEL_BLOCK else [f"block-{block}"]
    estimate = [] if tail == NO_TAIL else [f"tail-{tail}"]
    return str(parse("_".join([*kept, *sides, *shape, *estimate])))


def read_controls(algorithm: str) -> tuple[str, float, str, str, str]:
    """Return the controls of an algorithm string, as far as they can say it."""
    config = parse(algorithm)
    rule = RULES[1] if config.topk else RULES[0]
    window, block = ("-".join(map(str, sides or ())) for sides in (config.window, config.block))
    return (
        rule,
        config.topk or config.threshold or 0.7,
        window if window in WINDOWS else NO_WINDOW,
        block if block in BLOCKS else MODEL_BLOCK,
        config.tail or NO_TAIL,
    )


class Studio:
    """The models on offer, the one that is loaded, and the temporary folder of the videos.

    Args:
        models: "builtin" or diffusers directories that may be asked for.
        load: Loads a pipeline.
        adapters: LoRA weights that may be asked for, as `load_pipeline` takes them.

    Attributes:
        cache: Folder for Gradio's own copies of the videos; removed with the others.

    Raises:
        ValueError: A model is missing.
    """

    def __init__(
        self, models: Sequence[str], load: LoadPipeline, adapters: Sequence[str] = ()
    ) -> None:
        self.models = tuple(models)
        self.adapters = (NO_ADAPTER, *adapters)
        for name in models:
            ModelDefaults.load(model_directory(name))
        self._load = load
        self._loaded: tuple[tuple[str, str], Any] | None = None
        self._busy = threading.Lock()
        self._folder = tempfile.TemporaryDirectory(prefix="nabla-studio-")
        self.cache = Path(self._folder.name) / "cache"
        self._count = 0

    def close(self) -> None:
        """Remove the videos."""
        self._folder.cleanup()

    def defaults_of(self, model: str, adapter: str) -> ModelDefaults:
        """Return the defaults of a model with an adapter; the algorithm is never dense.

        Raises:
            ValueError: The model or the adapter is not on offer.
        """
        if model not in self.models or adapter not in self.adapters:
            raise ValueError(f"unknown model or adapter: got {model!r}, {adapter!r}.")
        found = ModelDefaults.load(model_directory(model), _lora(adapter))
        is_dense = parse(found.sparse_algo).is_dense
        return replace(found, sparse_algo=SPARSE, schedule=None) if is_dense else found

    def run(
        self,
        prompt: str,
        model: str,
        adapter: str,
        algorithm: str,
        height: int,
        width: int,
        frames: int,
        steps: int,
        seed: int,
    ) -> Iterator[tuple[Any, Any, str, str]]:
        """Yield (dense video, sparse video, summary, viewer); the videos come together at the end.

        Raises:
            gradio.Error: Something went wrong; the message is for the user.
        """
        import gradio

        try:
            defaults = self.defaults_of(model, adapter)
            request = GenerationRequest(
                prompt=prompt,
                height=_whole("height", height),
                width=_whole("width", width),
                frames=_whole("frames", frames),
                steps=_whole("steps", steps),
                seed=_whole("seed", seed),
                guidance=defaults.guidance,
                sparse_algo=str(parse(algorithm)),
            )
            if request.is_dense:
                raise ValueError("dense is made for comparison anyway. Choose a sparse algorithm.")
            with self._busy:
                yield from self._generate(model, adapter, request, defaults.fps)
        except (ValueError, TypeError, OSError) as error:
            raise gradio.Error(str(error)) from error

    def _generate(
        self, model: str, adapter: str, request: GenerationRequest, fps: float
    ) -> Iterator[tuple[Any, Any, str, str]]:
        yield None, None, f"Loading {model} …", ""
        pipeline = self._pipeline(model, adapter)
        for video in Path(self._folder.name).glob("*.mp4"):
            video.unlink()
        finished: list[FinishedVideo] = []
        pair = make_pair(pipeline, request)
        try:
            for event in pair:
                if isinstance(event, FinishedVideo):
                    finished.append(event)
                else:
                    yield None, None, describe_step(event), ""
        finally:
            pair.close()
        # Both together: a browser that plays the first would take time from the second.
        dense, sparse = (self._write(video, fps) for video in finished)
        yield dense, sparse, describe_pair(*finished), embed_view(finished[1])

    def _pipeline(self, model: str, adapter: str) -> Any:
        if self._loaded is None or self._loaded[0] != (model, adapter):
            self._loaded = None  # the old one is released first
            self._loaded = ((model, adapter), self._load(model, _lora(adapter)))
        return self._loaded[1]

    def _write(self, video: FinishedVideo, fps: float) -> str:
        self._count += 1
        path = Path(self._folder.name) / f"{self._count}.mp4"
        write_video(video.frames, path, fps)
        return str(path)


def _lora(adapter: str) -> tuple[str, ...]:
    return () if adapter == NO_ADAPTER else (adapter,)


def _whole(name: str, value: float | None) -> int:
    if value is None or int(value) != value:
        raise ValueError(f"{name} must be a whole number: got {value}.")
    return int(value)


def describe_step(step: Step) -> str:
    """Return a line of progress as Markdown."""
    if step.stage == "denoise":
        return f"**{step.algo}**: step {step.done} of {step.total}"
    words = {"text": "reading the prompt", "decode": "decoding", "done": "done"}
    return f"**{step.algo}**: {words.get(step.stage, step.stage)}"


def describe_pair(dense: FinishedVideo, sparse: FinishedVideo) -> str:
    """Return density, time and fidelity as Markdown."""
    ours, theirs = (net_seconds(video.record) for video in (sparse, dense))
    kept = sparse.record.numbers["attention"]["density"]
    psnr = measure_fidelity(sparse.frames, dense.frames).psnr
    closeness = f"PSNR to dense {psnr:.1f} dB." if isfinite(psnr) else "Identical to dense."
    return (
        f"**{sparse.record.config['sparse_algo']}** kept **{kept:.1%}** of the token pairs: "
        f"{ours:.2f} s in the transformer against {theirs:.2f} s dense. {closeness}"
    )


def embed_view(video: FinishedVideo) -> str:
    """Return the viewer in a frame of its own, without rights on the page around it."""
    assert video.maps is not None
    page = escape(build_view(video.frames, video.maps, video.record), quote=True)
    return (
        '<iframe title="What attention kept" sandbox="allow-scripts" '
        f'style="width:100%;height:56rem;border:0" srcdoc="{page}"></iframe>'
    )
