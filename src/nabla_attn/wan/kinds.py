"""What a set of tensor names is: which part of Wan, and which family of transformer."""

from collections.abc import Iterable

from nabla_attn.wan.rules import strip_prefix

# Names that only this part has, in the original layout.
SIGNATURES = {
    "transformer": ("blocks.0.self_attn.q.weight", "patch_embedding.weight"),
    "text encoder": ("token_embedding.weight", "blocks.0.attn.q.weight"),
    "VAE": ("conv1.weight", "decoder.upsamples.0.residual.0.gamma"),
    "Wan 2.2 VAE": ("conv1.weight", "decoder.upsamples.0.upsamples.0.residual.0.gamma"),
    "image encoder": ("visual.cls_embedding", "visual.patch_embedding.weight"),
    "LoRA": ("blocks.0.self_attn.q.lora_A.weight",),
}
DIFFUSERS_SIGNATURES = {
    "transformer (diffusers names)": ("blocks.0.attn1.to_q.weight",),
    "text encoder (transformers names)": ("encoder.block.0.layer.0.SelfAttention.q.weight",),
    "VAE (diffusers names)": ("quant_conv.weight",),
}
# The families of tasks that a transformer serves; the number in a task's name is only its size.
FAMILIES = {
    "t2v": ("t2v-1.3B", "t2v-14B", "t2i-14B"),
    "i2v": ("i2v-14B",),
    "flf2v": ("flf2v-14B",),
    "vace": ("vace-1.3B", "vace-14B"),
    "t2v-2.2": ("t2v-A14B",),
    "i2v-2.2": ("i2v-A14B",),
    "ti2v-2.2": ("ti2v-5B",),
}
LATENT_CHANNELS = 16
LATENT_CHANNELS_2_2 = 48


def describe(names: Iterable[str]) -> str:
    """Name the part that tensor ``names`` belong to, or ``"unknown tensors"``."""
    names = {strip_prefix(name) for name in names}
    for kind, signature in (SIGNATURES | DIFFUSERS_SIGNATURES).items():
        if names.issuperset(signature):
            return kind
    return "unknown tensors"


def transformer_family(names: Iterable[str], in_channels: int, num_experts: int = 1) -> str:
    """Tell the family of tasks from the keys of an original transformer.

    Args:
        names: tensor names in the original layout.
        in_channels: second axis of ``patch_embedding.weight``.
        num_experts: transformers in the checkpoint; Wan 2.2 A14B has two.

    Returns:
        A key of ``FAMILIES``.
    """
    names = {strip_prefix(name) for name in names}
    if any(name.startswith("vace_blocks.") for name in names):
        return "vace"
    if "img_emb.emb_pos" in names:
        return "flf2v"
    if any(name.startswith("img_emb.") for name in names):
        return "i2v"
    if in_channels == LATENT_CHANNELS_2_2:
        return "ti2v-2.2"
    if in_channels > LATENT_CHANNELS:
        return "i2v-2.2"
    return "t2v-2.2" if num_experts == 2 else "t2v"


def check_task(task: str, family: str, where: object) -> None:
    """Raise unless a checkpoint of ``family`` serves ``task``.

    Raises:
        ValueError: the task is unknown, or belongs to another family.
    """
    known = [name for tasks in FAMILIES.values() for name in tasks]
    if task not in known:
        raise ValueError(f"unknown task {task!r}. Known: {', '.join(known)}.")
    if task not in FAMILIES[family]:
        raise ValueError(
            f"{where} is a checkpoint for {' or '.join(FAMILIES[family])} (told by its keys), "
            f"not for {task}. Pass that task, or the directory of a {task} checkpoint."
        )
