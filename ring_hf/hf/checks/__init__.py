"""Rules that are checked before anything runs: functions of arguments, models, Trainers and batches to a message or
None."""
