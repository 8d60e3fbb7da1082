"""`evaluate()` and `predict()` of launched processes equal one process whose batch is that of all replicas
together."""

import pytest

from tests.trainer.evaluation_cases import BATCHES, LABELS, LENGTHS

WORST = 1e-5

pytestmark = pytest.mark.timeout(900)  # the first test of a world size waits for its launch


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("batch", BATCHES)
def test_evaluation_equals_one_process(launches, world_size, labels, batch):
    start = f"dp{world_size // 2}-batch{batch}-{labels}-"
    ours, one = launches.of(world_size)["evaluation"], launches.of(1)["evaluation"]
    keys = [key for key in ours if key.startswith(start)]
    num_lengths = sum("-length" in key and "packed" not in key for key in keys)
    assert num_lengths == len(LENGTHS) * (3 if labels == "hole" else 1)
    assert_same_numbers(start, {key: ours[key] for key in keys}, one)


@pytest.mark.parametrize("world_size", [2, 4], ids=["balanced-packed", "hybrid"])
def test_evaluation_by_other_algorithms_equals_one_process(launches, world_size):
    ours, one = launches.of(world_size)["more evaluation"], launches.of(1)["evaluation"]
    assert sum("packed" in key for key in ours) == 2 and sum("length" in key for key in ours) == len(LENGTHS) + 2
    assert_same_numbers(f"{world_size} processes", ours, one)


def assert_same_numbers(start, ours, one):
    worst = 0.0
    for key in ours:
        assert ours[key].keys() == one[key].keys() and ours[key]
        for name, value in ours[key].items():
            apart = abs(value - one[key][name]) / max(1.0, abs(one[key][name]))
            worst = max(worst, apart)
            assert apart <= WORST, f"{key} {name}: {value} instead of {one[key][name]}"
    print(f"{start} {len(ours)} cases, worst difference {worst:.2e}")


@pytest.mark.parametrize("world_size", [2, 4])
def test_metrics_see_whole_rows_in_order(launches, world_size):
    predicted = {key: value for key, value in launches.of(world_size)["evaluation"].items() if "predict" in key}
    assert len(predicted) == len(BATCHES) * (len(LABELS) + 2)
    for values in predicted.values():
        assert values["rows"] == 5 and values["tokens"] == 48 and values["accuracy"] > 0
