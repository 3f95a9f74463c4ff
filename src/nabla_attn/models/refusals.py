"""The video models that NABLA cannot help, and why."""

REFUSALS = {
    "LatteTransformer3DModel": (
        "it attends within a frame and along time separately, in rows too short to gain."
    ),
    "SanaVideoTransformer3DModel": (
        "its video self-attention is linear; there is no map to make sparse."
    ),
    "SanaWMTransformer3DModel": (
        "most of its video self-attention is recurrent; there is no map to make sparse."
    ),
    "SanaWMLTX2RefinerTransformer3DModel": (
        "it attends a cache of earlier windows, so its keys are not one token grid."
    ),
    "AnyFlowFARTransformer3DModel": (
        "it attends chunks causally behind a block mask of its own, and a cache of keys."
    ),
    "WanAnimate2Transformer3DModel": (
        "its keys are the video and a cached reference behind a mask of its own."
    ),
    "Cosmos3OmniTransformer": (
        "it packs video, sound and actions into one sequence with causal parts."
    ),
    "MiniMaxH3Transformer3DModel": (
        "it packs text, images, sound and video into one sequence without a token grid."
    ),
}
