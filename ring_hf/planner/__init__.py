"""What a run will need, before it is started: memory item by item, time part by part, the longest sequence.

Pure formulas on the sizes of a model and the published rates of devices; no torch, nothing measured here. Start at
`plan`; `published` holds the predictions against what others have published.
"""

from .config import read_keys, read_model
from .job import Job
from .model import Model
from .plan import Plan, longest, plan

__all__ = ["Job", "Model", "Plan", "longest", "plan", "read_keys", "read_model"]
