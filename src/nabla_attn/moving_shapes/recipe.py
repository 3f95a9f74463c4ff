"""The built-in model's recipe: everything its training is made of."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class MuonConfig:
    """Optimiser and schedule of one stage.

    Attributes:
        muon_lr: Learning rate of hidden weights.
        adamw_lr: Learning rate of everything else.
        muon_weight_decay: Decoupled weight decay of hidden weights.
        warmup: Steps of linear warm-up.
        flat: Share of the steps after which the learning rate decays linearly.
        final: Learning rate at the end, as a share of the full one.
        average: Decay of the running average of the weights.
        clip: Largest gradient norm.
    """

    muon_lr: float
    adamw_lr: float
    muon_weight_decay: float = 0.0
    warmup: int = 20
    flat: float = 0.4
    final: float = 0.0
    average: float = 0.99
    clip: float = 1.0


@dataclass(frozen=True)
class VaePhase:
    """Part of the VAE's training: steps on crops of one size.

    Attributes:
        steps: Number of steps.
        batch: Clips a step.
        frames: Frames of a clip, 4 n + 1.
        size: Height and width of a crop in pixels.
        largest: Height of the largest frame that crops are cut from.
    """

    steps: int
    batch: int
    frames: int
    size: int
    largest: int


@dataclass(frozen=True)
class VaeConfig:
    """Training of the VAE."""

    phases: tuple[VaePhase, ...]
    optim: MuonConfig = MuonConfig(muon_lr=0.015, adamw_lr=2e-3)
    foreground_weight: float = 4.0
    latent_noise: float = 0.1
    latent_penalty: float = 1e-4

    @property
    def steps(self) -> int:
        """Steps of all phases."""
        return sum(phase.steps for phase in self.phases)


BUILTIN_VAE = VaeConfig(
    phases=(
        VaePhase(steps=600, batch=48, frames=1, size=32, largest=128),
        VaePhase(steps=350, batch=16, frames=5, size=32, largest=128),
        VaePhase(steps=600, batch=8, frames=13, size=32, largest=128),
        VaePhase(steps=300, batch=2, frames=13, size=64, largest=256),
        VaePhase(steps=60, batch=2, frames=1, size=256, largest=256),
        VaePhase(steps=100, batch=1, frames=13, size=128, largest=256),
        VaePhase(steps=40, batch=1, frames=5, size=256, largest=256),
    )
)


@dataclass(frozen=True)
class TransformerPhase:
    """One stage of the transformer's training: clips of one size, from the stage before.

    Attributes:
        name: Names the stage.
        size: Height and width in pixels.
        frames: Frames of a clip, 4 n + 1.
        steps: Number of steps.
        batch: Clips a step.
        clips: Number of scenes that are drawn; equal ones are one clip.
        shift: Shift of the noise levels; larger frames need more noise.
        optim: Optimiser settings.
        image_share: Share of the steps that see first latent frames only: more scenes for the same
            number of tokens, which is how shapes are learnt.
        images: The same of images; 0 takes the first latent frames of the clips.
        image_size: Height and width of images; 0 is that of the clips.
        image_batch: Images a step; 0 takes as many as have the same number of tokens as the clips
            of a step, if these are of one size.
        image_shift: Shift of the noise levels of images; None is that of the clips.
        thresholds: NABLA thresholds to draw from, (lowest, highest).
        algorithm: Name of the attention of clips where it is always the same. Without it and
            `thresholds` attention is dense.
        dense_share: Share of the steps that stay dense beside either.
        padding: Weight of the text padding at the stage's start and end, 0 to 1.
        empty_share: Share of the captions left empty, for guidance.
        short_share: Share of the captions that leave out sizes that are usual, and of those that
            leave out a usual background.
        place_weight: Weight of the loss that teaches where in a video tokens lie; 0 leaves it out.
    """

    name: str
    size: int
    frames: int
    steps: int
    batch: int
    clips: int
    shift: float
    optim: MuonConfig
    image_share: float = 0.0
    images: int = 0
    image_size: int = 0
    image_batch: int = 0
    image_shift: float | None = None
    thresholds: tuple[float, float] | None = None
    algorithm: str | None = None
    dense_share: float = 0.25
    padding: tuple[float, float] = (1.0, 1.0)
    empty_share: float = 0.1
    short_share: float = 0.25
    place_weight: float = 0.0


@dataclass(frozen=True)
class Defaults:
    """How the finished model is used unless asked otherwise."""

    height: int
    width: int
    frames: int
    steps: int
    guidance: float
    fps: int
    sparse_algo: str


@dataclass(frozen=True)
class BuiltinConfig:
    """Everything the built-in model is made of."""

    seed: int
    text_tokens: int
    vae: VaeConfig
    phases: tuple[TransformerPhase, ...]
    flow_shift: float
    defaults: Defaults


def _optim(rate: float, warmup: int, average: float) -> MuonConfig:
    """Muon at `rate` and AdamW at a tenth of it."""
    return MuonConfig(
        muon_lr=rate,
        adamw_lr=rate / 10,
        muon_weight_decay=0.01,
        warmup=warmup,
        final=0.1,
        average=average,
    )


CLIPS_256 = TransformerPhase(
    "clips-256",
    size=256,
    frames=33,
    steps=211,
    batch=1,
    clips=4096,
    shift=30.0,
    optim=MuonConfig(
        muon_lr=0.014,
        adamw_lr=1.4e-3,
        muon_weight_decay=0.01,
        warmup=15,
        flat=1.0,
        average=0.985,
    ),
    image_share=0.15,
    images=4096,
    image_batch=8,
    image_shift=20.0,
    algorithm="topk-0.07_sta-17-1-1_tail-first",
    dense_share=0.01,
    empty_share=0.0,
    short_share=0.0,
    place_weight=1.0,
)
"""The first stage on clips of full size; the later ones differ in what they name."""


def builtin() -> BuiltinConfig:
    """The model that ships with the package: 256x256, 33 frames, 9,216 tokens; some four hours."""
    return BuiltinConfig(
        seed=0,
        text_tokens=14,
        vae=BUILTIN_VAE,
        phases=(
            TransformerPhase(
                "images-32",
                size=32,
                frames=13,
                steps=300,
                batch=32,
                clips=4096,
                shift=3.0,
                optim=_optim(0.02, warmup=100, average=0.99),
                image_share=1.0,
                padding=(0.0, 0.2),
            ),
            TransformerPhase(
                "clips-32",
                size=32,
                frames=13,
                steps=900,
                batch=32,
                clips=4096,
                shift=3.0,
                optim=_optim(0.02, warmup=50, average=0.998),
                padding=(0.2, 1.0),
            ),
            TransformerPhase(
                "clips-64",
                size=64,
                frames=13,
                steps=1200,
                batch=12,
                clips=1536,
                shift=4.0,
                optim=_optim(0.015, warmup=50, average=0.995),
            ),
            TransformerPhase(
                "clips-128",
                size=128,
                frames=13,
                steps=500,
                batch=3,
                clips=512,
                shift=5.0,
                optim=_optim(0.01, warmup=50, average=0.995),
                image_share=0.5,
            ),
            TransformerPhase(
                "long-128",
                size=128,
                frames=61,
                steps=650,
                batch=1,
                clips=256,
                shift=10.0,
                optim=_optim(0.008, warmup=20, average=0.99),
                image_share=0.2,
                thresholds=(0.25, 0.7),
                dense_share=0.1,
            ),
            TransformerPhase(
                "long-128-fine",
                size=128,
                frames=61,
                steps=850,
                batch=1,
                clips=256,
                shift=10.0,
                optim=MuonConfig(
                    muon_lr=0.006,
                    adamw_lr=6e-4,
                    muon_weight_decay=0.01,
                    flat=0.1,
                    average=0.99,
                ),
                image_share=0.2,
                thresholds=(0.25, 0.7),
                dense_share=0.2,
            ),
            TransformerPhase(
                "images-128-a",
                size=128,
                frames=1,
                steps=500,
                batch=24,
                clips=4096,
                shift=3.0,
                optim=MuonConfig(
                    muon_lr=0.012, adamw_lr=1.2e-3, muon_weight_decay=0.01, average=0.98
                ),
            ),
            TransformerPhase(
                "joint-128",
                size=128,
                frames=61,
                steps=2200,
                batch=1,
                clips=512,
                shift=10.0,
                optim=MuonConfig(
                    muon_lr=0.008, adamw_lr=8e-4, muon_weight_decay=0.01, flat=0.3, average=0.99
                ),
                image_share=0.4,
                images=4096,
                image_shift=3.0,
                thresholds=(0.3, 0.8),
                dense_share=0.2,
            ),
            TransformerPhase(
                "images-256",
                size=256,
                frames=1,
                steps=300,
                batch=8,
                clips=4096,
                shift=20.0,
                optim=MuonConfig(
                    muon_lr=0.015,
                    adamw_lr=1.5e-3,
                    muon_weight_decay=0.01,
                    warmup=30,
                    flat=1.0,
                    average=0.97,
                ),
                empty_share=0.0,
                short_share=0.0,
                place_weight=1.0,
            ),
            TransformerPhase(
                "clips-64-b",
                size=64,
                frames=33,
                steps=240,
                batch=16,
                clips=4096,
                shift=12.0,
                optim=MuonConfig(
                    muon_lr=0.015,
                    adamw_lr=1.5e-3,
                    muon_weight_decay=0.01,
                    warmup=10,
                    flat=1.0,
                    average=0.97,
                ),
                image_share=0.5,
                images=4096,
                image_size=256,
                image_batch=8,
                image_shift=20.0,
                empty_share=0.0,
                short_share=0.0,
                place_weight=1.0,
            ),
            CLIPS_256,
            replace(CLIPS_256, name="clips-256-b", steps=250, place_weight=3.0),
            replace(
                CLIPS_256,
                name="clips-256-c",
                steps=600,
                optim=replace(CLIPS_256.optim, flat=0.15, final=0.03),
                short_share=0.25,
                place_weight=3.0,
            ),
        ),
        flow_shift=10.0,
        defaults=Defaults(256, 256, 33, 2, 1.0, 15, "topk-0.07_sta-17-1-1_tail-first"),
    )
