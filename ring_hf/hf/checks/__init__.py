"""Checks of arguments, models, Trainers and batches that run before anything is computed.

Rules and `check_*` functions return an error message, or None. `refuse_*` functions raise.
"""
