"""`LinearCrossEntropyLoss`: the `nn.Module` face of the primitive, over any impl."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fusedalign.head import LMHead, layer_head
from fusedalign.impls import check_name
from fusedalign.ops import linear_cross_entropy, linear_logps

_REDUCTIONS = ("mean", "sum", "none")


class LinearCrossEntropyLoss(nn.Module):
    """The cross-entropy of an LM head, from hidden states and labels, without the logits.

    The head is a model's, or the module's own. A model's head stays the model's: it is looked up at each call, so that
    tied, reloaded and moved weights are the ones in use, and neither parameters nor `state_dict` hold it twice. A copy
    (`copy.deepcopy`) of a model together with its loss refers to the copied head. Copies share the process group; a
    module that is pickled, as by `torch.save(module)`, must have the default group or none, and takes the default group
    of the process that loads it, as `DistributedDataParallel` does.

    A head knows nothing of what its model does to the logits afterwards: pass `softcap` and `scale` yourself, as
    `fusedalign.head.lm_head(model)` reads them off.

    Args:
        output_embeddings: `model.get_output_embeddings()`, an `nn.Linear`; or a function that returns it, such as
            `model.get_output_embeddings` itself, asked at each call, for heads that are replaced later (by PEFT, or
            when the vocabulary is resized).
        in_features, out_features: instead of it, D and V of a head of the module's own.
        bias: whether the own head has one.
        device, dtype: of the own head.
        impl: as in `linear_logps`.
        chunk_size: tokens a tile, instead of what `workspace` gives; `token_chunk` of the primitive.
        reduction: "mean" or "sum" over the labels that are not ignored, or "none".
        shift: 0 where `labels` are aligned with `hidden_states`; 1 for the causal shift, in which the hidden state at t
            predicts the label at t + 1; k for the k-th token after. Labels are shifted, hidden states not copied.
        ignore_index, scale, softcap, temperature, filter_eps, workspace, keep_head, process_group: as in
            `linear_logps`; a pipeline's last stage wants keep_head=False.
        loss_type, z_loss: as in `linear_cross_entropy`; 0 and "nll" with reduction="none".

    Raises:
        ValueError: neither or both kinds of head, an unknown impl or reduction, a negative shift.

    Example:
        >>> import torch
        >>> loss_fn = LinearCrossEntropyLoss(in_features=8, out_features=50, shift=1)
        >>> hidden_states, labels = torch.randn(2, 5, 8), torch.randint(0, 50, (2, 5))
        >>> loss_fn(hidden_states, labels).shape
        torch.Size([])
    """

    def __init__(
        self,
        output_embeddings: nn.Module | Callable[[], nn.Module] | None = None,
        *,
        in_features: int | None = None,
        out_features: int | None = None,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        impl: str = "auto",
        chunk_size: int | None = None,
        reduction: str = "mean",
        shift: int = 0,
        ignore_index: int = -100,
        loss_type: str = "nll",
        z_loss: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__()
        check_name(impl)
        if reduction not in _REDUCTIONS:
            raise ValueError(f"reduction must be one of {', '.join(_REDUCTIONS)}, got {reduction!r}")
        if not isinstance(shift, int) or shift < 0:
            raise ValueError(f"shift must be an integer >= 0, got {shift!r}")
        if reduction == "none" and (loss_type, z_loss) != ("nll", 0.0):
            raise ValueError(f"reduction='none' is for the plain NLL, got loss_type={loss_type!r}, z_loss={z_loss}")
        if unknown := options.keys() - _OPTIONS:
            raise TypeError(f"options must be among {', '.join(sorted(_OPTIONS))}, got {', '.join(sorted(unknown))}")
        sizes = in_features, out_features
        if sizes != (None, None) if output_embeddings is not None else None in sizes:
            raise ValueError("expected output_embeddings, or in_features and out_features for a head of its own")
        if in_features is not None and out_features is not None:
            self.head = nn.Linear(in_features, out_features, bias, device, dtype)
        elif bias or device is not None or dtype is not None:
            raise ValueError("bias, device and dtype are those of a head of its own, output_embeddings has its own")
        self._lent = (output_embeddings,)  # in a tuple, which nn.Module does not register
        self.reduction, self.shift, self.ignore_index = reduction, int(shift), ignore_index
        self.loss_type, self.z_loss = loss_type, z_loss
        self.group = _Group(options.pop("process_group", None))
        self.options = {"impl": impl, "token_chunk": chunk_size, **options}

    def forward(self, hidden_states: Tensor, labels: Tensor, num_items: float | Tensor | None = None) -> Tensor:
        """The loss.

        Args:
            hidden_states: [..., T, D] fp64/fp32/bf16/fp16, the input of the head.
            labels: [..., T] int64, see `shift`.
            num_items: what "mean" divides by instead of the number of labels that count: that of the whole window,
                under gradient accumulation and data parallelism.

        Returns:
            A scalar in fp32 (fp64 where hidden_states are); with reduction="none" [..., T], nats, 0 where nothing is
            predicted.

        Raises:
            TypeError, ValueError: the head is no whole linear layer, or has adapters that `lm_head` refuses; and as
                `linear_cross_entropy`.
        """
        head, targets = self._find_head(), self._targets(labels)
        hidden_states = head.expand(hidden_states)
        options: dict[str, Any] = {"bias": head.bias, "ignore_index": self.ignore_index, **self.options}
        if self.group.handle is not None:
            options["process_group"] = self.group.handle
        if self.reduction == "none":
            if num_items is not None:
                raise ValueError(f"num_items must be None with reduction='none', got {num_items}")
            return -linear_logps(hidden_states, head.weight, targets, **options).logps
        options |= {"loss_type": self.loss_type, "z_loss": self.z_loss, "reduction": self.reduction}
        return linear_cross_entropy(hidden_states, head.weight, targets, num_items=num_items, **options)

    def _find_head(self) -> LMHead:
        (lent,) = self._lent
        if lent is None:
            lent = self.head
        return layer_head(lent if isinstance(lent, nn.Module) else lent())

    def _targets(self, labels: Tensor) -> Tensor:
        if not self.shift:
            return labels
        targets = torch.full_like(labels, self.ignore_index)
        targets[..., : -self.shift] = labels[..., self.shift :]
        return targets

    def extra_repr(self) -> str:
        """The options that have a value, for `print(module)`."""
        chosen = {"reduction": self.reduction, "shift": self.shift, **self.options, "process_group": self.group.handle}
        return ", ".join(f"{name}={value!r}" for name, value in chosen.items() if value is not None)


@dataclass(frozen=True)
class _Group:
    """A process group, which belongs to its process: PyTorch can neither copy nor pickle one."""

    handle: dist.ProcessGroup | None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Group:
        return self

    def __reduce__(self) -> tuple[Callable[[], _Group], tuple[()]]:
        if self.handle is None:
            return _no_group, ()
        if self.handle is not dist.group.WORLD:
            raise TypeError(
                "process_group must be the default group or None in a module that is pickled, got another group: "
                "save its state_dict() instead"
            )
        return _default_group, ()


def _no_group() -> _Group:
    return _Group(None)


def _default_group() -> _Group:
    if not dist.is_initialized():
        raise RuntimeError(
            "expected a default process group, with which this module was saved, got none: call "
            "torch.distributed.init_process_group first"
        )
    return _Group(dist.group.WORLD)


#: The options of both functions that are passed on as they are.
_OPTIONS = (signature(linear_logps).parameters.keys() & signature(linear_cross_entropy).parameters.keys()) - {
    *("hidden", "weight", "targets", "bias", "ignore_index", "impl", "token_chunk"),
}
