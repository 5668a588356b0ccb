"""Packed batches in the trainers: metrics and gradients equal those of padded ones; refusals and log lines."""

import gc
import json
import logging
import weakref

import peft
import pytest
import tiny
import torch
import transformers
from datasets import Dataset
from transformers import AutoModelForCausalLM, TrainerCallback

from fusedalign.packing import PackedBatch, RightPadded, enable_sharded
from fusedalign.packing.attention import PREFIX
from fusedalign.packing.proof import twin
from fusedalign.trl import attach, attachment, detach
from fusedalign.trl import layouts as trl_layouts
from fusedalign.trl.layouts import MASKED, PACKED, UNMASKED

PACK = [("packed", True)]


def sdpa(name, folder):
    return lambda: AutoModelForCausalLM.from_pretrained(folder(name), attn_implementation="sdpa")


def long_prompts(kind, n=8, longest=12):
    """Prompts longer than their answers, so that sharing them pays also with gradients."""
    words, sides = tiny.WORDS, ("chosen", "rejected")
    rows = []
    for i in range(n):
        prompt = " ".join(words[(i + k) % len(words)] for k in range(longest + i % 3))
        answers = [
            " " + " ".join(words[(2 * i + 3 * j + k) % len(words)] for k in range(1 + (i + j) % 2)) for j in (0, 1)
        ]
        rows.append({"prompt": prompt, **dict(zip(sides, answers, strict=True))})
    if kind == "kto":
        rows = [{"prompt": r["prompt"], "completion": r[sides[i % 2]], "label": i % 2 == 0} for i, r in enumerate(rows)]
    return Dataset.from_list(rows)


# The proof on a small model


@pytest.mark.parametrize(
    ("options", "experts"),
    [
        ({"num_experts": 64, "num_experts_per_tok": 3}, 6),
        ({"num_experts": 4, "num_experts_per_tok": 3}, 4),
        ({"num_experts": 64, "num_experts_per_tok": 3, "n_group": 8, "topk_group": 1}, 24),
    ],
)
def test_a_mixture_is_proven_with_few_experts(options, experts):
    """n_group and topk_group are read as DeepSeek routes: the groups that a token takes must hold its experts."""
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(**tiny.SMALL, **options, head_dim=8, moe_intermediate_size=16)
    model = transformers.Qwen3MoeForCausalLM._from_config(config, attn_implementation="sdpa")
    small = twin(model, torch.device("cpu"))
    assert small.config.num_experts == experts
    assert config.num_experts == options["num_experts"]
    proof = enable_sharded(model, torch.device("cpu"))
    assert proof.difference <= proof.allowed


# Metrics

CASES = {
    "sft": ("sft", {}),
    "sft, dft": ("sft", {"loss_type": "dft"}),
    "sft, packed": ("sft", {"packing": True, "max_length": 24}),
    "sft, packed and wrapped": ("sft", {"packing": True, "packing_strategy": "wrapped", "max_length": 24}),
    "sft, padding-free": ("sft", {"padding_free": True, "max_length": None}),
    "sft, prompts too": ("sft", {"completion_only_loss": False}),
    "sft, gradient checkpointing": ("sft", {"gradient_checkpointing": True}),
    "sft, experts": ("sft", {"model": "qwen3_moe"}),
    "sft, a bias in the head": ("sft", {"model": "phi"}),
    "dpo": ("dpo", {"loss_type": ["sigmoid"]}),
    "dpo, ipo": ("dpo", {"loss_type": ["ipo"]}),
    "dpo, ld_alpha": ("dpo", {"ld_alpha": 0.4}),
    "dpo, wpo": ("dpo", {"use_weighting": True}),
    "dpo, synchronised reference": ("dpo", {"sync_ref_model": True, "ref_model_sync_steps": 2}),
    "dpo, precomputed reference": ("dpo", {"precompute_ref_log_probs": True}),
    "dpo, gradient checkpointing": ("dpo", {"gradient_checkpointing": True}),
    "dpo, a scale": ("dpo", {"model": "granite"}),
    "dpo, experts": ("dpo", {"model": "qwen3_moe"}),
    "orpo, experts": ("orpo", {"model": "qwen3_moe"}),
    "kto": ("kto", {}),
    "kto, odd batch": ("kto", {"per_device_train_batch_size": 3, "desirable_weight": 1.5, "undesirable_weight": 0.7}),
    "kto, apo": ("kto", {"loss_type": "apo_zero_unpaired"}),
    "kto, precomputed reference": ("kto", {"precompute_ref_log_probs": True}),
    "cpo": ("cpo", {}),
    "simpo": ("cpo", {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.7}),
    "cpo, gradient checkpointing": ("cpo", {"gradient_checkpointing": True}),
    "orpo": ("orpo", {}),
    "orpo, accumulation": ("orpo", {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}),
    "tpo": ("tpo", {}),
    "tpo, tpo-l": ("tpo", {"loss_type": "tpo-l", "label_smoothing": 0.1}),
    "tpo, no gold": ("tpo", {"tpo_alpha": 0.0}),
    # Stock histories of these are used only here.
    "dpo, reentrant checkpointing": (
        "dpo",
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    ),
    "dpo, cut at the beginning": ("dpo", {"max_length": 9, "truncation_mode": "keep_end"}),
    "dpo, windows": ("dpo", {"model": "gemma3"}),
    "sft, windows": ("sft", {"model": "mistral"}),
}


def without_mean_logits(kind, rows):
    """Drop mean logits of CPO and ORPO, which include padding; packed rows have none."""
    if kind not in ("cpo", "orpo"):
        return rows
    return [{name: x for name, x in row.items() if "logits/" not in name} for row in rows]


#: Cases that packing treats as others: another loss of the same log-probabilities, or another trainer's option.
LIKE_OTHERS = {
    *("sft, dft", "sft, packed and wrapped", "sft, prompts too", "sft, gradient checkpointing"),
    *("dpo, ipo", "dpo, ld_alpha", "dpo, wpo", "dpo, a scale", "kto, apo"),
    *("orpo, experts", "cpo, gradient checkpointing", "tpo, tpo-l", "tpo, no gold"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in LIKE_OTHERS else []) for name in CASES]
)
def test_packed_metrics_equal_those_of_padded_rows(build, stock_history, name):
    kind, options = CASES[name]
    trainer = build(kind, "fused", head=PACK, **options)
    assert trainer.layouts.kind == PACKED
    got, want = tiny.history(trainer), stock_history(kind, **options)
    assert [row.keys() for row in got] == [row.keys() for row in want]
    tiny.assert_same(without_mean_logits(kind, got), without_mean_logits(kind, want))
    assert len({row["loss"] for row in got if "loss" in row}) > 1  # the model was trained


@pytest.mark.parametrize("kind", ["cpo", "orpo"])
@pytest.mark.parametrize("model", ["phi", "gemma3"])
def test_packed_mean_logits_are_means_over_tokens(build, tiny_folder, kind, model):
    """For a head with a bias and one with a softcap."""
    arguments = [("model", sdpa(model, tiny_folder))]
    trainer = build(kind, "fused", head=PACK, arguments=arguments, max_steps=1)
    assert trainer.layouts.kind == PACKED
    batch = next(iter(trainer.get_train_dataloader()))
    inputs = trainer.concatenated_inputs(batch, padding_value=0, device="cpu")
    ids, mask = inputs["concatenated_input_ids"], inputs["concatenated_attention_mask"]
    with torch.no_grad():
        logits = trainer.model(input_ids=ids, attention_mask=mask).logits.mean(-1)
    means = torch.stack([row[real.bool()].mean() for row, real in zip(logits, mask, strict=True)])
    _, metrics = trainer.get_batch_loss_metrics(trainer.model, batch)
    for side, want in zip(("chosen", "rejected"), means.chunk(2), strict=True):
        assert float(metrics[f"logits/{side}"]) == pytest.approx(want.mean().item(), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("kind", ["cpo", "orpo"])
def test_padded_rows_keep_their_mask_if_mean_logits_include_padding(build, kind):
    """TRL's mean logits include padding, and its hidden states depend on the mask."""
    assert build(kind, "fused", max_steps=1).layouts.kind == MASKED


# Gradients


def gradients(trainer, name=None):
    """Gradients of all trained parameters after one batch, and the loss."""
    trainer.model.train()
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None} | {"loss": loss.detach()}


def assert_same_gradients(got, want):
    assert got.keys() == want.keys()
    assert any(x.abs().max() > 1e-3 for name, x in want.items() if name != "loss")
    for name, x in want.items():
        torch.testing.assert_close(got[name], x, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def head_adapters():
    return peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False, task_type="CAUSAL_LM")


@pytest.mark.parametrize("kind", ["sft", "dpo", "kto", "cpo", "orpo", "tpo"])
@pytest.mark.parametrize("adapters", [None, tiny.lora, head_adapters], ids=["all weights", "lora", "lora on the head"])
def test_packed_gradients_equal_those_of_padded_rows(build, kind, adapters):
    arguments = [] if adapters is None else [("peft_config", adapters)]
    if adapters is not None and kind in ("cpo", "orpo"):
        arguments = [("peft_config", adapters)]
    got, want = (gradients(build(kind, "fused", head=[("packed", p)], arguments=arguments)) for p in (True, False))
    assert_same_gradients(got, want)


def test_accumulation_changes_nothing(build):
    histories = [
        tiny.history(
            build(
                "dpo",
                "fused",
                head=PACK,
                rows=8,
                max_steps=3,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=8 // size,
            ),
            evaluate=False,
        )
        for size in (1, 8)
    ]
    losses = [[(row["loss"], row["grad_norm"]) for row in rows if "loss" in row] for rows in histories]
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{"precompute_ref_log_probs": True}, {}])
def test_packed_lora_reference_equals_the_padded_one(build, options):
    """The reference is the model with disabled adapters."""
    arguments = [("peft_config", tiny.lora)]
    options = {"arguments": arguments, "max_steps": 3, **options}
    got, want = (tiny.history(build("dpo", "fused", head=[("packed", p)], **options)) for p in (True, False))
    tiny.assert_same(got, want)


# KTO


@pytest.mark.parametrize("prompts", ["short", "long"])
@pytest.mark.parametrize("precomputed", [False, True])
def test_kto_rows_run_together_if_that_takes_fewer_tokens(build, prompts, precomputed):
    options = {"precompute_ref_log_probs": precomputed, "max_steps": 3}
    if prompts == "long":
        options["data"] = long_prompts("kto")
    trainer, widths = build("kto", "fused", head=PACK, **options), []
    batch = next(iter(trainer.get_train_dataloader()))
    layouts = batch["layout"]
    assert layouts.joined(False) is layouts.both  # for the reference it always pays
    assert (layouts.joined(True) is layouts.both) == (prompts == "long")
    trainer.model.base_model.register_forward_pre_hook(
        lambda m, a, k: widths.append((k["input_ids"].shape[1], torch.is_grad_enabled())), with_kwargs=True
    )
    reference_calls = []
    if trainer.ref_model is not None and not precomputed:
        trainer.ref_model.base_model.register_forward_pre_hook(lambda m, a: reference_calls.append(m))
    got = tiny.history(trainer, evaluate=False)
    want = tiny.history(build("kto", "stock", **options), evaluate=False)
    tiny.assert_same(got, want)
    assert len(widths) == 3 * (1 if prompts == "long" else 2)
    assert len(reference_calls) == (0 if precomputed else 3)


# Complete trainings


@pytest.mark.parametrize(
    ("kind", "variant", "options"),
    [
        ("dpo", "fused", {}),
        ("dpo", "fused", {"precompute_ref_log_probs": True}),
        ("dpo", "attached", {}),
        ("cpo", "fused", {}),
        ("orpo", "fused", {}),
        ("tpo", "fused", {}),
    ],
)
def test_answers_share_their_prompt(build, kind, variant, options):
    """Every forward computes each prompt once."""
    options, answers = options | {"max_steps": 2}, 3 if kind == "tpo" else 2
    if kind != "tpo":
        options["data"] = long_prompts(kind)
    if variant == "attached":
        trainer = attach(build(kind, "stock", **options), packed=True)
    else:
        trainer = build(kind, "fused", head=PACK, **options)
    sizes, expected = [], []
    for model in trl_layouts.models_of(trainer):
        model.get_input_embeddings().register_forward_pre_hook(lambda m, args: sizes.append(args[0].numel()))
    for batch in trainer.get_train_dataloader():
        layout = batch["layout"]
        groups = [
            [ids[keep].tolist() for ids, keep in zip(layout.input_ids[0][rows], valid, strict=True)]
            for rows, valid in zip(layout.token_index.chunk(answers), layout.valid.chunk(answers), strict=True)
        ]
        count = 0
        for first, *others in zip(*groups, strict=True):
            count += len(first)
            for row in others:
                equal = [x == y for x, y in zip(first, row, strict=False)]
                count += len(row) - [*equal, False].index(False)
        expected.append(count)
        assert layout.input_ids.numel() == count < layout.valid.sum()
    tiny.history(trainer, evaluate=False)
    assert set(sizes) <= set(expected)


def test_every_call_is_packed(build, monkeypatch):
    """Policy and reference, in training and evaluation: no backbone gets a padded batch."""
    shapes = []
    trainer = build("dpo", "fused", head=PACK, max_steps=1)
    for model in trl_layouts.models_of(trainer):
        model.base_model.register_forward_pre_hook(
            lambda m, a, k: shapes.append((len(k["input_ids"]), type(k["layout"]))), with_kwargs=True
        )
    tiny.history(trainer)
    assert len(shapes) == 2 + 2 * 2
    assert set(shapes) == {(1, PackedBatch)}


def test_streams_are_packed_in_the_step(build):
    """The main process reads the batches of all processes, so layouts are computed in the step."""
    options = {"max_steps": 3, "eval_strategy": "no"}
    data = tiny.data("dpo", 12)
    want = tiny.history(build("dpo", "fused", head=[("packed", False)], data=data, **options), evaluate=False)
    losses = []
    for packed in (True, False):
        trainer = build(
            "dpo",
            "fused",
            head=[("packed", packed)],
            data=data.to_iterable_dataset(),
            arguments=[("eval_dataset", lambda: data.to_iterable_dataset())],
            **options,
        )
        losses.append(tiny.history(trainer))
    tiny.assert_same(*losses)
    assert len(losses[0]) > len(want)


def test_dataloader_workers_and_several_evaluation_sets_pack(build):
    def sets():
        return {"a": tiny.data("dpo", 4), "b": tiny.data("dpo", 6)}

    options = {"max_steps": 2, "arguments": [("eval_dataset", sets)], "data": tiny.data("dpo", 12)}
    got, want = (
        tiny.history(build("dpo", "fused", head=[("packed", p)], dataloader_num_workers=n, **options))
        for p, n in ((True, 1), (False, 0))
    )
    tiny.assert_same(got, want)
    assert any("eval_b_loss" in row for row in got)


@pytest.mark.parametrize("packed", [True, pytest.param("auto", marks=pytest.mark.slow)])
def test_a_compiled_model_packs(build, tiny_folder, packed):
    options = {"max_steps": 2, "arguments": [("model", sdpa("qwen3", tiny_folder))]}
    want = tiny.history(build("dpo", "fused", head=[("packed", False)], **options), evaluate=False)
    options |= {"torch_compile": True, "torch_compile_backend": "eager"}
    tiny.assert_same(tiny.history(build("dpo", "fused", head=[("packed", packed)], **options), evaluate=False), want)


class Generating(TrainerCallback):
    def __init__(self):
        self.answers = []

    def on_step_end(self, args, state, control, model=None, **_):
        ids = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 3]])
        with torch.no_grad():
            self.answers.append(model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0))


def test_generation_between_steps_is_unchanged(build):
    runs = []
    for packed in (True, False):
        callback = Generating()
        options = {"max_steps": 3, "arguments": [("callbacks", lambda c=callback: [c])]}
        trainer = build("dpo", "fused", head=[("packed", packed)], **options)
        runs.append((tiny.history(trainer, evaluate=False), callback.answers))
    tiny.assert_same(runs[0][0], runs[1][0])
    assert all(map(torch.equal, runs[0][1], runs[1][1]))


@pytest.mark.parametrize("adapters", [False, True])
def test_saved_models_show_no_trace_of_packing(build, tmp_path, adapters):
    arguments = [("peft_config", tiny.lora)] if adapters else []
    trainer = build("dpo", "fused", head=PACK, max_steps=1, arguments=arguments)
    trainer.train()
    trainer.save_model(str(tmp_path))
    trainer.model.config.save_pretrained(str(tmp_path / "config"))
    for file in tmp_path.rglob("*.json"):
        assert PREFIX not in file.read_text(), file.name
    if adapters:
        return
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert PREFIX not in reloaded.config._attn_implementation
    torch.testing.assert_close(reloaded.eval()(ids).logits, trainer.model.eval()(ids).logits, rtol=1e-5, atol=1e-5)


def test_consecutive_trainers_on_one_model_do_not_interfere(build):
    """Packed SFT, padded DPO, stock DPO and packed DPO each train as with a separate model."""

    def runs(own):
        model = None
        for kind, variant, packed in (
            ("sft", "fused", True),
            ("dpo", "fused", False),
            ("dpo", "stock", None),
            ("dpo", "fused", True),
        ):
            if model is not None and own:
                model = tiny_copy(model)
            arguments = [] if model is None else [("model", lambda m=model: m)]
            trainer = build(kind, variant, max_steps=2, arguments=arguments, head=[("packed", packed)])
            yield tiny.history(trainer)
            model = trainer.model

    def tiny_copy(model):
        fresh = type(model)(transformers.AutoConfig.for_model(**model.config.to_dict()))
        fresh.load_state_dict(model.state_dict())
        return fresh

    for got, want in zip(runs(own=False), runs(own=True), strict=True):
        tiny.assert_same(got, want)


# Attach


@pytest.mark.parametrize(
    ("kind", "model"), [("sft", "qwen3"), ("sft", "qwen3_moe"), ("dpo", "qwen3"), ("kto", "qwen3")]
)
def test_attached_trainers_pack(build, stock_history, kind, model):
    options = {"loss_type": ["sigmoid"]} if kind == "dpo" else {}
    options |= {} if model == "qwen3" else {"model": model}
    trainer = build(kind, "stock", **options)
    models = trl_layouts.models_of(trainer)
    collator, shapes = trainer.data_collator, []
    attach(trainer, packed=True)
    for model in models:
        embeddings = model.get_input_embeddings()
        embeddings.register_forward_pre_hook(lambda m, a: shapes.append(len(a[0])))
    tiny.assert_same(tiny.history(trainer), stock_history(kind, **options))
    assert set(shapes) == {1}
    detach(trainer)
    assert trainer.data_collator is collator
    for model in models:
        assert "forward" not in vars(model.base_model)
    shapes.clear()
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.compute_loss(trainer.model, batch)
    assert set(shapes) != {1}


def test_attach_refuses_trainers_without_packing(build):
    from test_attach import ONLINE

    trainer = build("grpo", "stock", **ONLINE)
    with pytest.raises(ValueError, match="packed must be False for GRPOTrainer, got True"):
        attach(trainer, packed=True)


def test_a_refused_attach_leaves_no_trace(build):
    trainer = build("dpo", "stock", model="gemma2")
    collator = trainer.data_collator
    with pytest.raises(ValueError, match="softcap"):
        attach(trainer, packed=True)
    assert trainer not in attachment._attached
    assert trainer.data_collator is collator
    assert not trainer.model.config._attn_implementation.startswith(PREFIX)


def test_an_attached_trainer_is_garbage_collected(build):
    trainer = attach(build("sft", "stock"), packed=True)
    reference = weakref.ref(trainer)
    del trainer
    gc.collect()
    assert reference() is None


# Refusals


@pytest.mark.parametrize("packed", ["auto", True])
def test_attention_dropout_is_refused_or_padded(build, packed):
    """Default GPT-2: packed=True is refused at construction, "auto" pads."""
    config = transformers.GPT2Config(vocab_size=419, n_embd=16, n_layer=2, n_head=2, n_positions=64)
    options = {"arguments": [("model", lambda: transformers.GPT2LMHeadModel(config))], "max_steps": 1}
    if packed is True:
        with pytest.raises(ValueError, match="GPT2Attention has dropout in its attention"):
            build("sft", "fused", head=PACK, **options)
        return
    trainer = build("sft", "fused", **options)
    assert trainer.layouts.kind == MASKED
    trainer.train()


@pytest.mark.parametrize("value", ["maybe", 1, None, "true"])
def test_unknown_values_of_packed_are_refused(build, value):
    with pytest.raises(ValueError, match="packed must be 'auto', True or False, got"):
        build("sft", "fused", head=[("packed", value)])


@pytest.mark.parametrize(
    ("model", "kind", "reason"),
    [
        ("gemma2", "dpo", "packed=True needs a model that can run packed: Gemma2Attention has softcap"),
        ("falcon_h1", "sft", "packed=True needs a model that can run packed: FalconH1ForCausalLM carries a state"),
        ("t5", "orpo", "T5ForConditionalGeneration is an encoder-decoder"),
    ],
)
def test_unpackable_models_are_refused(build, model, kind, reason):
    with pytest.raises(ValueError, match=reason):
        build(kind, "fused", model=model, head=PACK)


def test_virtual_tokens_are_refused_or_padded(build):
    config = lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)  # noqa: E731
    with pytest.raises(ValueError, match="PROMPT_TUNING puts virtual tokens before each row"):
        build("sft", "fused", head=PACK, arguments=[("peft_config", config)])
    assert build("sft", "fused", arguments=[("peft_config", config)]).layouts.kind == MASKED


def test_auto_on_a_cpu_pads_and_logs_it(build, tiny_folder, caplog):
    caplog.set_level(logging.INFO, "fusedalign")
    expected = {
        "sdpa": (UNMASKED, "FusedSFTTrainer, batches: right-padded without a mask (packed='auto' packs on CUDA)"),
        "eager": (MASKED, "FusedSFTTrainer, batches: padded with a mask (packed='auto' packs on CUDA; eager attention"),
    }
    for attention, (kind, line) in expected.items():
        caplog.clear()
        load = lambda a=attention: AutoModelForCausalLM.from_pretrained(tiny_folder("qwen3"), attn_implementation=a)  # noqa: E731
        trainer = build("sft", "fused", arguments=[("model", load)])
        assert trainer.layouts.kind == kind
        messages = [r.getMessage() for r in caplog.records if "batches: " in r.getMessage()]
        assert len(messages) == 1
        assert messages[0].startswith(line)


# Right-padded rows, other collators


def recorded_layouts(trainer):
    layout_types = []
    trainer.model.base_model.register_forward_pre_hook(
        lambda m, a, k: layout_types.append(type(k.get("layout")).__name__), with_kwargs=True
    )
    return layout_types


@pytest.mark.parametrize("kind", ["sft", "dpo", "kto", "tpo"])
def test_right_padded_rows_take_no_mask(build, tiny_folder, kind):
    arguments = [("model", sdpa("qwen3", tiny_folder))]
    trainer = build(kind, "fused", arguments=arguments)
    assert trainer.layouts.kind == UNMASKED
    layout_types = recorded_layouts(trainer)
    got, want = tiny.history(trainer), tiny.history(build(kind, "stock", arguments=arguments))
    assert set(layout_types) == {RightPadded.__name__}
    tiny.assert_same(without_mean_logits(kind, got), without_mean_logits(kind, want))


class LeftPadding:
    """A collator of left-padded SFT rows; `mask` and `tensors`: functions of the default mask and of the ids."""

    def __init__(self, label_first=False, mask=None, **tensors):
        self.label_first, self.mask, self.tensors = label_first, mask, tensors

    def __call__(self, examples):
        rows = [list(x["input_ids"]) for x in examples]
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        counted = mask.bool() if self.label_first else mask.cumsum(1) > 1
        tensors = {name: make(ids) for name, make in self.tensors.items()}
        attention_mask = mask if self.mask is None else self.mask(mask)
        labels = ids.masked_fill(~counted, -100)
        return {"input_ids": ids, "attention_mask": attention_mask, "labels": labels, **tensors}


def with_collator(tiny_folder, make):
    return {"arguments": [("model", sdpa("qwen3", tiny_folder)), ("data_collator", make)], "max_steps": 2}


@pytest.mark.parametrize("packed", [True, "auto"])
def test_left_padded_rows_train_like_padded_ones(build, tiny_folder, packed):
    options = with_collator(tiny_folder, LeftPadding)
    trainer = build("sft", "fused", head=[("packed", packed)], **options)
    layout_types = recorded_layouts(trainer)
    got = tiny.history(trainer)
    assert set(layout_types) == {"PackedBatch" if packed is True else "NoneType"}
    tiny.assert_same(got, tiny.history(build("sft", "fused", head=[("packed", False)], **options)))


#: Collators of unpackable batches: a label predicted by padding, a hole in a row, another mask or argument.
UNPACKABLE = {
    "label": (lambda: LeftPadding(label_first=True), "packed rows need labels of -100 for a first token after padding"),
    "hole": (lambda: LeftPadding(mask=_with_hole), "first token after padding"),
    "mask": (lambda: LeftPadding(mask=_square), "must both be .rows, length."),
    "positions": (
        lambda: LeftPadding(position_ids=lambda ids: 2 * torch.arange(ids.shape[1]).expand_as(ids)),
        "packed rows count positions from their first token, got other position_ids",
    ),
    "argument": (
        lambda: LeftPadding(token_type_ids=torch.zeros_like),
        "packed=True needs batches of text, whose model takes input_ids alone, got token_type_ids",
    ),
}


def _with_hole(mask):
    mask = mask.clone()
    mask[:, -3] = 0
    return mask


def _square(mask):
    """A causal mask over windows of two tokens, [B, 1, L, L]."""
    window = torch.ones(mask.shape[1], mask.shape[1], dtype=torch.bool).tril().triu(-1)
    return (window & mask.bool()[:, None, None]) | torch.eye(mask.shape[1], dtype=torch.bool)


def test_a_layout_of_other_rows_is_rebuilt(tiny_folder):
    model = sdpa("qwen3", tiny_folder)()
    ids = torch.tensor([[5, 6, 7], [5, 6, 8]])
    layouts = trl_layouts.Layouts(groups=2, kind=PACKED)
    arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    other = layouts.of({"input_ids": ids[:, :2], "attention_mask": torch.ones_like(ids[:, :2])})
    assert layouts.for_call(model, other, arguments).input_ids.tolist() == [[5, 6, 7, 8]]
    own = layouts.of(arguments)
    assert layouts.for_call(model, own, arguments) is own


@pytest.mark.parametrize("name", UNPACKABLE)
def test_unpackable_batches_stay_padded(build, tiny_folder, name):
    collator, message = UNPACKABLE[name]
    options = with_collator(tiny_folder, collator)
    with pytest.raises(ValueError, match=message):
        build("sft", "fused", head=PACK, **options).train()
    want = tiny.history(build("sft", "fused", head=[("packed", False)], **options))
    for kind in (PACKED, UNMASKED):  # as "auto" selects on CUDA and on a CPU
        trainer = build("sft", "fused", **options)
        trainer.layouts.kind = kind
        layout_types = recorded_layouts(trainer)
        tiny.assert_same(tiny.history(trainer), want)
        assert set(layout_types) == {"NoneType"}


# Command line


@pytest.mark.parametrize("source", ["flag", "file"])
def test_the_command_packs(embedded_folder, tmp_path, capsys, source):
    from fusedalign.cli import main

    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({n: r[n] for n in ("prompt", "chosen", "rejected")}) + "\n" for r in tiny.rows(6))
    )
    options = {
        "model_name_or_path": str(embedded_folder),
        "dataset_name": str(rows),
        "output_dir": str(tmp_path / "out"),
        "max_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
    }

    def run(packed):
        if source == "file":
            (tmp_path / "config.yaml").write_text(json.dumps(options | {"fused_packed": packed}))
            return main(["dpo", "--config", str(tmp_path / "config.yaml")])
        words = [str(w).lower() if isinstance(w, bool) else str(w) for n, x in options.items() for w in (f"--{n}", x)]
        return main(["dpo", *words, "--fused_packed", str(packed).lower()])

    assert run(True) in (0, None), capsys.readouterr().err
    out = capsys.readouterr()
    assert "batches: packed (proven on a few tokens" in out.err + out.out
    assert run("maybe") == 2
    error = capsys.readouterr().err
    assert "fused_packed" in error
    assert "maybe" in error


# Features that depend on padded rows


@pytest.mark.parametrize(
    ("options", "adapters", "reason"),
    [
        ({"neftune_noise_alpha": 5.0}, None, "NEFTune scales its noise by the length of the padded rows"),
        ({}, "alora", "activated LoRA begins at a place of its own in each padded row"),
    ],
)
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_options_that_depend_on_padded_rows_are_refused_or_padded(build, tiny_folder, kind, options, adapters, reason):
    """packed=True is refused; without a mask rows keep their positions."""
    arguments = [("model", sdpa("qwen3", tiny_folder))]
    if adapters == "alora":
        arguments.append(("peft_config", activated_lora))
    options = {"arguments": arguments, "max_steps": 2, **options}
    with pytest.raises(ValueError, match=f"packed=True needs a model that can run packed: {reason}"):
        build(kind, "fused", head=PACK, **options)
    trainer = build(kind, "fused", **options)
    assert trainer.layouts.kind == UNMASKED
    tiny.assert_same(tiny.history(trainer), tiny.history(build(kind, "fused", head=[("packed", False)], **options)))


def activated_lora():
    return peft.LoraConfig(
        r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM", alora_invocation_tokens=[5]
    )


@pytest.mark.parametrize("packed", [True, "auto"])
@pytest.mark.parametrize("variant", ["fused", "attach"])
def test_attention_set_after_construction_trains_like_stock(build, tiny_folder, packed, variant):
    """The new attention runs batches without a layout; layouts are used as before."""

    def run(variant):
        options = {"arguments": [("model", sdpa("qwen3", tiny_folder))], "max_steps": 2}
        trainer = build("dpo", variant, head=[] if variant == "stock" else [("packed", packed)], **options)
        trainer.model.set_attn_implementation("eager")
        return tiny.history(trainer)

    tiny.assert_same(run(variant), run("stock"))


class OtherTypes(LeftPadding):
    """Tensor types that a user's collator may return, with positions that start at each row's first token."""

    def __call__(self, examples):
        batch = super().__call__(examples)
        mask = batch["attention_mask"]
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        integers = {name: batch[name].int() for name in ("input_ids", "labels")}
        return transformers.BatchEncoding({**integers, "attention_mask": mask.bool(), "position_ids": positions})


def test_batches_of_other_types_are_packed(build, tiny_folder):
    options = with_collator(tiny_folder, OtherTypes)
    trainer = build("sft", "fused", head=PACK, **options)
    layout_types = recorded_layouts(trainer)
    got = tiny.history(trainer)
    assert set(layout_types) == {"PackedBatch"}
    tiny.assert_same(got, tiny.history(build("sft", "fused", head=[("packed", False)], **options)))


@pytest.mark.parametrize("kind", ["sft", "dpo", "kto", "cpo"])
def test_an_evaluation_stream_is_packed_in_the_step(build, kind):
    """Streams are dispatched to other processes as tensors only, so layouts are computed in the step."""
    trainer = build(kind, "fused", head=PACK, max_steps=1)
    stream = trainer.eval_dataset.to_iterable_dataset()
    assert "layout" in next(iter(trainer.get_eval_dataloader()))
    assert "layout" not in next(iter(trainer.get_eval_dataloader(stream)))
    got, want = (trainer.evaluate(data)["eval_loss"] for data in (stream, trainer.eval_dataset))
    assert got == pytest.approx(want, rel=1e-5)
