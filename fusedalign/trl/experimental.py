"""`FusedCPOTrainer` (CPO, SimPO, AlphaPO), `FusedORPOTrainer` and `FusedTPOTrainer`: trainers of `trl.experimental`.

Their stock forms build the logits, in fp32 under mixed precision, more than once. Of CPO and ORPO one method is
replaced, the forward of a batch; the losses and metrics that follow stay TRL's. TPO has all in one method, so that is
written anew around `fusedalign.tpo_loss`.
"""

from __future__ import annotations

import functools
import logging
import warnings
from typing import Any

import torch
import transformers
from torch import Tensor

from fusedalign.losses import sft_loss, tpo_loss
from fusedalign.sequence import completion_labels, sequence_mean, sequence_sum
from fusedalign.trl.kernels import add_liger_kernels
from fusedalign.trl.layouts import KEY, LayOut, Layouts
from fusedalign.trl.refusals import base_of
from fusedalign.trl.shapes import preference
from fusedalign.trl.tokens import OPTIONS, PairSource, pair_ids, rendered
from fusedalign.trl.trainers import Fused

with warnings.catch_warnings():  # trl.experimental warns of being that; who asks for these trainers by name knows
    warnings.simplefilter("ignore")
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer
    from trl.experimental.tpo import TPOTrainer

__all__ = ["FusedCPOTrainer", "FusedORPOTrainer", "FusedTPOTrainer"]

_logger = logging.getLogger(__name__)


class _FusedForward(Fused):
    """Puts the head on once the trainer is built; mixed precision wraps the model later, when it trains."""

    _trl_has_head = False
    #: The per-token outputs that the loss and the metrics take.
    _outputs: tuple[str, ...] = ("log_probs",)
    #: Positions of which the stock trainer logs the mean logit; None: it takes those of the completions.
    _mean_positions: slice | None = None

    def _add_late_head(self) -> None:
        trainer: Any = self
        model = base_of(trainer.model)
        if model.config.is_encoder_decoder:
            if self.liger_kernels:
                add_liger_kernels(model)
            _logger.warning("%s is an encoder-decoder: it keeps TRL's own path, with logits", type(model).__name__)
            return
        self._add_head(model, self._outputs, self._mean_positions)
        if trainer.args.use_liger_kernel:  # which would replace that forward when training starts
            kernels = trainer.args.liger_kernel_config or {}
            trainer.args.liger_kernel_config = {**kernels, "fused_linear_cross_entropy": False}


class _FusedPairs(_FusedForward):
    """What CPO and ORPO share: their rows, tokenised as DPO's are, and the forward of a batch."""

    _may_unmask = False  # TRL logs mean logits over padding too, which depend on the mask

    def _adapt(self, arguments: dict[str, Any]) -> None:
        """The rows as they are for `tokenize_row`; a model for the name of an encoder-decoder."""
        _load_encoder_decoder(arguments)
        for name in ("train_dataset", "eval_dataset"):
            if hasattr(arguments.get(name), "map"):
                split = name.partition("_")[0]
                arguments[name] = PairSource(arguments[name], self, arguments.get("args"), split)

    def tokenize_row(self, feature: Any, model: Any = None) -> dict[str, Any]:
        """The tokens of DPO for a row, the answers cut to max_length as TRL's CPO and ORPO cut them."""
        trainer: Any = self
        row = preference({n: feature[n] for n in ("prompt", "chosen", "rejected", *OPTIONS) if n in feature})
        tokenizer = trainer.processing_class
        if trainer.is_encoder_decoder:
            return super().tokenize_row(rendered(row, tokenizer), model)  # type: ignore[misc]
        prompt, *answers = pair_ids(row, tokenizer)
        made: dict[str, Any] = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
        if trainer.generate_during_eval:  # its table shows the prompt
            made["prompt"] = tokenizer.decode(prompt, skip_special_tokens=True)
        for side, answer in zip(("chosen", "rejected"), answers, strict=True):
            answer = answer[: max(0, trainer.max_length - len(prompt))]
            made[f"{side}_input_ids"] = prompt + answer
            made[f"{side}_attention_mask"] = [1] * len(prompt + answer)
            made[f"{side}_labels"] = [-100] * len(prompt) + answer
        return made

    def _groups(self) -> int:
        return 2

    def _lay_out(self) -> LayOut:
        return functools.partial(_lay_out_pairs, padding_value=self._padding_value)

    @property
    def _padding_value(self) -> int:
        trainer: Any = self
        padding: int = getattr(trainer, "padding_value", trainer.processing_class.pad_token_id)  # ORPO's own option
        return padding

    def _completion_forward(self, model: Any, batch: Any, *, with_prompt: bool, mean: bool, aux: bool) -> tuple:
        """What CPO's and ORPO's `concatenated_forward` returns, with mean logits in the place of the logits.

        One call of the head serves the NLL of the chosen rows, prompt included or not, and the preference terms.
        """
        trainer: Any = self
        device = trainer.accelerator.device
        inputs = trainer.concatenated_inputs(batch, padding_value=self._padding_value, device=device)
        ids, attention_mask = inputs["concatenated_input_ids"], inputs["concatenated_attention_mask"]
        labels, n = inputs["concatenated_labels"], batch["chosen_labels"].shape[0]
        nll_labels = completion_labels(ids[:n], attention_mask[:n]) if with_prompt else labels[:n]
        out: Any = model(
            input_ids=ids,
            attention_mask=attention_mask,
            layout=batch.get(KEY),
            labels=torch.cat([nll_labels, labels[n:]]),
            fused_lm_head=True,
            **({"output_router_logits": True} if aux else {}),
        )
        mask = labels[:, 1:] != -100
        # Prompt-learning adapters prepend virtual tokens.
        per_token = out.log_probs[:, -mask.shape[1] :]
        logps = (sequence_mean if mean else sequence_sum)(per_token, mask)
        nll = sft_loss(per_token[:n], nll_labels[:, 1:] != -100)
        made = (logps[:n], logps[n:], out.row_mean_logits[:n], out.row_mean_logits[n:], nll)
        return (*made, out.aux_loss) if aux else made


def _lay_out_pairs(layouts: Layouts, batch: Any, padding_value: int) -> Any:
    """The layout of a batch of TRL's collator for CPO and ORPO; the trainers join its two halves later."""
    joined = CPOTrainer.concatenated_inputs(batch, padding_value=padding_value)
    return layouts.of({name: joined[f"concatenated_{name}"] for name in ("input_ids", "attention_mask")})


def _load_encoder_decoder(arguments: dict[str, Any]) -> None:
    name, args = arguments.get("model"), arguments.get("args")
    if not isinstance(name, str) or args is None:
        return
    options = {"device_map": "auto", "trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
    remote = {"revision": options.get("revision"), "trust_remote_code": options["trust_remote_code"]}
    try:
        config = transformers.AutoConfig.from_pretrained(name, **remote)
    except (OSError, ValueError):  # adapters; or no model, of which the loader says more
        return
    if config.is_encoder_decoder:
        arguments["model"] = transformers.AutoModelForSeq2SeqLM.from_pretrained(name, **options)
        args.model_init_kwargs = None  # which are for models that TRL loads


class FusedCPOTrainer(_FusedPairs, CPOTrainer):
    """`trl.experimental.cpo.CPOTrainer` without logits: CPO, SimPO and AlphaPO; see `FusedSFTTrainer`.

    A completion without tokens has an average log-probability of 0, where TRL's is NaN.
    """

    _mean_positions = slice(None)

    def concatenated_forward(self, model: Any, batch: Any) -> tuple:
        """As TRL's; [B] mean logits in the place of logits, of which only the mean is logged."""
        if self.is_encoder_decoder:
            return super().concatenated_forward(model, batch)
        mean = self.loss_type in ("ipo", "simpo")
        made = self._completion_forward(model, batch, with_prompt=False, mean=mean, aux=self.aux_loss_enabled)
        nll = made[4] if self.cpo_alpha else torch.zeros_like(made[4])
        return (*made[:4], nll, *made[5:])


class FusedORPOTrainer(_FusedPairs, ORPOTrainer):
    """`trl.experimental.orpo.ORPOTrainer` without logits; see `FusedSFTTrainer`.

    Average log-probabilities are at most -1.2e-7, also that of a completion without tokens, where TRL's loss is NaN.
    """

    _mean_positions = slice(None, -1)

    def concatenated_forward(self, model: Any, batch: Any) -> tuple:
        """As TRL's; [B] mean logits in the place of logits, of which only the mean is logged."""
        if self.is_encoder_decoder:
            return super().concatenated_forward(model, batch)
        made = self._completion_forward(model, batch, with_prompt=True, mean=True, aux=self.aux_loss_enabled)
        # The odds of a probability of 1, also that of nothing, are infinite.
        chosen_logps, rejected_logps = (x.clamp(max=-torch.finfo(torch.float32).eps) for x in made[:2])
        return (chosen_logps, rejected_logps, *made[2:])


class FusedTPOTrainer(_FusedForward, TPOTrainer):
    """`trl.experimental.tpo.TPOTrainer` without logits; see `FusedSFTTrainer`."""

    def _groups(self) -> int:
        return 3 if self.tpo_alpha else 2

    _outputs = ("log_probs", "entropy", "mean_logits", "is_top1")

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        """Rows are all chosen, then all rejected, then, unless tpo_alpha is 0, all gold completions."""
        mode = "train" if model.training else "eval"
        model_kwargs = {name: x for name, x in inputs.items() if name != "completion_mask"} | {"use_cache": False}
        labels = completion_labels(inputs["input_ids"], inputs["completion_mask"])
        out = model(**model_kwargs, labels=labels, fused_lm_head=True)
        mask = inputs["completion_mask"][:, 1:].bool()
        width, parts = mask.shape[1], 3 if self.tpo_alpha else 2
        per_token, entropy, mean_logits, is_top1 = (  # without the virtual tokens of prompt-learning adapters
            x[:, -width:] for x in (out.log_probs, out.entropy, out.mean_logits, out.is_top1)
        )
        reduce = sequence_mean if self.loss_type in ("ipo", "tpo-l") else sequence_sum
        chosen_logps, rejected_logps, *_ = reduce(per_token, mask).chunk(parts)
        options = {"gamma": self.tpo_l_gamma} if self.loss_type == "tpo-l" else {}
        if self.loss_type in ("sigmoid", "tpo-l"):  # TRL warns that the others ignore it
            options["label_smoothing"] = self.label_smoothing
        losses, chosen_rewards, rejected_rewards = tpo_loss(
            chosen_logps, rejected_logps, beta=self.beta, loss_type=self.loss_type, **options
        )
        loss = losses.mean()
        if self.tpo_alpha:
            loss = loss + self.tpo_alpha * sft_loss(per_token.chunk(3)[2], mask.chunk(3)[2])

        metrics, gathered = self._metrics[mode], self.accelerator.gather_for_metrics

        def over_tokens(x: Tensor, of: Tensor) -> float:
            total, count = gathered(x.where(of, 0).sum()).sum(), gathered(of.sum()).sum()
            return (total / count).item() if count > 0 else 0.0

        metrics["entropy"].append(gathered(entropy.detach()[mask].mean()).mean().item())
        if mode == "train":
            self._total_train_tokens += gathered(inputs["attention_mask"].sum()).sum().item() // self._tp_size
        metrics["num_tokens"] = [self._total_train_tokens]
        for name, logits, of in zip(("chosen", "rejected"), mean_logits.chunk(parts), mask.chunk(parts), strict=False):
            metrics[f"logits/{name}"].append(over_tokens(logits, of))
        metrics["mean_token_accuracy"].append(over_tokens(is_top1.chunk(parts)[0].float(), mask.chunk(parts)[0]))
        for name, x in {
            "rewards/chosen": chosen_rewards,
            "rewards/rejected": rejected_rewards,
            "rewards/accuracies": (chosen_rewards > rejected_rewards).float(),
            "rewards/margins": chosen_rewards - rejected_rewards,
            "logps/chosen": chosen_logps.detach(),
            "logps/rejected": rejected_logps.detach(),
        }.items():
            metrics[name].append(self.accelerator.gather(x).mean().item())
        if not return_outputs:
            return loss
        with torch.no_grad():  # compute_metrics asks for the logits themselves
            return loss, model(**model_kwargs)
