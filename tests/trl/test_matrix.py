"""Stock TRL against this package over 5 steps and an evaluation: every logged metric, for all trainers and options."""

import pytest
import tiny

DPO_LOSSES = {
    "sigmoid": {},
    "hinge": {},
    "ipo": {},
    "exo_pair": {"label_smoothing": 0.1},
    "nca_pair": {},
    "robust": {"label_smoothing": 0.1},
    "bco_pair": {},
    "sppo_hard": {},
    "aot": {},
    "aot_unpaired": {"label_smoothing": 0.1},
    "apo_zero": {},
    "apo_down": {},
    "discopop": {},
    "sft": {},
    "sigmoid_norm": {},
}
FAMILIES = ("tied", "gemma2", "cohere", "granite", "falcon_h1", "phi", "qwen3_moe", "mixtral")

CASES = {
    "sft": ("sft", {}),
    "sft, dft": ("sft", {"loss_type": "dft"}),
    "sft, packed": ("sft", {"packing": True, "max_length": 24}),
    "sft, packed and wrapped": ("sft", {"packing": True, "packing_strategy": "wrapped", "max_length": 24}),
    "sft, padding-free": ("sft", {"padding_free": True, "max_length": None}),
    "sft, prompts too": ("sft", {"completion_only_loss": False}),
    "sft, gradient checkpointing": ("sft", {"gradient_checkpointing": True}),
    "sft, accumulation": ("sft", {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2}),
    "dpo, two losses": ("dpo", {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.7, 0.3]}),
    "dpo, ld_alpha": ("dpo", {"ld_alpha": 0.4}),
    "dpo, forward_kl": ("dpo", {"f_divergence_type": "forward_kl"}),
    "dpo, js_divergence": ("dpo", {"f_divergence_type": "js_divergence"}),
    "dpo, alpha_divergence": ("dpo", {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.5}),
    "dpo, wpo": ("dpo", {"use_weighting": True}),
    "dpo, synchronised reference": ("dpo", {"sync_ref_model": True, "ref_model_sync_steps": 2}),
    "dpo, precomputed reference": ("dpo", {"precompute_ref_log_probs": True}),
    "dpo, gradient checkpointing": ("dpo", {"gradient_checkpointing": True}),
    "kto": ("kto", {}),
    "kto, odd batch": ("kto", {"per_device_train_batch_size": 3, "desirable_weight": 1.5, "undesirable_weight": 0.7}),
    "kto, apo": ("kto", {"loss_type": "apo_zero_unpaired"}),
    "kto, precomputed reference": ("kto", {"precompute_ref_log_probs": True}),
    "cpo": ("cpo", {}),
    "cpo, hinge": ("cpo", {"loss_type": "hinge"}),
    "cpo, ipo": ("cpo", {"loss_type": "ipo"}),
    "simpo": ("cpo", {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.7}),
    "cpo-simpo": ("cpo", {"loss_type": "simpo", "cpo_alpha": 0.5}),
    "alphapo": ("cpo", {"loss_type": "simpo", "cpo_alpha": 0.0, "alpha": 0.25}),
    "cpo, smoothing": ("cpo", {"label_smoothing": 0.1}),
    "cpo, gradient checkpointing": ("cpo", {"gradient_checkpointing": True}),
    "orpo": ("orpo", {}),
    "orpo, accumulation": ("orpo", {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}),
    "tpo": ("tpo", {}),
    "tpo, hinge": ("tpo", {"loss_type": "hinge"}),
    "tpo, ipo": ("tpo", {"loss_type": "ipo"}),
    "tpo, tpo-l": ("tpo", {"loss_type": "tpo-l", "label_smoothing": 0.1}),
    "tpo, no gold": ("tpo", {"tpo_alpha": 0.0}),
}
CASES |= {f"dpo, {name}": ("dpo", {"loss_type": [name], **settings}) for name, settings in DPO_LOSSES.items()}
CASES |= {f"{kind}, {name}": (kind, {"model": name}) for kind in ("sft", "dpo", "cpo", "orpo") for name in FAMILIES}
ATTACHABLE = ("sft", "dpo", "kto")


def cases(names, slow=lambda name: False):
    return [pytest.param(name, marks=[pytest.mark.slow] if slow(name) else []) for name in names]


#: Losses that TRL computes from the same log-probabilities as another case: their own code is TRL's alone.
SAME_FORWARD = {
    *(f"dpo, {name}" for name in DPO_LOSSES if name not in ("sigmoid", "ipo", "bco_pair", "aot_unpaired", "sft")),
    *("dpo, forward_kl", "dpo, js_divergence", "kto, apo", "cpo, hinge", "cpo, ipo", "cpo, smoothing", "cpo-simpo"),
    *("tpo, hinge", "tpo, ipo"),
}


def is_slow(name):
    """Cases that others cover: a loss on the same forward, a family in ORPO, the slowest family in DPO."""
    kind, _, option = name.partition(", ")
    return name in SAME_FORWARD | {"dpo, falcon_h1"} or (kind == "orpo" and option in FAMILIES)


def also_fused(name):
    """Cases already covered by the Fused trainers: the switch of `attach` depends on neither loss nor family."""
    kind, _, option = name.partition(", ")
    return name in SAME_FORWARD or (kind == "dpo" and (option in FAMILIES or option in set(DPO_LOSSES) - {"sigmoid"}))


@pytest.mark.parametrize("name", cases(CASES, is_slow))
def test_fused_trainers_log_the_metrics_of_stock_trl(build, stock_history, name):
    kind, options = CASES[name]
    got = tiny.history(build(kind, "fused", **options))
    tiny.assert_same(got, stock_history(kind, **options))
    assert len({row["loss"] for row in got if "loss" in row}) > 1  # the model was trained


@pytest.mark.parametrize("name", cases((name for name, (kind, _) in CASES.items() if kind in ATTACHABLE), also_fused))
def test_attached_trainers_log_the_metrics_of_stock_trl(build, stock_history, name):
    kind, options = CASES[name]
    tiny.assert_same(tiny.history(build(kind, "attach", **options)), stock_history(kind, **options))
