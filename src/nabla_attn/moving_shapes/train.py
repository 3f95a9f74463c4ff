"""The stages of the built-in model, each skipped when its result is already in the run folder."""

import json
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

from nabla_attn import apply
from nabla_attn.files import write_text
from nabla_attn.moving_shapes.loop import RecipeStep, Stage, run_stage
from nabla_attn.moving_shapes.places import place_probe
from nabla_attn.moving_shapes.recipe import BuiltinConfig, TransformerPhase
from nabla_attn.moving_shapes.scene import EXAMPLES, render, sample_scene
from nabla_attn.moving_shapes.transformer import (
    CaptionEncoder,
    PadWeight,
    build_text_encoder,
    build_tokenizer,
    build_transformer,
    flow_loss,
    is_hidden_matrix,
    is_image_step,
)
from nabla_attn.moving_shapes.vae import (
    LatentSet,
    build_vae,
    encode_mean,
    encode_scenes,
    is_hidden_convolution,
    to_model_range,
    vae_loss,
)
from nabla_attn.record import RunRecord, collect_versions, describe_device
from nabla_attn.training.checkpoint import whole_folder
from nabla_attn.training.metrics import StepMetrics
from nabla_attn.training.trainer import OnLog


def save_model(model: Any, folder: Path, *, texts: dict[str, str] | None = None) -> None:
    """`model.save_pretrained(folder)` that leaves either nothing or the whole folder.

    Args:
        model: A model or pipeline of diffusers.
        folder: The folder to write.
        texts: Further files of the folder, by name.
    """
    with whole_folder(folder) as temporary:
        model.save_pretrained(temporary)
        for name, text in (texts or {}).items():
            write_text(temporary / name, text)


@torch.no_grad()
def _measure_latents(vae: Any, size: int, frames: int) -> None:
    """Write the mean and deviation of every latent channel to the VAE's config."""
    scenes = [sample_scene(index) for index in range(48)]
    videos = torch.stack([to_model_range(render(s, frames, size, size)) for s in scenes])
    device = next(vae.parameters()).device
    latents = encode_mean(vae, videos.to(device)).transpose(0, 1).flatten(1)
    vae.register_to_config(
        latents_mean=[round(x, 4) for x in latents.mean(1).tolist()],
        latents_std=[round(x, 4) for x in latents.std(1).tolist()],
    )


def train_vae(
    config: BuiltinConfig, folder: Path, on_log: OnLog, device: torch.device
) -> dict[str, Any]:
    """Train the VAE to `folder`/vae and return the stage's record."""
    vae = build_vae(config.seed).to(device)
    record = run_stage(
        Stage(
            name="vae",
            folder=folder,
            module=vae,
            loss_at=lambda step: vae_loss(vae, config.vae, step),
            is_hidden=is_hidden_convolution,
            optim=config.vae.optim,
            steps=config.vae.steps,
            seed=config.seed,
            on_log=on_log,
        )
    )
    _measure_latents(vae, size=64, frames=max(phase.frames for phase in config.vae.phases))
    save_model(vae, folder / "vae")
    return record


def _sparse_step(model: WanTransformer3DModel, phase: TransformerPhase, step: RecipeStep) -> Any:
    """Attention of one step: the phase's, NABLA with a random threshold, or dense.

    Images are always dense.
    """
    is_dense = phase.algorithm is None and phase.thresholds is None
    if is_dense or is_image_step(phase, step.number) or step.rng.random() < phase.dense_share:
        return nullcontext()
    if phase.thresholds is None:
        return apply(model, phase.algorithm)
    return apply(model, f"nabla-{round(step.rng.uniform(*phase.thresholds), 3)}")


def train_phase(
    config: BuiltinConfig,
    phase: TransformerPhase,
    start: Path | None,
    folder: Path,
    on_log: OnLog,
    device: torch.device,
) -> dict[str, Any]:
    """Train one phase of the transformer to `folder`/<phase> and return the stage's record.

    Args:
        config: The recipe.
        phase: Which phase.
        start: The phase before, or None to start untrained.
        folder: The run folder.
        on_log: Called with the metrics of every step.
        device: Where it is trained.
    """
    text = CaptionEncoder(
        build_tokenizer(), build_text_encoder(config.seed), num_tokens=config.text_tokens
    )
    vae = AutoencoderKLWan.from_pretrained(folder / "vae").to(device)

    def encode(clips: int, frames: int, size: int) -> LatentSet:
        name = f"encode-{frames}x{size}"
        return encode_scenes(
            vae,
            folder,
            clips=clips,
            frames=frames,
            size=size,
            seed=config.seed,
            on_progress=lambda _, done, total: on_log(StepMetrics(done, total, {}, stage=name)),
        )

    clips = encode(phase.clips, phase.frames, phase.size)
    images = encode(phase.images, 1, phase.image_size or phase.size) if phase.images else None
    model = (
        WanTransformer3DModel.from_pretrained(start) if start else build_transformer(config.seed)
    )
    model = model.to(device)
    padding = PadWeight(config.text_tokens)

    def loss_at(step: RecipeStep) -> torch.Tensor:
        low, high = phase.padding
        padding.set(low + (high - low) * step.progress)
        with padding.applied(model), _sparse_step(model, phase, step):
            return flow_loss(model, clips, text, phase, step, images=images, probe=probe)

    with place_probe(model) if phase.place_weight else nullcontext() as probe:
        record = run_stage(
            Stage(
                name=phase.name,
                folder=folder,
                module=model,
                loss_at=loss_at,
                is_hidden=is_hidden_matrix,
                optim=phase.optim,
                steps=phase.steps,
                seed=config.seed,
                save_every=100,
                on_log=on_log,
            )
        )
    save_model(model, folder / phase.name)
    return record


def _load(model_class: Any, folder: Path) -> Any:
    """Load a part and forget its origin, which would be saved with the pipeline."""
    part = model_class.from_pretrained(folder)
    part.register_to_config(_name_or_path="")
    return part


def build_pipeline(config: BuiltinConfig, folder: Path, transformer: Path) -> WanPipeline:
    """Put the trained parts together as a standard `WanPipeline`."""
    return WanPipeline(
        tokenizer=build_tokenizer(),
        text_encoder=build_text_encoder(config.seed),
        vae=_load(AutoencoderKLWan, folder / "vae"),
        transformer=_load(WanTransformer3DModel, transformer),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=config.flow_shift,
        ),
    )


class _Log:
    """`training.json` of a run folder: the recipe and a record of every finished stage."""

    def __init__(self, config: BuiltinConfig, folder: Path, device: torch.device) -> None:
        self._device = describe_device(device)
        self._path = folder / "training.json"
        self._config = json.loads(json.dumps(asdict(config)))
        self._seed = config.seed
        self._stages: list[dict[str, Any]] = []
        if self._path.exists():
            record = RunRecord.load(self._path)
            if record.config != self._config:
                raise ValueError(
                    f"{folder} was begun with another recipe. Choose another --output."
                )
            self._stages = record.numbers["stages"]
        self._save()

    def add(self, stage: dict[str, Any]) -> None:
        """Keep the record of a finished stage."""
        self._stages = [kept for kept in self._stages if kept["stage"] != stage["stage"]]
        self._stages.append(stage)
        self._save()

    def _save(self) -> None:
        RunRecord(
            kind="train",
            config=self._config,
            seed=self._seed,
            versions=collect_versions(),
            device=self._device,
            numbers={"stages": self._stages},
        ).save(self._path)


def train_builtin(
    config: BuiltinConfig,
    folder: Path,
    on_log: OnLog = lambda metrics: None,
    device: str | torch.device = "cpu",
) -> Path:
    """Run every stage that is not done yet and save the pipeline.

    Args:
        config: The recipe.
        folder: The run folder: checkpoints, encoded clips, logs, `training.json`, `pipeline`.
        on_log: Called with the metrics of every step.
        device: Where models are trained. Batches and noise are drawn on the CPU, so that they are
            the same everywhere.

    Returns:
        The pipeline's directory.

    Raises:
        ValueError: The folder was begun with another recipe.
        KeyboardInterrupt: Ctrl-C; the same call continues from there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    place = torch.device(device)
    log = _Log(config, folder, place)
    if not (folder / "vae").exists():
        log.add(train_vae(config, folder, on_log, place))
    start = None
    for phase in config.phases:
        if not (folder / phase.name).exists():
            log.add(train_phase(config, phase, start, folder, on_log, place))
        start = folder / phase.name
    if not (folder / "pipeline").exists():
        assert start is not None, "a recipe has at least one phase"
        defaults = asdict(config.defaults) | {"examples": EXAMPLES}
        texts = {"defaults.json": json.dumps(defaults, indent=2) + "\n"}
        save_model(build_pipeline(config, folder, start), folder / "pipeline", texts=texts)
    return folder / "pipeline"
