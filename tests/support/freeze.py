"""Freezes the garbage collector after the imports of the forkserver; must be the last module that it preloads.

A Trainer calls `gc.collect` at the end of each run. With torch and Transformers imported this takes 0.3 s, and in a
forked process it copies every page that was shared (see `gc.freeze` in Python's documentation).
"""

import gc

gc.collect()
gc.freeze()
