"""Two and four gloo ranks under DDP: the parameters of one process with the same global batches, on every rank."""

import dataclasses

import cached
import engines
import pytest
import tiny
import torch
from engines import Case
from transformers import AutoModelForCausalLM


def with_lora(model):
    """The model with LoRA on its body; the head is frozen."""
    import peft

    return peft.get_peft_model(model, tiny.lora())


def sft_rows(n, without_targets=(), bad=None):
    """Tokens and labels of n rows of uneven lengths; some `without_targets`, the `bad` one with an impossible label."""
    g = torch.Generator().manual_seed(0)
    for i in range(n):
        ids = torch.randint(3, 419, (5 + 3 * i % 11,), generator=g).tolist()
        labels = [-100] * len(ids) if i in without_targets else [-100, -100, *ids[2:]]
        yield {"input_ids": ids, "labels": [*labels[:-1], 419] if i == bad else labels}


TOKENISED = {"dataset_kwargs": {"skip_prepare_dataset": True}}
#: Rank 1 has the rows 2 and 3 in the first step of each epoch of 8 rows.
NO_TARGETS = {"rows": list(sft_rows(8, without_targets=(2, 3))), "config": TOKENISED}
#: Rank 1 has one row left in the last step of each epoch, and accelerate adds the first row of all.
UNEVEN = {"rows": list(tiny.data("dpo", 7))}
FILLED = [*tiny.data("dpo", 7), *tiny.data("dpo", 1)]
ACCUMULATED = {"config": {"gradient_accumulation_steps": 2}}
#: The last update of an epoch of five batches has one of them, not two.
SHORT = {"rows": 20, **ACCUMULATED}
ALL_USED = {"config": {"ddp_find_unused_parameters": False}}
STATIC = {"config": {"ddp_find_unused_parameters": False, "ddp_static_graph": True}}
CHECKPOINTED = {"config": {"gradient_checkpointing": True, "ddp_find_unused_parameters": False}}
SIMPO = {"config": {"loss_type": "simpo", "cpo_alpha": 0.0, "learning_rate": 1e-1}}
NO_KL = {"config": {"loss_type": "apo_zero_unpaired", "learning_rate": 1e-1}}

CASES = {
    "sft": Case("sft", saves=True),
    "dpo": Case("dpo"),
    "orpo": Case("orpo"),
    "sft, attached to": Case("sft", trainer="attach"),
    "dpo, packed": Case("dpo", packed=True, **ALL_USED),
    "dpo, tied": Case("dpo", model="tied", saves=True),
    "sft, static graph, packed": Case("sft", packed=True, **STATIC),
    "dpo, accumulated": Case("dpo", **ACCUMULATED),
    "sft, a rank without targets": Case("sft", **NO_TARGETS),
    "dpo, a rank with fewer pairs": Case("dpo", **UNEVEN),
    "orpo, lora": Case("orpo", prepare=with_lora, **ALL_USED),
}
MORE = {
    "dpo, attached to": Case("dpo", trainer="attach"),
    "orpo, packed": Case("orpo", packed=True),
    "dpo, packed stream": Case("dpo", packed=True, streams=True),
    "simpo": Case("cpo", **SIMPO),
    "kto": Case("kto", **NO_KL),
    "kto, packed": Case("kto", packed=True, **NO_KL),
    "dpo, every parameter used": Case("dpo", **ALL_USED),
    "sft, static graph": Case("sft", **STATIC),
    "dpo, static graph": Case("dpo", **STATIC),
    "orpo, static graph, packed": Case("orpo", packed=True, **STATIC),
    "sft, accumulated": Case("sft", **ACCUMULATED),
    "orpo, accumulated, packed": Case("orpo", packed=True, **ACCUMULATED),
    "sft, a short last update": Case("sft", **SHORT),
    "dpo, a short last update": Case("dpo", **SHORT),
    "sft, a rank without targets, packed": Case("sft", packed=True, **NO_TARGETS),
    "sft, a rank without targets, attached to": Case("sft", trainer="attach", **NO_TARGETS),
    "orpo, a rank with fewer pairs, packed": Case("orpo", packed=True, **UNEVEN),
    "sft, lora": Case("sft", prepare=with_lora),
    "dpo, lora": Case("dpo", prepare=with_lora),
    "dpo, lora, static graph": Case("dpo", prepare=with_lora, **STATIC),
    "dpo, gradient checkpointing": Case("dpo", **CHECKPOINTED),
}
FOUR = {
    "sft": Case("sft", batch_size=1),
    "dpo, packed": Case("dpo", packed=True),
    "orpo, accumulated": Case("orpo", **ACCUMULATED),
}
#: Cases that are not compared with one process: TRL's KL term depends on the batches of the ranks.
KL = {"kto with KL": Case("kto"), "kto with KL, packed": Case("kto", packed=True)}
#: Rank 1 has a label that is no id in the second step.
BAD = {"bad": Case("sft", rows=list(sft_rows(8, bad=6)), config=TOKENISED), "next": Case("sft")}
#: TRL gathers the rewards of each pair, and rank 1 has one pair fewer than rank 0 at the end of an epoch.
REFUSED = {"refused": Case("dpo", rows=UNEVEN["rows"], config={"accelerator_config": {"even_batches": False}})}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ddp")


@pytest.fixture(scope="module")
def outcomes(folder):
    return engines.run(CASES | BAD | REFUSED, folder, ranks=2)


@pytest.fixture(scope="module")
def more_outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("more")
    cached_reference = Case("dpo", options={"ref_logps": str(folder / "ref.parquet")})
    write_reference(cached_reference, folder)
    return engines.run(MORE | KL | {"dpo, cached reference": cached_reference}, folder, ranks=2)


@pytest.fixture(scope="module")
def four_outcomes(tmp_path_factory):
    return engines.run(FOUR, tmp_path_factory.mktemp("four"), ranks=4)


def write_reference(case, folder):
    model = AutoModelForCausalLM.from_pretrained(engines.model_folder(case, folder), attn_implementation="eager")
    args = tiny.classes("dpo")[2](output_dir=str(folder), max_length=64, bf16=False, use_cpu=True)
    data, path = tiny.data("dpo", case.rows), case.options["ref_logps"]
    cached.write(path, "dpo", model, [data], tiny.tokenizer(), args)


def assert_equal_to_one_process(name, case, outcomes, folder, ranks):
    if "fewer" in name:
        case = dataclasses.replace(case, rows=FILLED)
    engines.assert_trained_alike(outcomes[name], engines.alone(case, folder, ranks))


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_equal_one_process(outcomes, folder, name):
    assert_equal_to_one_process(name, CASES[name], outcomes, folder, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_two_ranks_equal_one_process_in_more_settings(more_outcomes, folder, name):
    assert_equal_to_one_process(name, MORE[name], more_outcomes, folder, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUR)
def test_four_ranks_equal_one_process(four_outcomes, folder, name):
    assert_equal_to_one_process(name, FOUR[name], four_outcomes, folder, 4)


@pytest.mark.slow
def test_two_ranks_with_a_cached_reference_equal_one_process(more_outcomes, folder):
    engines.assert_trained_alike(more_outcomes["dpo, cached reference"], engines.alone(Case("dpo"), folder))


@pytest.mark.slow
@pytest.mark.parametrize("name", KL)
def test_two_ranks_of_kto_are_equal(more_outcomes, name):
    engines.assert_ranks_equal(more_outcomes[name])


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.saves])
def test_a_saved_model_is_the_trained_one_without_an_engine(outcomes, name):
    engines.assert_saved_as_trained(outcomes[name][0])


def test_a_label_out_of_range_on_one_rank_ends_both(outcomes):
    waiting, raising = outcomes["bad"]
    assert "419" in raising.error.splitlines()[-1]
    assert "by peer" in waiting.error.splitlines()[-1]  # the connection is closed or reset
    engines.assert_ranks_equal(outcomes["next"])


def test_last_batches_of_unequal_size_are_refused_on_both(outcomes):
    for outcome in outcomes["refused"]:
        assert "FusedDPOTrainer needs last batches of one size on all ranks" in outcome.error.splitlines()[-1]
