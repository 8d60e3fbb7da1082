"""Compare two training runs, and print one line with their worst differences."""

from typing import Any

MAX_LOSS, MAX_GRAD_NORM = 1e-5, 1e-4


def compare_runs(name: str, run: dict[str, Any], reference: dict[str, Any]) -> tuple[float, float]:
    """Print and return the worst absolute difference of the losses and the worst relative one of the grad norms."""
    assert len(run["loss"]) == len(reference["loss"]) > 0, f"{name}: {len(run['loss'])} steps"
    pairs = list(zip(run["loss"], reference["loss"], strict=True))
    loss = max(abs(a - b) for a, b in pairs)
    norms = list(zip(run["grad_norm"], reference["grad_norm"], strict=True))
    grad_norm = max(abs(a - b) / b for a, b in norms)
    print(f"{name}: {len(pairs)} steps, worst loss {loss:.2e}, worst grad norm {grad_norm:.2e} (relative)")
    return loss, grad_norm


def assert_same_run(name: str, run: dict[str, Any], reference: dict[str, Any]) -> None:
    loss, grad_norm = compare_runs(name, run, reference)
    assert loss <= MAX_LOSS, f"{name}: worst loss difference {loss:.2e} is above {MAX_LOSS}"
    assert grad_norm <= MAX_GRAD_NORM, f"{name}: worst grad norm difference {grad_norm:.2e} is above {MAX_GRAD_NORM}"
