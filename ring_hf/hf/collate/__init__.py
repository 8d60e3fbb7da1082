"""The collator: rows to batches, batches to shards."""
