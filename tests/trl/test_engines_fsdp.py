"""Two gloo ranks under FSDP2 or tensor parallelism: the parameters of one process with the same global batches."""

import dataclasses

import engines
import pytest
import tiny
import torch
import torch.distributed as dist
from engines import Case
from test_engines_ddp import ACCUMULATED, NO_TARGETS, with_lora, write_reference
from transformers import Qwen3Config, Qwen3ForCausalLM


def with_head_lora(model):
    """The model with LoRA on its body and its head."""
    import peft

    config = tiny.lora()
    config.target_modules = ["q_proj", "lm_head"]
    return peft.get_peft_model(model, config)


def tensor_parallel(model):
    """A model with two key heads, sharded over the ranks by transformers where there are ranks."""
    folder = f"{model.name_or_path}-heads"
    if not dist.is_initialized() or dist.get_rank() == 0:
        torch.manual_seed(0)
        config = Qwen3Config(**tiny.SMALL | {"num_key_value_heads": 2}, head_dim=8, initializer_range=0.2)
        Qwen3ForCausalLM(config).save_pretrained(folder)
    plan = {}
    if dist.is_initialized():
        dist.barrier()
        plan = {"tp_plan": "auto"}
    return Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", **plan)


def with_trained_tokens(model):
    """The model with LoRA on its body and trained rows of its embeddings, which PEFT merges when they are read."""
    import peft

    config = tiny.lora()
    config.trainable_token_indices = [3, 4, 5]
    return peft.get_peft_model(model, config)


def fsdp(**options):
    return {"config": {"fsdp_config": options}}


#: Each linear layer is a unit of FSDP2 of its own, the head too.
OWN = fsdp(transformer_layer_cls_to_wrap=["Qwen3DecoderLayer", "Linear"])
CHECKPOINTED = fsdp(activation_checkpointing=True, transformer_layer_cls_to_wrap=["Qwen3DecoderLayer", "Linear"])
KEPT = fsdp(reshard_after_forward=False)
BF16 = {"config": {"bf16": True}}

CASES = {
    "sft": Case("sft", "fsdp2", saves=True),
    "dpo, packed": Case("dpo", "fsdp2", packed=True),
    "orpo": Case("orpo", "fsdp2"),
    "sft, tied, packed": Case("sft", "fsdp2", model="tied", packed=True, saves=True),
    "sft, own unit": Case("sft", "fsdp2", **OWN),
    "dpo, own unit, attached to": Case("dpo", "fsdp2", trainer="attach", **OWN),
    "dpo, lora": Case("dpo", "fsdp2", prepare=with_lora),
    "sft, trained tokens, packed": Case("sft", "fsdp2", packed=True, prepare=with_trained_tokens),
    "sft, a rank without targets": Case("sft", "fsdp2", **NO_TARGETS),
}
MORE = {
    "sft, attached to": Case("sft", "fsdp2", trainer="attach"),
    "dpo, attached to, packed": Case("dpo", "fsdp2", trainer="attach", packed=True),
    "sft, own unit, attached to": Case("sft", "fsdp2", trainer="attach", **OWN),
    "dpo, own unit, packed": Case("dpo", "fsdp2", packed=True, **OWN),
    "orpo, own unit, packed": Case("orpo", "fsdp2", packed=True, **OWN),
    "sft, own unit, checkpointed": Case("sft", "fsdp2", **CHECKPOINTED),
    "sft, kept": Case("sft", "fsdp2", **KEPT),
    "dpo, kept": Case("dpo", "fsdp2", **KEPT),
    "dpo, tied": Case("dpo", "fsdp2", model="tied"),
    "orpo, tied": Case("orpo", "fsdp2", model="tied"),
    "sft, accumulated": Case("sft", "fsdp2", **ACCUMULATED),
    "dpo, accumulated, packed": Case("dpo", "fsdp2", packed=True, **ACCUMULATED),
    "orpo, lora": Case("orpo", "fsdp2", prepare=with_lora),
    "dpo, lora on the head": Case("dpo", "fsdp2", prepare=with_head_lora),
    "sft, a rank without targets, packed": Case("sft", "fsdp2", packed=True, **NO_TARGETS),
}
PARALLEL = {
    name: Case(method, "tp", packed=packed, prepare=tensor_parallel, config={"learning_rate": 0.1})
    for name, method, packed in (("sft", "sft", False), ("sft, packed", "sft", True), ("orpo", "orpo", False))
}
#: Not compared with one process: autocast rounds at other places than FSDP2.
HALF = {"dpo, bf16": Case("dpo", "fsdp2", **BF16)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fsdp")


@pytest.fixture(scope="module")
def outcomes(folder):
    parallel = {f"tp, {name}": case for name, case in PARALLEL.items()}  # FSDP leaves settings in the environment
    cached_reference = Case("dpo", "fsdp2", packed=True, options={"ref_logps": str(folder / "ref.parquet")})
    write_reference(cached_reference, folder)
    return engines.run(parallel | CASES | HALF | {"dpo, cached reference": cached_reference}, folder, ranks=2)


@pytest.fixture(scope="module")
def parallel_outcomes(outcomes):
    return {name: outcomes[f"tp, {name}"] for name in PARALLEL}


@pytest.fixture(scope="module")
def more_outcomes(tmp_path_factory):
    return engines.run(MORE, tmp_path_factory.mktemp("more"), ranks=2)


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_equal_one_process(outcomes, folder, name):
    engines.assert_trained_alike(outcomes[name], engines.alone(_without_engine(CASES[name]), folder))


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_two_ranks_equal_one_process_in_more_settings(more_outcomes, folder, name):
    engines.assert_trained_alike(more_outcomes[name], engines.alone(_without_engine(MORE[name]), folder))


@pytest.mark.parametrize("name", PARALLEL)
def test_tensor_parallel_ranks_equal_one_process(parallel_outcomes, folder, name):
    """Ranks have the same tokens, and each a part of the head."""
    equals = engines.alone(_without_engine(PARALLEL[name]), folder, ranks=1)
    engines.assert_trained_alike(parallel_outcomes[name], equals)


def test_two_ranks_with_a_cached_reference_equal_one_process(outcomes, folder):
    equals = engines.alone(_without_engine(CASES["dpo, packed"]), folder)
    engines.assert_trained_alike(outcomes["dpo, cached reference"], equals)


def _without_engine(case):
    config = {name: value for name, value in case.config.items() if name != "fsdp_config"}
    return dataclasses.replace(case, engine="ddp", config=config)


def test_log_probabilities_are_not_rounded_to_half_precision(outcomes):
    """accelerate's policy rounds the outputs of a model, and TRL's losses are then bf16 numbers."""
    first, _ = outcomes["dpo, bf16"]
    engines.assert_ranks_equal(outcomes["dpo, bf16"])
    losses = torch.tensor(first.losses)
    assert (losses[1:] != losses[1:].bfloat16().float()).all()


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.saves])
def test_a_saved_model_is_the_trained_one_without_an_engine(outcomes, name):
    engines.assert_saved_as_trained(outcomes[name][0])
