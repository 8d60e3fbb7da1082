"""Checks around every forward and backward pass: messages between ranks, the loss that reaches the optimizer, trial
steps."""
