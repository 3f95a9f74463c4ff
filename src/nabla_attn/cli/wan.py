"""The reference's own command line, flag by flag: `python generate.py --task t2v-14B ...`."""

import warnings

from nabla_attn.cli import output as out
from nabla_attn.cli import wan_options as opt

BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def wan(
    ckpt_dir: opt.CkptDir,
    prompt: opt.Prompt = None,
    task: opt.Task = "t2v-14B",
    size: opt.Size = "1280*720",
    frame_num: opt.FrameNum = None,
    offload_model: opt.OffloadModel = None,
    ulysses_size: opt.UlyssesSize = 1,
    ring_size: opt.RingSize = 1,
    t5_fsdp: opt.T5Fsdp = False,
    t5_cpu: opt.T5Cpu = False,
    dit_fsdp: opt.DitFsdp = False,
    save_file: opt.SaveFile = None,
    src_video: opt.SrcVideo = None,
    src_mask: opt.SrcMask = None,
    src_ref_images: opt.SrcRefImages = None,
    use_prompt_extend: opt.UsePromptExtend = False,
    prompt_extend_method: opt.PromptExtendMethod = "local_qwen",
    prompt_extend_model: opt.PromptExtendModel = None,
    prompt_extend_target_lang: opt.PromptExtendTargetLang = "zh",
    base_seed: opt.BaseSeed = -1,
    image: opt.Image = None,
    first_frame: opt.FirstFrame = None,
    last_frame: opt.LastFrame = None,
    sample_solver: opt.SampleSolver = "unipc",
    sample_steps: opt.SampleSteps = None,
    sample_shift: opt.SampleShift = None,
    sample_guide_scale: opt.SampleGuideScale = None,
    sparse_attention: opt.SparseAttention = False,
    sparse_algo: opt.SparseAlgo = None,
    negative_prompt: opt.NegativePrompt = None,
    crop_to_blocks: opt.CropToBlocks = False,
    vae_tiling: opt.VaeTiling = False,
    overwrite: opt.Overwrite = False,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
) -> None:
    """Generate from a Wan checkpoint with the flags and defaults of the reference's generate.py."""
    from nabla_attn.cli.loading import quiet_libraries
    from nabla_attn.cli.progress import generation_bars, loading_bars
    from nabla_attn.distributed import is_first_process
    from nabla_attn.wan.command import WanJob
    from nabla_attn.wan.placement import WanPlacement
    from nabla_attn.wan.prompt_extension import PromptExtension
    from nabla_attn.wan.request import WanRequest

    inputs = {"image": image, "first_frame": first_frame, "last_frame": last_frame}
    inputs |= {"src_video": src_video, "src_mask": src_mask, "src_ref_images": src_ref_images}
    request = WanRequest(
        ckpt_dir=ckpt_dir,
        prompt=prompt or "",
        task=task,
        size=size,
        frames=frame_num,
        steps=sample_steps,
        shift=sample_shift,
        guidance=sample_guide_scale,
        solver=sample_solver,
        seed=base_seed,
        negative_prompt=negative_prompt,
        sparse_algo=sparse_algo,
        crop_to_blocks=crop_to_blocks,
        inputs={name: value for name, value in inputs.items() if value},
    )
    placement = WanPlacement(
        device=device,
        dtype=dtype,
        offload_model=_parse_bool(offload_model),
        t5_cpu=t5_cpu,
        t5_fsdp=t5_fsdp,
        dit_fsdp=dit_fsdp,
        ulysses_size=ulysses_size,
        ring_size=ring_size,
        vae_tiling=vae_tiling,
    )
    if sparse_attention:
        warnings.warn(
            "--sparse_attention has no effect, as in the reference; the algorithm is --sparse_algo "
            "or the checkpoint's own.",
            stacklevel=1,
        )
    extension = PromptExtension(
        prompt_extend_method, prompt_extend_model, prompt_extend_target_lang, use_prompt_extend
    )
    quiet_libraries()
    output = save_file and out.free_path(save_file, overwrite=overwrite)
    job = WanJob.prepare(request, placement, output, extension)
    if is_first_process():
        out.notice("note", job.heading)
    with loading_bars() as on_load, generation_bars() as start:
        summary = job.run(on_progress=start(job.algo), on_load=on_load)
    if summary:
        out.say(summary)


def _parse_bool(text: str | None) -> bool | None:
    """Read `True`, `yes`, `1` and their opposites, as the reference does."""
    if text is not None and text.lower() not in BOOLEANS:
        raise ValueError(f"offload_model must be True or False, got {text!r}.")
    return None if text is None else BOOLEANS[text.lower()]
