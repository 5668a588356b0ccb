"""Two gloo ranks under DeepSpeed's ZeRO-2 and ZeRO-3: the parameters of one process with the same global batches."""

import collections

import cached
import engines
import pytest
import tiny
import torch
from engines import Case
from transformers import AutoModelForCausalLM

pytest.importorskip("deepspeed")


def with_name(model):
    return model.name_or_path


def with_whole_weights(model):
    """A model that has been loaded before ZeRO-3 was configured."""
    from safetensors.torch import load_file

    whole = type(model)(model.config)
    whole.load_state_dict(load_file(f"{model.name_or_path}/model.safetensors"))
    return whole


def with_frozen_head(model):
    model.get_output_embeddings().requires_grad_(False)
    return model


def lora(**options):
    import peft

    options = {"target_modules": ["q_proj"], **options}
    return peft.LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM", **options)


def adapted(model, **options):
    import peft

    # TRL gives its own adapters the model's dtype under ZeRO-3, too.
    return peft.get_peft_model(model, lora(**options), autocast_adapter_dtype=False)


def with_lora(model):
    return adapted(model)


def with_lora_on_head(model):
    return adapted(model, target_modules=["q_proj", "lm_head"])


def with_copy_of_head(model):
    return adapted(model, modules_to_save=["lm_head"])


def with_trained_tokens(model):
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer

    def collected(layer, weight, rows, width):
        from fusedalign.engines import gathered_tensors

        with gathered_tensors([weight]):
            return weight[rows].clone()

    TrainableTokensLayer._collect_token_weights = collected  # PEFT's takes CUDA's device under ZeRO-3
    return adapted(model, trainable_token_indices=[3, 5, 7])


def count_gathers(trainer):
    """Let DeepSpeed count its gathers of the heads' weights: (model, parameter, whether in a forward) -> times."""
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters, ZeroParamStatus
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    models = {"policy": trainer.model, "reference": getattr(trainer, "ref_model", None)}
    heads = {
        (model_name, name.partition("lm_head.")[2]): parameter
        for model_name, model in models.items()
        if model is not None
        for name, parameter in model.named_parameters()
        if "lm_head." in name
    }
    count = collections.Counter()
    hooked = "_PartitionedParameterCoordinator__all_gather_params_"
    gather, enter = (
        getattr(f, "original", f)
        for f in (getattr(PartitionedParameterCoordinator, hooked), GatheredParameters.__enter__)
    )

    def counting_gather(self, parameters, forward, **options):
        for parameter in parameters:
            if parameter.ds_status == ZeroParamStatus.NOT_AVAILABLE:
                count.update((*name, forward) for name, x in heads.items() if x is parameter)
        return gather(self, parameters, forward, **options)

    def counting_enter(self):
        count["outside of a layer"] += trainer.state.global_step < engines.STEPS
        return enter(self)

    counting_gather.original, counting_enter.original = gather, enter
    setattr(PartitionedParameterCoordinator, hooked, counting_gather)
    GatheredParameters.__enter__ = counting_enter
    return count


NAMED = {"prepare": with_name, "config": {"model_init_kwargs": {"attn_implementation": "eager"}}}
ACCUMULATED = {"config": {"gradient_accumulation_steps": 2}}
SIMPO = {"config": {"loss_type": "simpo", "cpo_alpha": 0.0, "learning_rate": 1e-1}}
NO_KL = {"config": {"loss_type": "apo_zero_unpaired", "learning_rate": 1e-1}}
PRECOMPUTED = {"config": {"precompute_ref_log_probs": True}}

CASES = {
    "zero2, sft": Case("sft", "zero2", saves=True),
    "zero2, dpo": Case("dpo", "zero2"),
    "zero3, sft": Case("sft", "zero3", watch=count_gathers),
    "zero3, dpo, named": Case("dpo", "zero3", watch=count_gathers, saves=True, **NAMED),
    "zero3, dpo, whole weights, packed": Case("dpo", "zero3", packed=True, prepare=with_whole_weights),
    "zero3, orpo": Case("orpo", "zero3"),
    "zero3, dpo, tied": Case("dpo", "zero3", model="tied", saves=True),
    "zero3, sft, attached to": Case("sft", "zero3", trainer="attach", watch=count_gathers),
    "zero3, dpo, attached to": Case("dpo", "zero3", trainer="attach", watch=count_gathers),
    "zero3, dpo, lora on the head": Case("dpo", "zero3", prepare=with_lora_on_head),
    "zero3, sft, a copy of the head": Case("sft", "zero3", prepare=with_copy_of_head, watch=count_gathers),
}
MORE = {
    "zero2, orpo": Case("orpo", "zero2"),
    "zero2, dpo, packed": Case("dpo", "zero2", packed=True),
    "zero2, dpo, precomputed": Case("dpo", "zero2", **PRECOMPUTED),
    "zero2, sft, attached to": Case("sft", "zero2", trainer="attach"),
    "zero2, dpo, attached to, tied": Case("dpo", "zero2", trainer="attach", model="tied"),
    "zero2, sft, accumulated": Case("sft", "zero2", **ACCUMULATED),
    "zero3, sft, packed": Case("sft", "zero3", packed=True),
    "zero3, sft, tied": Case("sft", "zero3", model="tied"),
    "zero3, sft, tied, attached to": Case("sft", "zero3", trainer="attach", model="tied"),
    "zero3, simpo": Case("cpo", "zero3", **SIMPO),
    "zero3, kto": Case("kto", "zero3", **NO_KL),
    "zero3, dpo": Case("dpo", "zero3"),
    "zero3, dpo, precomputed": Case("dpo", "zero3", **PRECOMPUTED),
    "zero3, dpo, accumulated": Case("dpo", "zero3", **ACCUMULATED),
    "zero3, sft, gradient checkpointing": Case("sft", "zero3", config={"gradient_checkpointing": True}),
    "zero3, sft, bf16": Case("sft", "zero3", config={"bf16": True}),
    "zero3, sft, frozen head": Case("sft", "zero3", prepare=with_frozen_head, watch=count_gathers),
    "zero3, kto, frozen head": Case("kto", "zero3", prepare=with_frozen_head, watch=count_gathers, **NO_KL),
    "zero3, simpo, frozen head": Case("cpo", "zero3", prepare=with_frozen_head, watch=count_gathers, **SIMPO),
    "zero3, sft, lora": Case("sft", "zero3", prepare=with_lora),
    "zero3, dpo, lora": Case("dpo", "zero3", prepare=with_lora),
    "zero3, dpo, lora by configuration": Case(
        "dpo", "zero3", options={"peft_config": lora(target_modules=["lm_head"])}
    ),
    "zero3, sft, lora on the head": Case("sft", "zero3", prepare=with_lora_on_head),
    "zero3, sft, trained tokens": Case("sft", "zero3", prepare=with_trained_tokens),
}


@pytest.fixture(scope="module", autouse=True)
def _on_cpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("zero")


@pytest.fixture(scope="module")
def outcomes(folder):
    return engines.run(CASES, folder, ranks=2)


@pytest.fixture(scope="module")
def more_outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("more")
    cached_reference = Case("dpo", "zero3", options={"ref_logps": str(folder / "ref.parquet")})
    write_reference(cached_reference, folder)
    return engines.run(MORE | {"cached reference": cached_reference}, folder, ranks=2)


def write_reference(case, folder):
    model = AutoModelForCausalLM.from_pretrained(engines.model_folder(case, folder), attn_implementation="eager")
    args = tiny.classes("dpo")[2](output_dir=str(folder), max_length=64, bf16=False, use_cpu=True)
    path, data = case.options["ref_logps"], tiny.data("dpo", case.rows)
    cached.write(path, "dpo", model, [data], tiny.tokenizer(), args)


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_equal_one_process(outcomes, folder, name):
    engines.assert_trained_alike(outcomes[name], engines.alone(CASES[name], folder))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MORE if "bf16" not in name])
def test_two_ranks_equal_one_process_in_more_settings(more_outcomes, folder, name):
    engines.assert_trained_alike(more_outcomes[name], engines.alone(MORE[name], folder))


@pytest.mark.slow
def test_the_cache_of_a_reference_matches_partitioned_weights(more_outcomes, folder):
    engines.assert_trained_alike(more_outcomes["cached reference"], engines.alone(Case("dpo"), folder))


@pytest.mark.slow
def test_ranks_of_bf16_are_equal_and_lose_as_in_fp32(more_outcomes, folder):
    engines.assert_ranks_equal(more_outcomes["zero3, sft, bf16"])
    fp32, *_ = engines.alone(Case("sft"), folder)
    # Ten steps lower the losses by more than this.
    torch.testing.assert_close(more_outcomes["zero3, sft, bf16"][0].losses, fp32.losses, rtol=0, atol=1e-2)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.watch is not None])
def test_the_head_is_gathered_once_in_the_forward_and_once_in_the_backward(outcomes, name):
    head = "modules_to_save.default.weight" if "copy" in name else "weight"
    want = {("policy", head, True): engines.STEPS, ("policy", head, False): engines.STEPS}
    if "dpo" in name:
        want["reference", head, True] = engines.STEPS
    for outcome in outcomes[name]:
        assert outcome.watched == collections.Counter(want)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sft", "kto", "simpo"])
def test_a_frozen_head_is_not_gathered_in_the_backward(more_outcomes, method):
    """Also where the entropy is logged, as it is by SFT and KTO."""
    gathers = {("policy", "weight", True): engines.STEPS}
    if method == "kto":
        gathers["reference", "weight", True] = engines.STEPS
    for outcome in more_outcomes[f"zero3, {method}, frozen head"]:
        assert outcome.watched == collections.Counter(gathers)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.saves])
def test_a_saved_model_is_the_trained_one_without_deepspeed(outcomes, name):
    engines.assert_saved_as_trained(outcomes[name][0])
