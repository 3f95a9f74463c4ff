"""The studio: a page on which to try algorithms, dense and sparse side by side (Gradio)."""

import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from html import escape
from math import isfinite
from pathlib import Path
from typing import Any

from nabla_attn.config import parse
from nabla_attn.evaluation.metrics import measure_fidelity
from nabla_attn.generation.pipeline import model_directory
from nabla_attn.generation.request import GenerationRequest, ModelDefaults
from nabla_attn.generation.video import write_video
from nabla_attn.studio.pair import Made, Step, make_pair
from nabla_attn.viz.view import build_view, net_seconds

KEPT_SECONDS = 86400  # videos of pages that are still open
MAX_WAITING = 8  # requests in the queue; the next one is told so
FAMILIES = {
    "NABLA": "nabla-{:g}",
    "NABLA + window": "nabla-{:g}_sta-3-3-3",
    "top-k": "topk-{:g}",
}
EXAMPLES = (
    ("a small red circle moving right on a black background", "NABLA", 0.7),
    ("a large red square moving right on a black background", "NABLA", 0.4),
    ("a small green triangle moving left on a black background", "NABLA + window", 0.3),
    ("a large yellow circle moving down on a black background", "top-k", 0.2),
)
FONTS = ("system-ui", "sans-serif")


def build_studio(models: Sequence[str], load: Callable[[str], Any]) -> Any:
    """The page as Gradio Blocks; `launch` serves it.

    Args:
        models: "builtin" or diffusers directories to choose from.
        load: makes a pipeline of one of them.

    Raises:
        ValueError: a model is not there.
    """
    # Neither statistics nor fonts are fetched from the network.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio

    studio = Studio(models, load)
    defaults = studio.defaults[models[0]]
    with gradio.Blocks(title="nabla studio", delete_cache=(KEPT_SECONDS, KEPT_SECONDS)) as page:
        gradio.Markdown("# nabla studio\nDense and block-sparse attention from the same noise.")
        with gradio.Row():
            with gradio.Column(scale=1):
                prompt = gradio.Textbox(label="Prompt", value=EXAMPLES[0][0], lines=2)
                model = gradio.Dropdown(list(models), value=models[0], label="Model")
                family = gradio.Radio(list(FAMILIES), value="NABLA", label="Algorithm")
                number = gradio.Slider(
                    0.05, 1.0, value=0.7, step=0.05, label="Threshold (kept mass) or share"
                )
                with gradio.Accordion("Size and seed", open=False):
                    height = gradio.Number(defaults.height, label="Height", precision=0)
                    width = gradio.Number(defaults.width, label="Width", precision=0)
                    frames = gradio.Number(defaults.frames, label="Frames", precision=0)
                    steps = gradio.Slider(1, 100, value=defaults.steps, step=1, label="Steps")
                    seed = gradio.Number(0, label="Seed", precision=0)
                with gradio.Row():
                    start = gradio.Button("Generate", variant="primary")
                    cancel = gradio.Button("Cancel")
            with gradio.Column(scale=3):
                with gradio.Row():
                    dense = gradio.Video(label="dense", autoplay=True, loop=True)
                    sparse = gradio.Video(label="sparse", autoplay=True, loop=True)
                facts = gradio.Markdown()
                viewer = gradio.HTML()
        inputs = [prompt, model, family, number, height, width, frames, steps, seed]
        outputs = [dense, sparse, facts, viewer]
        gradio.Examples([list(row) for row in EXAMPLES], [prompt, family, number])
        running = start.click(studio.run, inputs, outputs, concurrency_limit=1)
        model.change(studio.sizes_of, model, [height, width, frames, steps])
        # Said after the run has ended, or its last progress would stand over it.
        stopped = cancel.click(None, None, None, cancels=[running], queue=False)
        stopped.then(lambda: "Cancelled.", None, facts, queue=False)
    page.queue(max_size=MAX_WAITING)
    return page


def launch(page: Any, host: str, port: int) -> str:
    """Serve the page from threads of its own and return its address; port 0 takes a free one."""
    import gradio

    theme = gradio.themes.Base(font=list(FONTS), font_mono=["ui-monospace", "monospace"])
    _, address, _ = page.launch(
        server_name=host,
        server_port=port or None,
        theme=theme,
        share=False,
        show_error=True,
        quiet=True,
        allowed_paths=[],
        prevent_thread_lock=True,
    )
    return str(address)


class Studio:
    """What the page's button does; one video at a time, the last model stays loaded.

    Args:
        models: "builtin" or diffusers directories that may be asked for.
        load: makes a pipeline.

    Raises:
        ValueError: a model is not there.
    """

    def __init__(self, models: Sequence[str], load: Callable[[str], Any]) -> None:
        self.defaults = {name: ModelDefaults.load(model_directory(name)) for name in models}
        self._load = load
        self._loaded: tuple[str, Any] | None = None
        self._busy = threading.Lock()
        self._folder = tempfile.TemporaryDirectory(prefix="nabla-studio-")
        self._count = 0

    def run(
        self,
        prompt: str,
        model: str,
        family: str,
        number: float,
        height: int,
        width: int,
        frames: int,
        steps: int,
        seed: int,
    ) -> Iterator[tuple[Any, Any, str, str]]:
        """Yield (dense video, sparse video, facts, viewer) as they come.

        Raises:
            gradio.Error: shown as a message, in words the user can act on.
        """
        import gradio

        try:
            if model not in self.defaults or family not in FAMILIES:
                raise ValueError(f"unknown model or algorithm: {model!r}, {family!r}.")
            algo = str(parse(FAMILIES[family].format(float(number))))
            request = GenerationRequest(
                prompt=prompt,
                height=_whole("height", height),
                width=_whole("width", width),
                frames=_whole("frames", frames),
                steps=_whole("steps", steps),
                seed=_whole("seed", seed),
                guidance=self.defaults[model].guidance,
                sparse_algo=algo,
            )
            with self._busy:
                yield from self._make(model, request)
        except (ValueError, TypeError, OSError) as error:
            raise gradio.Error(str(error)) from error

    def sizes_of(self, model: str) -> tuple[int, int, int, int]:
        """Height, width, frames and steps that a model was made for."""
        defaults = self.defaults[model]
        return defaults.height, defaults.width, defaults.frames, defaults.steps

    def _make(self, model: str, request: GenerationRequest) -> Iterator[tuple[Any, Any, str, str]]:
        yield None, None, f"Loading {model} …", ""
        pipeline = self._pipeline(model)
        # Gradio serves copies of its own.
        for video in Path(self._folder.name).iterdir():
            video.unlink()
        made: list[Made] = []
        paths: list[str | None] = [None, None]
        pair = make_pair(pipeline, request)
        try:
            for event in pair:
                if isinstance(event, Made):
                    paths[len(made)] = self._write(event, self.defaults[model].fps)
                    made.append(event)
                else:
                    yield paths[0], paths[1], describe_step(event), ""
        finally:
            pair.close()
        yield paths[0], paths[1], describe_pair(*made), embed(made[1])

    def _pipeline(self, model: str) -> Any:
        if self._loaded is None or self._loaded[0] != model:
            self._loaded = None  # first let go of the old one
            self._loaded = (model, self._load(model))
        return self._loaded[1]

    def _write(self, made: Made, fps: float) -> str:
        self._count += 1
        path = Path(self._folder.name) / f"{self._count}.mp4"
        write_video(made.frames, path, fps)
        return str(path)


def _whole(name: str, value: float | None) -> int:
    if value is None or int(value) != value:
        raise ValueError(f"{name} must be a whole number: got {value}.")
    return int(value)


def describe_step(step: Step) -> str:
    """A line of progress."""
    if step.stage == "denoise":
        return f"**{step.algo}**: step {step.done} of {step.total}"
    words = {"text": "reading the prompt", "decode": "decoding", "done": "done"}
    return f"**{step.algo}**: {words.get(step.stage, step.stage)}"


def describe_pair(dense: Made, sparse: Made) -> str:
    """Density, time and fidelity as Markdown."""
    ours, theirs = (net_seconds(made.record) for made in (sparse, dense))
    kept = sparse.record.numbers["attention"]["density"]
    psnr = measure_fidelity(sparse.frames, dense.frames).psnr
    closeness = f"PSNR to dense {psnr:.1f} dB." if isfinite(psnr) else "Identical to dense."
    return (
        f"**{sparse.record.config['sparse_algo']}** kept **{kept:.1%}** of the token pairs: "
        f"{ours:.2f} s in the transformer against {theirs:.2f} s dense. {closeness}"
    )


def embed(made: Made) -> str:
    """The viewer's page in a frame of its own, without rights on this one."""
    assert made.maps is not None
    page = escape(build_view(made.frames, made.maps, made.record), quote=True)
    return (
        '<iframe title="What attention kept" sandbox="allow-scripts" '
        f'style="width:100%;height:56rem;border:0" srcdoc="{page}"></iframe>'
    )
