"""The Fused trainers prepare their impl for the problems of training when they are built."""

import types

import pytest
import torch

from fusedalign.trl import options


@pytest.fixture
def prepared(monkeypatch):
    """The problems that an impl was asked to prepare."""
    problems, resolve = [], options.resolve

    def resolved(name, problem):
        impl = resolve(name, problem)
        return types.SimpleNamespace(prepare=problems.append, token_logps=impl.token_logps)

    monkeypatch.setattr(options, "resolve", resolved)
    return problems


@pytest.mark.parametrize("kind", ["dpo", "sft"])
def test_policy_and_reference_problems_are_prepared(prepared, build, kind):
    trainer = build(kind, "fused")
    policy, *reference = prepared
    head = trainer.model.get_output_embeddings().weight
    assert policy.weight is head
    assert policy.hidden.requires_grad
    assert policy.hidden.shape == (0, head.shape[1])
    assert policy.outputs
    assert len(reference) == (kind == "dpo")
    for problem in reference:
        assert problem.weight.shape == head.shape
        assert not problem.weight.requires_grad
        assert not problem.hidden.requires_grad
        assert not problem.outputs
    assert policy.operand_dtype == torch.float32
