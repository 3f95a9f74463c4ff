"""Checks that any sparse attention method must pass, this package's own and a user's.

import nabla_attn as na
na.testing.check_method("nabla-0.5")
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nabla_attn import methods
from nabla_attn.attention import build_block_map, nabla_attention
from nabla_attn.config import SparseConfig, as_config, parse
from nabla_attn.core.grid import BlockShape, TokenGrid

BLOCK = BlockShape(1, 4, 4)
GRIDS = {
    "whole blocks": TokenGrid(3, 8, 12, block=BLOCK),
    "ragged edges": TokenGrid(2, 11, 13, block=BLOCK),
    "one frame": TokenGrid(1, 8, 20, block=BLOCK),
    "one block": TokenGrid(1, 4, 4, block=BLOCK),
}
HEADS, DIM = 3, 16


def check_method(algorithm: str | SparseConfig, *, seed: int = 0) -> list[str]:
    """Hold a method to what all methods promise, on small grids, in float64.

    The map has its shape, keeps a block in each row, and is the same when asked again; samples and
    heads do not depend on each other; the string reads back; backends agree; constant values come
    out constant; packed clips do not see each other; text is attended; gradients are those of the
    definition, for methods that are trainable.

    Args:
        algorithm: An algorithm with the method, such as "mine-0.2".
        seed: Draws queries, keys and values.

    Returns:
        The checks that were made, in words.

    Raises:
        AssertionError: One does not hold; the message names check and grid.
        ValueError: The algorithm does not parse, or its method needs a table of calibration.
    """
    config = as_config(algorithm)
    done = []
    for name, check in _checks(config):
        for where, grid in GRIDS.items():
            grid = grid.with_block(config.block, config.order)
            q, k, v = _tokens(grid.num_tokens, seed)
            try:
                check(config, grid, q, k, v)
            except AssertionError as error:
                raise AssertionError(f"{config}, {where}: {name}. {error}") from None
        done.append(name)
    return done


Check = Callable[[SparseConfig, TokenGrid, Tensor, Tensor, Tensor], None]


def _checks(config: SparseConfig) -> Iterator[tuple[str, Check]]:
    rows = [methods.find(use.name) for use in config.uses]
    yield "its string must read back", _check_string
    yield "the map must have its shape and a block in each row", _check_map
    yield "the same call must give the same output", _check_repeats
    yield "samples and heads must not depend on each other", _check_independence
    yield "backends must agree with the reference", _check_backends
    if all(row.keeps_constants for row in rows):
        yield "constant values must come out constant", _check_constants
    if all(row.packs for row in rows):
        yield "packed clips must not see each other", _check_clips
    yield "text must see and be seen by all", _check_text
    if config.is_trainable:
        yield "gradients must be those of the reference", _check_gradients


def _tokens(count: int, seed: int, batch: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, HEADS, count, DIM)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)]


def _attend(
    tokens: Iterable[Tensor], grid: TokenGrid, config: SparseConfig, **options: Any
) -> Tensor:
    q, k, v = tokens
    return nabla_attention(q, k, v, grid, config, **options)


def _check_string(config: SparseConfig, *_: object) -> None:
    assert parse(str(config)) == config, str(config)


def _check_map(config: SparseConfig, grid: TokenGrid, q: Tensor, k: Tensor, v: Tensor) -> None:
    found = build_block_map(q, k, grid, config, v=v)
    mask = found.mask
    assert mask.dtype == torch.bool, mask.dtype
    assert mask.shape[:2] == q.shape[:2], tuple(mask.shape)
    if found.q_order is None:
        assert mask.shape[2:] == (grid.num_blocks, grid.num_blocks), tuple(mask.shape)
    assert mask.any(dim=-1).all(), "some row keeps nothing"
    assert 0 < found.density <= 1, found.density


def _check_repeats(config: SparseConfig, grid: TokenGrid, q: Tensor, k: Tensor, v: Tensor) -> None:
    first, second = (nabla_attention(q, k, v, grid, config) for _ in range(2))
    assert torch.equal(first, second)
    assert first.isfinite().all()


def _check_independence(
    config: SparseConfig, grid: TokenGrid, q: Tensor, k: Tensor, v: Tensor
) -> None:
    whole = nabla_attention(q, k, v, grid, config)
    alone = _attend((x[1:] for x in (q, k, v)), grid, config)
    torch.testing.assert_close(whole[1:], alone, atol=1e-9, rtol=0)
    order = torch.tensor([2, 0, 1])
    moved = _attend((x[:, order] for x in (q, k, v)), grid, config)
    torch.testing.assert_close(whole[:, order], moved, atol=1e-9, rtol=0)


def _check_backends(config: SparseConfig, grid: TokenGrid, q: Tensor, k: Tensor, v: Tensor) -> None:
    exact, fast = (
        nabla_attention(q, k, v, grid, config, backend=name) for name in ("reference", "gather")
    )
    torch.testing.assert_close(exact, fast, atol=1e-9, rtol=0)


def _check_constants(
    config: SparseConfig, grid: TokenGrid, q: Tensor, k: Tensor, v: Tensor
) -> None:
    out = nabla_attention(q, k, v[:, :, :1].expand_as(v), grid, config)
    torch.testing.assert_close(out, v[:, :, :1].expand_as(v), atol=1e-9, rtol=0)


def _check_clips(config: SparseConfig, grid: TokenGrid, q: Tensor, k: Tensor, v: Tensor) -> None:
    packed = replace(grid, frames=2 * grid.frames, segments=(grid.frames, grid.frames))
    others = _tokens(grid.num_tokens, 1)
    both = [torch.cat([x, y], dim=2) for x, y in zip((q, k, v), others, strict=True)]
    count = grid.num_tokens
    first = _attend(both, packed, config)[:, :, :count]
    changed = [torch.cat([x, 2 * y], dim=2) for x, y in zip((q, k, v), others, strict=True)]
    second = _attend(changed, packed, config)[:, :, :count]
    torch.testing.assert_close(first, second, atol=1e-9, rtol=0)


def _check_text(config: SparseConfig, grid: TokenGrid, q: Tensor, k: Tensor, v: Tensor) -> None:
    text = _tokens(5, 2)
    both = [torch.cat([x, y], dim=2) for x, y in zip((q, k, v), text, strict=True)]
    out = _attend(both, grid, config, text_after=5, backend="reference")
    scores = both[0][:, :, -5:] @ both[1].transpose(-1, -2) / DIM**0.5
    rows = [methods.find(use.name) for use in config.uses]
    if all(row.keeps_constants for row in rows):
        expected = scores.softmax(dim=-1) @ both[2]
        torch.testing.assert_close(out[:, :, -5:], expected, atol=1e-9, rtol=0)
    padded = [x.clone() for x in both]
    padded[1][:, :, -1], padded[2][:, :, -1] = 1e3, 1e3
    valid = torch.tensor([[True] * 4 + [False]] * 2)
    options: dict[str, Any] = {"text_after": 5, "text_valid": valid}
    same = [_attend(x, grid, config, **options) for x in (both, padded)]
    torch.testing.assert_close(same[0][:, :, :-5], same[1][:, :, :-5], atol=1e-9, rtol=0)


def _check_gradients(
    config: SparseConfig, grid: TokenGrid, q: Tensor, k: Tensor, v: Tensor
) -> None:
    found = []
    for name in ("reference", "gather"):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        _attend(inputs, grid, config, backend=name).square().sum().backward()
        found.append([x.grad for x in inputs])
    for exact, fast in zip(*found, strict=True):
        assert exact is not None and exact.isfinite().all()
        torch.testing.assert_close(exact, fast, atol=1e-8, rtol=1e-8)
