"""Every loss against the trainer of TRL that has it, through the trainer's own method: value, gradient and rewards.

Left out, because TRL differs there, on purpose or not:

- label_smoothing or an f-divergence with a DPO loss type that has no use for it: TRL ignores it or refuses it in its
  constructor, `dpo_loss` raises. Likewise label_smoothing with CPO's and TPO's hinge and ipo.
- WPO's weights with hinge, and with sft on more than one pair: TRL multiplies in place and autograd refuses; with aot
  and aot_unpaired its constructor does.
- ld_alpha with sft: TRL's sft looks at the tokens and not at the discounted sums that `dpo_loss` is given.
- discopop where beta d is below -88, as a steep f-divergence makes it: TRL gives inf * 0.
- Exponents above 40, which `dpo_loss` and `alphapo_rewards` hold there and TRL at 80 or not at all.
- Empty completions in CPO's and ORPO's averages, no completion token at all in a token mean, and log-probabilities
  that round to 0 in ORPO: TRL gives NaN or infinity.
- The load-balancing loss of mixtures of experts, which no loss function here adds.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from dataclasses import MISSING, fields
from types import SimpleNamespace

import pytest

pytest.importorskip("trl", minversion="1.16")

import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutput
from transformers.trainer_pt_utils import LabelSmoother
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.experimental.tpo import TPOConfig, TPOTrainer
from trl.trainer.utils import FusedCausalLMOutput

from fusedalign import losses
from fusedalign.losses.dpo import LOSS_TYPES as DPO_LOSS_TYPES

VOCAB = 29
BATCHES = pytest.mark.parametrize(("b", "seed"), [(b, seed) for b in (1, 2, 7) for seed in range(3)])
BETAS = [{}, {"beta": 0.02}, {"beta": 0.7}]  # one per seed; {}: the default of both
DRIFT = [0.1, 0.3, 0.6]  # one per seed: distance of the policy from the reference


class Bigram(nn.Module):
    """A bigram language model with the two call signatures that TRL's trainers use."""

    is_gradient_checkpointing = False

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, input_ids, attention_mask=None, labels=None, use_cache=None, fused_lm_head=False):
        logits = self.weight[input_ids]
        if not fused_lm_head:
            return CausalLMOutput(logits=logits)
        logits, labels = logits[:, :-1], labels[:, 1:]
        mask, logps = labels != -100, logits.log_softmax(-1)
        exact = logps.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
        rounded = (256 * exact).round() / 256  # sums do not depend on the order
        self.token_logps = exact + (rounded - exact).detach()
        self.output = FusedCausalLMOutput(  # zero outside the mask, as TRL documents
            log_probs=self.token_logps.where(mask, 0),
            entropy=-(logps.exp() * logps).sum(-1).where(mask, 0),
            log_sum_sq_probs=(2 * logps).logsumexp(-1).detach().where(mask, 0),
            mean_logits=logits.mean(-1).detach().where(mask, 0),
            is_top1=(logits.argmax(-1) == labels) & mask,
            label_mask=mask,
        )
        return self.output


def models(seed):
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(VOCAB, VOCAB, generator=g)
    return Bigram(weight + DRIFT[seed] * torch.randn(VOCAB, VOCAB, generator=g)), Bigram(weight)


def make_batch(rows, seed, *, empty=False):
    """Prompts of 1 to 3 tokens, completions of 1 to 9; `empty`: the last completion has no tokens."""
    g = torch.Generator().manual_seed(100 + seed)
    prompts, completions = torch.randint(1, 4, (rows, 1), generator=g), torch.randint(1, 10, (rows, 1), generator=g)
    completions[-1] *= not empty
    position = torch.arange(12)
    attention = position < prompts + completions
    return {
        "input_ids": torch.randint(VOCAB, (rows, 12), generator=g),
        "attention_mask": attention.long(),
        "completion_mask": (attention & (position >= prompts)).long(),
    }


def completion(batch):
    return batch["completion_mask"][:, 1:].bool()


def fused(model, batch):
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    return model(batch["input_ids"], labels=labels, fused_lm_head=True)


def all_logps(model, batch):
    """[B, T - 1, V]"""
    return model(batch["input_ids"]).logits[:, :-1].log_softmax(-1)


def token_logps(model, batch):
    return all_logps(model, batch).gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)


def reduced(logps, mask, *, mean):
    sums = logps.where(mask, 0).sum(1)
    return sums / mask.sum(1).clamp(min=1) if mean else sums


ONE_PROCESS = SimpleNamespace(
    device=torch.device("cpu"),
    num_processes=1,
    parallelism_config=None,
    gather=lambda x: x,
    gather_for_metrics=lambda x: x,
    autocast=contextlib.nullcontext,
)


def stub(cls, config, model, ref_model=None, label_smoother=None, **options):
    """A trainer with its methods and config defaults, but without running `__init__`, which needs data and files."""
    defaults = {x.name: x.default if x.default_factory is MISSING else x.default_factory() for x in fields(config)}
    assert options.keys() <= defaults.keys()
    args = SimpleNamespace(**defaults | options)
    trainer = object.__new__(cls)
    vars(trainer).update(vars(args))  # beta etc. are attributes of the same name
    vars(trainer).update(
        {"args": args, "accelerator": ONE_PROCESS, "model": model, "ref_model": ref_model, "aux_loss_enabled": False},
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
        is_deepspeed_enabled=False,
        compute_loss_func=None,
        label_smoother=label_smoother,
        pad_token_id=0,
    )
    if config in (DPOConfig, KTOConfig):
        trainer.precompute_ref_logps = args.precompute_ref_log_probs
    if config is DPOConfig:
        trainer.loss_types = args.loss_type
        trainer.loss_weights = args.loss_weights or [1.0] * len(args.loss_type)
    if config is KTOConfig:
        trainer.calculate_KL = args.loss_type != "apo_zero_unpaired"
    return trainer


def close(got, want, *, scale=1.0):
    tolerance = 1e-12 if getattr(want, "dtype", None) == torch.float64 else 1e-6
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * scale)


def assert_same(got, want, *inputs):
    """Assert equal losses and gradients; gradients to 1e-5 of their largest entry."""
    close(got, want)
    grads, want_grads = (torch.autograd.grad(x.sum(), inputs, retain_graph=True) for x in (got, want))
    for x, y in zip(grads, want_grads, strict=True):
        close(x, y, scale=min(1.0, 10 * y.abs().max().item()))


def assert_same_rewards(out, metrics):
    for name, rewards in (("chosen", out.chosen_rewards), ("rejected", out.rejected_rewards)):
        if len(rewards):
            logged = metrics[f"rewards/{name}"]
            close(rewards.mean().item(), logged[-1] if isinstance(logged, list) else logged)


def cases(*options):
    names = [",".join(str(v) if k == "loss_type" else f"{k}={v}" for k, v in x.items()) for x in options]
    return pytest.mark.parametrize("options", options, ids=names)


def dpo_both(options, b, seed, **overrides):
    """`dpo_loss`, TRL's loss, the policy's per-token log-probabilities, and TRL's metrics."""
    batch, (policy, reference) = make_batch(2 * b, seed, empty=b == 7), models(seed)
    names = [options["loss_type"]] if isinstance(options["loss_type"], str) else options["loss_type"]
    precomputed = seed == 1
    trl_options = options | {"loss_type": names, "precompute_ref_log_probs": precomputed}
    trainer, refs = stub(DPOTrainer, DPOConfig, policy, reference, **trl_options), {}
    if precomputed:
        refs["ref_chosen_logps"], refs["ref_rejected_logps"] = trainer.compute_ref_log_probs(reference, batch)
    trl_loss = trainer._compute_loss(policy, batch | refs, return_outputs=False)
    tokens, out = policy.token_logps, policy.output

    options, mask = options | overrides, completion(batch)
    lengths = mask.sum(1)
    logps, ref_logps = out.log_probs, fused(reference, batch).log_probs.detach()
    if (ld_alpha := options.pop("ld_alpha", None)) is None:
        sums = [reduced(x, mask, mean=False) for x in (logps, ref_logps)]
    else:
        shared = torch.minimum(*lengths.chunk(2)).repeat(2)
        sums = [losses.ld_logps(x, mask, shared, ld_alpha=ld_alpha) for x in (logps, ref_logps)]
    if options.pop("use_weighting", False):
        chosen, rejected = losses.wpo_weights(logps, out.log_sum_sq_probs, mask).chunk(2)
        options["pair_weights"] = chosen * rejected
    halves = [half for x in sums for half in x.chunk(2)]
    options["chosen_lengths"], options["rejected_lengths"] = lengths.chunk(2)
    return losses.dpo_loss(*halves, **options), trl_loss, tokens, trainer._metrics["train"]


SMOOTHED = {"exo_pair": (1e-3, 0.3), "robust": (0.1, 0.4), "aot": (0.1, 0.6), "aot_unpaired": (0.1, 0.6)}
WEIGHTED = [x for x in DPO_LOSS_TYPES if x not in ("hinge", "sft", "aot", "aot_unpaired")]
SCORED = ("sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sigmoid_norm")
DIVERGENCES = [{"f_divergence_type": x} for x in ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")] + [
    {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": x} for x in (-1.0, 0.0, 1.0, 1.5, 2.0)
]
SEVERAL = [
    {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    {"loss_type": ["hinge", "sppo_hard", "nca_pair"]},
    {"loss_type": ["robust", "aot", "exo_pair"], "loss_weights": [1.0, 0.5, 2.0], "label_smoothing": 0.2},
    {"loss_type": ["ipo", "sft", "discopop"], "loss_weights": [0.3, 0.1, 2.0], "f_divergence_type": "js_divergence"},
    {"loss_type": ["apo_zero", "sigmoid_norm"], "loss_weights": [0.5, 1.5], "use_weighting": True},
    {"loss_type": ["apo_down", "ipo"], "loss_weights": [0.5, 1.5], "ld_alpha": 0.5, "use_weighting": True},
]


def dpo_options(name, **options):
    smoothing = {"label_smoothing": 0.1} if name == "exo_pair" else {}
    return {"loss_type": name} | smoothing | options


@BATCHES
@cases(
    *(dpo_options(name) for name in DPO_LOSS_TYPES),
    *({"loss_type": name, "label_smoothing": x} for name, values in SMOOTHED.items() for x in values),
    *(dpo_options(name, **x) for name in SCORED for x in DIVERGENCES if name != "discopop"),
    *(dpo_options("discopop", beta=0.1, **x) for x in DIVERGENCES if x.get("f_alpha_divergence_coef") != -1.0),
    *(dpo_options("discopop", discopop_tau=x) for x in (0.01, 1.0)),
    *(dpo_options(name, ld_alpha=x) for name in DPO_LOSS_TYPES if name != "sft" for x in (0.0, 0.5, 1.0)),
    *(dpo_options(name, use_weighting=True) for name in WEIGHTED),
    *SEVERAL,
)
def test_dpo_equals_trl(options, b, seed):
    out, trl_loss, tokens, metrics = dpo_both(BETAS[seed] | options, b, seed)
    assert_same(out.losses.mean(), trl_loss, tokens)
    assert_same_rewards(out, metrics)


@BATCHES
@pytest.mark.parametrize("labels", ["mixed", "desirable", "undesirable"])
@cases(
    {"loss_type": "kto"},
    {"loss_type": "kto", "desirable_weight": 1.3, "undesirable_weight": 0.4},
    {"loss_type": "apo_zero_unpaired"},
    {"loss_type": "apo_zero_unpaired", "desirable_weight": 0.0, "undesirable_weight": 2.5},
)
def test_kto_equals_trl(options, labels, b, seed):
    options = options | BETAS[seed]
    batch, (policy, reference) = make_batch(b, seed, empty=b == 7), models(seed)
    mismatched = make_batch(b, 50 + seed)  # the mean is positive for some seeds and negative for others
    desirable = torch.arange(b) % 3 != 1 if labels == "mixed" else torch.full((b,), labels == "desirable")
    precomputed = seed == 1
    trainer = stub(KTOTrainer, KTOConfig, policy, reference, **options, precompute_ref_log_probs=precomputed)
    inputs = batch | {f"KL_{k}": v for k, v in mismatched.items()}
    if precomputed:
        inputs["ref_logps"], inputs["ref_KL_logps"] = trainer.compute_ref_log_probs(reference, inputs)
    trl_loss = trainer._compute_loss(policy, inputs | {"label": desirable}, return_outputs=False)
    tokens, logps = policy.token_logps, policy.output.log_probs.sum(1)

    kl = None
    if options["loss_type"] == "kto":
        kl = losses.kto_kl(*(fused(model, mismatched).log_probs.sum(1) for model in (policy, reference)))
        close(kl.item(), trainer._metrics["train"]["kl"][-1])
    out = losses.kto_loss(logps, fused(reference, batch).log_probs.sum(1).detach(), desirable, kl, **options)
    assert_same(out.losses.mean(), trl_loss, tokens)
    assert_same_rewards(out, trainer._metrics["train"])


def our_cpo(chosen, rejected, options):
    """`cpo_loss` with TRL's options."""
    options = dict(options)
    if (alpha := options.pop("alpha", 0.0)) != 0:
        chosen, rejected = (losses.alphapo_rewards(x, alpha=alpha) for x in (chosen, rejected))
    if options["loss_type"] != "simpo":
        return losses.cpo_loss(chosen, rejected, **options)
    options = {"beta": CPOConfig.beta, "gamma": options.pop("simpo_gamma", CPOConfig.simpo_gamma)} | options
    return losses.simpo_loss(chosen, rejected, **{k: v for k, v in options.items() if k != "loss_type"})


CPO = [
    {"loss_type": "sigmoid"},
    {"loss_type": "sigmoid", "label_smoothing": 0.1},
    {"loss_type": "hinge"},
    {"loss_type": "ipo"},
    {"loss_type": "simpo"},
    {"loss_type": "simpo", "label_smoothing": 0.3, "simpo_gamma": 1.5},
]
#: In fp32, TRL's (1 - exp(x) ** -alpha) / alpha is 7e-6 from its own fp64 at alpha 0.5, so the larger ones are in fp64.
ALPHAS = [(x, torch.float32) for x in (0.0, 0.25, -0.25)] + [(x, torch.float64) for x in (0.0, 0.25, -0.25, 0.5, 1.0)]


def pair(b, seed, scale, dtype=torch.float32):
    rand = torch.rand(2, b, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return (-scale * rand).requires_grad_().unbind()


def assert_same_pairs(out, trl_out, *inputs):
    assert_same(out.losses, trl_out[0], *inputs)
    close(out.chosen_rewards, trl_out[1])
    close(out.rejected_rewards, trl_out[2])


@BATCHES
@pytest.mark.parametrize(("alpha", "dtype"), ALPHAS)
@cases(*CPO)
def test_cpo_and_alphapo_of_each_pair_equal_trl(options, alpha, dtype, b, seed):
    options = {"alpha": alpha} | (BETAS[seed] or {"beta": 2.5}) | options
    averaged = alpha or options["loss_type"] in ("ipo", "simpo")
    inputs = pair(b, seed, 2 if averaged else 40, dtype)
    trl_out = stub(CPOTrainer, CPOConfig, None, **options).cpo_loss(*inputs)
    assert_same_pairs(our_cpo(*inputs, options), trl_out, *inputs)


@BATCHES
@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_orpo_of_each_pair_equals_trl(beta, b, seed):
    inputs = pair(b, seed, 3)
    negated, *rewards = stub(ORPOTrainer, ORPOConfig, None, beta=beta).odds_ratio_loss(*inputs)
    assert_same_pairs(losses.orpo_loss(*inputs, beta=beta), (-negated, *rewards), *inputs)


def separate(batch):
    """The batch as the collator of CPO and ORPO lays it out."""
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    columns = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}
    sides = {k: dict(zip(("chosen", "rejected"), v.chunk(2), strict=True)) for k, v in columns.items()}
    return {f"{side}_{k}": sides[k][side] for side in ("chosen", "rejected") for k in columns}


@BATCHES
@cases(
    *CPO,
    {"loss_type": "simpo", "alpha": 0.25, "cpo_alpha": 0.0},
    {"loss_type": "sigmoid", "cpo_alpha": 0.3},
    {"loss_type": "orpo"},
)
def test_cpo_and_orpo_with_nll_equal_trl(options, b, seed):
    options = options | BETAS[seed]
    batch, (policy, _) = make_batch(2 * b, seed), models(seed)
    logps, mask = token_logps(policy, batch), completion(batch)
    c, r = reduced(logps, mask, mean=options["loss_type"] in ("ipo", "simpo", "orpo")).chunk(2)
    if options["loss_type"] == "orpo":
        del options["loss_type"]
        trainer = stub(ORPOTrainer, ORPOConfig, policy, **options, padding_value=0)
        out, nll_weight, nll_mask = losses.orpo_loss(c, r, **options), 1.0, batch["attention_mask"][:, 1:].bool()
    else:
        trainer = stub(CPOTrainer, CPOConfig, policy, **options)
        nll_weight, nll_mask = options.pop("cpo_alpha", 1.0), mask
        out = our_cpo(c, r, options)
    trl_loss, metrics = trainer.get_batch_loss_metrics(policy, separate(batch))
    nll = losses.sft_loss(logps[:b], nll_mask[:b])
    assert_same(out.losses.mean() + nll_weight * nll, trl_loss, policy.weight)
    assert_same_rewards(out, metrics)


@BATCHES
@pytest.mark.parametrize("tpo_alpha", [0.0, 1.0, 0.3])
@cases(
    {"loss_type": "sigmoid"},
    {"loss_type": "sigmoid", "label_smoothing": 0.2},
    {"loss_type": "hinge"},
    {"loss_type": "ipo"},
    {"loss_type": "tpo-l"},
    {"loss_type": "tpo-l", "label_smoothing": 0.2, "tpo_l_gamma": 1.2},
)
def test_tpo_equals_trl(options, tpo_alpha, b, seed):
    options = options | BETAS[seed]
    batch, (policy, _) = make_batch((3 if tpo_alpha else 2) * b, seed, empty=b == 7), models(seed)
    trainer = stub(TPOTrainer, TPOConfig, policy, **options, tpo_alpha=tpo_alpha)
    trl_loss = trainer._compute_loss(policy, batch, return_outputs=False)
    options = {"gamma" if k == "tpo_l_gamma" else k: v for k, v in options.items()}
    logps, mask = token_logps(policy, batch), completion(batch)
    means = reduced(logps, mask, mean=options["loss_type"] in ("ipo", "tpo-l"))
    out = losses.tpo_loss(means[:b], means[b : 2 * b], **options)
    nll = losses.sft_loss(logps[2 * b :], mask[2 * b :]) if tpo_alpha else 0
    assert_same(out.losses.mean() + tpo_alpha * nll, trl_loss, policy.weight)
    assert_same_rewards(out, trainer._metrics["train"])


@BATCHES
@pytest.mark.parametrize("num_items", [None, torch.tensor(50)])
@cases({"loss_type": "nll"}, {"loss_type": "dft"}, {"loss_type": "nll", "label_smoothing": 0.1})
def test_sft_equals_trl(options, num_items, b, seed):
    batch, (policy, _) = make_batch(b, seed, empty=b == 7), models(seed)
    smoothing = options.get("label_smoothing", 0.0)
    smoother = LabelSmoother(epsilon=smoothing) if smoothing else None  # as the transformers Trainer computes it
    trainer = stub(SFTTrainer, SFTConfig, policy, loss_type=options["loss_type"], label_smoother=smoother)
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}
    trl_loss = trainer.compute_loss(policy, inputs, num_items_in_batch=num_items)
    smoothed = {"mean_logps": all_logps(policy, batch).mean(-1)} if smoothing else {}
    logps = token_logps(policy, batch) if smoothing else policy.token_logps
    loss = losses.sft_loss(logps, completion(batch), num_items=num_items, **options, **smoothed)
    assert_same(loss, trl_loss, policy.weight)


def test_the_comparison_detects_a_wrong_beta():
    out, trl_loss, tokens, metrics = dpo_both({"loss_type": "sigmoid", "beta": 0.1}, 2, 0, beta=0.1001)
    grads = [torch.autograd.grad(x, tokens, retain_graph=True)[0] for x in (out.losses.mean(), trl_loss)]
    for check in (
        lambda: close(out.losses.mean(), trl_loss),
        lambda: close(*grads),
        lambda: assert_same_rewards(out, metrics),
    ):
        with pytest.raises(AssertionError):
            check()
