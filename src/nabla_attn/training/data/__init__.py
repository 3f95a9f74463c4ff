"""Videos and captions, encoded once and read in batches of one size."""

from nabla_attn.training.data.dataset import BucketSampler, EncodedSet, collate

__all__ = ["BucketSampler", "EncodedSet", "collate"]
