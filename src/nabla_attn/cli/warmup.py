"""`nabla warmup`: compile what a generation would use, and leave it in PyTorch's cache."""

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nabla_attn.cli import options as opt
from nabla_attn.cli import output as out

if TYPE_CHECKING:
    from nabla_attn.generation.request import GenerationRequest


@opt.with_video_options
def warmup(
    video: opt.VideoOptions,
    sparse_algo: Annotated[
        list[str] | None,
        typer.Option(help="An algorithm; repeat for more.", show_default=opt.MODEL_DEFAULT),
    ] = None,
    as_json: opt.AsJson = False,
) -> None:
    """Run one denoising step of each algorithm at these sizes, and count what was compiled.

    The compiled code stays in PyTorch's cache, from which later processes start.
    """
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    algorithms: list[str | None] = [*sparse_algo] if sparse_algo else [None]
    requests = [video.request(prompt="", seed=0, sparse_algo=algo) for algo in algorithms]
    pipeline = video.load_for(requests[0].with_algo("dense"))
    warmed = []
    for request in requests:
        warmed.append(_warm_up(pipeline, request))
        if not as_json:
            out.say(
                "{sparse_algo}, {frames} frames of {width}x{height}: {seconds:.1f} s, {graphs} "
                "graphs compiled, {from_cache} of them from the cache".format(**warmed[-1])
            )
    if as_json:
        out.print_json({"algorithms": warmed, "cache": cache_dir()})
    else:
        out.say(f"cache: {cache_dir()}")


def _warm_up(pipeline: Any, request: "GenerationRequest") -> dict[str, Any]:
    """Warm up and return what was asked for and what it took."""
    from torch._dynamo.utils import counters

    from nabla_attn.generation.generate import warm_up
    from nabla_attn.generation.request import check_request

    check_request(pipeline, request.with_algo("dense"))
    names = (("stats", "unique_graphs"), ("inductor", "fxgraph_cache_hit"))
    before, began = [counters[room][name] for room, name in names], time.perf_counter()
    warm_up(pipeline, request)
    seconds = time.perf_counter() - began
    graphs, found = (
        counters[room][name] - count for (room, name), count in zip(names, before, strict=True)
    )
    asked = {name: getattr(request, name) for name in ("sparse_algo", "frames", "height", "width")}
    return asked | {"seconds": round(seconds, 3), "graphs": graphs, "from_cache": found}
