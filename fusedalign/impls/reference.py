"""Full logits in fp32 or fp64 and PyTorch's own autograd: the oracle of every test, never chosen by "auto"."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedalign.impls.base import Impl
from fusedalign.problem import Problem, TokenLogps


def _operand(x: Tensor, problem: Problem) -> Tensor:
    return x.to(problem.operand_dtype).to(problem.logit_dtype)


class Reference(Impl):
    """The impl, see above."""

    about = "full logits in fp32/fp64, the oracle of the tests"

    def supports(self, problem: Problem) -> str | None:
        """None, or why this impl cannot serve `problem`."""
        if problem.filter_eps is not None:
            return "its gradients are always dense (filter_eps must be None)"
        return None

    def token_logps(self, problem: Problem) -> TokenLogps:
        """`TokenLogps` of [N] tokens from the [N, V] logits."""
        p, outputs = problem, problem.outputs
        logits = F.linear(_operand(p.hidden, p), _operand(p.weight[:], p))
        if p.bias is not None:
            logits = logits + p.bias.to(p.logit_dtype)
        logits = p.scale * logits
        if p.softcap is not None:
            logits = p.softcap * torch.tanh(logits / p.softcap)
        logits = logits / p.temperature

        all_logps = logits.log_softmax(-1)
        logps = all_logps.gather(-1, p.targets[:, None]).squeeze(-1)
        entropy = lse = mean_logit = log_sum_sq_probs = is_top1 = None
        if "entropy" in outputs:
            # A column masked by a bias of -inf has p = 0: clamped, it contributes 0 * -1e4 instead of 0 * -inf.
            entropy = -(all_logps.exp() * all_logps.clamp(min=-1e4)).sum(-1).to(p.result_dtype)
        if "lse" in outputs:
            lse = logits.logsumexp(-1).to(p.result_dtype)
        if "mean_logit" in outputs:
            mean_logit = logits.detach().mean(-1).to(p.result_dtype)
        if "log_sum_sq_probs" in outputs:
            log_sum_sq_probs = (2 * all_logps.detach()).logsumexp(-1).to(p.result_dtype)
        if "is_top1" in outputs:
            is_top1 = (logits.max(-1).indices == p.targets) & ~logps.isnan()
        return TokenLogps(logps.to(p.result_dtype), entropy, lse, mean_logit, log_sum_sq_probs, is_top1)


IMPL = Reference()
