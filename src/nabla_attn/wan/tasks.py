"""The tasks of Wan with the defaults of the reference, and the families of models that serve them.

Sources: Wan2.1 `generate.py` (`_validate_args`) and `wan/configs`, Wan2.2 `wan/configs`,
Wan2.1-NABLA `generate.py` at d5c50a8; for `vace-A14B` VideoX-Fun `examples/wan2.2_vace_fun`.
"""

import re
from dataclasses import dataclass
from typing import Any

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
SOLVERS = ("unipc", "dpm++")
VACE_FLAGS = ("src_video", "src_mask", "src_ref_images")
INPUT_FLAGS = ("image", "first_frame", "last_frame", *VACE_FLAGS)


@dataclass(frozen=True)
class WanTask:
    """One task of the reference and its defaults.

    Attributes:
        sizes: Sizes that the model was trained for, WIDTH*HEIGHT; others run too.
        steps: Number of denoising steps.
        shift: Shift of the noise schedule.
        shift_480p: The shift at 480p where it differs.
        guidance: Scale of classifier-free guidance; of the high-noise expert in Wan 2.2.
        guidance_low_noise: The scale of the low-noise expert, where there is one.
        frames: Number of video frames, 4n+1.
        fps: Frames per second of the saved video.
        negative_prompt: The text that guidance steers away from.
        flags: Input flags that the task needs.
        optional_flags: Input flags that it takes besides.
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

    @property
    def usual_size(self) -> str:
        """The size to make where nothing is asked for: the largest in landscape."""
        return DEFAULT_SIZE if DEFAULT_SIZE in self.sizes else self.sizes[-1]

    @property
    def makes_image(self) -> bool:
        """Whether the task makes one image instead of a video."""
        return self.frames == 1

    def shift_for(self, size: tuple[int, int]) -> float:
        """The shift at `size` (width, height)."""
        is_480p = "{}*{}".format(*size) in SIZES_480P
        return self.shift_480p if is_480p and self.shift_480p is not None else self.shift


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
    "vace-A14B": WanTask(
        shift=12.0, guidance=5.0, guidance_low_noise=5.0, optional_flags=VACE_FLAGS
    ),
    "ti2v-5B": WanTask(sizes=SIZES_5B, frames=121, fps=24, optional_flags=("image",)),
}


@dataclass(frozen=True)
class WanFamily:
    """Transformers with the same inputs, told by their tensors, and what belongs to them.

    The number in a task's name is only the size of the model.

    Attributes:
        tasks: Tasks that the family serves.
        pipeline: Name of the pipeline's class in diffusers.
        channels: Input channels of the transformer; for images noise, mask and first frames.
        has_image_tokens: Whether the image tower's tokens enter the transformer.
        boundary: Share of the noise levels that the high-noise expert takes, where there are two
            experts (Wan2.2 `wan/configs`).
        is_2_2_vae: Whether latents are those of the Wan 2.2 VAE, with 48 channels.
    """

    tasks: tuple[str, ...]
    pipeline: str = "WanPipeline"
    channels: int = 16
    has_image_tokens: bool = False
    boundary: float | None = None
    is_2_2_vae: bool = False

    @property
    def num_experts(self) -> int:
        """Number of transformers, which share the noise levels."""
        return 1 if self.boundary is None else 2

    def pipeline_class(self) -> Any:
        """The pipeline's class."""
        import diffusers

        return getattr(diffusers, self.pipeline)

    def pipeline_options(self) -> dict[str, Any]:
        """Arguments of the pipeline's class beside its parts."""
        options: dict[str, Any] = {} if self.boundary is None else {"boundary_ratio": self.boundary}
        return options | ({"expand_timesteps": True} if self.is_2_2_vae else {})

    def task_for(self, width: int) -> str:
        """The task of a model by the width of its transformer."""
        is_small = width == WIDTH_1_3B
        fitting = [name for name in self.tasks if name.endswith("-1.3B") == is_small]
        return (fitting or self.tasks)[0]


I2V, VACE = "WanImageToVideoPipeline", "WanVACEPipeline"
WIDTH_1_3B = 1536
WAN_FAMILIES = {
    "t2v": WanFamily(("t2v-1.3B", "t2v-14B", "t2i-14B")),
    "i2v": WanFamily(("i2v-14B",), I2V, channels=36, has_image_tokens=True),
    "flf2v": WanFamily(("flf2v-14B",), I2V, channels=36, has_image_tokens=True),
    "vace": WanFamily(("vace-1.3B", "vace-14B"), VACE),
    "t2v-2.2": WanFamily(("t2v-A14B",), boundary=0.875),
    "i2v-2.2": WanFamily(("i2v-A14B",), I2V, channels=36, boundary=0.9),
    "vace-2.2": WanFamily(("vace-A14B",), VACE, boundary=0.875),
    "ti2v-2.2": WanFamily(("ti2v-5B",), channels=48, is_2_2_vae=True),
}


def find_task(name: str) -> WanTask:
    """The task called `name`.

    Raises:
        ValueError: There is none.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}. Known: {', '.join(TASKS)}.")
    return TASKS[name]


def family_of_task(task: str) -> WanFamily:
    """The family of models that serves a task.

    Raises:
        ValueError: There is no such task.
    """
    find_task(task)
    return next(family for family in WAN_FAMILIES.values() if task in family.tasks)


def check_task(task: str, family: str, where: object) -> None:
    """Check that a checkpoint of `family` serves `task`.

    Raises:
        ValueError: The task is unknown, or belongs to another family.
    """
    find_task(task)
    if task not in (served := WAN_FAMILIES[family].tasks):
        raise ValueError(
            f"{where} is a checkpoint for {' or '.join(served)} (told by its keys), not for "
            f"{task}. Pass that task, or the directory of a {task} checkpoint."
        )


def width_and_height(text: str) -> tuple[int, int]:
    """Read `"1280*720"` or `"1280x720"` as width and height in pixels.

    Raises:
        ValueError: It is not two positive numbers of at most five digits.
    """
    match = re.fullmatch(r"([0-9]{1,5})[*xX]([0-9]{1,5})", text)
    if match is None or not all(map(int, match.groups())):
        raise ValueError(f"size must be WIDTH*HEIGHT such as {DEFAULT_SIZE}, got {text!r}.")
    return int(match[1]), int(match[2])


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
