"""Videos and captions, encoded once and read in batches of one size.

In the order that data flows: `folder` and `tars` list clips (`clip`), `decode` reads them, `resize`
fits them, `encode` writes latents and embeddings (`encoded`), `dataset` reads these back, and
`batches` puts them together.
"""

from nabla_attn.training.data.batches import BucketSampler, collate
from nabla_attn.training.data.dataset import EncodedSet

__all__ = ["BucketSampler", "EncodedSet", "collate"]
