"""What `ring-hf` shows and simulates: pictures and tables made of the geometry alone, for any number of ranks."""

from .pictures import draw
from .setting import Setting
from .simulation import Row, simulate
from .tables import layout_table, transport_table

__all__ = ["Row", "Setting", "draw", "layout_table", "simulate", "transport_table"]
