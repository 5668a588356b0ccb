"""Models of many families, packed against padded: hidden states, gradients and log-probabilities."""

import copy

import families
import pytest
import torch

pytest.importorskip("transformers")

from fusedalign.packing import RightPadded, enable, enable_unmasked, pack_padded, pack_rows, packed_hidden, packed_logps
from fusedalign.packing.backbone import packed_output, unmasked_arguments
from fusedalign.sequence import shift_labels

TOLERANCE = 1e-5


def run(model, ids, mask, layout=None):
    """Hidden states of the real tokens, [tokens, D], and gradients of a loss that weights each number differently.

    The loss is over padded rows, so a shared token counts once per row.
    """
    model.zero_grad()
    if layout is None:
        hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    elif isinstance(layout, RightPadded):
        arguments = unmasked_arguments(ids, layout)
        hidden = model.base_model(input_ids=ids, use_cache=False, **arguments).last_hidden_state
    else:
        hidden = layout.spread(packed_output(model, layout).last_hidden_state[0])
    hidden = hidden[mask.bool()]
    direction = torch.linspace(1, 99, hidden.numel()).sin().view_as(hidden)
    (hidden.float() * direction).sum().div(len(hidden)).backward()
    grads = {name: p.grad.clone() for name, p in model.base_model.named_parameters() if p.grad is not None}
    return {"hidden": hidden.detach(), **grads}


def assert_same(got, want, tolerance=TOLERANCE):
    assert got.keys() == want.keys()
    for name in want:
        size = max(1.0, want[name].abs().max().item())
        assert (got[name] - want[name]).abs().max().item() <= tolerance * size, name


@pytest.fixture(scope="module")
def family():
    """family(name) -> a model enabled for packing, cached per module."""
    models = {}

    def get(name):
        if name not in models:
            models[name] = families.build(*families.PACKABLE[name])
            enable(models[name])
        return models[name].train()

    return get


@pytest.mark.parametrize("name", families.PACKABLE)
def test_packed_equals_padded(family, name):
    model = family(name)
    for seed in range(3):
        ids, mask = families.padded_pairs(seed)
        want = run(model, ids, mask)
        assert len(want) > 10
        for options in ({"groups": 2}, {"groups": 2, "multiple": 16}, {}):
            assert_same(run(model, ids, mask, pack_padded(ids, mask, **options)), want)


@pytest.mark.parametrize("name", families.PACKABLE)
def test_right_padded_rows_without_a_mask_equal_masked_rows(family, name):
    model = family(name)
    enable_unmasked(model)
    for seed in range(2):
        ids, mask = families.padded_pairs(seed)
        assert_same(run(model, ids, mask, RightPadded()), run(model, ids, mask))


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_left_padded_rows_equal_masked_rows(family, name):
    model, (ids, mask) = family(name), families.padded_pairs(0)
    flipped = torch.cat([torch.full((len(ids), 2), 7), ids], 1).flip(1), torch.cat([mask[:, :2] * 0, mask], 1).flip(1)
    positions = (flipped[1].cumsum(1) - 1).clamp(min=0)
    hidden = model.base_model(
        input_ids=flipped[0], attention_mask=flipped[1], position_ids=positions, use_cache=False
    ).last_hidden_state
    batch = pack_padded(*flipped, groups=2)
    got = batch.spread(packed_hidden(model, batch))
    real = flipped[1].bool()
    torch.testing.assert_close(got[real], hidden[real], rtol=TOLERANCE, atol=TOLERANCE)
    assert not got[~real].any()


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "phi", "deepseek_v3"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_packed_gradient_checkpointing_equals_padded(family, name, reentrant):
    model, (ids, mask) = copy.deepcopy(family(name)), families.padded_pairs(1)
    want = run(family(name), ids, mask)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_same(run(model, ids, mask, pack_padded(ids, mask, groups=2)), want)
    assert_same(run(model, ids, mask, RightPadded()), want)


@pytest.mark.parametrize("name", ["qwen3", "granite", "phi", "gpt_neox"])
def test_packed_logps_equal_fp64_full_logits(family, name):
    """Compared with fp64 full logits, for all tokens and for completion tokens."""
    model, (ids, mask) = family(name), families.padded_pairs(2)
    exact = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        logits = exact(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
    entropy = -(logits.exp() * logits).sum(-1)
    batch = pack_padded(ids, mask, groups=2)
    all_labels = ids.masked_fill(mask == 0, -100)
    for labels in (None, all_labels.masked_fill(torch.arange(ids.shape[1]) < 4, -100)):
        targets = shift_labels(all_labels if labels is None else labels)
        counted = targets != -100
        got = packed_logps(model, batch, labels, outputs=["entropy"])
        want = logits.gather(-1, targets.clamp(min=0)[..., None])[..., 0].where(counted, 0)
        torch.testing.assert_close(got.logps.double(), want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got.entropy.double(), entropy.where(counted, 0), rtol=1e-5, atol=1e-5)
        assert got.logps.requires_grad
    assert counted.any()


def test_mismatched_labels_are_refused(family):
    model, batch = (
        family("qwen3"),
        pack_padded(torch.tensor([[5, 6, 7], [5, 6, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])),
    )
    with pytest.raises(ValueError, match=r"labels must have shape \(2, 3\), got \(2, 2\)"):
        packed_logps(model, batch, torch.ones(2, 2).long())
    padded = pack_rows([[5, 6, 7], [5]])
    with pytest.raises(ValueError, match="labels must be -100 where the token before them is padding"):
        packed_logps(model, padded, torch.tensor([[5, 6, 7], [5, -100, 6]]))


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "gpt_neox"])
def test_half_precision_error_is_at_most_twice_the_padded_one(name):
    """The error against fp32 is at most twice that of the padded run, over a few batches."""
    exact_model = families.build(*families.PACKABLE[name])
    half = families.build(*families.PACKABLE[name], dtype=torch.bfloat16)
    enable(half)
    totals = {}
    for seed in range(4):
        ids, mask = families.padded_pairs(seed)
        exact = run(exact_model, ids, mask)
        layouts = {"padded": None, "packed": pack_padded(ids, mask, groups=2), "unmasked": RightPadded()}
        for layout_name, layout in layouts.items():
            for key, x in run(half, ids, mask, layout).items():
                totals.setdefault((layout_name, key), []).append((x.float() - exact[key]).square().sum())
    error = {key: torch.stack(x).sum().sqrt() for key, x in totals.items()}
    for (layout_name, key), x in error.items():
        assert x <= 2 * error["padded", key], (layout_name, key)


def test_the_first_call_proves_the_model():
    model, batch = families.build("qwen3", {"head_dim": 8}), pack_padded(torch.tensor([[5, 6]]), torch.ones(1, 2))
    assert packed_hidden(model, batch).shape == (2, 32)
    refused = families.build(*families.REFUSED["stablelm"][:2])
    with pytest.raises(ValueError, match="StableLmAttention is not handed"):
        packed_hidden(refused, batch)
