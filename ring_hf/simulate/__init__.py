"""Pictures and tables of `ring-hf show` and `ring-hf simulate`, from the geometry alone, for any number of ranks."""

from ..simulate.layout_tables import layout_table, transport_table
from ..simulate.scenario import Scenario
from ..simulate.schedule_drawing import draw
from ..simulate.simulation import AlgorithmCost, simulate

__all__ = ["AlgorithmCost", "Scenario", "draw", "layout_table", "simulate", "transport_table"]
