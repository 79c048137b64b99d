"""Several threads, on a model each and on one model, do not see each other's plans."""

from __future__ import annotations

import threading

import pytest
import torch
from architectures import call_of
from architectures import wrapped as of_architecture
from served_adapters import random_adapter
from tiny_models import LAYERS, blocks_of, llama, padded, tokens
from torch import nn

from reft import ReftConfig, get_reft_model
from reft.model import hooks
from reft.model.hooks import _enter

PATIENCE = 60


def config(**changes) -> ReftConfig:
    return ReftConfig(**{"rank": 3, "positions": "f2+l2", **changes})


def wrapped(**changes):
    torch.manual_seed(5)
    return get_reft_model(llama(), config(**changes)).eval()


class InTheMiddle:
    """A hook on a block that stops the forward of one thread until it is released."""

    def __init__(self, block: nn.Module) -> None:
        self.there, self.go = threading.Event(), threading.Event()
        self.thread = None
        self.handle = block.register_forward_hook(self._stop)

    def _stop(self, *_):
        if threading.current_thread() is self.thread:
            self.there.set()
            assert self.go.wait(PATIENCE)

    def during(self, call, inside):
        """Run ``call()`` in another thread, and ``inside()`` while that is stopped between two
        blocks; return both results."""
        outcome = {}

        def run():
            try:
                with torch.no_grad():
                    outcome["value"] = call()
            except BaseException as error:
                outcome["error"] = error

        self.thread = threading.Thread(target=run)
        self.thread.start()
        try:
            assert self.there.wait(PATIENCE)
            with torch.no_grad():
                inner = inside()
        finally:
            self.go.set()
            self.thread.join(PATIENCE)
            self.handle.remove()
        if "error" in outcome:
            raise outcome["error"]
        return outcome["value"], inner


def middle(model) -> InTheMiddle:
    return InTheMiddle(blocks_of(model.get_base_model())[0])


def logits(model, ids, **more):
    with torch.no_grad():
        return model(ids, **more).logits


def generated(model, ids, **more):
    return model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, **more)


SHORT, LONG = tokens(2, 6), tokens(3, 11, seed=9)


def all_at_once(jobs):
    """Start the functions together in a thread each; return their results."""
    barrier, results, errors = threading.Barrier(len(jobs)), {}, []

    def run(name, job):
        try:
            barrier.wait(PATIENCE)
            results[name] = job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(name, jobs[name])) for name in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert not errors, errors
    return results


class TestTwoModels:
    def trained(self, seed: int):
        torch.manual_seed(seed)
        model = get_reft_model(llama(), config(positions=f"f{seed}+l1"), generator=_seeded(seed))
        optimizer = torch.optim.AdamW(model.reft.adapter("default").parameters(), lr=1e-2)

        def run():
            model.train()
            for step in range(4):
                ids = tokens(2, 5 + seed + step, seed=step)
                model(
                    ids, labels=ids.masked_fill(torch.arange(ids.shape[1]) < 3, -100)
                ).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            model.eval()
            return generated(model, tokens(1, 7)), logits(model, LONG)

        return run

    def test_training_and_generating(self):
        expected = {seed: self.trained(seed)() for seed in (1, 2)}
        results = all_at_once({seed: self.trained(seed) for seed in (1, 2)})
        for seed in (1, 2):
            for ours, theirs in zip(results[seed], expected[seed], strict=True):
                assert torch.equal(ours, theirs)


def _seeded(seed):
    return torch.Generator().manual_seed(seed)


class TestOneModel:
    """One call is stopped between two blocks while the other one runs."""

    @pytest.mark.parametrize("sent", [True, False])
    def test_two_forwards(self, sent):
        """Blocks receive the plan as an argument or, in other architectures, look it up."""
        model = wrapped()
        for hook in model.base_model._forward_pre_hooks.values():
            if isinstance(hook, hooks.MakePlan):
                hook.takes_keywords = sent
        expected = logits(model, SHORT), logits(model, LONG, prompt_lengths=[4, 5, 6])
        results = middle(model).during(
            lambda: logits(model, SHORT), lambda: logits(model, LONG, prompt_lengths=[4, 5, 6])
        )
        assert all(map(torch.equal, results, expected))

    def test_options_stay_in_their_thread(self):
        """One forward is stopped after its options are read and before its plan is made."""
        model = of_architecture("t5-encoder", "block_output").eval()
        calls = [
            {**call_of("t5-encoder", LONG), "prompt_lengths": [4, 5, 6]},
            call_of("t5-encoder", LONG),
        ]

        def run(number):
            with torch.no_grad():
                return model(**calls[number]).logits

        expected = run(0), run(1)
        assert not torch.equal(*expected)
        stop = InTheMiddle(nn.Identity())
        model.reft.blocks.stack.register_forward_pre_hook(stop._stop, prepend=True)
        results = stop.during(lambda: run(0), lambda: run(1))
        assert all(map(torch.equal, results, expected))

    @pytest.mark.parametrize("positions", ["f2+l2", "all", "prompt+g2"])
    def test_a_forward_inside_a_generation(self, positions):
        model = wrapped(positions=positions)
        expected = generated(model, SHORT), logits(model, LONG)
        results = middle(model).during(lambda: generated(model, SHORT), lambda: logits(model, LONG))
        assert all(map(torch.equal, results, expected))

    def test_two_generations(self):
        model = wrapped(positions="prompt+g2")
        ids, mask, _ = padded([4, 7, 9], "left")
        expected = generated(model, SHORT), generated(model, ids, attention_mask=mask)
        results = middle(model).during(
            lambda: generated(model, SHORT), lambda: generated(model, ids, attention_mask=mask)
        )
        assert all(map(torch.equal, results, expected))

    def test_the_base_inside_a_forward_of_the_adapter_and_the_other_way_round(self):
        model = wrapped()

        def base():
            with model.disable_adapter():
                return logits(model, LONG)

        expected = logits(model, LONG), base()
        assert not torch.equal(*expected)
        assert all(
            map(torch.equal, middle(model).during(lambda: logits(model, LONG), base), expected)
        )
        results = middle(model).during(base, lambda: logits(model, LONG))
        assert all(map(torch.equal, results, expected[::-1]))

    def test_training_beside_inference(self):
        model = wrapped()

        def gradient():
            with torch.enable_grad():
                model.zero_grad()
                model(LONG, labels=LONG).loss.backward()
            return model.reft.adapter("default").weight.grad.clone()

        expected = gradient(), logits(model, SHORT)
        results = middle(model).during(gradient, lambda: logits(model, SHORT))
        assert all(map(torch.equal, results, expected))

    def test_a_pool_of_threads(self):
        model = wrapped(positions="f3+l3")
        batches = {n: tokens(1 + n % 3, 4 + n, seed=n) for n in range(8)}
        expected = {n: (logits(model, ids), generated(model, ids)) for n, ids in batches.items()}

        def job(n):
            return lambda: [
                (logits(model, batches[n]), generated(model, batches[n])) for _ in range(3)
            ]

        results = all_at_once({n: job(n) for n in batches})
        for n, several in results.items():
            for result in several:
                assert all(map(torch.equal, result, expected[n]))


class TestChanges:
    def test_an_adapter_that_comes(self, tmp_path):
        model = wrapped(layers=[0])
        wrapped(layers=[0, 1, 2], rank=2).save_pretrained(tmp_path)
        expected = logits(model, LONG)
        results, _ = middle(model).during(
            lambda: logits(model, LONG), lambda: model.load_adapter(tmp_path, "new")
        )
        assert torch.equal(results, expected)

    @pytest.mark.parametrize("call", [logits, generated])
    def test_another_becomes_active(self, call):
        model = wrapped(positions="all")
        model.add_adapter("other", config(positions="all"), generator=_seeded(3))
        expected = call(model, LONG)
        results, _ = middle(model).during(
            lambda: call(model, LONG), lambda: model.set_adapter("other")
        )
        assert torch.equal(results, expected)
        assert not torch.equal(call(model, LONG), expected)

    @pytest.mark.parametrize("call", [logits, generated])
    def test_one_that_goes(self, call):
        model = wrapped(positions="all")
        model.add_adapter("other", config(layers=[1]))
        expected = call(model, LONG)
        results, _ = middle(model).during(
            lambda: call(model, LONG), lambda: model.delete_adapter("default")
        )
        assert torch.equal(results, expected)
        model.add_adapter("third", config(layers=[1]))
        assert len(model.reft.handles) == 1  # hooks that are no longer needed are removed

    def test_unload_is_refused(self):
        model = wrapped()
        expected = logits(model, LONG)

        def unload():
            with pytest.raises(RuntimeError, match="another thread calls it"):
                model.unload()

        results, _ = middle(model).during(lambda: logits(model, LONG), unload)
        assert torch.equal(results, expected)
        model.unload()

    def test_a_thread_that_ended_does_not_count(self):
        model = wrapped()
        thread = threading.Thread(target=lambda: _enter(model.reft))
        thread.start()
        thread.join()
        model.unload()

    def test_modules_that_an_adapter_trains_stay_under_a_forward(self):
        model = wrapped(modules_to_save=["lm_head"])
        with torch.no_grad():
            model.base_model.lm_head.weight.add_(1.0)
        expected = logits(model, LONG)

        def disable():
            with pytest.raises(RuntimeError, match="another thread"), model.disable_adapter():
                pass

        results, _ = middle(model).during(lambda: logits(model, LONG), disable)
        assert torch.equal(results, expected)
        assert torch.equal(logits(model, LONG), expected)

        def refused():
            with pytest.raises(RuntimeError, match="disable_adapter"):
                logits(model, LONG)

        def base():
            with model.disable_adapter():
                return logits(model, SHORT)

        alone = base()
        assert torch.equal(middle(model).during(base, refused)[0], alone)
        assert torch.equal(logits(model, LONG), expected)


class TestPool:
    @pytest.mark.parametrize("capacity", [1, 2, 64])
    def test_entries_of_a_forward_in_progress_are_not_given_away(self, tmp_path, capacity):
        model = self.served(tmp_path)
        expected = [logits(model, SHORT, adapter_names=[name] * 2) for name in ("a", "b")]
        assert not torch.equal(*expected)
        model.pool.cache.clear()
        model.pool.capacity = capacity
        results = middle(model).during(
            lambda: logits(model, SHORT, adapter_names=["a"] * 2),
            lambda: logits(model, SHORT, adapter_names=["b"] * 2),
        )
        assert all(map(torch.equal, results, expected))

    def served(self, tmp_path):
        """Put two adapters of equal shapes, which could be confused, into the pool."""
        model = wrapped()
        for seed, name in enumerate(("a", "b")):
            model.pool.add(name, random_adapter(tmp_path / name, seed))
        return model

    def test_an_adapter_that_is_removed_meanwhile(self, folders):
        model = wrapped(layers=[0])
        model.pool.add("plain", folders["plain"])
        expected = logits(model, SHORT, adapter_names=["plain"] * 2)

        def replace():
            model.pool.remove("plain")
            model.pool.add("new", folders["wide"])
            logits(model, SHORT, adapter_names=["new"] * 2)

        results, _ = middle(model).during(
            lambda: logits(model, SHORT, adapter_names=["plain"] * 2), replace
        )
        assert torch.equal(results, expected)

    def test_entries_come_back(self, tmp_path):
        model = self.served(tmp_path)
        model.pool.capacity = 1
        logits(model, SHORT, adapter_names=["a"] * 2)
        alone = model.pool.resident_nbytes
        for name in "babab":
            logits(model, SHORT, adapter_names=[name] * 2)
        assert model.pool.resident_nbytes == alone


def test_two_threads_that_load_adapters_put_one_hook_on_a_block():
    model = wrapped(layers=[0])

    def add(name):
        return lambda: model.add_adapter(name, config(layers="all"))

    all_at_once({name: add(name) for name in ("a", "b", "c", "d")})
    hooks = [len(block._forward_hooks) for block in model.base_model.model.layers]
    assert hooks == [1] * LAYERS


def test_an_interrupted_call_leaves_no_options():
    """torch runs no further hooks after Ctrl-C in a forward."""
    model = wrapped()
    expected = logits(model, LONG)

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model.base_model.model.layers[1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        logits(model, LONG, prompt_lengths=[4, 5, 6])
    handle.remove()
    assert torch.equal(logits(model, LONG), expected)


def test_data_parallel_is_refused():
    with pytest.raises(RuntimeError, match="one process per device"):
        for module in wrapped().modules():  # as nn.DataParallel does
            module._replicate_for_data_parallel()
