"""The pyreft side of the comparison: interventions, dataset, collator and trainer on a tiny Llama.

Imported by ``make_golden.py`` alone, whose text says what is done about pyreft's peculiarities.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator

import pyreft
import torch
from pyreft.reft_trainer import make_data_collator, make_dataloader
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainingArguments

HIDDEN, LAYERS, VOCABULARY, RANK = 64, 3, 61, 4
#: (tokens of the prompt, of the completion before the end mark); for f7+l7 the last two are short
LENGTHS = ((18, 5), (9, 6), (3, 4))
FAMILY = {  # this library's name -> pyreft's class
    "loreft": pyreft.LoreftIntervention,
    "direft": pyreft.NodireftIntervention,
    "noreft": pyreft.NoreftIntervention,
    "direft_orthonormal": pyreft.DireftIntervention,
    "consreft": pyreft.ConsreftIntervention,
    "lobireft": pyreft.LobireftIntervention,
}


# ------------------------------------------------------------------- the model and its batch


def tiny_model() -> LlamaForCausalLM:
    """A random Llama with weights large enough for an edit of the prompt to move the answer."""
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.15,
        # The eager path takes its softmax in float32, where a float64 mask overflows to NaN.
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).eval()


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"t{i}": i for i in range(3, VOCABULARY)}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<s>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<s>",
        padding_side="right",
        model_max_length=64,
    )


class Prompts(pyreft.ReftGenerationDataset):
    """pyreft's dataset, for which a prompt ends one token early; ``prompt_end="last"`` undoes that,
    as the datasets of its examples (the paper's runs) do."""

    def preprocess(self, kwargs: dict) -> None:
        super().preprocess(kwargs)
        self.prompt_end = kwargs["prompt_end"]

    def tokenize(self, data_item: dict) -> tuple[dict, int]:
        result, last_position = super().tokenize(data_item)
        return result, last_position + (self.prompt_end == "last")


def dataset(positions: str, tied: bool, prompt_end: str) -> Prompts:
    """One random prompt and completion for each of ``LENGTHS``."""
    generator = torch.Generator().manual_seed(2)

    def words(count: int) -> str:
        ids = torch.randint(3, VOCABULARY, (count,), generator=generator).tolist()
        return "".join(f"t{i} " for i in ids)

    return Prompts(
        task="golden",
        data_path=None,
        tokenizer=tokenizer(),
        dataset=[{"prompt": words(p), "completion": words(c)} for p, c in LENGTHS],
        prompt_field="prompt",
        completion_field="completion",
        position=positions,
        prompt_end=prompt_end,
        num_interventions=LAYERS * (1 if tied else 2),
        share_weights=tied,
    )


def collated(base: LlamaForCausalLM, data: Prompts) -> dict[str, Tensor]:
    """All of the dataset as one batch."""
    return make_data_collator(data.tokenizer, base)([data[i] for i in range(len(data))])


# ------------------------------------------------------------------- interventions


def intervention(
    name: str,
    rank: int = RANK,
    dim: int = HIDDEN,
    dtype: torch.dtype = torch.float32,
    completion: torch.Generator | None = None,
    **extra: object,
) -> nn.Module:
    """One of pyreft's classes as it initialises itself, its R completed to D × D by ``reflectors``.

    R is made orthonormal in float64 first and then rounded to ``dtype``. With a generator in
    ``completion`` the other columns are random, as in torch.
    """
    arguments = {"add_bias": False, "dtype": torch.float32, **extra}
    module = FAMILY[name](embed_dim=dim, low_rank_dimension=rank, **arguments).to(dtype)
    if not hasattr(module, "rotate_layer"):
        return module
    columns, triangle = torch.linalg.qr(module.rotate_layer.weight.detach().double())
    columns = columns * triangle.diagonal().sign()
    module.reflectors, base = reflectors(columns)
    if completion is not None:
        others = torch.randn(dim, dim - rank, dtype=torch.float64, generator=completion)
        others = torch.linalg.qr(torch.cat([columns, others], dim=1)).Q[:, rank:]
        base = torch.cat([columns, others], dim=1)
    identity = torch.eye(dim, dtype=torch.float64)
    torch.testing.assert_close(base.T @ base, identity, atol=1e-13, rtol=0)
    start = module.rotate_layer.weight.detach()
    torch.testing.assert_close(base[:, :rank].to(dtype), start, atol=1e-6, rtol=0)
    parametrisation = module.rotate_layer.parametrizations.weight
    assert torch.equal(parametrisation.original, -torch.eye(dim, rank, dtype=dtype))
    parametrisation[0].base = base.to(dtype)
    return module


def reflectors(columns: Tensor) -> tuple[Tensor, Tensor]:
    """(packed (D, r), base (D, D)) of Rᵀ (D, r) with orthonormal columns.

    ``torch.geqrf`` writes Rᵀ = H(V₀) E diag(s) with s = ±1. base is H(V₀) with its first r columns
    multiplied by s, an orthogonal completion of Rᵀ. packed holds V₀ strictly below the diagonal
    (its unit diagonal is implied) and −s on it: zero free parameters give H(0) E = −E, hence
    Rᵀ = H(V₀) H(0) E diag(−s).
    """
    packed, tau = torch.geqrf(columns)
    signs = packed.diagonal().sign()
    base = torch.ormqr(packed, tau, torch.eye(columns.shape[0], dtype=columns.dtype))
    base[:, : columns.shape[1]] *= signs
    packed = packed.tril(-1)
    packed.diagonal().copy_(-signs)
    return packed, base


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """rotation, weight, bias, the bias of Noreft's projection, and the packed ``reflectors``."""
    values = {key: value.detach() for key, value in trained(module).items() if key != "free"}
    if hasattr(module, "rotate_layer"):
        values["rotation"] = values["rotation"].T
        values["reflectors"] = module.reflectors.to(values["rotation"].dtype)
    return {key: value.contiguous().clone() for key, value in values.items()}


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """The gradients, ``grad.`` before each name; ``grad.free`` (D, r) is that of the parameter that
    torch's parametrisation trains.

    Left out is what has none: R outside ``one_rotation``, a projection bias that pyreft ignores.
    """
    grads = {k: v.grad for k, v in trained(module).items() if v.is_leaf or v.retains_grad}
    if hasattr(module, "rotate_layer") and "rotation" in grads:
        grads["rotation"] = grads["rotation"].T
    kept = {key: value for key, value in grads.items() if value is not None}
    return {f"grad.{key}": value.contiguous().clone() for key, value in kept.items()}


def trained(module: nn.Module) -> dict[str, Tensor]:
    """The tensors themselves, laid out as pyreft has them."""
    source = module.learned_source
    weight, bias = (None, source) if isinstance(source, Tensor) else (source.weight, source.bias)
    if hasattr(module, "rotate_layer"):
        layer = module.rotate_layer
        parameters = {"rotation": layer.weight, "free": layer.parametrizations.weight.original}
    else:
        projection = module.proj_layer
        parameters = {"rotation": projection.weight, "projection_bias": projection.bias}
    parameters |= {"weight": weight, "bias": bias}
    return {key: value for key, value in parameters.items() if value is not None}


@contextlib.contextmanager
def one_rotation(modules: list[nn.Module]) -> Iterator[None]:
    """Evaluate each R once and keep its gradient while the context lasts."""
    with parametrize.cached():
        for module in modules:
            if hasattr(module, "rotate_layer"):
                module.rotate_layer.weight.retain_grad()
        yield


# ------------------------------------------------------------------- models and training


def reft_model(
    base: LlamaForCausalLM, name: str, tied: bool, **extra: object
) -> tuple[pyreft.ReftModel, list[nn.Module]]:
    """pyreft's model, with an intervention on every layer, twice over (prefixes, then suffixes) if
    untied; and the interventions in that order, which is that of the position lists."""
    config = pyreft.ReftConfig(
        representations=[
            {
                "layer": layer,
                "component": "block_output",
                "low_rank_dimension": RANK,
                "intervention": intervention(name, **extra),
            }
            for layer in list(range(LAYERS)) * (1 if tied else 2)
        ]
    )
    model = pyreft.get_reft_model(base, config)
    return model, [model.interventions[key] for key in model.sorted_keys]


def stacked(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors as (layers, groups, …): group 0 the prefix (or every position), 1 the suffix."""
    stacks = {key: torch.stack([entry[key] for entry in parts]) for key in parts[0]}
    return {
        key: value.unflatten(0, (-1, LAYERS)).transpose(0, 1).contiguous()
        for key, value in stacks.items()
    }


def call(model: pyreft.ReftModel, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(loss, logits), the way pyreft's trainer calls the model."""
    _, output = pyreft.ReftTrainer.compute_loss(None, model, batch, return_outputs=True)
    return output.loss, output.logits


class RecordingTrainer(pyreft.ReftTrainer):
    """pyreft's trainer over one unshuffled batch; keeps every loss unrounded in ``losses``."""

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        return make_dataloader(self.train_dataset, len(LENGTHS), self.data_collator, shuffle=False)

    def compute_loss(
        self, model: nn.Module, inputs: dict, num_items_in_batch: object = None
    ) -> Tensor:
        # pyreft's override predates the last argument, with which current trainers call it.
        loss = super().compute_loss(model, inputs)
        self.losses.append(loss.detach().double())
        return loss


def train(model: pyreft.ReftModel, data: Prompts, steps: int, learning_rate: float) -> Tensor:
    """The losses (steps,) float64, each before its step of AdamW.

    The rate is constant; there is no weight decay (it sets R to zero) and no clipping.
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            num_train_epochs=steps,
            per_device_train_batch_size=len(LENGTHS),
            optim="adamw_torch",
            learning_rate=learning_rate,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=0.0,
            remove_unused_columns=False,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        collator = make_data_collator(data.tokenizer, model.model)
        trainer = RecordingTrainer(model, arguments, train_dataset=data, data_collator=collator)
        trainer.losses = []
        trainer.train()
    assert len(trainer.losses) == steps
    return torch.stack(trainer.losses)
