"""`ring-hf doctor`: what this machine has, what it would do with a model, and what to change before training.

`Diagnosis` is what was found out, `diagnose` finds it out, `advise` is a table of pure functions of it.
"""

from typing import TYPE_CHECKING

from ..exports import export_lazily

__all__ = ["Advice", "Diagnosis", "Query", "advise", "diagnose", "render"]

if TYPE_CHECKING:
    from .advice import Advice, advise
    from .diagnosis import diagnose
    from .diagnosis_report import render
    from .facts import Diagnosis, Query
else:  # a type checker that saw `__getattr__` would accept any name
    __getattr__, __dir__ = export_lazily(
        __name__,
        {
            "advice": ("Advice", "advise"),
            "diagnosis": ("diagnose",),
            "facts": ("Diagnosis", "Query"),
            "machine": (),
            "rank_launch": (),
            "diagnosis_report": ("render",),
        },
    )
