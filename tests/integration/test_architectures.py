"""For every architecture and component, the edit changes the chosen rows and nothing else."""

from __future__ import annotations

import pytest
import torch
from architectures import (
    ARCHITECTURES,
    DIM,
    LAYERS,
    PAD,
    build,
    call_of,
    config_of,
    wrapped,
)
from block_outputs import outputs
from tiny_models import edit, parameters_of, tokens

from reft import ReftConfig, ReftModel, get_reft_model
from reft.model.blocks import find_blocks

COMPONENTS = ["block_output", "attention_output", "mlp_output"]
CASES = [(name, component) for name in ARCHITECTURES for component in COMPONENTS]
#: Every architecture with one component, every component with a third of the architectures.
ROTATED = [(name, COMPONENTS[index % 3]) for index, name in enumerate(ARCHITECTURES)]


def rows_of(name, spans, columns):
    """Return the rows that are edited, given (first column, tokens) of each sequence."""
    rows = []
    for row, (start, n) in enumerate(spans):
        if ARCHITECTURES[name].decoder:
            edited = range(n)
        else:
            half = n // 2
            edited = [*range(min(2, half)), *range(n - min(1, half), n)]
        rows += [row * columns + start + token for token in edited]
    return rows


@pytest.mark.parametrize(("name", "component"), CASES)
def test_exactly_the_chosen_rows_of_the_chosen_blocks(name, component):
    layers = [0, 2]
    model = wrapped(name, component, layers=layers)
    sites = model.reft.blocks
    architecture = ARCHITECTURES[name]
    path = {"attention_output": architecture.attention, "mlp_output": architecture.mlp}.get(
        component
    )
    modules = [
        block if path is None else block.get_submodule(path)
        for block in model.get_submodule("base_model").get_submodule(architecture.blocks)
    ]
    assert (sites.path, len(sites.layers), sites.dim) == (architecture.blocks, LAYERS, DIM)
    assert [sites.module(layer, component) for layer in range(LAYERS)] == modules
    ids = tokens(2, 8)
    call = call_of(name, ids)
    edited = outputs(model, modules, call)
    # The disabled model, with all modules' outputs replaced: every module has the same input.
    plain = outputs(model, modules, call, again=edited)
    rows = rows_of(name, [(0, 8), (0, 8)], 8)
    values = parameters_of(model)
    for layer in range(LAYERS):
        before, after = plain[layer].reshape(-1, DIM), edited[layer].reshape(-1, DIM)
        if layer not in layers:
            assert torch.equal(after, before)
            continue
        rest = [row for row in range(16) if row not in rows]
        assert torch.equal(after[rest], before[rest])
        expected = edit(before[rows], model.configs["default"], values, layers.index(layer), 0)
        torch.testing.assert_close(after[rows], expected.detach(), rtol=1e-4, atol=1e-5)
        assert (after[rows] - before[rows]).abs().amax(1).min() > 1e-4


@pytest.mark.parametrize(("name", "component"), ROTATED)
def test_a_batch_equals_its_sequences(name, component):
    model, architecture = wrapped(name, component), ARCHITECTURES[name]
    module = model.reft.blocks.module(LAYERS - 1, component)
    lengths = [8, 6, 5]
    for side in ("left", "right"):
        if not getattr(architecture, side):
            continue
        ids, mask = torch.full((3, 8), PAD), torch.zeros(3, 8, dtype=torch.long)
        singles, slices = [], []
        for row, n in enumerate(lengths):
            columns = slice(8 - n, 8) if side == "left" else slice(0, n)
            call = call_of(name, tokens(1, n, seed=row + 1))
            sequence = call["decoder_input_ids"] if architecture.decoder else call["input_ids"]
            ids[row, columns], mask[row, columns] = sequence[0], 1
            singles.append(call)
            slices.append(columns)
        call = call_of(name, ids, mask)
        if architecture.image:
            call["input_ids"] = ids
        (batch,) = outputs(model, [module], call)
        batch = batch.reshape(3, 8, DIM)
        for row, columns in enumerate(slices):
            (alone,) = outputs(model, [module], singles[row])
            torch.testing.assert_close(
                batch[row, columns], alone.reshape(-1, DIM), rtol=1e-3, atol=1e-4
            )


@pytest.mark.parametrize(("name", "component"), ROTATED)
def test_disabled_unloaded_and_loaded(name, component, tmp_path):
    call = call_of(name, tokens(2, 8))
    with torch.no_grad():
        expected = build(name)(**call)[0]
        model = wrapped(name, component)
        got = model(**call)[0]
        assert (got - expected).abs().max() > 1e-4
        with model.disable_adapter():
            assert torch.equal(model(**call)[0], expected)
        model.save_pretrained(tmp_path)
        assert torch.equal(model.unload()(**call)[0], expected)
        again = ReftModel.from_pretrained(build(name), tmp_path)
        assert again.configs["default"].component == component
        assert torch.equal(again(**call)[0], got)


@pytest.mark.parametrize(("name", "component"), ROTATED)
def test_gradients_reach_every_layer(name, component):
    model = wrapped(name, component).train()
    out = model(**call_of(name, tokens(2, 8)))[0]
    torch.manual_seed(7)
    (out.float() * torch.randn_like(out.float())).sum().backward()
    for key, parameter in model.reft.adapter("default").named_parameters():
        # A causal classifier would read a single token; this loss depends on every output.
        assert (parameter.grad.flatten(1).abs().amax(1) > 0).all(), key


GENERATING = [
    pair for pair in ROTATED if ARCHITECTURES[pair[0]].causal or ARCHITECTURES[pair[0]].block_path
]


@pytest.mark.parametrize(("name", "component"), GENERATING)
def test_greedy_tokens_equal_the_slow_loop(name, component):
    architecture, steps = ARCHITECTURES[name], 4
    model = wrapped(name, component)
    with torch.no_grad():
        adapter = model.reft.adapter("default")
        adapter.bias.add_(torch.randn_like(adapter.bias) * 2)
    how = {"max_new_tokens": steps, "min_new_tokens": steps, "do_sample": False}
    if architecture.block_path is None:
        call = call_of(name, tokens(1, 8))
        out = model.generate(**call, **how)[0, 8:]
        ids = call["input_ids"]
        for _ in range(steps):
            with torch.no_grad():
                logits = model(
                    **{**call, "input_ids": ids}, prompt_lengths=[8], use_cache=False
                ).logits[:, -1]
            ids = _next(ids, logits)
        assert out.tolist() == ids[0, 8:].tolist()
        return
    source = tokens(2, 6)
    start = torch.full((2, 1), model.generation_config.decoder_start_token_id)
    prompts = [None, torch.cat([start, tokens(2, 2)], dim=1)] if architecture.decoder else [None]
    for prompt in prompts:
        given = {} if prompt is None else {"decoder_input_ids": prompt}
        out = model.generate(source, **given, **how)
        ids = start if prompt is None else prompt
        n = ids.shape[1]
        for _ in range(steps):
            with torch.no_grad():
                lengths = {"prompt_lengths": [n, n]} if architecture.decoder else {}
                logits = model(
                    input_ids=source, decoder_input_ids=ids, use_cache=False, **lengths
                ).logits[:, -1]
            ids = _next(ids, logits)
        assert out.tolist() == ids.tolist()
        more = {**given, **how, "output_logits": True, "return_dict_in_generate": True}
        first = model.generate(source, **more).logits[0]
        with torch.no_grad():
            whole = model(input_ids=source, decoder_input_ids=start if prompt is None else prompt)
            torch.testing.assert_close(first, whole.logits[:, -1], rtol=1e-4, atol=1e-5)
            with model.disable_adapter():
                plain = model.generate(source, **more).logits[0]
        assert (first - plain).abs().max() > 1e-3


def _next(ids, logits):
    logits[:, 2] = -torch.inf  # what min_new_tokens forbids
    return torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)


class TestEncoderDecoders:
    def test_a_side_has_to_be_named(self):
        says = 'is edited: "encoder.block" or "decoder.block"'
        with pytest.raises(ValueError, match=says):
            find_blocks(build("t5-encoder"))
        with pytest.raises(ValueError, match=r"encoder\.block.*got 'middle'|'middle'"):
            find_blocks(build("t5-encoder"), "middle")

    def test_labels_end_the_decoders_prompt(self):
        """Only the start token and the tokens before the first label are edited."""
        model = wrapped("t5-decoder", "block_output")
        block = model.reft.blocks.layers[0]
        source, labels = tokens(2, 5), tokens(2, 6, seed=4)
        labels[1, :2] = -100
        call = {"input_ids": source, "labels": labels}
        (edited,) = outputs(model, [block], call)
        (plain,) = outputs(model, [block], call, again=[edited])
        changed = (edited != plain).any(-1)
        assert changed.tolist() == [[True] + [False] * 5, [True] * 3 + [False] * 3]

    def test_beams(self):
        for name in ("t5-encoder", "t5-decoder"):
            model = wrapped(name, "block_output")
            source = tokens(2, 6)
            how = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": 3}
            together = model.generate(source, **how)
            for row in range(2):
                alone = model.generate(source[row : row + 1], **how)
                assert alone[0].tolist() == together[row].tolist()

    def test_adapters_by_name_and_given_positions(self):
        model = wrapped("t5-encoder", "block_output")
        model.add_adapter("other", config_of("t5-encoder", "block_output", rank=1))
        block = model.reft.blocks.layers[0]
        source = tokens(3, 6)
        call = {"input_ids": source, "decoder_input_ids": torch.zeros(3, 1, dtype=torch.long)}
        (edited,) = outputs(
            model,
            [block],
            {**call, "adapter_names": ["other", "__base__", "default"],
             "edit_positions": [[1], [2], [-1]]},
        )  # fmt: skip
        (plain,) = outputs(model, [block], call, again=[edited])
        edited_tokens = (edited != plain).any(-1).nonzero().tolist()
        assert edited_tokens == [[0, 1], [2, 5]]


class TestComponents:
    def test_any_module_of_a_block(self):
        torch.manual_seed(3)
        by_name = wrapped("llama", "mlp_output")
        by_path = wrapped("llama", "module:mlp.down_proj")
        ids = tokens(2, 8)
        with torch.no_grad():
            assert torch.equal(by_name(ids).logits, by_path(ids).logits)

    def test_what_a_block_has_not(self):
        base = build("llama")
        says = r"'module:mlp\.middle' is no part of block 0, a LlamaDecoderLayer.*mlp\.down_proj"
        with pytest.raises(ValueError, match=says):
            get_reft_model(base, ReftConfig(component="module:mlp.middle"))
        assert not hasattr(base, "reft")

    def test_an_output_of_another_width(self):
        model = wrapped("llama", "module:mlp.up_proj")
        with pytest.raises(ValueError, match=r"module:mlp.up_proj of block 0 must return .* 24\)"):
            model(tokens(1, 5))

    def test_adapters_of_different_components_together(self):
        model = wrapped("gpt2", "block_output")
        for component in COMPONENTS[1:]:
            model.add_adapter(component, config_of("gpt2", component))
        assert len(model.reft.handles) == 3 * LAYERS
        ids = tokens(3, 6)
        names = ["default", "mlp_output", "attention_output"]
        with torch.no_grad():
            together = model(ids, adapter_names=names).logits
            for row, name in enumerate(names):
                model.set_adapter(name)
                alone = model(ids[row : row + 1]).logits
                torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-5)
        for name in ("default", "mlp_output"):
            model.delete_adapter(name)
        assert {site[1] for site in model.reft.handles} == {"attention_output"}
