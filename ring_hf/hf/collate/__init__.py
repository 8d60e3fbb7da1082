"""Collators: they turn examples into a batch, and a batch into the shard of this rank."""
