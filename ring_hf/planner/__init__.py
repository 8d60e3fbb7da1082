"""What a run will need, before it is started: memory item by item, time part by part, the longest sequence.

Pure formulas on the sizes of a model and the published rates of devices; no torch, nothing measured here. Start at
`plan`; `published` holds the predictions against what others have published.
"""

from .model import Model
from .model_config import read_keys, read_model
from .training_job import Job
from .training_plan import Plan, longest, plan

__all__ = ["Job", "Model", "Plan", "longest", "plan", "read_keys", "read_model"]
