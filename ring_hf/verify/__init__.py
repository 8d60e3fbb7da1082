"""`ring-hf verify`: acceptance of this package on a machine, in four sections; or of a model against one process.

    exactness          every attention kernel that fits, on the tiles of all ranks, against attention in fp64
    trajectories       losses and grad norms of a ring against those of one process
    attention_timing   TFLOP/s of rings whose blocks are all in one process
    training_steps     seconds and memory of the Trainer's steps against the planner

One device suffices: `ring_emulation` computes all ranks of a ring in turn. `thread_ranks` and `random_cases` run the
real exchanges with threads as ranks (`scripts/fuzz.py`, tests), `model_families` builds a tiny model of every family
of causal language models in Transformers.

`verify_model` and `verify_trainer` compare a user's model on shards with one process and name the first difference
(`step_comparison`, `module_records`, `first_difference`, `usual_causes`); `verify_first_steps` does it in a training.
"""

from typing import TYPE_CHECKING

from ..exports import export_lazily

__all__ = ["FirstDifference", "ModelVerification", "verify_first_steps", "verify_model", "verify_trainer"]

if TYPE_CHECKING:
    from .model_verification import FirstDifference, ModelVerification
    from .trainer_verification import verify_first_steps, verify_model, verify_trainer
else:  # a type checker that saw `__getattr__` would accept any name
    __getattr__, __dir__ = export_lazily(
        __name__,
        {
            "model_verification": ("FirstDifference", "ModelVerification"),
            "trainer_verification": ("verify_first_steps", "verify_model", "verify_trainer"),
        },
    )
