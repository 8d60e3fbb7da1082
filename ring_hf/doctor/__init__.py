"""`ring-hf doctor`: what this machine has, what it would do with a model, and what to change before training.

`Facts` is what was found out, `diagnose` finds it out, `advise` is a table of pure functions of it.
"""

from .advice import Advice, advise
from .examination import diagnose
from .facts import Facts, Question
from .report import render

__all__ = ["Advice", "Facts", "Question", "advise", "diagnose", "render"]
