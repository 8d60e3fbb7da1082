"""Runs a script as an accelerate file for GPUs starts it, on CPU processes: `as_on_gpus.py SCRIPT ARGUMENTS`.

Accelerate runs DDP on CPUs where FSDP is asked for, so FSDP is given to believe in another device, as in
`tests/engines/cases.py`. DeepSpeed would compile a kernel for shared memory, which is left out. Appends to the file
ENGINE_FILE what really trained.
"""

import importlib
import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

from accelerate.state import PartialState
from accelerate.utils import DistributedType
from transformers import Trainer

from tests.engines.cases import state_of


def main() -> None:
    """Run the script, with what it needs to see in the machine, and say what trained."""
    script, *arguments = sys.argv[1:]
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU
        arguments += ["--accelerator_config", json.dumps({"use_configured_state": True})]
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        backend: Any = importlib.import_module("deepspeed.comm.torch")
        backend.build_shm_op = lambda: None
    train = Trainer.train

    def trained(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        result = train(self, *args, **kwargs)
        if os.environ["RANK"] == "0":
            Path(os.environ["ENGINE_FILE"]).write_text(json.dumps(state_of(self)))
        return result

    Trainer.train = trained  # type: ignore[method-assign]
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
