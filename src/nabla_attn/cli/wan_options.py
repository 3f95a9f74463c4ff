"""The flags of `nabla wan`: first those of the reference's generate.py, then ours."""

from pathlib import Path
from typing import Annotated, Any

import typer

THEIRS, OURS = "The reference's flags", "Flags of nabla-attn"
BY_TASK = "by task"


def _flag(name: str, text: str, panel: str = THEIRS, **options: Any) -> Any:
    return typer.Option(f"--{name}", help=text, rich_help_panel=panel, **options)


CkptDir = Annotated[Path, _flag("ckpt_dir", "Directory of the checkpoint.")]
Prompt = Annotated[str | None, _flag("prompt", "What the video shows.")]
Task = Annotated[
    str, _flag("task", "t2v-14B, t2v-1.3B, t2i-14B, i2v-14B, flf2v-14B, vace-14B, ...")
]
Size = Annotated[str, _flag("size", "WIDTH*HEIGHT; with an image, its area.")]
FrameNum = Annotated[int | None, _flag("frame_num", "Frames, 4n+1.", show_default=BY_TASK)]
OffloadModel = Annotated[
    str | None,
    _flag("offload_model", "True keeps only the part at work on the GPU.", show_default="one GPU"),
]
UlyssesSize = Annotated[int, _flag("ulysses_size", "Processes to a sequence, head-wise.")]
RingSize = Annotated[int, _flag("ring_size", "Processes to a sequence, ring-wise; dense only.")]
T5Fsdp = Annotated[bool, _flag("t5_fsdp", "Share the text encoder between processes.")]
T5Cpu = Annotated[bool, _flag("t5_cpu", "Run the text encoder on the CPU.")]
DitFsdp = Annotated[bool, _flag("dit_fsdp", "Share the transformer between processes.")]
SaveFile = Annotated[
    Path | None, _flag("save_file", "The mp4, or png for t2i.", show_default="from the prompt")
]
SrcVideo = Annotated[str | None, _flag("src_video", "[vace] Source video.")]
SrcMask = Annotated[str | None, _flag("src_mask", "[vace] Mask video; white is made anew.")]
SrcRefImages = Annotated[
    str | None, _flag("src_ref_images", "[vace] Reference images, separated by commas.")
]
UsePromptExtend = Annotated[bool, _flag("use_prompt_extend", "Rewrite the prompt at more length.")]
PromptExtendMethod = Annotated[
    str, _flag("prompt_extend_method", "local_qwen; the remote dashscope is refused.")
]
PromptExtendModel = Annotated[
    str | None, _flag("prompt_extend_model", "Directory of a local instruct model.")
]
PromptExtendTargetLang = Annotated[str, _flag("prompt_extend_target_lang", "zh or en.")]
BaseSeed = Annotated[int, _flag("base_seed", "Seed of the noise; below 0 draws one.")]
Image = Annotated[str | None, _flag("image", "[i2v, ti2v] The first frame.")]
FirstFrame = Annotated[str | None, _flag("first_frame", "[flf2v] The first frame.")]
LastFrame = Annotated[str | None, _flag("last_frame", "[flf2v] The last frame.")]
SampleSolver = Annotated[str, _flag("sample_solver", "unipc or dpm++.")]
SampleSteps = Annotated[int | None, _flag("sample_steps", "Denoising steps.", show_default=BY_TASK)]
SampleShift = Annotated[
    float | None, _flag("sample_shift", "Shift of the noise schedule.", show_default=BY_TASK)
]
SampleGuideScale = Annotated[
    float | None, _flag("sample_guide_scale", "Scale of guidance; 1 is none.", show_default=BY_TASK)
]
SparseAttention = Annotated[
    bool, _flag("sparse_attention", "Accepted, without effect as in the reference.")
]
SparseAlgo = Annotated[
    str | None,
    _flag(
        "sparse_algo",
        "nabla-0.7, sta-11-3-3, nabla-0.6_sta-11-3-3, topk-0.2 or dense.",
        show_default="the checkpoint's own, else dense",
    ),
]
NegativePrompt = Annotated[
    str | None,
    _flag("negative_prompt", "The text to steer away from.", OURS, show_default=BY_TASK),
]
CropToBlocks = Annotated[
    bool, _flag("crop_to_blocks", "Cut the size to multiples of 128 as the reference does.", OURS)
]
VaeTiling = Annotated[bool, _flag("vae_tiling", "Decode in tiles, with less memory.", OURS)]
Overwrite = Annotated[
    bool, _flag("overwrite", "Replace the file of --save_file, not take the next name.", OURS)
]
Device = Annotated[str, _flag("device", "auto, cpu, cuda, cuda:1.", OURS)]
Dtype = Annotated[str, _flag("dtype", "auto, float32, bfloat16, float16.", OURS)]
