"""The sections of a training configuration: every key, its default and what it may be.

Sections check themselves: none can be built with a value out of its range, or with two values that
exclude each other.
"""

from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Strict, model_validator
from pydantic.dataclasses import dataclass

from nabla_attn.config import parse
from nabla_attn.training.yaml_text import parse_yaml

CONFIG = ConfigDict(extra="forbid", allow_inf_nan=False)


def _as_number(value: Any) -> Any:
    """YAML leaves "1e-6" a text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _as_text(value: Any) -> Any:
    """YAML reads the name 2024 as a number."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return str(value) if is_number else value


def _as_texts(value: Any) -> Any:
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def _as_numbers(value: Any) -> Any:
    """YAML reads `1,2` as one text."""

    def read(part: str) -> Any:
        try:
            return parse_yaml(part)
        except ValueError:
            return part

    return [read(part) for part in _as_texts(value)] if isinstance(value, str) else value


def _as_pair(value: Any) -> Any:
    value = _as_numbers(value)
    if isinstance(value, list | tuple) and len(value) != 2:
        raise ValueError("must have 2 values")
    return value


def _check_share(value: float) -> float:
    if not 0 <= value <= 1:
        raise ValueError("must be from 0 to 1")
    return value


def _check_algorithm(value: str) -> str:
    parse(value)
    return value


Number = Annotated[float, BeforeValidator(_as_number), Strict()]
Positive = Annotated[Number, Gt(0)]
NotNegative = Annotated[Number, Ge(0)]
Share = Annotated[Number, AfterValidator(_check_share)]
Decay = Annotated[Number, Ge(0), Lt(1)]
Count = Annotated[int, Strict(), Ge(1)]
Natural = Annotated[int, Strict(), Ge(0)]
Switch = Annotated[bool, Strict()]
Text = Annotated[str, BeforeValidator(_as_text), Strict()]
Algorithm = Annotated[Text, AfterValidator(_check_algorithm)]
Texts = Annotated[tuple[Text, ...], BeforeValidator(_as_texts)]
NumShapes = Annotated[int, Strict(), Ge(1), Le(3)]


@dataclass(frozen=True, config=CONFIG)
class DataConfig:
    """The clips to train on: encoded once by `nabla encode`, or drawn from the built-in world.

    Attributes:
        folder: The folder of encoded clips, or "world" for the built-in world; empty means the
            world for the built-in model, and is an error for others.
        batch: Number of clips in one batch, all of one grid.
        drop: Share of the captions replaced by the empty one, which guidance needs.
        validation: Number of clips held out for validation, spread evenly over the data; None
            takes a tenth of them, at most 8.
        pack: Number of latent frames in one sequence that is filled with clips of different
            lengths; 0 makes batches of one length instead.
        clips: Number of clips drawn from the world; the run's seed draws them.
        frames: Video frames of a drawn clip; None takes the model's default, as for both sides.
        height: Height of a drawn clip in pixels.
        width: Width of a drawn clip in pixels.
        shapes: Numbers of shapes in a drawn scene, each equally likely.
    """

    folder: Text = ""
    batch: Count = 1
    drop: Share = 0.1
    validation: Natural | None = None
    pack: Natural = 0
    clips: Count = 256
    frames: Count | None = None
    height: Count | None = None
    width: Count | None = None
    shapes: Annotated[tuple[NumShapes, ...], BeforeValidator(_as_numbers)] = (1,)


@dataclass(frozen=True, config=CONFIG)
class ObjectiveConfig:
    """The loss that is minimised.

    Attributes:
        kind: "flow" learns the data, "distill" the predictions of the dense model
            (arXiv:2507.13546, section 4.1).
        times: Distribution of the noise levels before the shift, "uniform" or "logit-normal".
        logit_mean: Mean of logit-normal levels.
        logit_std: Standard deviation of logit-normal levels.
        shift: Factor by which the levels move to more noise; None takes the scheduler's own. It
            has no effect on v-prediction, whose steps fix their levels.
        data_weight: Weight of the data term in distillation; 0 in the paper.
        layer_weight: Weight of the error of the attention outputs in distillation; 0 in the paper.
        guidance: Scale of the classifier-free guidance in the predictions that a student learns; it
            is then used without guidance. 1 distills plain predictions.
    """

    kind: Literal["flow", "distill"] = "flow"
    times: Literal["uniform", "logit-normal"] = "uniform"
    logit_mean: Number = 0.0
    logit_std: Positive = 1.0
    shift: Positive | None = None
    data_weight: NotNegative = 0.0
    layer_weight: NotNegative = 0.0
    guidance: Annotated[Number, Ge(1)] = 1.0

    @property
    def is_guided(self) -> bool:
        """Whether the predictions to learn include guidance."""
        return self.guidance != 1

    @model_validator(mode="after")
    def _check(self) -> "ObjectiveConfig":
        if (self.data_weight or self.layer_weight) and self.kind != "distill":
            raise ValueError(
                "objective.data_weight and objective.layer_weight are terms of distillation: got "
                f"objective.kind={self.kind}. Use objective.kind=distill."
            )
        if self.is_guided and self.kind != "distill":
            raise ValueError(
                "objective.guidance changes the predictions of a teacher: got objective.kind="
                f"{self.kind}. Use objective.kind=distill."
            )
        if self.is_guided and self.layer_weight:
            raise ValueError(
                "objective.layer_weight compares attention outputs, which guidance does not "
                "change. Use one of objective.guidance and objective.layer_weight."
            )
        return self


@dataclass(frozen=True, config=CONFIG)
class SparsityConfig:
    """The attention that is trained.

    Attributes:
        algorithm: The algorithm, such as "nabla-0.7"; "dense" trains dense attention.
        schedule: A JSON file that gives layers and heads algorithms of their own, or the name of a
            schedule of the built-in model; replaces `algorithm`.
        allow_mismatch: Whether a schedule calibrated for another model, size or version is followed
            with a warning.
        thresholds: Lowest and highest threshold: every step draws one of these, so that one set of
            weights serves them all. None keeps the algorithm's own, as validation always does.
        ramp: Number of steps over which the threshold, or share, falls from 1 to its target.
        dense_share: Share of the steps that stay dense, spread evenly.
        backend: "auto" or one of `nabla_attn.backends.NAMES`.
        parts_only: Whether only the trained parts of the algorithm's methods learn, such as VSA's
            gate, and the weights stay as they are.
    """

    algorithm: Algorithm = "nabla-0.7"
    schedule: Text | None = None
    allow_mismatch: bool = False
    thresholds: Annotated[tuple[Number, Number], BeforeValidator(_as_pair)] | None = None
    ramp: Natural = 0
    dense_share: Share = 0.0
    backend: Text = "auto"
    parts_only: Switch = False

    @property
    def is_dense(self) -> bool:
        """Whether all attention is dense."""
        return self.schedule is None and parse(self.algorithm).is_dense

    @model_validator(mode="after")
    def _check(self) -> "SparsityConfig":
        algorithm = parse(self.algorithm)
        if self.ramp and not algorithm.is_adaptive and self.schedule is None:
            raise ValueError(
                f"sparsity.ramp lowers a threshold or a share, and {algorithm} has none. Use "
                "sparsity.ramp=0."
            )
        if self.thresholds is None:
            return self
        lowest, highest = self.thresholds
        if not 0 < lowest <= highest <= 1:
            raise ValueError(
                "sparsity.thresholds must be lowest, highest, both more than 0 and at most 1: got "
                f"{lowest}, {highest}."
            )
        if algorithm.threshold is None or self.schedule is not None:
            raise ValueError(
                "sparsity.thresholds need one NABLA algorithm for all layers: got "
                f"{self.schedule or algorithm}. Use sparsity.algorithm=nabla-0.7 or another, "
                "without a schedule."
            )
        return self


@dataclass(frozen=True, config=CONFIG)
class OptimConfig:
    """AdamW and its learning rate; the defaults are the paper's (appendix A).

    Attributes:
        lr: Learning rate after warm-up.
        betas: Decay rates of the running averages of gradients and their squares.
        eps: Number added to the denominator.
        weight_decay: Decoupled weight decay.
        max_norm: Largest gradient norm; larger gradients are scaled to it. 0 does not clip.
        warmup: Number of steps of linear warm-up.
        decay: "constant", "linear" or "cosine", to `final` at the last step.
        final: Learning rate at the end, as a share of the full one.
    """

    lr: Positive = 1e-6
    betas: Annotated[tuple[Decay, Decay], BeforeValidator(_as_pair)] = (0.9, 0.95)
    eps: Positive = 1e-8
    weight_decay: NotNegative = 0.0
    max_norm: NotNegative = 0.01
    warmup: Natural = 0
    decay: Literal["constant", "linear", "cosine"] = "constant"
    final: Share = 0.0


@dataclass(frozen=True, config=CONFIG)
class LoraConfig:
    """Low-rank adapters, through PEFT.

    Attributes:
        rank: Rank of the adapters; 0 trains all weights instead.
        alpha: Scale of the adapters; None takes the rank.
        targets: Ends of the names of the linear layers that get one; none means attention's four
            projections, as the model names them.
    """

    rank: Natural = 0
    alpha: Positive | None = None
    targets: Texts = ()


@dataclass(frozen=True, config=CONFIG)
class CheckpointConfig:
    """When the run is saved.

    Attributes:
        every: Number of steps between checkpoints.
        keep: Number of the last checkpoints that are kept.
        best: Whether the one with the lowest validation loss is kept as well.
    """

    every: Count = 200
    keep: Count = 2
    best: Switch = True


@dataclass(frozen=True, config=CONFIG)
class WatchConfig:
    """What is measured during training.

    Attributes:
        log: Number of steps between rows of the log.
        validate: Number of steps between measurements of the validation loss.
        sample: Number of steps between generated samples with their scores; built-in world only.
        prompts: Number of held-out prompts in a sample.
        tensorboard: Whether a tensorboard log is written beside `log.csv`.
    """

    log: Count = 1
    validate: Count = 100
    sample: Count = 500
    prompts: Natural = 4
    tensorboard: Switch = True
