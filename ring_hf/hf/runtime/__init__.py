"""What runs around every forward and backward pass: messages between ranks, losses that are followed to the optimizer,
trial steps."""
