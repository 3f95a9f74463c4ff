"""GPU memory of the released Wan models, by a formula held against measured peaks of small ones.

Bytes of tensors alive at once, without the workspace of kernels and the allocator's slack; leave a
tenth of the card free. All for batch 1 without gradients; N = video tokens, d = width of the
transformer, f = width of its feed-forward layer, b = bytes of a number.

- weights: exactly the parameters of the released shapes;
- activations of the transformer: `N d (max(12.4 + 4.45 b, 4 b + 2 b f/d) + 8 / heads)`: float32
  norms, q, k, v and tokens in the attention half; two copies of the inner layer in the feed-forward
  half; the rotary tables last. VACE keeps `N d b` more for each layer of its branch;
- sparse attention adds `4 N d b` (q, k, v and output in block order) and its map:
  `9 heads (N/64)^2` bytes (a mask and two index tables) and half a GiB of scratch;
- VAE in float32: `51 B W H 4` and the video, B = 96 its base width; Wan 2.2:
  `85.3 B (W/2) (H/2) 4` and the video, B = 256; tiled: 4.7 videos and one tile of 256 x 256.
"""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from nabla_attn.cost.memory import activation_bytes, sparse_bytes
from nabla_attn.wan.tasks import TASKS, find_task, width_and_height

BLOCK_TOKENS = 64
MAP_SCRATCH = 2**29
GIB = 2**30
FLOAT32 = 4
CARDS = (16, 24, 48, 80, 141)
TILE = 256


@dataclass(frozen=True)
class WanModel:
    """Shapes of a released model (Wan2.1 and Wan2.2 `wan/configs`).

    Attributes:
        width: D, width of the transformer.
        ffn: F, width of its feed-forward layer.
        heads: Number of attention heads.
        layers: Number of transformer blocks.
        channels: Input channels of the transformer.
        has_image: Whether there is cross-attention to image tokens, and the image tower.
        vace_layers: Number of blocks of the VACE branch.
        experts: Number of transformers; with offload one at a time is on the card.
        is_2_2_vae: Whether the VAE is that of TI2V-5B.
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
    "t2v-1.3B": SMALL,
    "t2v-14B": WanModel(),
    "t2i-14B": WanModel(),
    "i2v-14B": WanModel(channels=36, has_image=True),
    "flf2v-14B": WanModel(channels=36, has_image=True),
    "vace-1.3B": replace(SMALL, vace_layers=15),
    "vace-14B": WanModel(vace_layers=8),
    "t2v-A14B": WanModel(experts=2),
    "i2v-A14B": WanModel(channels=36, experts=2),
    "vace-A14B": WanModel(vace_layers=8, experts=2),
    "ti2v-5B": WanModel(width=3072, ffn=14336, heads=24, layers=30, channels=48, is_2_2_vae=True),
}
# Parameters of umT5-xxl's encoder, the ViT-H/14 tower, and both VAEs.
TEXT_ENCODER, IMAGE_ENCODER, VAE, VAE_2_2 = 5_680_910_336, 630_766_080, 126_892_531, 704_688_668


@dataclass(frozen=True)
class WanMemory:
    """Bytes at one video size.

    Attributes:
        weights: Weights of one transformer.
        text_encoder: Weights of the text encoder.
        image_encoder: Weights of the image encoder, 0 without one.
        activations: Activations of the transformer, dense.
        sparse: Addition of sparse attention.
        vae: Decoding, weights included.
        vae_tiled: Decoding in tiles, weights included.
        experts: Number of transformers.
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
            offload: Whether only the part at work is there (`--offload_model True`).
            tiled: Whether the VAE decodes in tiles.
            is_sparse: Whether attention is sparse.
        """
        transformer = self.activations + (self.sparse if is_sparse else 0)
        vae = self.vae_tiled if tiled else self.vae
        if offload:
            return max(self.text_encoder, self.image_encoder, self.weights + transformer, vae)
        resident = self.text_encoder + self.image_encoder + self.experts * self.weights
        return resident + max(transformer, vae)


def vae_bytes(
    base: int, height: int, width: int, frames: int, *, is_2_2: bool = False, tiled: bool = False
) -> float:
    """Peak of decoding one video in float32 beside the weights."""
    video = 3 * frames * height * width * FLOAT32
    height, width = (min(height, TILE), min(width, TILE)) if tiled else (height, width)
    inner = 85.3 * base * height * width / 4 if is_2_2 else 51 * base * height * width
    return inner * FLOAT32 + (4.7 if tiled else 1) * video


def estimate(task: str, width: int, height: int, frames: int, item: int = 2) -> WanMemory:
    """Memory of the released model of a task at one video size.

    Args:
        task: A key of `tasks.TASKS`.
        width: Pixels.
        height: Pixels.
        frames: Number of video frames, 4n+1.
        item: Bytes of a number of the weights.

    Raises:
        ValueError: The task is unknown, or its model cannot take the size.
    """
    find_task(task)
    model = MODELS[task]
    if frames < 1 or frames % 4 != 1:
        raise ValueError(f"frames must be 4n+1, got {frames}.")
    for name, pixels in (("width", width), ("height", height)):
        if pixels < 1 or pixels % model.pixels_per_token:
            raise ValueError(
                f"{name} must be a multiple of {model.pixels_per_token} for {task}, got {pixels}."
            )
    side = model.pixels_per_token
    tokens = ((frames - 1) // 4 + 1) * (height // side) * (width // side)
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
        sparse=sparse_bytes(tokens, model.width, model.heads, BLOCK_TOKENS, item) + MAP_SCRATCH,
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


def measure_up(task: str, size: str, frames: int | None = None) -> dict[str, Any]:
    """What a video needs on a card, in numbers.

    Args:
        task: A key of `tasks.TASKS`.
        size: WIDTH*HEIGHT.
        frames: Number of video frames; None is the task's default.

    Returns:
        "task", "width", "height", "frames", "bytes" by label, and "smallest_card_gb", None where
        no card of `CARDS` is enough.

    Raises:
        ValueError: As `estimate`.
    """
    width, height = width_and_height(size)
    frames = find_task(task).frames if frames is None else frames
    memory = estimate(task, width, height, frames)
    low = memory.peak(offload=True, tiled=True)
    amounts = {
        "transformer": memory.weights,
        "text_encoder": memory.text_encoder,
        "image_encoder": memory.image_encoder,
        "activations": memory.activations,
        "sparse": memory.sparse,
        "decoding": memory.vae,
        "decoding_tiled": memory.vae_tiled,
        "peak": memory.peak(offload=False, tiled=False),
        "peak_tiled": memory.peak(offload=False, tiled=True),
        "peak_offload": memory.peak(offload=True, tiled=False),
        "peak_offload_tiled": low,
    }
    found: dict[str, Any] = {"task": task, "width": width, "height": height, "frames": frames}
    return found | {"bytes": amounts, "smallest_card_gb": smallest_card(low)}


LABELS = {
    "transformer": "transformer",
    "text_encoder": "text encoder",
    "image_encoder": "image encoder",
    "activations": "activations",
    "sparse": "sparse attention adds",
    "decoding": "decoding",
    "decoding_tiled": "decoding in tiles",
    "peak": "peak, all on the card",
    "peak_tiled": "peak with --vae_tiling",
    "peak_offload": "peak with --offload_model True",
    "peak_offload_tiled": "peak with both",
}


def describe_memory(needs: dict[str, Any]) -> list[tuple[str, str]]:
    """What `measure_up` found, as labels with GiB."""
    amounts = {LABELS[name]: amount for name, amount in needs["bytes"].items() if amount}
    video = "{task} {width}x{height}, {frames} frames, weights in bfloat16".format(**needs)
    return [
        ("video", video),
        *((label, f"{amount / GIB:.1f} GiB") for label, amount in amounts.items()),
        ("smallest card", describe_card(needs["smallest_card_gb"])),
    ]


def memory_table() -> str:
    """The table of docs/wan.md: bfloat16 weights, GiB."""
    head = (
        "| task | video | transformer | activations | sparse adds | VAE | tiled | "
        "peak with offload | offload, tiled | all on the card, tiled | smallest card |"
    )
    rows = [head, "|" + " --- |" * head.count(" | ") + " --- |"]
    for name, task in TASKS.items():
        for width, height in map(width_and_height, task.sizes):
            if width <= height:
                continue
            memory = estimate(name, width, height, task.frames)
            peaks = [
                memory.peak(offload=True, tiled=False),
                memory.peak(offload=True, tiled=True),
                memory.peak(offload=False, tiled=True),
            ]
            parts = [memory.weights, memory.activations, memory.sparse]
            parts += [memory.vae, memory.vae_tiled, *peaks]
            cells = [name, f"{width}x{height}x{task.frames}", *(f"{x / GIB:.1f}" for x in parts)]
            rows.append("| " + " | ".join([*cells, describe_card(smallest_card(peaks[1]))]) + " |")
    return "\n".join(rows)


def smallest_card(peak: int) -> int | None:
    """The smallest of `CARDS` (GB) that holds `peak` with a tenth to spare; None without one."""
    return next((card for card in CARDS if peak <= 0.9 * card * 10**9), None)


def describe_card(card: int | None) -> str:
    """A card such as `24 GB`."""
    return "none" if card is None else f"{card} GB"
