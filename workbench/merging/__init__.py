"""Merging task vectors on a CUDA device, with the bits of `vectors.tasks`."""
