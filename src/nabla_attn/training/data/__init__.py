"""Videos and captions, encoded once and read in batches of one size."""

from nabla_attn.training.data.dataset import BucketSampler, EncodedSet, collate
from nabla_attn.training.data.world import WorldSet

__all__ = ["BucketSampler", "EncodedSet", "WorldSet", "collate"]
