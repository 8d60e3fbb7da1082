"""Generation over a KV cache that is sharded over the ranks which share a sequence."""
