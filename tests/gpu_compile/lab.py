"""A process of its own in which CUDA seems to be there: JSON requests in, JSON answers out.

Tensors are fake, so nothing is computed; what Inductor writes for a call is kept and compiled.
"""

import json
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

from tests.gpu_compile.fake_cuda import fake_cuda, load_hooks

load_hooks(Path(sys.argv[1]))

import torch  # noqa: E402
from tests.gpu_compile.kernels import compile_kernel, sources  # noqa: E402
from tests.gpu_compile.waits import WatchedMode  # noqa: E402
from torch import Tensor  # noqa: E402
from torch._inductor.async_compile import AsyncCompile  # noqa: E402
from torch._inductor.graph import GraphLowering  # noqa: E402
from torch._inductor.kernel.flex.flex_flash_attention import is_trivial_mask_graph  # noqa: E402
from torch.utils._python_dispatch import _disable_current_modes  # noqa: E402

import nabla_attn as na  # noqa: E402
from nabla_attn import fusion  # noqa: E402
from nabla_attn.backends.flex_options import FlexOptions, flex_options  # noqa: E402
from nabla_attn.core import order  # noqa: E402

# One mode for the whole process: what the package caches stays usable.
MODE = WatchedMode()
CUDA = torch.device("cuda", 0)


class Lowering:
    """What Inductor wrote while it was watched: modules, and candidates of templates."""

    def __init__(self) -> None:
        self.codes: list[str] = []
        self.candidates: dict[str, list[Any]] = {}
        self.trivial_masks: list[bool] = []

    def keep(self, graph: GraphLowering) -> "ReplayedModule":
        """Stands for `GraphLowering.compile_to_module`."""
        self.codes.append(graph.codegen()[0].value)
        return ReplayedModule(self.codes[-1])

    def choose(self, name: str, choices: list[Any], *_: Any, **__: Any) -> tuple[Any, Any]:
        """Stands for `autotune_select_algorithm`: the first, since nothing can be timed."""
        self.candidates.setdefault(name, []).extend(choices)
        if not choices:
            raise RuntimeError(f"there is no kernel for {name}")
        return choices[0].output_node(), choices[0]

    def use_flash(self, _: Any, mask_graph: Any, *__: Any, **___: Any) -> bool:
        """Stands for `_use_flex_flash_attention`: no, but would it see a mask?"""
        self.trivial_masks.append(is_trivial_mask_graph(mask_graph.graph_module))
        return False


class ReplayedModule:
    """Stands for a compiled module: allocates as Inductor wrote it, and keeps what kernels move."""

    __file__ = None

    def __init__(self, code: str) -> None:
        with (
            mock.patch.object(AsyncCompile, "triton", lambda _, name, source, **__: Kernel(source)),
            mock.patch.object(AsyncCompile, "wait", lambda *_: None),
            mock.patch.object(torch._C, "_cuda_getCurrentRawStream", None, create=True),
        ):
            self._names: dict[str, Any] = {}
            exec(code, self._names)
        self._names |= {
            "empty_strided_cuda": lambda size, stride, dtype: torch.empty_strided(
                size, stride, dtype=dtype, device=CUDA
            ),
            "assert_size_stride": lambda *_: None,
            "copy_if_misaligned": lambda x: x,
            "get_raw_stream": lambda *_: 0,
        }

    def call(self, arguments: list[Any]) -> Any:
        with (
            mock.patch.object(torch.cuda, "_DeviceGuard", lambda _: nullcontext()),
            mock.patch.object(torch.cuda, "set_device", lambda _: None),
        ):
            return self._names["call"](arguments)


class Kernel:
    """Stands for a kernel: reads its `in_ptr`s and `arg_`s, writes its `out_ptr`s."""

    def __init__(self, source: str) -> None:
        found = re.search(
            r"^def (triton_(?:poi|red|per|tem|spl)\w*)\(([^)]*)\)", source, flags=re.M
        )
        self._name, self._parameters = found[1], found[2].split(", ")

    def run(self, *arguments: Any, stream: Any) -> None:
        named = zip(self._parameters, arguments, strict=False)
        tensors = [(name, x) for name, x in named if isinstance(x, Tensor)]
        read = [x for name, x in tensors if not name.startswith("out_ptr")]
        written = [x for name, x in tensors if "out_ptr" in name]
        MODE.keep_kernel(self._name, read, written)


@contextmanager
def lowering(architecture: str) -> Iterator[Lowering]:
    """Inside the block, calls on fake CUDA tensors are lowered for the architecture and kept."""
    from torch._functorch import config as functorch
    from torch._inductor import config as inductor
    from torch._inductor.kernel.flex import flex_attention as templates

    seen = Lowering()
    torch._dynamo.reset()
    fusion.compiled.cache_clear()
    with ExitStack() as stack:
        for context in (
            fake_cuda(architecture),
            inductor.patch(
                force_disable_caches=True, compile_threads=1, joint_graph_constant_folding=False
            ),
            functorch.patch(force_non_lazy_backward_lowering=True),
            mock.patch.object(GraphLowering, "compile_to_module", lambda graph: seen.keep(graph)),
            mock.patch.object(templates, "autotune_select_algorithm", seen.choose),
            mock.patch.object(templates, "_use_flex_flash_attention", seen.use_flash),
            # The package looks for modes that watch operations; fake tensors are one.
            mock.patch.object(fusion, "_is_watched", lambda: False),
            MODE,
        ):
            stack.enter_context(context)
        yield seen


def fake_block_order() -> None:
    """Index tables are made of real numbers; the package then sees fake ones in their place."""
    real = order.block_order
    made: dict[Any, Any] = {}

    def block_order(layout: Any, device: torch.device) -> Any:
        if layout not in made:
            with _disable_current_modes():
                tables = vars(real(layout, torch.device("cpu")))
            made[layout] = order.BlockOrder(
                **{
                    name: torch.empty(table.shape, dtype=table.dtype, device=CUDA)
                    for name, table in tables.items()
                }
            )
        return made[layout]

    for module in list(sys.modules.values()):
        if getattr(module, "block_order", None) is real:
            module.block_order = block_order


def attention(
    architecture: str,
    *,
    grids: list[list[int]] = ((21, 45, 80),),
    block: list[int] = (1, 8, 8),
    algorithm: str = "nabla-0.7",
    heads: int = 4,
    dim: int = 128,
    dtype: str = "bfloat16",
    batch: int = 1,
    num_text: int = 0,
    options: dict[str, Any] | None = None,
    needs_backward: bool = False,
    backend: str = "flex",
    repeat: int = 1,
    compiles: bool = True,
    only_templates: bool = True,
) -> dict[str, Any]:
    """Lower `nabla_attention` for each grid in turn, and compile its kernels.

    Args:
        architecture: such as "sm_90".
        grids: frames, height and width of each grid.
        block: tokens of a block along the same axes.
        algorithm: which blocks are kept.
        heads: heads of each input.
        dim: dim of a head.
        dtype: of the inputs.
        batch: samples.
        num_text: text tokens behind the video; some are padding where there are two samples.
        options: of FlexAttention, instead of those that the package chooses.
        needs_backward: the inputs need gradients.
        backend: as for `nabla_attention`.
        repeat: calls per grid, of which the last is watched.
        compiles: compile the kernels too, of a template the first candidate.
        only_templates: compile FlexAttention's kernels and leave the others.

    Returns:
        The kernels, how many candidates each template had, and the operations outside of
        compiled graphs in the last call.
    """
    forced = flex_options(FlexOptions(**options)) if options else nullcontext()
    with lowering(architecture) as seen, forced:
        for sizes in grids:
            grid = na.TokenGrid(*sizes, block=na.BlockShape(*block))
            # Tokens before heads in memory, as models have them.
            q, k, v = (
                torch.empty(
                    (batch, grid.num_tokens + num_text, heads, dim),
                    dtype=getattr(torch, dtype),
                    device=CUDA,
                    requires_grad=needs_backward,
                ).transpose(1, 2)
                for _ in range(3)
            )
            valid = torch.ones(batch, num_text, dtype=torch.bool, device=CUDA)
            text = {"text_after": num_text, "text_valid": valid} if num_text else {}
            for _ in range(repeat):
                with MODE.watch() as operations, torch.set_grad_enabled(needs_backward):
                    out = na.nabla_attention(q, k, v, grid, algorithm, backend=backend, **text)
                    # The next layer joins the heads of a token.
                    out.transpose(1, 2).flatten(2)
                    del out
        kernels = compile_all(seen, architecture, only_templates) if compiles else []
    candidates = {name: len(found) for name, found in seen.candidates.items()}
    # torch compiles those with the same key once.
    distinct = {
        name: len({choice.kernel_hash_key() for choice in found})
        for name, found in seen.candidates.items()
    }
    return {
        "kernels": kernels,
        "candidates": candidates,
        "distinct": distinct,
        "trivial_masks": seen.trivial_masks,
        "operations": operations,
        "codes": seen.codes,
    }


def compile_all(seen: Lowering, architecture: str, only_templates: bool) -> list[dict[str, Any]]:
    """Compile the kernels of the modules."""
    programs = {}
    for code in seen.codes:
        programs |= {source: name for name, source in sources(code)}
    return [
        compile_kernel(name, source, architecture)
        for source, name in programs.items()
        if "@triton_heuristics.template" in source or not only_templates
    ]


def main() -> None:
    """Answer requests until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.filterwarnings("ignore")
    fake_block_order()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"result": attention(**request)}
        except Exception as error:
            text = "".join(traceback.format_exception(error))
            answer = {"error": f"{type(error).__name__}: {error}", "traceback": text}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
