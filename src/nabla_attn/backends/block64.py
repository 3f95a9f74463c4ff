"""Kernels of other packages for blocks of 64 tokens: found where installed, run only on request.

Each takes the indices of kept key blocks in front of every row, as our tables have them, how many
they are, and the tokens of each key block, which are its first. These tokens are the same for all
samples, so a padded text is beyond them, and summaries of a tail too, whose scores need a bias.

Sources, read and not copied: FastVideo 523831b, fastvideo_kernel/block_sparse_attn.py; flashinfer
fb28d72 (0.6.18), cute_dsl/sparse/bsa_attn_sm100_blk64.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from math import sqrt

import torch
from torch import Tensor

from nabla_attn.core.block_map import BlockMap
from nabla_attn.core.flex_tables import KeptColumns, compact
from nabla_attn.core.tail import Tail
from nabla_attn.shapes import Float

BLOCK_TOKENS = 64


@dataclass(frozen=True)
class Kernel:
    """A kernel of another package.

    Attributes:
        package: The package as Python imports it.
        distribution: The package as pip installs it.
        head_dims: Dims of a head that it takes.
        run: The function of q, k, v, kept columns, tokens of key blocks and the scale that calls
            it.
        has_backward: Whether it has one.
        takes_scale: Whether q.k may be scaled by anything but 1/sqrt(dim).
        capabilities: Compute capabilities of the GPUs that it runs on; None is 8.0 and later.
    """

    package: str
    distribution: str
    head_dims: tuple[int, ...]
    run: Callable[[Tensor, Tensor, Tensor, KeptColumns, Tensor, float], Tensor]
    has_backward: bool
    takes_scale: bool
    capabilities: tuple[tuple[int, int], ...] | None = None

    def why_not(
        self,
        device: torch.device,
        *,
        needs_grad: bool = False,
        dtype: torch.dtype | None = None,
        head_dim: int | None = None,
        block_tokens: int | None = None,
        tail: str | None = None,
        is_text_padded: bool = False,
    ) -> str | None:
        """The reason why it cannot run, or None; arguments as for `backends.why_not`."""
        if find_spec(self.package) is None:
            return f"{self.distribution} is not installed (pip install {self.distribution})"
        if device.type != "cuda":
            return f"{self.distribution} runs on CUDA only: got {device.type}"
        if reason := self._why_not_device(device):
            return reason
        if needs_grad and not self.has_backward:
            return f"{self.distribution} has no backward"
        if dtype not in (None, torch.bfloat16):
            return f"{self.distribution} takes bfloat16: got {dtype}"
        if head_dim not in (None, *self.head_dims):
            dims = " or ".join(map(str, self.head_dims))
            return f"{self.distribution} takes heads of {dims} dims: got {head_dim}"
        if block_tokens not in (None, BLOCK_TOKENS):
            return f"{self.distribution} takes blocks of {BLOCK_TOKENS} tokens: got {block_tokens}"
        if tail is not None:
            return f"{self.distribution} takes no bias for the summaries of _tail-{tail}"
        if is_text_padded:
            return f"{self.distribution} takes no padded text, which differs between samples"
        return None

    def _why_not_device(self, device: torch.device) -> str | None:
        here = torch.cuda.get_device_capability(device)
        if self.capabilities is None:
            return None if here >= (8, 0) else f"{self.distribution} needs sm_80 or later"
        if here in self.capabilities:
            return None
        needed = " or ".join("sm_{}{}".format(*each) for each in self.capabilities)
        return f"{self.distribution} needs {needed}: got sm_{here[0]}{here[1]}"

    def attend(
        self,
        q: Float[Tensor, "batch heads q_slots dim"],
        k: Float[Tensor, "batch heads kv_slots dim"],
        v: Float[Tensor, "batch heads kv_slots dim"],
        block_map: BlockMap,
        *,
        scale: float | None = None,
        tail: Tail | None = None,
    ) -> Float[Tensor, "batch heads q_slots dim"]:
        """Attention over the map's blocks.

        Raises:
            RuntimeError: The kernel cannot hold the call.
        """
        valid, usual = block_map.kv_valid, 1 / sqrt(q.shape[-1])
        if tail is not None or (valid is not None and len(valid) > 1):
            raise RuntimeError(
                f"{self.distribution} takes no tail and no keys that are valid in some samples "
                "only. Use backend='flex' or 'gather'."
            )
        if scale is not None and scale != usual and not self.takes_scale:
            raise RuntimeError(
                f"{self.distribution} scales by 1/sqrt(dim) = {usual:g}: got {scale:g}. Use "
                "backend='flex' or 'gather'."
            )
        tokens = block_map.kv_counts[0].to(torch.int32)
        # A block without a token would be a row of minus infinity.
        kept = compact(block_map.mask & (tokens > 0))
        return self.run(q, k, v, kept, tokens, usual if scale is None else scale)


def _run_fastvideo(
    q: Tensor, k: Tensor, v: Tensor, kept: KeptColumns, tokens: Tensor, scale: float
) -> Tensor:
    from fastvideo_kernel import block_sparse_attn_from_indices

    q, k, v = (x.contiguous() for x in (q, k, v))
    return block_sparse_attn_from_indices(q, k, v, kept.columns, kept.counts, tokens)[0]


def _run_flashinfer(
    q: Tensor, k: Tensor, v: Tensor, kept: KeptColumns, tokens: Tensor, scale: float
) -> Tensor:
    try:
        from flashinfer.cute_dsl.sparse.bsa_attn_sm100_blk64 import (
            bsa_attn_sm100_blk64_fwd as run,
        )
    except ImportError:  # its name before 0.6.18
        from flashinfer.cute_dsl.sparse import bsa_attn_blk64_fwd as run

    # Tokens before heads; counts of their own make the number for all rows meaningless.
    out, _ = run(
        *(x.transpose(1, 2).contiguous() for x in (q, k, v)),
        q2k_block_index=kept.columns,
        block_sparse_num=1,
        block_sizes=tokens,
        q2k_block_nums=kept.counts,
        softmax_scale=scale,
    )
    return out.transpose(1, 2)


KERNELS = {
    "fastvideo": Kernel(
        package="fastvideo_kernel",
        distribution="fastvideo-kernel",
        head_dims=(64, 128),
        run=_run_fastvideo,
        has_backward=True,
        takes_scale=False,
    ),
    "flashinfer": Kernel(
        package="flashinfer",
        distribution="flashinfer-python",
        head_dims=(128,),
        run=_run_flashinfer,
        has_backward=False,
        takes_scale=True,
        capabilities=((10, 0), (10, 3)),
    ),
}
"""Backends by name, each with `attend` and `why_not`."""
