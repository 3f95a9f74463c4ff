"""The work of an attention layer from its shape and the share of token pairs it keeps."""

from nabla_attn.cost.count import POINTWISE
from nabla_attn.cost.work import MatrixShape, Operator, Work

MAP_OPERATIONS = 70
"""Vector operations per entry of the map: softmax, and 31 halvings that compare and add."""


def attention_work(
    tokens: int, heads: int, dim: int, density: float = 1.0, *, block_tokens: int = 64
) -> Work:
    """Count the work of one attention layer on one sample.

    Dense attention has two matrix products per head and a softmax. A sparse layer does the kept
    share of both, reads keys and values again for each query block, and makes its map: pooled
    queries and keys, their product, and the selection.

    Args:
        tokens: Number of tokens.
        heads: Number of heads.
        dim: Dimension of a head.
        density: Share of token pairs kept, in (0, 1]; 1 is dense and makes no map.
        block_tokens: Tokens of a block.

    Raises:
        ValueError: A size is not positive, or the density is outside (0, 1].
    """
    if min(tokens, heads, dim, block_tokens) < 1 or not 0 < density <= 1:
        raise ValueError(
            f"attention needs positive sizes and a density in (0, 1]: got {tokens} tokens, {heads} "
            f"heads, dim {dim}, blocks of {block_tokens}, density {density}."
        )
    size = heads * tokens * dim
    kept = round(density * tokens)
    # Both products as one: 2 * dim multiply-accumulates for every kept pair.
    product = MatrixShape(heads, tokens, 2 * dim, max(1, kept))
    softmax = float(POINTWISE["_softmax"] * heads * tokens * kept)
    if density == 1:
        return Work((Operator("attention", product, 4 * size, softmax, elements=size),))
    blocks = -(-tokens // block_tokens)
    pairs = heads * blocks**2
    read = 2 * size + 2 * heads * blocks * kept * dim
    return Work(
        (
            Operator("pool", None, 2 * size, 2 * size, elements=2 * heads * blocks * dim),
            Operator(
                "scores",
                MatrixShape(heads, blocks, dim, blocks),
                2 * heads * blocks * dim + pairs,
                MAP_OPERATIONS * pairs,
                elements=pairs,
            ),
            Operator("sparse attention", product, read, softmax, elements=size),
        )
    )
