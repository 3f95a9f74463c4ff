"""The configuration of `nabla train` for any model: frozen dataclasses, all defaults in sight."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class DataConfig:
    """What is trained on: clips encoded once by `nabla encode`, or the built-in world.

    Attributes:
        folder: The encoded clips; "world" draws and encodes the built-in world on the way. Empty
            is the world for the built-in model.
        batch: Clips of one grid in a step of one process.
        drop: Share of the captions that are replaced by the empty one, for guidance.
        validation: Clips held out for validation, spread evenly over the data; 0 is none.
        pack: Clips of different length are put into sequences of at most so many latent frames, in
            place of batches of one length; 0 does not.
        clips: Of the world: number of clips. The run's seed draws them.
        frames: Of the world: video frames; None is the model's default, and so are the sides.
        height: Of the world, in pixels.
        width: Of the world, in pixels.
        shapes: Of the world: numbers of shapes in a scene, each as likely.
    """

    folder: str = ""
    batch: int = 1
    drop: float = 0.1
    validation: int = 8
    pack: int = 0
    clips: int = 256
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    shapes: tuple[int, ...] = (1,)


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is learnt.

    Attributes:
        kind: "flow" learns the data; "distill" what the dense model predicts (arXiv:2507.13546,
            section 4.1).
        times: How noise levels are drawn before the shift: "uniform" or "logit-normal".
        logit_mean: Mean of the logit-normal levels.
        logit_std: Deviation of the logit-normal levels.
        shift: Moves the levels to more noise; None is the scheduler's own. Not for v-prediction,
            whose steps fix their levels.
        data_weight: Weight of the data term beside distillation, 0 in the paper.
        layer_weight: Weight of the attention outputs' error beside distillation, 0 in the paper.
        guidance: Of distillation: the student learns the teacher's prediction with classifier-free
            guidance of this scale, and is then used without guidance; 1 is the plain prediction.
    """

    kind: str = "flow"
    times: str = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    shift: float | None = None
    data_weight: float = 0.0
    layer_weight: float = 0.0
    guidance: float = 1.0

    @property
    def is_guided(self) -> bool:
        """Whether what is learnt has guidance in it."""
        return self.guidance != 1


@dataclass(frozen=True)
class SparsityConfig:
    """Which attention is trained.

    Attributes:
        algorithm: Such as "nabla-0.7"; "dense" for none.
        schedule: JSON file that says which layers run which algorithm, instead of `algorithm`.
        thresholds: (lowest, highest) that every step draws its threshold from, so that one set of
            weights serves them all; None keeps the algorithm's own, as validation always does.
        ramp: Steps over which the threshold, or share, falls from 1 to its target.
        dense_share: Share of the steps that stay dense, spread evenly.
        backend: "auto" or one of `nabla_attn.backends.NAMES`.
        keep_first_frame: Every block attends the first latent frame.
    """

    algorithm: str = "nabla-0.7"
    schedule: str | None = None
    thresholds: tuple[float, float] | None = None
    ramp: int = 0
    dense_share: float = 0.0
    backend: str = "auto"
    keep_first_frame: bool = False


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its learning rate; the defaults are the paper's (appendix A).

    Attributes:
        lr: Learning rate after warm-up.
        betas: Decay of the running averages of gradients and their squares.
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay.
        max_norm: Largest gradient norm; 0 does not clip.
        warmup: Steps of linear warm-up.
        decay: "constant", "linear" or "cosine", to `final` at the last step.
        final: Learning rate at the end, as a share of the full one.
    """

    lr: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_norm: float = 0.01
    warmup: int = 0
    decay: str = "constant"
    final: float = 0.0


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters, through PEFT.

    Attributes:
        rank: Rank of the adapters; 0 trains all weights instead.
        alpha: Scale; None is the rank.
        targets: Ends of the names of the linear layers that get one; none is attention's four
            projections, as the model names them.
    """

    rank: int = 0
    alpha: float | None = None
    targets: tuple[str, ...] = ()


@dataclass(frozen=True)
class CheckpointConfig:
    """When the run is saved.

    Attributes:
        every: Steps between checkpoints.
        keep: How many of the last are kept.
        best: Whether the one of the lowest validation loss is kept as well.
    """

    every: int = 200
    keep: int = 2
    best: bool = True


@dataclass(frozen=True)
class WatchConfig:
    """What is measured on the way.

    Attributes:
        log: Steps between lines of the log.
        validate: Steps between measurements of the validation loss.
        sample: Steps between generated samples with the judge's scores; built-in world only.
        prompts: Held-out prompts of a sample.
        tensorboard: Whether a tensorboard log is written beside `log.csv`.
    """

    log: int = 1
    validate: int = 100
    sample: int = 500
    prompts: int = 4
    tensorboard: bool = True


@dataclass(frozen=True)
class StageConfig:
    """One stage of several: it starts from the weights of the one before.

    Attributes:
        name: Names the stage's folder.
        steps: Its optimiser steps.
        folder: Its encoded clips; None is `data.folder`, and so on for the other values.
        batch: Clips in a step of one process.
        frames: Of the world: video frames.
        height: Of the world, in pixels.
        width: Of the world, in pixels.
        shift: Shift of the noise levels; larger grids need more.
        algorithm: Its attention.
        lr: Its learning rate.
    """

    name: str
    steps: int
    folder: str | None = None
    batch: int | None = None
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    shift: float | None = None
    algorithm: str | None = None
    lr: float | None = None


@dataclass(frozen=True)
class TrainConfig:
    """Everything a training run is made of.

    Attributes:
        recipe: Name of the recipe it came from.
        model: "builtin" or a diffusers pipeline directory.
        part: The pipeline's transformer to train (Wan 2.2 has two).
        data: See `DataConfig`; the others likewise.
        steps: Optimiser steps.
        accumulation: Batches of one process in a step.
        precision: "float32" or "bfloat16" (autocast; the trained weights stay float32).
        ema: Decay of a running average of the weights, which is what is saved; 0 is none.
        gradient_checkpointing: Recompute activations in the backward pass.
        compile: Compile the repeated blocks.
        sharding: "none", or "fsdp" to share weights and optimiser among GPUs.
        context_parallel: Processes that share one sequence (Ulysses).
        max_skipped: Steps in a row without a finite loss after which training stops.
        seed: Seeds order, noise, captions and adapters.
        stages: Stages with their own data, steps and attention; empty is one stage.
    """

    recipe: str = "finetune"
    model: str = "builtin"
    part: str = "transformer"
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    sparsity: SparsityConfig = field(default_factory=SparsityConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    steps: int = 1000
    accumulation: int = 1
    precision: str = "float32"
    ema: float = 0.0
    lora: LoraConfig = field(default_factory=LoraConfig)
    gradient_checkpointing: bool = False
    compile: bool = False
    sharding: str = "none"
    context_parallel: int = 1
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    max_skipped: int = 10
    seed: int = 0
    stages: tuple[StageConfig, ...] = ()
