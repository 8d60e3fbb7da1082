"""How a recipe ends when it refuses to run: with the message alone, which also closes the launcher's report.

A refusal is a `ValueError` that a recipe or ring_hf raises: it names the values, the rule and the way out, so a
traceback would add nothing. Other errors keep their traceback, also in the launcher's report.
"""

import dis
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from torch.distributed.elastic.multiprocessing.errors import get_error_handler

import ring_hf

OWN_FOLDERS = (Path(__file__).resolve().parent, Path(ring_hf.__file__).resolve().parent)
# Seconds that other processes wait for the first one to end the run: if all refuse for the same reason, the launcher
# then reports one failure.
PATIENCE = 5.0


def run(main: Callable[[], None]) -> None:
    """Run a recipe's `main`; if it refuses, end this process with the message and the exit code 1."""
    try:
        main()
    except Exception as error:
        if isinstance(error, ValueError) and is_refusal(error):
            end(f"{Path(sys.argv[0]).name}: {error}")
        get_error_handler().record_exception(error)  # its traceback, for the launcher's report
        raise


def is_refusal(error: ValueError) -> bool:
    """Return whether a `raise` statement of ring_hf or a recipe raised it, and not an operation that failed."""
    traceback = error.__traceback__
    assert traceback is not None
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    file = Path(traceback.tb_frame.f_code.co_filename).resolve()
    return any(file.is_relative_to(folder) for folder in OWN_FOLDERS) and _is_raise(traceback)


def _is_raise(traceback: TracebackType) -> bool:
    return dis.opname[traceback.tb_frame.f_code.co_code[traceback.tb_lasti]] == "RAISE_VARARGS"


def end(message: str) -> None:
    """Exit with the message.

    Under torchrun, and therefore `accelerate launch`, it also becomes the cause at the end of the launcher's report.
    """
    rank, report = int(os.environ.get("RANK", "0")), os.environ.get("TORCHELASTIC_ERROR_FILE")
    if rank > 0:
        time.sleep(PATIENCE)
        message = f"rank {rank}: {message}"
    if report:
        Path(report).write_text(json.dumps({"message": message, "timestamp": int(time.time())}))
    sys.exit(f"\n{message}\n")
