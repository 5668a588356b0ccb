"""Every name of PyTorch's that is not public, behind functions that say what for; tested with 2.11 and 2.13.

* `torch._C._functorch`: `get_interpreter_stack`, `is_functorch_wrapped_tensor`, `is_batchedtensor`, `get_unwrapped`,
  `is_legacy_batchedtensor`: `torch.func` transforms and batched gradients.
* `torch._C._will_engine_execute_node`, `torch._C._autograd._get_current_graph_task_keep_graph`,
  `Tensor._backward_hooks`, `Tensor._post_accumulate_grad_hooks`: the backward that is running.
* `torch._dynamo` in `sys.modules`: whether the compiler is loaded.
* `torch._subclasses`: the module of FakeTensor.
* `FSDPModule._get_fsdp_state()._modules`: the modules that FSDP2 gathers together.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn


def transform_names() -> list[str]:
    """The `torch.func` transforms around the present call ("Grad", "Jvp", "Vmap", ...), outermost first."""
    return [level.key().name for level in torch._C._functorch.get_interpreter_stack() or ()]


def is_transformed(x: Tensor) -> bool:
    """Whether `x` is wrapped by a `torch.func` transform."""
    return torch._C._functorch.is_functorch_wrapped_tensor(x)


def is_mapped(x: Tensor) -> bool:
    """Whether `torch.vmap` maps over `x`, at any level."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            return True
        x = functorch.get_unwrapped(x)
    return False


def is_batched_grad(x: Tensor) -> bool:
    """Whether `x` is an upstream gradient of `torch.autograd.grad(is_grads_batched=True)`."""
    return torch._C._functorch.is_legacy_batchedtensor(x)


def is_fake(x: Tensor) -> bool:
    """Whether `x` is a stand-in for a tensor while a graph is traced."""
    return type(x).__module__.startswith("torch._subclasses.")


def is_compiler_loaded() -> bool:
    """Whether `torch.compile` has been used or imported in this process."""
    return "torch._dynamo" in sys.modules


def graph_is_kept() -> bool:
    """Whether the running backward keeps its graph for another one; True where PyTorch does not tell."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return ask is None or ask()


def only_accumulates(x: Tensor) -> bool:
    """Whether the running backward does nothing with the gradient of the leaf `x` but add it to `x.grad`.

    False under `torch.autograd.grad`, and where hooks of `x` want to see the gradient. Hooks on the accumulating node
    (DDP's) look at `x.grad` alone.
    """
    if x._backward_hooks or x._post_accumulate_grad_hooks or graph_is_kept():
        return False
    try:
        return torch._C._will_engine_execute_node(torch.autograd.graph.get_gradient_edge(x).node)
    except (AttributeError, RuntimeError):  # a PyTorch without it; torch.autograd.grad, which asks for the gradient
        return False


def fsdp_unit(module: nn.Module) -> tuple[nn.Module, ...]:
    """The modules with parameters that FSDP2 gathers together with those of `module`, itself included."""
    state = getattr(module, "_get_fsdp_state", lambda: None)()
    modules: tuple[nn.Module, ...] = getattr(state, "_modules", (module,))
    return modules
