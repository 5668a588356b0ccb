"""Full logits in fp32 or fp64 and PyTorch's own autograd: the oracle of every test, never chosen by "auto"."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedalign.impls.base import Impl
from fusedalign.problem import DEFINITIONS, FullLogits, Problem, TokenLogps, TokenLoss


class Reference(Impl):
    """The impl, see above."""

    about = "full logits in fp32/fp64, the oracle of the tests"

    def supports(self, problem: Problem) -> str | None:
        """None, or why this impl cannot serve `problem`."""
        if problem.filter_eps is not None:
            return "its gradients are always dense (filter_eps must be None)"
        return None

    def token_logps(self, problem: Problem, loss_hint: TokenLoss | None = None) -> TokenLogps:
        """`TokenLogps` of [N] tokens from the [N, V] logits."""
        logits = _logits(problem)
        full = FullLogits(logits, logits.log_softmax(-1), problem.targets)
        results = {"logps": full.target_logps()}
        results |= {name: DEFINITIONS[name](full) for name in DEFINITIONS if name in problem.outputs}
        return TokenLogps(**{k: x.to(problem.result_dtype) if x.is_floating_point() else x for k, x in results.items()})


def _logits(p: Problem) -> Tensor:
    """Final logits, [N, V] in the logit dtype."""
    logits = F.linear(_operand(p.hidden, p), _operand(p.weight[:], p))
    if p.bias is not None:
        logits = logits + p.bias.to(p.logit_dtype)
    logits = p.scale * logits
    if p.softcap is not None:
        logits = p.softcap * torch.tanh(logits / p.softcap)
    return logits / p.temperature


def _operand(x: Tensor, problem: Problem) -> Tensor:
    return x.to(problem.operand_dtype).to(problem.logit_dtype)


IMPL = Reference()
