"""What `ring-hf` shows and simulates: pictures and tables made of the geometry alone, for any number of ranks."""

from ..simulate.layout_tables import layout_table, transport_table
from ..simulate.scenario import Scenario
from ..simulate.schedule_drawing import draw
from ..simulate.simulation import Row, simulate

__all__ = ["Row", "Scenario", "draw", "layout_table", "simulate", "transport_table"]
