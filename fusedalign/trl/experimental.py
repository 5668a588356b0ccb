"""`FusedCPOTrainer` (CPO, SimPO, AlphaPO), `FusedORPOTrainer` and `FusedTPOTrainer`: trainers of `trl.experimental`.

Their stock forms build the logits, in fp32 under mixed precision, more than once. In CPO and ORPO one method is
replaced, the forward of a batch; the losses and metrics that follow stay TRL's. TPO computes everything in one method,
which is rewritten here around `fusedalign.tpo_loss`.
"""

from __future__ import annotations

import functools
import logging
import warnings
from typing import Any

import torch
import transformers
from torch import Tensor

from fusedalign.losses import PreferenceLoss, sft_loss, tpo_loss
from fusedalign.sequence import completion_labels, sequence_mean, sequence_sum
from fusedalign.trl import stock
from fusedalign.trl.kernels import add_liger_kernels
from fusedalign.trl.layouts import KEY, LayOut, Layouts
from fusedalign.trl.refusals import base_of
from fusedalign.trl.shapes import preference
from fusedalign.trl.tokens import OPTIONS, PairSource, pair_ids, rendered
from fusedalign.trl.trainers import Fused

with warnings.catch_warnings():  # trl.experimental's warning: the user asked for these trainers by name
    warnings.simplefilter("ignore")
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer
    from trl.experimental.tpo import TPOTrainer

__all__ = ["FusedCPOTrainer", "FusedORPOTrainer", "FusedTPOTrainer"]

_logger = logging.getLogger(__name__)


class _LateHead(Fused):
    """Adds the head after TRL's constructor; mixed precision wraps the model later, when training starts."""

    _trl_has_head = False
    #: The per-token outputs that loss and metrics use, by TRL's names.
    _outputs: tuple[str, ...] = ("log_probs",)
    #: Positions over which the stock trainer averages the logits it logs; None: those of the completions.
    _mean_positions: slice | None = None

    def _add_late_head(self) -> None:
        trainer: Any = self
        self._add_head(base_of(trainer.model), self._outputs, self._mean_positions)
        if trainer.args.use_liger_kernel:  # Liger would replace the forward when training starts
            kernels = trainer.args.liger_kernel_config or {}
            trainer.args.liger_kernel_config = {**kernels, "fused_linear_cross_entropy": False}


class _FusedPairs(_LateHead):
    """Base of CPO and ORPO: rows tokenised as DPO's, and the forward of a batch."""

    _may_unmask = False  # TRL logs mean logits over padding too: these depend on the mask

    def _adapt(self, arguments: dict[str, Any]) -> None:
        """Pass rows unchanged to `tokenize_row`, and load an encoder-decoder that is given by name."""
        _load_encoder_decoder(arguments)
        if arguments.get("args") is not None and arguments.get("data_collator") is None:
            arguments["args"].remove_unused_columns = False  # TRL sets it too, with a warning
        for name in ("train_dataset", "eval_dataset"):
            if hasattr(arguments.get(name), "map"):
                split = name.partition("_")[0]
                arguments[name] = PairSource(arguments[name], self, arguments.get("args"), split)

    def _add_late_head(self) -> None:
        """Add the head, but to an encoder-decoder, for which TRL's own path is kept; TPO refuses it."""
        trainer: Any = self
        if not trainer.is_encoder_decoder:
            super()._add_late_head()
            return
        model = base_of(trainer.model)
        if self.liger_kernels:
            add_liger_kernels(model)
        _logger.warning("%s is an encoder-decoder: it keeps TRL's own path, with logits", type(model).__name__)

    def tokenize_row(self, feature: Any, model: Any = None) -> dict[str, Any]:
        """The tokens of a row as DPO has them, the answers cut to max_length as in TRL's CPO and ORPO."""
        trainer: Any = self
        row = preference({n: feature[n] for n in ("prompt", "chosen", "rejected", *OPTIONS) if n in feature})
        tokenizer = trainer.processing_class
        if trainer.is_encoder_decoder:
            parent: Any = super()
            tokenised: dict[str, Any] = parent.tokenize_row(rendered(row, tokenizer), model)
            return tokenised
        prompt, *answers = pair_ids(row, tokenizer)
        encoded: dict[str, Any] = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
        if trainer.generate_during_eval:  # its table shows the prompt
            encoded["prompt"] = tokenizer.decode(prompt, skip_special_tokens=True)
        for side, answer in zip(("chosen", "rejected"), answers, strict=True):
            answer = answer[: max(0, trainer.max_length - len(prompt))]
            encoded[f"{side}_input_ids"] = prompt + answer
            encoded[f"{side}_attention_mask"] = [1] * len(prompt + answer)
            encoded[f"{side}_labels"] = [-100] * len(prompt) + answer
        return encoded

    def _groups(self) -> int:
        return 2

    def _lay_out(self) -> LayOut:
        return functools.partial(_lay_out_pairs, padding_value=self._padding_value)

    @property
    def _padding_value(self) -> int:
        trainer: Any = self
        padding: int = getattr(trainer, "padding_value", trainer.processing_class.pad_token_id)  # an option of ORPO
        return padding

    def _completion_forward(self, model: Any, batch: Any, *, with_prompt: bool, mean: bool, aux: bool) -> tuple:
        """The return value of CPO's and ORPO's `concatenated_forward`, with mean logits in the place of the logits.

        One call of the head computes the preference terms and the NLL of the chosen rows, which may include the prompt.
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
        per_token = out.log_probs[:, -mask.shape[1] :]  # without the virtual tokens of prompt-learning adapters
        logps = (sequence_mean if mean else sequence_sum)(per_token, mask)
        nll = sft_loss(per_token[:n], nll_labels[:, 1:] != -100)
        values = (logps[:n], logps[n:], out.row_mean_logits[:n], out.row_mean_logits[n:], nll)
        return (*values, out.aux_loss) if aux else values


def _lay_out_pairs(layouts: Layouts, batch: Any, padding_value: int) -> Any:
    """The layout of a batch of TRL's collator for CPO and ORPO, whose chosen and rejected rows are joined later."""
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
    except (OSError, ValueError):  # an adapter's folder, or no model: TRL's loader has the better message
        return
    if config.is_encoder_decoder:
        arguments["model"] = transformers.AutoModelForSeq2SeqLM.from_pretrained(name, **options)
        args.model_init_kwargs = None  # TRL takes them only with a model's name


class FusedCPOTrainer(_FusedPairs, CPOTrainer):
    """`trl.experimental.cpo.CPOTrainer` without logits: CPO, SimPO and AlphaPO; see `FusedSFTTrainer`.

    A completion without tokens has an average log-probability of 0; TRL's is NaN.
    """

    _mean_positions = slice(None)

    def concatenated_forward(self, model: Any, batch: Any) -> tuple:
        """As TRL's, with mean logits [B] in the place of the logits: only their mean is logged."""
        if self.is_encoder_decoder:
            return super().concatenated_forward(model, batch)
        mean = self.loss_type in ("ipo", "simpo")
        values = self._completion_forward(model, batch, with_prompt=False, mean=mean, aux=self.aux_loss_enabled)
        *terms, nll = values[:5]
        return (*terms, nll if self.cpo_alpha else torch.zeros_like(nll), *values[5:])


class FusedORPOTrainer(_FusedPairs, ORPOTrainer):
    """`trl.experimental.orpo.ORPOTrainer` without logits; see `FusedSFTTrainer`.

    Average log-probabilities are at most -1.2e-7, also for a completion without tokens, for which TRL's loss is NaN.
    """

    _mean_positions = slice(None, -1)

    def concatenated_forward(self, model: Any, batch: Any) -> tuple:
        """As TRL's, with mean logits [B] in the place of the logits: only their mean is logged."""
        if self.is_encoder_decoder:
            return super().concatenated_forward(model, batch)
        values = self._completion_forward(model, batch, with_prompt=True, mean=True, aux=self.aux_loss_enabled)
        # The odds of a probability of 1, also of an empty completion, are infinite.
        chosen_logps, rejected_logps = (x.clamp(max=-torch.finfo(torch.float32).eps) for x in values[:2])
        return (chosen_logps, rejected_logps, *values[2:])


class FusedTPOTrainer(_LateHead, TPOTrainer):
    """`trl.experimental.tpo.TPOTrainer` without logits; see `FusedSFTTrainer`.

    Raises:
        TypeError: also an encoder-decoder, with which TRL's fails at the first step.
    """

    _outputs = ("log_probs", "entropy", "mean_logits", "is_top1")

    def _groups(self) -> int:
        return 3 if self.tpo_alpha else 2

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        """Rows are all chosen, then all rejected, then, unless tpo_alpha is 0, all gold completions."""
        model_kwargs = {name: x for name, x in inputs.items() if name != "completion_mask"} | {"use_cache": False}
        labels = completion_labels(inputs["input_ids"], inputs["completion_mask"])
        out = model(**model_kwargs, labels=labels, fused_lm_head=True)
        mask = inputs["completion_mask"][:, 1:].bool()
        # Without the virtual tokens of prompt-learning adapters.
        tokens = {name: getattr(out, name)[:, -mask.shape[1] :] for name in self._outputs}
        reduce = sequence_mean if self.loss_type in ("ipo", "tpo-l") else sequence_sum
        chosen_logps, rejected_logps, *_ = reduce(tokens["log_probs"], mask).chunk(self._groups())
        terms = tpo_loss(chosen_logps, rejected_logps, beta=self.beta, loss_type=self.loss_type, **self._loss_options())
        loss = terms.losses.mean()
        if self.tpo_alpha:
            loss = loss + self.tpo_alpha * sft_loss(tokens["log_probs"].chunk(3)[2], mask.chunk(3)[2])
        mode = "train" if model.training else "eval"
        self._log_tokens(mode, tokens, mask, inputs["attention_mask"])
        self._log_pairs(mode, terms, chosen_logps.detach(), rejected_logps.detach())
        if not return_outputs:
            return loss
        with torch.no_grad():  # compute_metrics asks for the logits themselves
            return loss, model(**model_kwargs)

    def _loss_options(self) -> dict[str, float]:
        options = {"gamma": self.tpo_l_gamma} if self.loss_type == "tpo-l" else {}
        if self.loss_type in ("sigmoid", "tpo-l"):  # TRL warns that the others ignore it
            options["label_smoothing"] = self.label_smoothing
        return options

    def _log_tokens(self, mode: str, tokens: dict[str, Tensor], mask: Tensor, attention_mask: Tensor) -> None:
        """Add TRL's metrics of the tokens [B, T] of a batch, means over all ranks; `mask` is True on completions."""
        metrics, gather = stock.metrics(self, mode), self.accelerator.gather_for_metrics

        def mean_over_ranks(values: Tensor, valid: Tensor) -> float:
            total, count = gather(values.where(valid, 0).sum()).sum(), gather(valid.sum()).sum()
            return (total / count).item() if count > 0 else 0.0

        metrics["entropy"].append(gather(tokens["entropy"].detach()[mask].mean()).mean().item())
        trained = gather(attention_mask.sum()).sum().item() if mode == "train" else 0
        metrics["num_tokens"] = [stock.count_train_tokens(self, trained)]
        pairs = len(mask) // self._groups()
        chosen, rejected = slice(pairs), slice(pairs, 2 * pairs)
        for name, rows in (("chosen", chosen), ("rejected", rejected)):
            metrics[f"logits/{name}"].append(mean_over_ranks(tokens["mean_logits"][rows], mask[rows]))
        metrics["mean_token_accuracy"].append(mean_over_ranks(tokens["is_top1"][chosen].float(), mask[chosen]))

    def _log_pairs(self, mode: str, terms: PreferenceLoss, chosen_logps: Tensor, rejected_logps: Tensor) -> None:
        """Add TRL's metrics of the pairs of a batch, means over all ranks."""
        metrics = stock.metrics(self, mode)
        chosen, rejected = terms.chosen_rewards, terms.rejected_rewards
        for name, x in {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/accuracies": (chosen > rejected).float(),
            "rewards/margins": chosen - rejected,
            "logps/chosen": chosen_logps,
            "logps/rejected": rejected_logps,
        }.items():
            metrics[name].append(self.accelerator.gather(x).mean().item())
