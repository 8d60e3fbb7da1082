"""`ring-hf verify`: acceptance of this package on a machine, in four sections.

    exactness          every attention kernel that fits, on the tiles of all ranks, against attention in fp64
    trajectories       losses and grad norms of a ring against those of one process
    attention_timing   TFLOP/s of rings whose blocks are all in one process
    training_steps     seconds and memory of the Trainer's steps against the planner

One device suffices: `ring_emulation` computes all ranks of a ring in turn. `thread_ranks` and `random_cases` run the
real exchanges with threads as ranks (`scripts/fuzz.py`, tests), `model_families` builds a tiny model of every family
of causal language models in Transformers.
"""
