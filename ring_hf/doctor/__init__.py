"""`ring-hf doctor`: what this machine has, how it would run a model, and what to change before training.

`diagnose` inspects and measures the machine and returns a `MachineReport`; `advise` applies a table of pure rules to
the report.
"""

from typing import TYPE_CHECKING

from ..exports import export_lazily

__all__ = ["Advice", "MachineReport", "Query", "advise", "diagnose", "render"]

if TYPE_CHECKING:
    from .advice import Advice, advise
    from .diagnosis import diagnose
    from .diagnosis_report import render
    from .machine_report import MachineReport, Query
else:  # a type checker that saw `__getattr__` would accept any name
    __getattr__, __dir__ = export_lazily(
        __name__,
        {
            "advice": ("Advice", "advise"),
            "diagnosis": ("diagnose",),
            "diagnosis_report": ("render",),
            "machine": (),
            "machine_report": ("MachineReport", "Query"),
            "rank_launch": (),
        },
    )
