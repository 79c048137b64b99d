"""transformers' continuous batching: shared blocks, and requests that come at any time."""

from __future__ import annotations

import threading
import time
from unittest import mock

import pytest
import torch
from batching import (
    check,
    generation,
    make_model,
    one_by_one,
    prompts,
    settings,
    shake,
)
from transformers.generation.continuous_batching import ContinuousBatchingManager

from reft import ReftModel
from reft.adapter.requests import TokenKeys
from reft.model import continuous_manager as continuous


@pytest.fixture(scope="module")
def model():
    return make_model()


def matches():
    """Record how many tokens of each request were found in shared blocks."""
    shared: list[int] = []
    original = continuous.share_by_edits

    def watched(cache, requests, keys):
        original(cache, requests, keys)
        search = cache.search_prefix_match

        def recorded(request_id, tokens):
            shared.append(search(request_id, tokens))
            return shared[-1]

        cache.search_prefix_match = recorded

    return mock.patch.object(continuous, "share_by_edits", watched), shared


class TestSharedBlocks:
    """Requests with one prompt of 50 tokens, in blocks of 8, one after the other."""

    def run(self, model, names, inputs=None):
        inputs = prompts([50]) * len(names) if inputs is None else inputs
        patch, shared = matches()
        with patch:
            how = settings(page=8, max_requests_per_batch=1)
            got = model.generate_batch(inputs, generation(), how, adapter_names=names)
        assert len(shared) == len(names)
        return got, shared, one_by_one(model, inputs, names)

    def test_tokens_alone_are_wrong_keys(self, model):
        names = ["prompt", "ends", "__base__"]
        with mock.patch.object(
            TokenKeys, "replace_edited", lambda self, request, tokens: list(tokens)
        ):
            got, shared, wanted = self.run(model, names)
        assert shared[1:] == [48, 48]
        for output, (_, logprobs) in list(zip(got.values(), wanted, strict=True))[1:]:
            wrong = torch.tensor(output.logprobs[:1]) - torch.tensor(logprobs[:1])
            assert wrong.abs().max() > 1e-2
        got, shared, wanted = self.run(model, names)
        assert shared == [0, 0, 0]
        check(got, wanted)

    def test_the_same_adapter_shares(self, model):
        got, shared, wanted = self.run(
            model, ["ends", "ends", "untied", "prompt", "ends", "untied"]
        )
        assert shared == [0, 48, 0, 0, 48, 48]
        check(got, wanted)

    def test_what_no_adapter_edits_is_shared_by_all(self, model):
        # Prompts that are the same for 40 tokens, edited behind them.
        start = prompts([40])[0]
        inputs = [start + more for more in prompts([10, 11, 12, 13], seed=5)]
        got, shared, wanted = self.run(model, ["__base__", "early", "__base__", "early"], inputs)
        assert shared == [0, 40, 40, 40]
        check(got, wanted)

    def test_another_scale_is_another_edit(self, model):
        patch, shared = matches()
        inputs, names, scales = prompts([50]) * 3, ["ends"] * 3, [1.0, 0.5, 1.0]
        with patch:
            how = settings(page=8, max_requests_per_batch=1)
            got = model.generate_batch(
                inputs, generation(), how, adapter_names=names, adapter_scales=scales
            )
        assert shared == [0, 0, 48]
        check(got, one_by_one(model, inputs, names, scales=scales))

    def test_a_trained_adapter_is_another_edit(self):
        model = make_model(["ends"])
        for seed in (None, 7):
            if seed is not None:
                shake(model, "ends", seed)
            patch, shared = matches()
            inputs = prompts([50]) * 2
            with patch:
                how = settings(page=8, max_requests_per_batch=1)
                got = model.generate_batch(inputs, generation(), how, persistent_manager=True)
            check(got, one_by_one(model, inputs, ["ends"] * 2))
            if seed is None:
                assert shared == [0, 48]
        model.destroy_cached_continuous_batching_manager()

    def test_a_release_with_other_methods_does_not_share(self, model):
        with mock.patch.object(continuous, "REGISTER", ("no_such_method",)):
            made = continuous.checked_config(model.get_base_model(), generation(), settings())
        assert not made.allow_block_sharing
        assert continuous.checked_config(
            model.get_base_model(), generation(), settings()
        ).allow_block_sharing

    def test_the_methods_are_there(self):
        assert continuous.register_name() in continuous.REGISTER


class TestManager:
    def test_requests_stream(self, model):
        inputs, names = prompts([40, 9]), ["ends", "__base__"]
        wanted = one_by_one(model, inputs, names)
        got: dict[str, list[list[int]]] = {}
        with model.continuous_batching_context_manager(
            generation(), continuous_batching_config=settings()
        ) as manager:
            ids = [
                manager.add_request(tokens, adapter_name=name, max_new_tokens=8, streaming=True)
                for tokens, name in zip(inputs, names, strict=True)
            ]
            assert len(set(ids)) == 2
            ended = 0
            for result in manager:
                got.setdefault(result.request_id, []).append(result.generated_tokens)
                ended += result.is_finished()
                if ended == 2:
                    break
        for request_id, (tokens, _) in zip(ids, wanted, strict=True):
            assert [tokens[: n + 1] for n in range(8)] == got[request_id]

    def results(self, manager, count):
        results = {}
        while len(results) < count:
            result = manager.get_result(timeout=60)
            assert result is not None and result.error is None
            results[result.request_id] = result
        return results

    def test_mistakes_add_nothing(self, model):
        manager = model.init_continuous_batching(generation(), settings())
        try:
            with pytest.raises(ValueError, match="'nobody'"):
                manager.add_request([3, 4], adapter_name="nobody")
            with pytest.raises(ValueError, match=r"one name per sequence \(2"):
                manager.add_requests([[3, 4], [5]], adapter_names=["ends"])
            assert manager.input_queue.empty() and not manager.requests()
            manager.add_request([3, 4], "mine", adapter_name="ends")
            with pytest.raises(ValueError, match="'mine', which is in progress"):
                manager.add_request([3, 4], "mine", adapter_name="untied")
            manager.start()
            self.results(manager, 1)
            manager.add_request([3, 4], "other")
            self.results(manager, 1)
            assert len(manager.requests()) == 1  # what is over is forgotten
            manager.add_request([3, 4], "mine", adapter_name="untied")
            self.results(manager, 1)
        finally:
            manager.stop()

    def test_a_replaced_adapter_stays_with_its_requests(self, tmp_path):
        inputs, names = prompts([60, 70, 50]), ["prompt", "early", "prompt"]
        model = make_model(["prompt", "early"])  # blocks 0 and 2, block 1
        wanted = one_by_one(model, inputs, names)
        for folder in ("old", "new"):
            for name in ("prompt", "early"):
                model.save_pretrained(tmp_path / folder / name, adapter_name=name)
            shake(model, "prompt", 50)
        model = make_model(["prompt"])
        shake(model, "prompt", 50)
        wanted[2] = one_by_one(model, inputs, names[:1] * 3)[2]
        served = ReftModel(model.unload())
        served.pool.add("one", tmp_path / "old" / "prompt")
        served.pool.add("gone", tmp_path / "old" / "early")
        manager = served.init_continuous_batching(generation(), settings())
        ids = [manager.add_request(inputs[0], adapter_name="one")]
        ids.append(manager.add_request(inputs[1], adapter_name="gone"))
        served.pool.add("one", tmp_path / "new" / "prompt", replace=True)
        served.pool.remove("gone")
        ids.append(manager.add_request(inputs[2], adapter_name="one"))
        assert len(served.reft.handles) == 3
        manager.start()
        try:
            results = self.results(manager, 3)
        finally:
            manager.stop()
        check({request_id: results[request_id] for request_id in ids}, wanted)
        assert len(served.reft.handles) == 2

    def test_the_pool_changes_while_requests_run(self, model, tmp_path):
        model.save_pretrained(tmp_path, adapter_name="ends")
        model.pool.capacity = 3
        inputs, names = prompts([60, 50, 70] * 6), ["ends", "untied", "prompt"] * 6
        wanted = one_by_one(model, inputs, names)
        over = threading.Event()

        def churn():
            while not over.is_set():
                model.pool.add("visitor", tmp_path)
                model.pool.remove("visitor")

        thread = threading.Thread(target=churn)
        thread.start()
        try:
            got = model.generate_batch(inputs, generation(), settings(), adapter_names=names)
        finally:
            over.set()
            thread.join()
            model.pool.capacity = 64
        check(got, wanted)

    def test_one_at_a_time(self, model):
        ids = torch.tensor([prompts([20])[0]])
        with model.continuous_batching_context_manager(
            generation(), continuous_batching_config=settings()
        ) as manager:
            model(ids)  # it has nothing to do
            request = manager.add_request(prompts([20])[0], max_new_tokens=4000)
            with pytest.raises(RuntimeError, match="runs this model in another thread"):
                model(ids)
            other = model.init_continuous_batching(generation(), settings())
            with pytest.raises(RuntimeError, match="another continuous batching manager"):
                other.start()
            if hasattr(ContinuousBatchingManager, "pause"):
                with manager.pause():
                    model(ids)
                with pytest.raises(RuntimeError, match="runs this model in another thread"):
                    model(ids)
            manager.cancel_request(request)
            for _ in range(600):
                if not manager.busy():
                    break
                time.sleep(0.1)
            model(ids)

    def test_a_manager_that_the_base_kept(self):
        model = make_model(["ends"])
        base = model.get_base_model()
        with model.disable_adapter():
            base.generate_batch(prompts([5]), generation(), settings(), persistent_manager=True)
        with pytest.raises(ValueError, match="keeps a continuous batching manager"):
            model.generate_batch(prompts([5]), generation(), settings())
        base.destroy_cached_continuous_batching_manager()
        got = model.generate_batch(prompts([5]), generation(), settings())
        check(got, one_by_one(model, prompts([5]), ["ends"]))

    def test_tensor_parallel_is_refused(self, model):
        with (
            mock.patch.object(type(model.get_base_model()), "tp_size", 2),
            pytest.raises(ValueError, match="tensor parallelism over 2"),
        ):
            model.init_continuous_batching()
