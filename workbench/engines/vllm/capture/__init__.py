"""Activations of single requests, read inside vLLM while they run."""
