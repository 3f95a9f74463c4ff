"""The page itself: its controls, and serving it."""

import ipaddress
import os
import signal
import socket
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from nabla_attn.config import grammar
from nabla_attn.studio.session import (
    BLOCKS,
    ESTIMATES,
    RULES,
    WINDOWS,
    LoadPipeline,
    Studio,
    compose_algorithm,
    read_controls,
)

SECONDS_KEPT = 86400  # videos of pages that are still open
MAX_WAITING = 8  # requests in the queue; the next one is refused
MAX_FILE_SIZE = 1  # bytes of an upload: the page takes none
EXAMPLES = (
    (
        "a large red square moving right on a black background",
        "none",
        "topk-0.07_sta-17-1-1_tail-first",
        0,
    ),
    ("a large yellow circle moving left on a black background", "none", "topk-0.12_tail-first", 1),
    ("a large cyan square moving right on a white background", "none", "nabla-0.5_tail-first", 2),
    ("a large blue square moving left on a black background", "builtin", "topk-0.05_tail-first", 0),
    ("a small yellow triangle moving down on a white background", "builtin", "topk-0.05", 0),
)
"""Prompts of combinations that the built-in model was trained on, with adapters, algorithms and
seeds; the page opens with the first one."""
FONTS = ("system-ui", "sans-serif")


def build_studio(models: Sequence[str], load: LoadPipeline, adapters: Sequence[str] = ()) -> Any:
    """Return the page as Gradio Blocks, for `launch`.

    Args:
        models: "builtin" or diffusers directories to choose from.
        load: Loads the pipeline of one of them with adapters.
        adapters: LoRA weights to choose from.

    Raises:
        ValueError: A model is missing.
    """
    studio = Studio(models, load, adapters)
    # Neither statistics nor fonts are fetched from the network.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    # Read when the components are made: their copies of the videos go with the videos.
    os.environ["GRADIO_TEMP_DIR"] = str(studio.cache)
    import gradio

    examples = [
        list(row) for row in EXAMPLES if models[0] == "builtin" and row[1] in studio.adapters
    ]
    defaults = studio.defaults_of(models[0], studio.adapters[0])
    first: list[Any] = (
        examples[0] if examples else ["", studio.adapters[0], defaults.sparse_algo, 0]
    )
    defaults = studio.defaults_of(models[0], first[1])
    with gradio.Blocks(title="nabla studio", delete_cache=(SECONDS_KEPT, SECONDS_KEPT)) as page:
        gradio.Markdown("# nabla studio\nDense and block-sparse attention from the same noise.")
        with gradio.Row():
            with gradio.Column(scale=1):
                prompt = gradio.Textbox(first[0], label="Prompt", lines=2)
                model = gradio.Dropdown(list(models), value=models[0], label="Model")
                adapter = gradio.Dropdown(
                    list(studio.adapters), value=first[1], label="Adapter (LoRA)"
                )
                algorithm = gradio.Textbox(first[2], label="Algorithm", info=f"{grammar()}.")
                with gradio.Row():
                    start = gradio.Button("Generate", variant="primary")
                    cancel = gradio.Button("Cancel")
                controls = _add_controls(gradio, first[2])
                with gradio.Accordion("Size and seed", open=False):
                    height = gradio.Number(defaults.height, label="Height", precision=0)
                    width = gradio.Number(defaults.width, label="Width", precision=0)
                    frames = gradio.Number(defaults.frames, label="Frames", precision=0)
                    steps = gradio.Slider(1, 100, value=defaults.steps, step=1, label="Steps")
                    seed = gradio.Number(first[3], label="Seed", precision=0)
            with gradio.Column(scale=3):
                with gradio.Row():
                    dense = gradio.Video(label="dense", autoplay=True, loop=True)
                    sparse = gradio.Video(label="sparse", autoplay=True, loop=True)
                summary = gradio.Markdown()
                viewer = gradio.HTML()
        if examples:
            gradio.Examples(examples, [prompt, adapter, algorithm, seed])
        inputs = [prompt, model, adapter, algorithm, height, width, frames, steps, seed]
        outputs = [dense, sparse, summary, viewer]
        running = start.click(studio.run, inputs, outputs, concurrency_limit=1)
        for control in controls:
            control.input(_compose, controls, algorithm, queue=False)
        for choice in (model, adapter):
            sizes = [height, width, frames, steps, algorithm]
            choice.input(lambda *chosen: _sizes(studio, *chosen), [model, adapter], sizes)
        # Said after the run has ended, or its last progress would replace it.
        stopped = cancel.click(None, None, None, cancels=[running], queue=False)
        stopped.then(lambda: "Cancelled.", None, summary, queue=False)
    page.queue(max_size=MAX_WAITING)
    page.studio = studio
    return page


def _add_controls(gradio: Any, algorithm: str) -> list[Any]:
    """Add the controls that write an algorithm, set to the one that the page opens with."""
    values = read_controls(algorithm)
    with gradio.Accordion("Compose an algorithm"):
        rule = gradio.Radio(list(RULES), value=values[0], label="Rule")
        label = "Threshold (kept mass) or share"
        number = gradio.Slider(0.05, 1.0, value=values[1], step=0.05, label=label)
        with gradio.Row():
            window = gradio.Dropdown(list(WINDOWS), value=values[2], label="Window, in blocks")
            block = gradio.Dropdown(list(BLOCKS), value=values[3], label="Block, in tokens")
            tail = gradio.Dropdown(
                list(ESTIMATES), value=values[4], label="Tail: how dropped blocks are estimated"
            )
    return [rule, number, window, block, tail]


def _compose(rule: str, number: float, window: str, block: str, tail: str) -> str:
    import gradio

    try:
        return compose_algorithm(rule, number, window, block, tail)
    except ValueError as error:
        raise gradio.Error(str(error)) from error


def _sizes(studio: Studio, model: str, adapter: str) -> tuple[int, int, int, int, str]:
    """Return height, width, frames, steps and algorithm that a model was trained for."""
    import gradio

    try:
        found = studio.defaults_of(model, adapter)
    except ValueError as error:
        raise gradio.Error(str(error)) from error
    return found.height, found.width, found.frames, found.steps, found.sparse_algo


class SameSite:
    """ASGI middleware that refuses foreign names of this server, and pages of other sites.

    A page of another site could otherwise reach the studio through the browser of its user, by a
    request of its own or by a name that it points at this machine.

    Args:
        app: The application behind it.
        names: Host names that the page is served under, besides this machine's own names and
            addresses.
    """

    def __init__(self, app: Any, names: Collection[str] = ()) -> None:
        self._app = app
        self._names = {"localhost", socket.gethostname().lower(), *map(str.lower, names)}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer 403, or pass the request on."""
        if scope["type"] in ("http", "websocket"):
            from starlette.datastructures import Headers
            from starlette.responses import PlainTextResponse

            headers = Headers(scope=scope)
            host, origin = headers.get("host", ""), headers.get("origin")
            refusal = None
            if not self._is_own(host):
                refusal = f"unknown host {host!r}. Start the studio with --allow-host to permit it."
            elif origin is not None and origin.partition("://")[2] != host:
                refusal = "requests from other sites are refused."
            if refusal:
                await PlainTextResponse(refusal, 403)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _is_own(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        return name in self._names or _is_address(name)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def launch(page: Any, host: str, port: int, allowed_hosts: Collection[str] = ()) -> str:
    """Serve the page from threads of its own and return its address; port 0 takes a free one."""
    import gradio
    from starlette.middleware import Middleware

    theme = gradio.themes.Base(font=list(FONTS), font_mono=["ui-monospace", "monospace"])
    names = {host, *allowed_hosts}
    _, address, _ = page.launch(
        server_name=host,
        server_port=port or None,
        theme=theme,
        share=False,
        show_error=True,
        quiet=True,
        allowed_paths=[],
        max_file_size=MAX_FILE_SIZE,
        ssr_mode=False,
        prevent_thread_lock=True,
        app_kwargs={"middleware": [Middleware(SameSite, names=names)]},
    )
    return str(address)


def wait(page: Any) -> None:
    """Wait for Ctrl-C or SIGTERM, then remove the videos."""
    with _sigterm_as_exit():
        try:
            page.block_thread()
        except SystemExit as stopped:
            page.studio.close()
            # Threads that compute cannot be waited for, nor be ended by Python in good order.
            os._exit(int(stopped.code or 0))
        finally:
            page.studio.close()


@contextmanager
def _sigterm_as_exit() -> Iterator[None]:
    def stop(number: int, _: Any) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
