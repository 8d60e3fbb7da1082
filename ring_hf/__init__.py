"""Exact context parallelism for Hugging Face models: same losses and gradients as one process."""
