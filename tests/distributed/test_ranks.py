"""Training on two ranks under DDP and FSDP2, of accelerate and of transformers, equals training in
one process."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import LONG, NATIVE
from safetensors.torch import load_file
from three_steps import CASES, STEPS, batch, largest_difference, make_base, make_trainer, trained

from reft import ReftModel
from reft.io.adapter_files import read_adapter

#: float32 resolves 6e-8 at 1; weights are about 1, gradients about 0.1.
ROUNDING = 1e-7

ENGINES = [
    *(("ddp", scene) for scene in CASES),
    *(("native", scene) for scene in NATIVE),
    *(("fsdp2", scene) for scene in CASES),
]


def load_results(folder: Path, engine: str, scene: str) -> list[dict[str, Any]]:
    """Load the results of each rank; skip where the installed versions lack the feature."""
    results = [
        torch.load(folder / f"{engine}.{scene}.{rank}.pt", weights_only=False) for rank in (0, 1)
    ]
    for result in results:
        if (
            "unsupported" in result
        ):  # on the oldest versions; this library or PEFT names the feature
            pattern = (
                "a later one can|as 1.15.0 can|must say use_reentrant=False|cannot import name"
            )
            assert re.search(pattern, result["unsupported"])
            pytest.skip(result["unsupported"])
    return results


def alone(folder: Path, scene: str) -> dict[str, Any]:
    """Load the results of one process."""
    return torch.load(folder / f"one.{scene}.pt", weights_only=False)


def assert_equal(result: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert largest_difference(result["weights"], wanted["weights"]) <= ROUNDING
    last = len(result["gradients"])
    assert last > 0
    for ours, theirs in zip(result["gradients"], wanted["gradients"][-last:], strict=True):
        assert largest_difference(ours, theirs) <= ROUNDING
        assert max(float(tensor.abs().max()) for tensor in theirs.values()) > 1e4 * ROUNDING
    assert result["losses"] == pytest.approx(wanted["losses"], abs=2e-6)
    assert result["norms"] == pytest.approx(wanted["norms"], rel=1e-6)


@pytest.mark.parametrize(("engine", "scene"), ENGINES)
def test_three_steps_are_those_of_one_process(ranks_folder, engine, scene):
    wanted = alone(ranks_folder, scene)
    assert len(wanted["losses"]) == STEPS
    if scene == "clipping":
        assert min(wanted["norms"]) > CASES[scene].arguments["max_grad_norm"]
    for result in load_results(ranks_folder, engine, scene):
        assert_equal(result, wanted)
    kind = {"ddp": "DistributedDataParallel", "native": "ReftModel", "fsdp2": "FSDPReftModel"}
    assert result["kind"] == kind[engine]


def test_units_are_those_of_the_bare_base(ranks_folder):
    [result, _] = load_results(ranks_folder, "fsdp2", "plain")
    [counted, _] = load_results(ranks_folder, "fsdp2", "units")
    blocks = make_base().config.num_hidden_layers
    assert result["units"] == counted["bare"] > blocks


@pytest.mark.parametrize("setting", ["cpu_ram_efficient_loading", "activation_checkpointing"])
def test_settings_of_accelerate_change_no_number(ranks_folder, setting):
    for result in load_results(ranks_folder, "fsdp2", setting):
        assert_equal(result, alone(ranks_folder, "plain"))


def test_the_adapter_stays_in_full_precision_under_a_policy_of_bfloat16(ranks_folder):
    ranks = load_results(ranks_folder, "fsdp2", "mixed")
    first = ranks[0]["first"]  # rank 0's initialisation, which was broadcast
    expected = first["weight"] - first["rotation"]
    for result in ranks:
        assert result["dtype"] == torch.float32
        torch.testing.assert_close(result["encode"], expected[0], rtol=0.0, atol=2e-7)
        # The base computes in bfloat16: gradients differ by its 8 bits.
        wanted = alone(ranks_folder, "plain")
        for ours, theirs in zip(result["gradients"][:1], wanted["gradients"][:1], strict=True):
            for name in theirs:
                assert (ours[name] - theirs[name]).norm() < 0.03 * theirs[name].norm()


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_all_ranks_find_alike_that_nothing_would_be_trained(ranks_folder, engine):
    for result in load_results(ranks_folder, engine, "answers all"):
        assert result["steps"] == 0
        assert "nothing would be trained" in result["error"]
    for scene in ("one rank's", "the first"):
        for result in load_results(ranks_folder, engine, f"answers {scene}"):
            assert result == {"steps": STEPS, "error": ""}


# ------------------------------------------------------------------ checkpoints


RESUMED = [("ddp", "long"), ("fsdp2", "long"), ("fsdp2", "long lora")]


@pytest.mark.parametrize(("engine", "run"), RESUMED)
def test_resuming_with_as_many_ranks_is_bit_for_bit(ranks_folder, engine, run):
    whole, again = (
        load_results(ranks_folder, engine, run),
        load_results(ranks_folder, engine, f"{run} again"),
    )
    for ours, theirs in zip(again, whole, strict=True):
        assert ours["losses"] == theirs["losses"]
        assert largest_difference(ours["weights"], theirs["weights"]) == 0.0
        assert_equal(theirs, alone(ranks_folder, run))


@pytest.mark.parametrize(("engine", "run"), RESUMED)
def test_two_ranks_go_on_from_one(ranks_folder, engine, run):
    for result in load_results(ranks_folder, engine, f"{run} from one"):
        assert len(result["gradients"]) == 3
        assert_equal(result, alone(ranks_folder, run))


@pytest.mark.parametrize(("engine", "run"), RESUMED)
def test_one_goes_on_from_two_ranks(ranks_folder, engine, run, tmp_path):
    load_results(ranks_folder, engine, run)
    trainer = make_trainer(LONG[run], tmp_path)
    checkpoint = ranks_folder / "runs" / engine / run / "checkpoint-3"
    result = trained(trainer, resume_from_checkpoint=str(checkpoint))
    assert len(result["gradients"]) == 3
    assert_equal(result, alone(ranks_folder, run))


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_checkpoints_are_the_files_of_one_process_without_the_base(ranks_folder, engine):
    def files(run: str) -> set[str]:
        return {path.name for path in (ranks_folder / "runs" / run / "long/checkpoint-3").iterdir()}

    random = {"rng_state_0.pth", "rng_state_1.pth"}
    assert files(engine) - random == files("one") - {"rng_state.pth"}
    assert random <= files(engine)


def test_the_best_checkpoint_is_loaded_into_shards(ranks_folder):
    for result in load_results(ranks_folder, "fsdp2", "best"):
        best = Path(result["best"].replace("making-ranks", "ranks"))
        assert best.name == "checkpoint-2"  # the last checkpoint's weights are in the model already
        _, stored = read_adapter(best)
        weights = {name.rpartition(".")[2]: tensor for name, tensor in result["weights"].items()}
        assert torch.equal(weights["weight"], stored["weight"])
        assert torch.equal(weights["free"], stored["rotation.free"])


def test_a_state_dict_of_shards_is_all_of_the_adapter(ranks_folder):
    ranks = load_results(ranks_folder, "fsdp2", "state")
    [prefix] = [key.removesuffix("base") for key in ranks[0]["keys"] if key.endswith(".base")]
    assert prefix.endswith("reft.adapters.default.")
    for result in ranks:
        for way in ("parts", "whole"):
            away, back = result["found"][way]
            assert away > 0.1
            assert back == 0.0


# ------------------------------------------------------------------ saved files and generation


@pytest.mark.parametrize("engine", ["ddp", "native", "fsdp2"])
def test_what_is_written_and_generated_is_that_of_one_process(ranks_folder, engine):
    wanted, ranks = (
        alone(ranks_folder, "plain")["weights"],
        load_results(ranks_folder, engine, "saved"),
    )
    adapter = ranks_folder / f"{engine}-adapter"
    model = ReftModel.from_pretrained(make_base(), adapter)
    stored = load_file(adapter / "adapter_model.safetensors")
    for name in ("weight", "bias"):
        [there] = [tensor for key, tensor in wanted.items() if key.endswith(name)]
        assert float((stored[name] - there).abs().max()) <= ROUNDING
    assert {path.name for path in adapter.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    complete = load_file(ranks_folder / f"{engine}-model" / "adapter_model.safetensors")
    assert complete.keys() == stored.keys()
    assert all(torch.equal(complete[name], stored[name]) for name in stored)
    for result in ranks:
        for beams, text in zip((1, 2), result["texts"], strict=True):
            expected = model.generate(
                **batch(3), max_new_tokens=6, num_beams=beams, do_sample=False
            )
            assert torch.equal(text, expected)


# ------------------------------------------------------------------ communication


def test_ddp_sends_the_gradients_of_the_adapter_and_nothing_of_the_base(ranks_folder):
    size = 4 * sum(tensor.numel() for tensor in alone(ranks_folder, "plain")["weights"].values())
    for result in load_results(ranks_folder, "ddp", "wire"):
        sent = dict(result["bytes"])
        assert sent.pop("allreduce_") == size
        assert sum(sent.values()) <= 64  # Trainer's token count, loss and gradient norm


def test_fsdp2_reduces_the_gradients_of_the_adapter_and_nothing_of_the_base(ranks_folder):
    weights = alone(ranks_folder, "plain")["weights"].values()
    # The first dimension, the layers, is sharded and padded to a multiple of the ranks.
    size = 4 * sum(-(-tensor.shape[0] // 2) * 2 * tensor[0].numel() for tensor in weights)
    for result in load_results(ranks_folder, "fsdp2", "wire"):
        assert result["bytes"]["_reduce_scatter_base_"] == size
        assert "allreduce_" not in result["bytes"]
