"""`ring-hf plan`: predicts memory, time and the longest sequence of a training run before it starts.

Pure formulas of model sizes and published device rates; nothing is measured here, and torch is not imported. Start at
`plan`; `published` compares predictions with runs that others have published.
"""

from .model import Model
from .model_config import read_config, read_model
from .training_job import TrainingJob
from .training_plan import TrainingPlan, find_max_length, plan

__all__ = ["Model", "TrainingJob", "TrainingPlan", "find_max_length", "plan", "read_config", "read_model"]
