"""The tasks of Wan and the defaults of the reference, as data.

Sources: Wan2.1 ``generate.py`` (``_validate_args``) and ``wan/configs``, Wan2.2 ``wan/configs``,
Wan2.1-NABLA ``generate.py`` at d5c50a8.
"""

from dataclasses import dataclass

# The reference's negative prompts; the weights were tuned with them.
NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，"
    "低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，"
    "毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
NEGATIVE_I2V = f"镜头晃动，{NEGATIVE}"
NEGATIVE_FLF2V = f"镜头切换，{NEGATIVE_I2V}"

SIZES_480P = ("480*832", "832*480")
SIZES = ("720*1280", "1280*720", *SIZES_480P)
SIZES_5B = ("704*1280", "1280*704")
DEFAULT_TASK = "t2v-14B"
DEFAULT_SIZE = "1280*720"


@dataclass(frozen=True)
class WanTask:
    """One task of the reference and what it does when nothing else is said.

    Attributes:
        sizes: width*height it was trained for; ours takes others too.
        steps: denoising steps.
        shift: of the noise schedule.
        shift_480p: the shift at 480p where it differs.
        guidance: scale of classifier-free guidance; of the high-noise expert in Wan 2.2.
        guidance_low_noise: of the low-noise expert, where there is one.
        frames: video frames, 4n+1.
        fps: of the saved video.
        negative_prompt: what guidance steers away from.
        flags: the input flags it needs.
        optional_flags: the input flags it takes.
    """

    sizes: tuple[str, ...] = SIZES
    steps: int = 50
    shift: float = 5.0
    shift_480p: float | None = None
    guidance: float = 5.0
    guidance_low_noise: float | None = None
    frames: int = 81
    fps: int = 16
    negative_prompt: str = NEGATIVE
    flags: tuple[str, ...] = ()
    optional_flags: tuple[str, ...] = ()

    def shift_for(self, size: tuple[int, int]) -> float:
        """The shift at ``size`` (width, height)."""
        is_480p = "{}*{}".format(*size) in SIZES_480P
        return self.shift_480p if is_480p and self.shift_480p is not None else self.shift


VACE_FLAGS = ("src_video", "src_mask", "src_ref_images")
TASKS = {
    "t2v-1.3B": WanTask(sizes=SIZES_480P),
    "t2v-14B": WanTask(),
    "t2i-14B": WanTask(sizes=(*SIZES, "1024*1024"), frames=1),
    "i2v-14B": WanTask(steps=40, shift_480p=3.0, negative_prompt=NEGATIVE_I2V, flags=("image",)),
    "flf2v-14B": WanTask(
        shift=16.0, negative_prompt=NEGATIVE_FLF2V, flags=("first_frame", "last_frame")
    ),
    "vace-1.3B": WanTask(sizes=SIZES_480P, shift=16.0, optional_flags=VACE_FLAGS),
    "vace-14B": WanTask(shift=16.0, optional_flags=VACE_FLAGS),
    "t2v-A14B": WanTask(steps=40, shift=12.0, guidance=4.0, guidance_low_noise=3.0),
    "i2v-A14B": WanTask(steps=40, guidance=3.5, guidance_low_noise=3.5, flags=("image",)),
    "ti2v-5B": WanTask(sizes=SIZES_5B, frames=121, fps=24, optional_flags=("image",)),
}
INPUT_FLAGS = ("image", "first_frame", "last_frame", *VACE_FLAGS)


def parse_size(text: str) -> tuple[int, int]:
    """``"1280*720"`` (or with an x) as (width, height) in pixels.

    Raises:
        ValueError: not two positive numbers.
    """
    parts = text.lower().replace("x", "*").split("*")
    if len(parts) != 2 or not all(
        part.isascii() and part.isdigit() and int(part) for part in parts
    ):
        raise ValueError(f"size must be WIDTH*HEIGHT such as {DEFAULT_SIZE}, got {text!r}.")
    return int(parts[0]), int(parts[1])


def find_task(name: str) -> WanTask:
    """The task called ``name``.

    Raises:
        ValueError: there is none.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}. Known: {', '.join(TASKS)}.")
    return TASKS[name]


def task_table() -> str:
    """The table of docs/wan.md."""
    rows = [
        "| task | input flags | steps | shift | guidance | frames | fps | trained sizes |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, task in TASKS.items():
        flags = [f"`--{flag}`" for flag in task.flags]
        flags += [f"(`--{flag}`)" for flag in task.optional_flags]
        shift = f"{task.shift:g}"
        if task.shift_480p is not None:
            shift += f", {task.shift_480p:g} at 480p"
        guidance = f"{task.guidance:g}"
        if task.guidance_low_noise is not None:
            guidance += f", low noise {task.guidance_low_noise:g}"
        cells = (
            name,
            " ".join(flags),
            task.steps,
            shift,
            guidance,
            task.frames,
            task.fps,
            " ".join(size.replace("*", "x") for size in task.sizes),
        )
        rows.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(rows)
