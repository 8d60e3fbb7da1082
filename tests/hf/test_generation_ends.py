"""Generation ends on all ranks together: after the same token, or with an error when a rank has gone."""

import os
import signal
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import GenerationConfig
from transformers.generation import BaseStreamer, StoppingCriteria, StoppingCriteriaList

from ring_hf.hf import ContextParallelCache, context
from ring_hf.hf.generation.common_stop import share_stopping
from ring_hf.launcher import WorkerError
from ring_hf.parallel import register_group
from ring_hf.verify.model_families import tiny
from tests.hf.models import context_of
from tests.support.harness import run_distributed, start_workers

SETTINGS = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def shared_model(rank, size, group=None):
    """Return a tiny model of processes that share sequences."""
    name = register_group(dist.group.WORLD if group is None else group)
    context.activate(replace(context_of(size, rank), group=name))
    return tiny("llama", "ring_zigzag").float().eval()


def prompt():
    return torch.randint(3, 60, (1, 30), generator=torch.Generator().manual_seed(0))


class Slow(BaseStreamer):
    """Takes some time for every token, a different one on each rank."""

    def __init__(self, seconds):
        self.seconds = seconds

    def put(self, value):
        time.sleep(self.seconds)

    def end(self):
        pass


class StopAt(StoppingCriteria):
    """A criterion that ranks do not agree about."""

    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


def test_all_ranks_stop_after_the_same_token():
    results = run_distributed(2, generate_until_stopped)
    for name in results[0]:
        first, second = (result[name] for result in results)
        assert torch.equal(first, second), name
    assert results[0]["criterion"].shape[1] == 35  # of the first rank, though the other would stop at 33
    for name in ("max_time", "max_time of a config", "max_time of the model"):
        assert 30 < results[0][name].shape[1] < 90, name


def test_a_method_that_something_else_replaced_is_refused():
    model = tiny("llama", "ring_zigzag")
    share_stopping(model)
    share_stopping(model)  # by a second cache
    model.generate = lambda *args, **kwargs: None
    with pytest.raises(ValueError, match=r"model\.generate of this LlamaForCausalLM was replaced"):
        share_stopping(model)


def generate_until_stopped(rank, size):
    model = shared_model(rank, size)
    own, slow = 60, {"streamer": Slow(0.02 + 0.05 * rank)}
    config = GenerationConfig(max_time=0.5, max_new_tokens=own, **SETTINGS)

    def run(**settings):
        cache = ContextParallelCache(model, 8)
        return model.generate(prompt(), past_key_values=cache, **settings)

    try:
        results = {
            "criterion": run(
                **SETTINGS, max_new_tokens=own, stopping_criteria=StoppingCriteriaList([StopAt(35 - 2 * rank)])
            ),
            "max_time": run(**SETTINGS, max_new_tokens=own, max_time=0.5, **slow),
            "max_time of a config": run(generation_config=config, **slow),
        }
        model.generation_config.max_time = 0.5
        results["max_time of the model"] = run(**SETTINGS, max_new_tokens=own, **slow)
    finally:
        context.reset()
    return results


def test_calls_that_could_end_at_different_tokens_are_refused():
    for messages in run_distributed(2, generate_differently):
        assert "disagree about the settings of generate" in messages["length"]
        assert "disagree about the stopping criteria" in messages["criteria"]
        assert "max_time: ranks could stop at different tokens" in messages["max_time"]
        assert "StopAt: ranks could stop at different tokens" in messages["late cache"]


def generate_differently(rank, size):
    cases = {
        "length": {"max_new_tokens": 4 + rank},
        "criteria": {"stopping_criteria": StoppingCriteriaList([StopAt(9)][:rank])},
        "max_time": {"max_time": 5.0},
        "late cache": {"stopping_criteria": StoppingCriteriaList([StopAt(9)])},
    }
    messages = {}
    try:
        for name, settings in cases.items():
            model = shared_model(rank, size)
            if name in ("length", "criteria"):
                ContextParallelCache(model, 8)
            settings = {"max_new_tokens": 4, **SETTINGS, **settings}
            with pytest.raises(ValueError) as caught:  # generate is looked up before the cache is made
                model.generate(prompt(), past_key_values=ContextParallelCache(model, 8), **settings)
            messages[name] = str(caught.value)
    finally:
        context.reset()
    return messages


class LeaveAfter(BaseStreamer):
    """Calls a function after five tokens."""

    def __init__(self, leave):
        self.num_calls, self.leave = 0, leave

    def put(self, value):
        self.num_calls += 1
        if self.num_calls == 6:
            self.leave()

    def end(self):
        pass


def decode_and_leave(rank, size, folder, is_killed):
    """Decode; the last rank is killed, or stops to answer, and the others write the error that ends them."""
    group = None if is_killed else dist.new_group(timeout=timedelta(seconds=3))
    model = shared_model(rank, size, group)
    ended = Path(folder, "ended")

    def leave():
        if rank < size - 1:
            return
        if is_killed:
            os.kill(os.getpid(), signal.SIGKILL)
        deadline = time.monotonic() + 60
        while not ended.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        raise KeyboardInterrupt

    cache = ContextParallelCache(model, 8)
    try:
        model.generate(prompt(), past_key_values=cache, max_new_tokens=2000, streamer=LeaveAfter(leave), **SETTINGS)
    except RuntimeError as error:
        ended.write_text(f"{type(error).__name__}: {error}")
        raise


@pytest.mark.parametrize("is_killed", [True, False], ids=["killed", "silent"])
def test_a_rank_that_leaves_ends_the_others(is_killed, tmp_path):
    pool = start_workers(2)
    try:
        with pytest.raises(WorkerError):
            pool.run(decode_and_leave, 2, str(tmp_path), is_killed, timeout=60)
        deadline = time.monotonic() + 20
        while not (tmp_path / "ended").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        message = (tmp_path / "ended").read_text()
        assert "closed" in message.lower() or "reset" in message.lower() or "timed out" in message.lower(), message
    finally:
        pool.stop()
