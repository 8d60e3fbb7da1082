"""Predicted time and traffic of an attention pass, from the plan of every rank and a few rates of the machine.

Pure Python on the integers of `geometry`, no torch: `transport="auto"`, the simulations and the planner decide by it.
"""
