"""How long a pass of attention would take and what it would send, from the plan of every rank and a few rates.

Pure Python on the integers of `geometry`, no torch: `transport="auto"`, the simulations and the planner decide by it.
"""
