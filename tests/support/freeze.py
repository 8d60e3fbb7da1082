"""Imported last by the server of forks: takes all that is loaded out of the garbage collector's sight.

A Trainer collects garbage at the end of each run. With torch and Transformers loaded this takes 0.3 s, and writes to
every page that forked processes share; what was imported is no garbage (the advice of `gc.freeze` in the library).
"""

import gc

gc.collect()
gc.freeze()
