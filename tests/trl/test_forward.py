"""`add_lm_head` without a trainer: the contract of TRL's fused forward, against the model's own logits."""

import functools
import inspect
import types

import pytest
import tiny
import torch
import transformers

from fusedalign.trl import HeadOptions
from fusedalign.trl.forward import add_lm_head, fused_by

OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")


def fused(name="qwen3", outputs=OUTPUTS, **options):
    """One of `tiny.MODELS` with the fused forward; shared, so tests must not train it."""
    torch.manual_seed(0)
    model = tiny.MODELS[name]().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(8)
    add_lm_head(model, outputs, options=HeadOptions(), **options)
    return model


def batch(ignored=0.3):
    g = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 400, (3, 7), generator=g)
    return ids, ids.masked_fill(torch.rand(3, 7, generator=g) < ignored, -100)


def test_the_loss_divides_by_num_items_or_the_counted_tokens():
    model, (ids, labels) = fused(), batch()
    count = int((labels[:, 1:] != -100).sum())
    mean = model(ids, labels=labels, fused_lm_head=True).loss
    torch.testing.assert_close(mean, model(ids, labels=labels).loss)
    window = model(ids, labels=labels, num_items_in_batch=torch.tensor(50), fused_lm_head=True).loss
    torch.testing.assert_close(window, mean * count / 50)
    nothing = model(ids, labels=torch.full_like(labels, -100), fused_lm_head=True).loss
    assert nothing == 0
    nothing.backward()


def test_shift_labels_take_precedence_over_labels():
    model, (ids, labels) = fused(), batch()
    want = model(ids, shift_labels=labels.roll(-3, 1), fused_lm_head=True)
    got = model(ids, labels=labels, shift_labels=labels.roll(-3, 1), fused_lm_head=True)
    assert torch.equal(got.log_probs, want.log_probs)
    with pytest.raises(ValueError, match="fused_lm_head=True needs labels or shift_labels, got neither"):
        model(ids, fused_lm_head=True)


@pytest.mark.parametrize("name", ["entropy", "log_probs"])
def test_logps_and_entropy_have_gradients_and_means_do_not(name):
    """Entropy too, since some losses reward it; logged means have none."""
    model, (ids, labels) = fused(mean_positions=slice(None)), batch()
    out = model(ids, labels=labels, fused_lm_head=True)
    assert not any(x.requires_grad for x in (out.mean_logits, out.is_top1, out.row_mean_logits))
    logps = model(ids).logits[:, :-1].log_softmax(-1)
    mask = labels[:, 1:] != -100
    own = -(logps.exp() * logps).sum(-1) if name == "entropy" else logps.gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(out[name], own.where(mask, 0))
    weights = torch.linspace(1, 2, mask.numel()).view_as(own)
    got, want = (
        torch.autograd.grad((x * weights).sum(), list(model.parameters())) for x in (out[name], own.where(mask, 0))
    )
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4 * y.abs().max().item())


@pytest.mark.parametrize("name", ["qwen3", "phi", "gemma2", "cohere"])
@pytest.mark.parametrize("positions", [slice(None), slice(None, -1)])
def test_row_mean_logits_equal_those_of_full_logits(name, positions):
    """With a bias, a softcap, and a scale."""
    model, (ids, labels) = fused(name, mean_positions=positions), batch()
    got = model(ids, labels=labels, fused_lm_head=True).row_mean_logits
    torch.testing.assert_close(got, model(ids).logits[:, positions].mean((1, 2)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("autocast", [True, False])
def test_row_mean_logits_are_not_rounded_to_bf16(autocast):
    """The mean is far smaller than the averaged logits: rounded to bf16 it would be noise."""
    hidden_states, (ids, labels) = [], batch()
    model = fused(mean_positions=slice(None))
    model = model if autocast else model.bfloat16()
    model.model.register_forward_hook(lambda module, args, out: hidden_states.append(out[0]))
    with torch.no_grad():
        model.lm_head.weight.add_(1.7)  # rows and columns with a non-zero mean
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            got = model(ids, labels=labels, fused_lm_head=True).row_mean_logits
        want = (hidden_states[0].double() @ model.lm_head.weight.double().T).mean((1, 2))
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


# Without fused_lm_head


def test_without_fused_lm_head_the_model_is_unchanged():
    """With labels, aligned labels, the number of items, or nothing."""
    ids, labels = batch()
    model = fused()
    plain = transformers.Qwen3ForCausalLM(model.config).eval()
    plain.load_state_dict(model.state_dict())
    aligned = labels.roll(-3, 1)
    for arguments in ({"labels": labels}, {"labels": labels, "num_items_in_batch": 50}, {}):
        for aligned_too in ({}, {"shift_labels": aligned}) if arguments else ({},):
            got, want = (x(ids, **arguments, **aligned_too) for x in (model, plain))
            assert torch.equal(got.logits, want.logits)
            assert got.loss == want.loss
    assert plain(ids, labels=labels).loss not in (
        plain(ids, labels=labels, shift_labels=aligned).loss,
        plain(ids, labels=labels, num_items_in_batch=50).loss,
    )


def test_a_forward_set_on_the_instance_is_still_called():
    """accelerate and other libraries set such forwards."""
    torch.manual_seed(0)
    model, (ids, labels), calls = tiny.MODELS["qwen3"](), batch(), []
    own = model.forward

    @functools.wraps(own)
    def counted(*args, **kwargs):
        calls.append(sorted(kwargs))
        return own(*args, **kwargs)

    model.forward = counted
    add_lm_head(model, options=HeadOptions())
    model(ids)
    model(ids, labels=labels)
    assert calls == [[], ["labels"]]


def test_the_signature_equals_the_models_own():
    """`generate` and the Trainer inspect the signature."""
    model = fused()
    own = inspect.signature(type(model).forward).parameters
    assert list(inspect.signature(model.forward).parameters) == list(own)[1:]
    with pytest.raises(ValueError, match="nonsense"):
        model.generate(batch()[0], max_new_tokens=2, nonsense=3)


def test_a_forward_with_few_arguments_gets_only_those():
    class Little(transformers.Qwen3ForCausalLM):
        def forward(self, input_ids):
            return self.lm_head(self.model(input_ids).last_hidden_state)

    torch.manual_seed(0)
    model, (ids, labels) = Little(transformers.Qwen3Config(**tiny.SMALL, head_dim=8)), batch()
    want = model(ids)
    add_lm_head(model, options=HeadOptions())
    assert torch.equal(model(ids), want)
    logps = want[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    got = model(ids, labels=labels, fused_lm_head=True).log_probs
    torch.testing.assert_close(got, logps.where(labels[:, 1:] != -100, 0))


def test_the_backbone_keeps_no_cache():
    """Even if the caller or the configuration enables one."""
    model, (ids, labels), caches = fused(), batch(), []
    model.model.register_forward_pre_hook(lambda module, args, kwargs: caches.append(kwargs), with_kwargs=True)
    model.config.use_cache = True
    model(ids, labels=labels, fused_lm_head=True)
    model(ids, labels=labels, fused_lm_head=True, use_cache=True)
    assert [kwargs["use_cache"] for kwargs in caches] == [False, False]


def test_a_model_that_is_its_own_backbone_is_refused():
    """Its forward would recurse."""

    class Alone(transformers.Qwen3ForCausalLM):
        base_model_prefix = "nothing"

    with pytest.raises(TypeError, match="expected a model whose base_model is its backbone, got Alone"):
        add_lm_head(Alone(transformers.Qwen3Config(**tiny.SMALL, head_dim=8)), options=HeadOptions())


# Experts


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_the_expert_balancing_loss_equals_the_models_own(name):
    """Over tokens that are not padding, if the configuration or the caller enables it."""
    model, (ids, labels) = fused(name), batch()
    mask = torch.ones_like(ids).index_fill(1, torch.tensor([0, 1]), 0)
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    want, got = model(**inputs), model(**inputs, fused_lm_head=True)
    torch.testing.assert_close(got.aux_loss, want.aux_loss)
    torch.testing.assert_close(got.loss, want.loss)
    disabled = model(**inputs, fused_lm_head=True, output_router_logits=False)
    assert disabled.aux_loss is None
    torch.testing.assert_close(disabled.loss, model(**inputs, output_router_logits=False).loss)
    model.config.output_router_logits = False
    assert model(**inputs, fused_lm_head=True).aux_loss is None
    enabled = model(**inputs, fused_lm_head=True, output_router_logits=True)
    torch.testing.assert_close(enabled.loss, want.loss)


def test_expert_counts_under_another_name_are_found():
    """A name with the value None is ignored."""
    model, (ids, labels) = fused("mixtral"), batch()
    want = model(ids, labels=labels, fused_lm_head=True).aux_loss
    vars(model.config).update(n_routed_experts=4, num_local_experts=None)
    assert model.config.num_experts is None
    torch.testing.assert_close(model(ids, labels=labels, fused_lm_head=True).aux_loss, want)


def test_experts_of_a_nested_text_configuration_are_found():
    """As in vision models; without a coefficient the term is logged but not part of the loss."""
    model, (ids, labels) = fused("mixtral"), batch()
    want = model(ids, labels=labels, fused_lm_head=True)
    text = types.SimpleNamespace(output_router_logits=True, num_local_experts=4, num_experts_per_tok=2)
    model.config.output_router_logits = False
    vars(model.config)["get_text_config"] = lambda **_: text
    got = model(ids, labels=labels, fused_lm_head=True)
    torch.testing.assert_close(got.aux_loss, want.aux_loss)
    torch.testing.assert_close(got.loss, want.loss - model.config.router_aux_loss_coef * want.aux_loss)
    text.router_aux_loss_coef = 3.0
    torch.testing.assert_close(
        model(ids, labels=labels, fused_lm_head=True).loss, got.loss + 3 * got.aux_loss, rtol=1e-5, atol=1e-5
    )


# Origin of the forward


def test_fused_by_names_the_library_of_the_forward():
    """Forwards of ours are known one by one, also below the wrappers of mixed precision; a name proves nothing."""
    model = fused()
    assert fused_by(model) == "fusedalign"
    inner = model.forward
    model.forward = functools.wraps(inner)(lambda *args, **kwargs: inner(*args, **kwargs))
    assert fused_by(model) == "fusedalign"
    for name in ("_fused_forward", "fused_forward"):
        scope: dict = {"__name__": "another.library"}
        exec(f"def {name}(self, **kwargs): return None", scope)
        model.forward = types.MethodType(scope[name], model)
        assert fused_by(model) == f"another.library.{name}"
    model.forward = functools.partial(print)
    assert fused_by(model) == "functools.partial"
