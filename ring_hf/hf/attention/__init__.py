"""Attention backends: what the attention interface of Transformers calls, in one process and on shards."""
