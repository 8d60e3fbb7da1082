"""Accelerate and the Trainer call into here: the parallelism config, the engines, the callback, the guard of a model,
evaluation."""
