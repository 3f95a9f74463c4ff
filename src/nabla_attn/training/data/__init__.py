"""Videos and captions, encoded once and read in batches of one size.

In the order that data flows: `folder` and `tars` list clips, `clip` reads their frames, `resize`
fits them, `encode` writes latents and embeddings, `encoded` reads these back, and `batches` puts
them together.
"""

from nabla_attn.training.data.batches import BucketSampler, collate
from nabla_attn.training.data.encoded import EncodedSet

__all__ = ["BucketSampler", "EncodedSet", "collate"]
