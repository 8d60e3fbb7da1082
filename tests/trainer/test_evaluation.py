"""`evaluate()` and `predict()` of launched processes equal one process whose batch is that of all replicas
together."""

import pytest

from tests.trainer.evaluation_cases import BATCHES, LABELS, LENGTHS

MAX_DIFFERENCE = 1e-5

pytestmark = pytest.mark.timeout(900)  # the first test of a world size waits for its launch


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("batch", BATCHES)
def test_evaluation_equals_one_process(launches, world_size, labels, batch):
    prefix = f"dp{world_size // 2}-batch{batch}-{labels}-"
    ours, reference = launches.results(world_size)["evaluation"], launches.results(1)["evaluation"]
    keys = [key for key in ours if key.startswith(prefix)]
    num_lengths = sum("-length" in key and "packed" not in key for key in keys)
    assert num_lengths == len(LENGTHS) * (3 if labels == "hole" else 1)
    assert_same_numbers(prefix, {key: ours[key] for key in keys}, reference)


@pytest.mark.parametrize("world_size", [2, 4], ids=["balanced-packed", "hybrid"])
def test_evaluation_by_other_algorithms_equals_one_process(launches, world_size):
    ours, reference = launches.results(world_size)["more evaluation"], launches.results(1)["evaluation"]
    assert sum("packed" in key for key in ours) == 2 and sum("length" in key for key in ours) == len(LENGTHS) + 2
    assert_same_numbers(f"{world_size} processes", ours, reference)


def assert_same_numbers(name, ours, reference):
    worst = 0.0
    for key in ours:
        assert ours[key].keys() == reference[key].keys() and ours[key]
        for metric, value in ours[key].items():
            expected = reference[key][metric]
            difference = abs(value - expected) / max(1.0, abs(expected))
            worst = max(worst, difference)
            assert difference <= MAX_DIFFERENCE, f"{key} {metric}: {value} instead of {expected}"
    print(f"{name} {len(ours)} cases, worst difference {worst:.2e}")


@pytest.mark.parametrize("world_size", [2, 4])
def test_metrics_see_whole_rows_in_order(launches, world_size):
    predictions = {key: value for key, value in launches.results(world_size)["evaluation"].items() if "predict" in key}
    assert len(predictions) == len(BATCHES) * (len(LABELS) + 2)
    for values in predictions.values():
        assert values["rows"] == 5 and values["tokens"] == 48 and values["accuracy"] > 0
