"""Token grids of videos and the blocks that tile them."""

from dataclasses import dataclass, field, replace
from math import prod
from numbers import Integral

from nabla_attn.core.token_orders import TokenOrder

MAX_BLOCK_TOKENS = 4096
# Slots per token beyond which blocks are too large for their grid, unless it is small.
MAX_PADDING, SMALL = 64, 2**16


def _positive(what: str, size: int) -> int:
    if isinstance(size, bool) or not isinstance(size, Integral) or size < 1:
        raise ValueError(f"{what} must be a positive integer: got {size!r}.")
    # Only where needed: under a compiler it would fix a size that may vary.
    return size if type(size) is int else int(size)


@dataclass(frozen=True)
class BlockShape:
    """Tokens of one attention block along (frames, height, width).

    The default 1x8x8 is the paper's: 64 tokens of one latent frame (arXiv:2507.13546, 3.1).
    """

    frames: int = 1
    height: int = 8
    width: int = 8

    def __post_init__(self) -> None:
        for name in ("frames", "height", "width"):
            object.__setattr__(self, name, _positive(f"block {name}", getattr(self, name)))

        if self.tokens > MAX_BLOCK_TOKENS:
            raise ValueError(
                f"a block holds at most {MAX_BLOCK_TOKENS:,} tokens: got {self} = {self.tokens:,}."
            )

    @property
    def tokens(self) -> int:
        """Token slots of a block."""
        return self.frames * self.height * self.width

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"


@dataclass(frozen=True)
class TokenGrid:
    """A video's latent patch tokens in raster order (frame, row, column), and how blocks tile them.

    Any size is allowed: edges that do not fill a block are ragged, and their empty slots exist only
    inside attention, where they are neither pooled nor attended.

    Args:
        frames: Latent frames of patch tokens.
        height: Token rows of a frame.
        width: Token columns of a frame.
        segments: Frames of each clip when several clips are packed along time; clips do not attend
            each other and no block spans two of them. Must sum to `frames`. None is one clip.
        block: Tokens of one block.
        order: Order of each clip's tokens, of which a block has as many consecutive ones as its
            shape has tokens. None cuts the video in boxes of that shape.

    Raises:
        ValueError: A size is not a positive integer, the segments do not sum to `frames`, or the
            block is not a `BlockShape`, or so large that the grid would be mostly padding.
    """

    frames: int
    height: int
    width: int
    segments: tuple[int, ...] | None = None
    block: BlockShape = field(default_factory=BlockShape)
    order: TokenOrder | None = None

    def __post_init__(self) -> None:
        for name in ("frames", "height", "width"):
            object.__setattr__(self, name, _positive(f"grid {name}", getattr(self, name)))
        if not isinstance(self.block, BlockShape):
            raise ValueError(f"the block must be a BlockShape: got {self.block!r}.")
        if self.segments is not None:
            self._check_segments(self.segments)
        if self.num_slots > max(SMALL, MAX_PADDING * self.num_tokens):
            raise ValueError(
                f"blocks of {self.block} are larger than the grid {self}, which would be padded "
                f"from {self.num_tokens:,} tokens to {self.num_slots:,}. Choose smaller blocks."
            )

    def _check_segments(self, segments: tuple[int, ...]) -> None:
        segments = tuple(_positive("segment frames", frames) for frames in segments)
        object.__setattr__(self, "segments", segments)
        if sum(segments) != self.frames:
            raise ValueError(
                f"segments must sum to the frames: got {segments} = {sum(segments)} "
                f"for {self.frames} frames."
            )

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"

    def with_block(
        self, sides: tuple[int, int, int] | None, order: TokenOrder | None = None
    ) -> "TokenGrid":
        """The same tokens in blocks of (frames, height, width), cut from an order.

        Args:
            sides: Tokens of a block; None leaves them as they are.
            order: Order of the tokens; None leaves it as it is.
        """
        block = self.block if sides is None else BlockShape(*sides)
        order = self.order if order is None else order
        is_same = block == self.block and order == self.order
        return self if is_same else replace(self, block=block, order=order)

    @property
    def num_tokens(self) -> int:
        """Tokens of the video."""
        return self.frames * self.height * self.width

    @property
    def segment_frames(self) -> tuple[int, ...]:
        """Frames of each packed clip; one clip when the grid has no segments."""
        return self.segments or (self.frames,)

    @property
    def segment_blocks(self) -> tuple[int, ...]:
        """Blocks along time of each packed clip; all its blocks where tokens have an order."""
        if self.order is not None:
            frame_tokens = self.height * self.width
            return tuple(-(-n * frame_tokens // self.block.tokens) for n in self.segment_frames)
        return tuple(-(-frames // self.block.frames) for frames in self.segment_frames)

    @property
    def blocks(self) -> tuple[int, int, int]:
        """Blocks along (frames, height, width); all along the first where tokens have an order."""
        if self.order is not None:
            return sum(self.segment_blocks), 1, 1
        return (
            sum(self.segment_blocks),
            -(-self.height // self.block.height),
            -(-self.width // self.block.width),
        )

    @property
    def num_blocks(self) -> int:
        """Blocks of the video."""
        return prod(self.blocks)

    @property
    def num_slots(self) -> int:
        """Token slots in block order, the empty ones of ragged blocks included."""
        return self.num_blocks * self.block.tokens

    @property
    def is_ragged(self) -> bool:
        """Whether some block has empty slots."""
        return self.num_slots != self.num_tokens

    @property
    def padding_share(self) -> float:
        """Empty slots / tokens: the extra length inside attention. 45x80 tokens (720p): 0.067."""
        return self.num_slots / self.num_tokens - 1
