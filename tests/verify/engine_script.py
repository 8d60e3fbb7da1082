"""Verifies a right model and one with a planted bug on an engine: `engine_script.py RESULT.json ENGINE`."""

import json
import os
import sys
import tempfile
from pathlib import Path

from ring_hf.hf import context
from ring_hf.verify import verify_model
from ring_hf.verify.trainer_verification import default_arguments
from tests.engines.cases import engine_arguments
from tests.hf.models import llama, rows
from tests.verify.planted_bugs import LocalAttention, with_layer


def main() -> None:
    path, engine = Path(sys.argv[1]), sys.argv[2]
    results = {}
    for name, model in (("right", llama()), ("wrong", with_layer(LocalAttention, "self_attn"))):
        with engine_arguments(engine) as more, tempfile.TemporaryDirectory() as folder:
            arguments = default_arguments(folder, 2, use_cpu=True, **more)
            results[name] = verify_model(model, rows(64, 57), arguments, past_refusals=True).to_json()
        context.reset()
    if os.environ["RANK"] == "0":
        path.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
