"""GPU memory of the released Wan models, by a formula held against measured peaks of small ones.

Bytes of tensors alive at once, without the workspace of kernels and the allocator's slack; leave a
tenth of the card free. All for batch 1 without gradients; N = video tokens, d = width of the
transformer, f = width of its feed-forward layer, b = bytes of a number.

- weights: exactly the parameters of the released shapes;
- activations of the transformer: ``N d (max(12.4 + 4.45 b, 4 b + 2 b f/d) + 8 / heads)``: float32
  norms, q, k, v and tokens in the attention half; two copies of the inner layer in the feed-forward
  half; the rotary tables last. VACE keeps ``N d b`` more for each layer of its branch;
- sparse attention adds ``4 N d b`` (q, k, v and output in block order) and its map:
  ``9 heads (N/64)^2`` bytes (a mask and two index tables) and half a GiB of scratch;
- VAE in float32: ``51 B W H 4`` and the video, B = 96 its base width; Wan 2.2:
  ``85.3 B (W/2) (H/2) 4`` and the video, B = 256; tiled: 4.7 videos and one tile of 256 x 256.
"""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

BLOCK_TOKENS = 64
MAP_SCRATCH = 2**29
GIB = 2**30
FLOAT32 = 4
CARDS = (16, 24, 48, 80, 141)
TILE = 256


@dataclass(frozen=True)
class WanModel:
    """Shapes of a released model (Wan2.1 and Wan2.2 ``wan/configs``).

    Attributes:
        width: d.
        ffn: f.
        heads: attention heads.
        layers: transformer blocks.
        channels: input channels of the transformer.
        has_image: cross-attention to image tokens, and the image tower.
        vace_layers: blocks of the VACE branch.
        experts: transformers; with offload one at a time is on the card.
        is_2_2_vae: the VAE of TI2V-5B.
    """

    width: int = 5120
    ffn: int = 13824
    heads: int = 40
    layers: int = 40
    channels: int = 16
    has_image: bool = False
    vace_layers: int = 0
    experts: int = 1
    is_2_2_vae: bool = False

    @property
    def pixels_per_token(self) -> int:
        """Side of the square that a token stands for."""
        return 32 if self.is_2_2_vae else 16


SMALL = WanModel(width=1536, ffn=8960, heads=12, layers=30)
MODELS = {
    "T2V-1.3B": SMALL,
    "T2V-14B": WanModel(),
    "I2V-14B, FLF2V-14B": WanModel(channels=36, has_image=True),
    "VACE-1.3B": replace(SMALL, vace_layers=15),
    "VACE-14B": WanModel(vace_layers=8),
    "T2V-A14B, I2V-A14B": WanModel(channels=36, experts=2),
    "TI2V-5B": WanModel(width=3072, ffn=14336, heads=24, layers=30, channels=48, is_2_2_vae=True),
}
# Parameters of umT5-xxl's encoder, the ViT-H/14 tower, and both VAEs.
TEXT_ENCODER, IMAGE_ENCODER, VAE, VAE_2_2 = 5_680_910_336, 630_766_080, 126_892_531, 704_688_668


@dataclass(frozen=True)
class WanMemory:
    """Bytes at one video size.

    Attributes:
        weights: of one transformer.
        text_encoder: weights.
        image_encoder: weights, 0 without one.
        activations: of the transformer, dense.
        sparse: what sparse attention adds.
        vae: decoding, weights included.
        vae_tiled: the same in tiles.
        experts: transformers.
    """

    weights: int
    text_encoder: int
    image_encoder: int
    activations: int
    sparse: int
    vae: int
    vae_tiled: int
    experts: int

    def peak(self, *, offload: bool, tiled: bool, is_sparse: bool = True) -> int:
        """The largest sum on the card at once.

        Args:
            offload: only the part at work is there (``--offload_model True``).
            tiled: the VAE decodes in tiles.
            is_sparse: attention is sparse.
        """
        transformer = self.activations + (self.sparse if is_sparse else 0)
        vae = self.vae_tiled if tiled else self.vae
        if offload:
            return max(self.text_encoder, self.image_encoder, self.weights + transformer, vae)
        resident = self.text_encoder + self.image_encoder + self.experts * self.weights
        return resident + max(transformer, vae)


def activation_bytes(tokens: int, width: int, ffn: int, heads: int, item: int = 2) -> float:
    """Peak of a dense transformer forward beside its weights; ``item`` bytes a number."""
    attention = 12.4 + 4.45 * item
    feed_forward = 4 * item + 2 * item * ffn / width
    return tokens * width * (max(attention, feed_forward) + 8 / heads)


def vae_bytes(
    base: int, height: int, width: int, frames: int, *, is_2_2: bool = False, tiled: bool = False
) -> float:
    """Peak of decoding one video in float32 beside the weights."""
    video = 3 * frames * height * width * FLOAT32
    height, width = (min(height, TILE), min(width, TILE)) if tiled else (height, width)
    inner = 85.3 * base * height * width / 4 if is_2_2 else 51 * base * height * width
    return inner * FLOAT32 + (4.7 if tiled else 1) * video


def estimate(name: str, width: int, height: int, frames: int, item: int = 2) -> WanMemory:
    """Memory of a released model at one video size; ``item`` bytes a number of the weights.

    Raises:
        ValueError: an unknown model.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}. Known: {', '.join(MODELS)}.")
    model = MODELS[name]
    side = model.pixels_per_token
    tokens = ((frames - 1) // 4 + 1) * (height // side) * (width // side)
    blocks = -(-tokens // BLOCK_TOKENS)
    base, vae_weights = (256, VAE_2_2) if model.is_2_2_vae else (96, VAE)
    decode = {
        tiled: int(
            vae_bytes(base, height, width, frames, is_2_2=model.is_2_2_vae, tiled=tiled)
            + vae_weights * FLOAT32
        )
        for tiled in (False, True)
    }
    dense = activation_bytes(tokens, model.width, model.ffn, model.heads, item)
    dense += model.vace_layers * tokens * model.width * item
    return WanMemory(
        weights=count_parameters(model) * item,
        text_encoder=TEXT_ENCODER * item,
        image_encoder=IMAGE_ENCODER * item if model.has_image else 0,
        activations=int(dense),
        sparse=4 * tokens * model.width * item + 9 * model.heads * blocks**2 + MAP_SCRATCH,
        vae=decode[False],
        vae_tiled=decode[True],
        experts=model.experts,
    )


@cache
def count_parameters(model: WanModel) -> int:
    """Parameters of one transformer, counted on the meta device."""
    from nabla_attn.wan.parts import KINDS

    config: dict[str, Any] = {
        "num_attention_heads": model.heads,
        "attention_head_dim": model.width // model.heads,
        "ffn_dim": model.ffn,
        "num_layers": model.layers,
        "in_channels": model.channels,
        "out_channels": 48 if model.is_2_2_vae else 16,
    }
    if model.has_image:
        config |= {"image_dim": 1280, "added_kv_proj_dim": model.width}
    if model.vace_layers:
        step = model.layers // model.vace_layers
        config["vace_layers"] = list(range(0, model.layers, step))
    return sum(p.numel() for p in KINDS["transformer"].build(config).parameters())


SIZES = {
    "T2V-1.3B": ((832, 480, 81),),
    "T2V-14B": ((832, 480, 81), (1280, 720, 81)),
    "I2V-14B, FLF2V-14B": ((832, 480, 81), (1280, 720, 81)),
    "VACE-1.3B": ((832, 480, 81),),
    "VACE-14B": ((1280, 720, 81),),
    "T2V-A14B, I2V-A14B": ((832, 480, 81), (1280, 720, 81)),
    "TI2V-5B": ((1280, 704, 121),),
}


def memory_table() -> str:
    """The table of docs/wan.md: bfloat16 weights, GiB."""
    head = (
        "| model | video | transformer | activations | sparse adds | VAE | tiled | "
        "peak with offload | offload, tiled | all on the card, tiled | smallest card |"
    )
    rows = [head, "|" + " --- |" * head.count(" | ") + " --- |"]
    for name, sizes in SIZES.items():
        for size in sizes:
            memory = estimate(name, *size)
            peaks = [
                memory.peak(offload=True, tiled=False),
                memory.peak(offload=True, tiled=True),
                memory.peak(offload=False, tiled=True),
            ]
            parts = [
                memory.weights,
                memory.activations,
                memory.sparse,
                memory.vae,
                memory.vae_tiled,
            ]
            cells = [name, "{}x{}x{}".format(*size), *(f"{x / GIB:.1f}" for x in parts + peaks)]
            rows.append("| " + " | ".join([*cells, smallest_card(peaks[1])]) + " |")
    return "\n".join(rows)


def smallest_card(peak: int) -> str:
    """The smallest of ``CARDS`` (GB) that holds ``peak`` with a tenth to spare."""
    for card in CARDS:
        if peak <= 0.9 * card * 10**9:
            return f"{card} GB"
    return "none"
