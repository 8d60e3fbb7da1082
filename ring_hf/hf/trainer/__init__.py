"""What Accelerate and the Trainer call: the config, the engines, the callback, the guard, evaluation."""
