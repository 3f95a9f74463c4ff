"""The reference's own command line, flag by flag: ``python generate.py --task t2v-14B ...``."""

import re
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from nabla_attn.cli import wan_options as opt
from nabla_attn.cli.options import quiet_libraries

if TYPE_CHECKING:
    from nabla_attn.wan.command import WanPlacement
    from nabla_attn.wan.request import WanRequest


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
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
) -> None:
    """Generate from a Wan checkpoint with the flags and defaults of the reference's generate.py."""
    from nabla_attn.wan.command import WanPlacement
    from nabla_attn.wan.request import WanRequest

    files = {
        "image": image,
        "first_frame": first_frame,
        "last_frame": last_frame,
        "src_video": src_video,
        "src_mask": src_mask,
        "src_ref_images": src_ref_images,
    }
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
        inputs={name: value for name, value in files.items() if value},
    ).resolved()
    placement = WanPlacement(
        device=device,
        dtype=dtype,
        offload_model=opt.parse_bool(offload_model),
        t5_cpu=t5_cpu,
        t5_fsdp=t5_fsdp,
        dit_fsdp=dit_fsdp,
        ulysses_size=ulysses_size,
        ring_size=ring_size,
        vae_tiling=vae_tiling,
    )
    if sparse_attention:
        opt.warn_sparse_attention()
    output = save_file or _default_name(request, placement)
    if use_prompt_extend:
        request = opt.extend(
            request, prompt_extend_method, prompt_extend_model, prompt_extend_target_lang, device
        )
    _run(request, placement, output)


def _run(request: "WanRequest", placement: "WanPlacement", output: Path) -> None:
    from nabla_attn.cli.progress import generation_bars
    from nabla_attn.distributed import process_index
    from nabla_attn.files import check_writable
    from nabla_attn.wan.command import chosen_sparsity, generate_wan
    from nabla_attn.wan.tasks import find_task

    _check_suffix(request, output)
    check_writable(output)
    _check_space(request, output)
    algo, source = chosen_sparsity(request)
    if process_index() == 0:
        typer.echo(f"{request.task}: attention {algo} ({source}); seed {request.seed}", err=True)
    quiet_libraries()
    with opt.loading_bar() as load, generation_bars() as start:
        frames, record = generate_wan(request, placement, progress=start(algo), load_progress=load)
    if process_index() != 0:
        return
    if request.task.startswith("t2i"):
        _write_image(frames[0], output)
    else:
        from nabla_attn.generation.video import write_video

        write_video(frames, output, find_task(request.task).fps)
    record.save(output.with_suffix(".json"))
    count, height, width, _ = frames.shape
    seconds = record.numbers["seconds"]["total"]
    kept = record.numbers["attention"]["density"]
    typer.echo(
        f"{output}: {width}x{height}, {count} frames, {algo}, {kept:.1%} of token pairs kept, "
        f"{seconds:.1f} s. Record: {output.with_suffix('.json')}"
    )


def _check_suffix(request: "WanRequest", output: Path) -> None:
    wanted = ".png" if request.task.startswith("t2i") else ".mp4"
    if output.suffix.lower() != wanted:
        raise ValueError(f"{request.task} writes a {wanted} file, got {output}.")


def _check_space(request: "WanRequest", output: Path) -> None:
    import shutil

    from nabla_attn.wan.tasks import parse_size

    width, height = parse_size(request.size)
    # Half a byte a pixel is far above what the encoder writes.
    needed = width * height * (request.frames or 1) // 2
    free = shutil.disk_usage(output.parent).free
    if free < needed:
        raise ValueError(
            f"no space for {output}: it may take {needed / 2**20:.0f} MiB, the disk has "
            f"{free / 2**20:.0f} MiB free."
        )


def _default_name(request: "WanRequest", placement: "WanPlacement") -> Path:
    """The reference's file name, with x for the * that shells and Windows dislike."""
    words = re.sub(r"[^\w.-]+", "_", request.prompt)[:50].strip("._") or "video"
    size = request.size.replace("*", "x")
    stamp = datetime.now().strftime("%Y%m%d_%H%M%S")
    suffix = ".png" if request.task.startswith("t2i") else ".mp4"
    shares = f"{placement.ulysses_size}_{placement.ring_size}"
    return Path(f"{request.task}_{size}_{shares}_{words}_{stamp}{suffix}")


def _write_image(frame: Any, output: Path) -> None:
    from PIL import Image

    from nabla_attn.files import whole_file

    with whole_file(output) as temporary:
        Image.fromarray(frame).save(temporary, format="PNG")
