"""One rank under each DeepSpeed engine in turn.

Run by torchrun; see test_deepspeed.py. Results go into the folder given as argument: one file for
each ZeRO stage and scene. Only rank 0 writes, because gathered tensors are equal on all ranks.
"""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed.ops
import torch
import transformers.training_args
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from three_steps import CASES, Case, InOrder, batch, make_trainer, short
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.integrations import HfDeepSpeedConfig

from reft.adapter.sharding import full_tensor, is_sharded

#: ZeRO stage -> cases trained under it.
STAGES = {
    0: ("plain",),
    1: ("clipping",),
    2: ("plain", "accumulation"),
    3: ("plain", "checkpointing", "accumulation", "head", "lora", "attention"),
}

#: Stages whose generated texts and saved files are compared.
SAVED = (2, 3)

#: An edit inside a block, whose modules DeepSpeed wraps.
MORE = {"attention": Case(config={"component": "attention_output"})}

#: A run with a checkpoint halfway.
LONG = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}


def on_cpu() -> None:
    """Let DeepSpeed run on a CPU: accelerate does not support it, DeepSpeed compiles a collective
    for a minute, and transformers wants a GPU for bfloat16."""
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_CPU)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    transformers.training_args.is_torch_bf16_gpu_available = lambda: True


def engine(stage: int) -> dict[str, Any]:
    """Build DeepSpeed's configuration; at stage 3 every parameter is sharded, however small."""
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 0
    auto = (
        "train_micro_batch_size_per_gpu",
        "train_batch_size",
        "gradient_accumulation_steps",
        "gradient_clipping",
    )
    return {"zero_optimization": zero, **dict.fromkeys(auto, "auto")}


class Rank:
    """One of the processes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.rank = folder, int(os.environ["RANK"])

    def trainer(
        self, stage: int, scene: str, case: Case, base: nn.Module | None = None, **changes: Any
    ) -> InOrder:
        AcceleratorState._reset_state()
        settings = {**case.arguments, "deepspeed": engine(stage), "use_cpu": False, **changes}
        case = Case(settings, case.config, case.lora)
        folder = self.folder / "runs" / f"{stage}-{scene}"
        return make_trainer(case, folder, rank=self.rank, ranks=2, base=base)

    def store(self, stage: int, scene: str, trainer: InOrder, **facts: Any) -> None:
        facts["weights"] = weights(trainer.model)
        facts["engine"] = type(trainer.model_wrapped).__name__
        facts["losses"] = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        if not self.rank:
            torch.save(facts, self.folder / f"{stage}-{scene}.pt")

    def cases(self, stage: int) -> None:
        for name in STAGES[stage]:
            trainer = self.trainer(stage, name, (CASES | MORE)[name])
            trainer.train()
            shards = sum(map(is_sharded, trainer.model.parameters()))
            self.store(stage, name, trainer, shards=shards)
            if name == "plain" and stage in SAVED:
                texts, logits = outputs(trainer.model)
                self.store(stage, "saved", trainer, texts=texts, logits=logits)
                trainer.save_model(str(self.folder / f"{stage}-model"))
                trainer.save_adapter(self.folder / f"{stage}-adapter")

    def resumed(self, stage: int, name: str) -> None:
        """Train four steps, then resume at step 2 and train the last two again."""
        trainer = self.trainer(stage, f"{name}-long", CASES[name], **LONG)
        trainer.train()
        self.store(stage, f"{name}-long", trainer)
        again = self.trainer(stage, f"{name}-again", CASES[name], **LONG)
        middle = self.folder / "runs" / f"{stage}-{name}-long" / "checkpoint-2"
        try:
            again.train(resume_from_checkpoint=str(middle))
        except ImportError as error:  # PEFT and the oldest transformers do not fit together
            self.store(stage, f"{name}-again", again, unsupported=str(error))
        else:
            self.store(stage, f"{name}-again", again)

    def half(self, stage: int) -> None:
        """Train in bfloat16: DeepSpeed casts all modules, its optimizer keeps float32
        parameters."""
        config = {**engine(stage), "bf16": {"enabled": "auto"}}
        trainer = self.trainer(stage, "half", CASES["plain"], bf16=True, deepspeed=config)
        trainer.train()
        self.store(stage, "half", trainer)
        trainer.save_adapter(self.folder / f"{stage}-half-adapter")

    def sharded_while_loaded(self, name: str) -> None:
        """Train on a base that from_pretrained has sharded, because a ZeRO-3
        configuration exists."""
        zero = engine(3)["zero_optimization"]
        settings = HfDeepSpeedConfig(
            {"zero_optimization": zero, "train_micro_batch_size_per_gpu": 2}
        )
        base = LlamaForCausalLM.from_pretrained(self.folder / "base")
        assert settings.is_zero3() and base.lm_head.weight.numel() == 0
        trainer = self.trainer(3, f"{name}-loaded", CASES[name], base)
        trainer.train()
        self.store(3, f"{name}-loaded", trainer)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Gather the trainable parameters; every rank must call this."""
    trained = {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    return {short(name): full_tensor(parameter).clone() for name, parameter in trained.items()}


def outputs(model: Any) -> tuple[list[Tensor], Tensor]:
    """Generate by greedy and beam search, and compute logits."""
    model.eval()
    inputs = {name: value.flip(1) for name, value in batch(3).items() if name != "labels"}
    how = {"max_new_tokens": 6, "do_sample": False}
    with torch.no_grad():
        texts = [model.generate(**inputs, num_beams=beams, **how) for beams in (1, 2)]
        return texts, model(**inputs).logits.clone()


def main(folder: Path) -> None:
    on_cpu()
    rank = Rank(folder)
    for stage in STAGES:
        rank.cases(stage)
    rank.resumed(2, "plain")
    rank.resumed(3, "lora")
    rank.half(2)
    rank.half(3)
    rank.sharded_while_loaded("head")


if __name__ == "__main__":
    torch.set_num_threads(1)
    gc.freeze()  # every training collects garbage: exclude the imported modules
    main(Path(sys.argv[1]))
    gc.unfreeze()  # frozen objects would leave threads of the process group running at exit
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
