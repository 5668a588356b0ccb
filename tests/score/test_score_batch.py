"""`sequence_logps` of one batch, padded and packed, with gradients, against fp64 full logits."""

import models
import peft
import pytest
import torch

from fusedalign.head import LMHead
from fusedalign.packing import LayoutError
from fusedalign.score import sequence_logps
from fusedalign.score.batch import count_likelier


def batch(rows, left=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    lengths = [int(torch.randint(2, 40, (), generator=g)) for _ in range(rows)]
    ids = torch.zeros(rows, max(lengths), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, n in enumerate(lengths):
        columns = slice(max(lengths) - n, None) if left else slice(0, n)
        ids[i, columns] = torch.tensor(models.ids(n, g))
        mask[i, columns] = 1
    return ids, mask


def exact(model, ids, mask, labels):
    """Per-token logps in fp64, each row run separately."""
    double = type(model)(model.config).double().eval()
    double.load_state_dict({name: x.double() for name, x in model.state_dict().items()})
    result = torch.zeros(ids.shape, dtype=torch.float64)
    for i, valid in enumerate(mask.bool()):
        logps = double(input_ids=ids[i][valid][None]).logits[0].log_softmax(-1)
        places = valid.nonzero()[:, 0]
        for k in range(len(places) - 1):
            label = labels[i, places[k + 1]]
            if label != -100:
                result[i, places[k + 1] - 1] = logps[k, label]
    return result


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("packed", [False, "auto"])
@pytest.mark.parametrize("family", models.FAMILIES)
@torch.no_grad()
def test_scores_equal_full_logits(family, packed, left):
    model = models.build(family)
    for seed in range(2):
        ids, mask = batch(5, left, seed)
        labels = ids.masked_fill((mask == 0) | (ids % 3 == 0), -100)
        first = mask.cumsum(1) == 1
        labels[first] = -100
        out = sequence_logps(model, ids, labels, attention_mask=mask, packed=packed, ranks=True, outputs=["entropy"])
        want = exact(model, ids, mask, labels)
        torch.testing.assert_close(out.tokens.logps.double(), want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(out.logps.double(), want.sum(1), rtol=1e-4, atol=1e-3)
        assert out.counts.tolist() == (labels != -100).sum(1).tolist()
        assert (out.mean_logps - out.logps / out.counts.clamp(min=1)).abs().max() == 0
        counted = want != 0
        assert torch.equal((out.ranks == 0)[counted], out.tokens.is_top1[counted])
        assert torch.equal(out.is_greedy, (out.tokens.is_top1 | ~counted).all(1))
        assert (out.tokens.entropy[~counted] == 0).all()


@pytest.mark.parametrize("left", [False, True])
def test_without_labels_each_token_but_the_first_counts(left):
    model = models.build()
    ids, mask = batch(4, left)
    with torch.no_grad():
        out = sequence_logps(model, ids, attention_mask=mask)
    assert out.counts.tolist() == (mask.sum(1) - 1).tolist()


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_equal_full_logits(packed):
    model = models.build()
    ids, mask = batch(4)
    sequence_logps(model, ids, attention_mask=mask, packed=packed).logps.sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    labels = ids.masked_fill(mask == 0, -100)
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    targets = labels[:, 1:]
    logps = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    (logps * (targets != -100)).sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_groups_share_their_prompts():
    model, widths = models.build(), []
    examples = models.pairs(3)
    rows = [a.windows[0].input_ids for k in (0, 1) for a in [e.answers[k] for e in examples]]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    model.get_input_embeddings().register_forward_pre_hook(lambda m, args: widths.append(args[0].numel()))
    separate = sequence_logps(model, ids, attention_mask=mask, packed=True)
    shared = sequence_logps(model, ids, attention_mask=mask, packed=True, groups=2)
    torch.testing.assert_close(separate.tokens.logps, shared.tokens.logps, rtol=1e-4, atol=1e-5)
    assert widths[-1] < widths[-2] == sum(map(len, rows))


@torch.no_grad()
def test_adapters_are_applied():
    model = models.build()
    ids, mask = batch(3)
    base = sequence_logps(model, ids, attention_mask=mask).logps
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    wrapped.eval()
    adapted = sequence_logps(wrapped, ids, attention_mask=mask, ranks=True)
    logits = wrapped(input_ids=ids, attention_mask=mask).logits[:, :-1]
    picked = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(adapted.logps, (picked * mask[:, 1:]).sum(1), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(adapted.logps, base)
    counted = mask[:, 1:].bool()
    assert torch.equal((adapted.ranks[:, :-1] == 0)[counted], (logits.argmax(-1) == ids[:, 1:])[counted])


def test_bad_arguments_are_refused():
    model = models.build("gemma2")
    ids, mask = batch(2)
    with pytest.raises(LayoutError, match="softcap"):
        sequence_logps(model, ids, attention_mask=mask, packed=True)
    with pytest.raises(ValueError, match=r"labels must be \[B, L\]"):
        sequence_logps(model, ids, ids[:, 1:], attention_mask=mask)
    for packed in (False, True):
        bad_ids = ids.clone()
        with pytest.raises(ValueError, match="labels on padding"):
            sequence_logps(models.build(), ids, bad_ids, attention_mask=torch.zeros_like(mask), packed=packed)
    prompt_tuned = peft.get_peft_model(
        models.build(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    with pytest.raises(ValueError, match="got prompt learning"):
        sequence_logps(prompt_tuned, ids, attention_mask=mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ranks_are_exact_over_several_tiles(monkeypatch, dtype):
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(9, 8, generator=g).to(dtype), torch.randn(50, 8, generator=g).to(dtype)
    bias, targets = torch.randn(50, generator=g), torch.randint(0, 50, (9,), generator=g)
    logits = hidden.double() @ weight.double().T + bias.double()
    want = (logits > logits.gather(1, targets[:, None])).sum(1)
    for tile in (1, 4 * 9 * 7, 2**20):
        monkeypatch.setattr("fusedalign.score.batch._RANK_TILE", tile)
        assert torch.equal(count_likelier(LMHead(weight, bias), hidden, targets), want)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("place", [2, 3])
def test_a_label_on_padding_is_refused(packed, place):
    """Also on the padding right after a row's last token, although a prediction exists there."""
    ids, mask = torch.tensor([[9, 10, 2, 2], [9, 10, 5, 6]]), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    labels = torch.full((2, 4), -100)
    labels[0, 1], labels[0, place] = 10, 2
    with pytest.raises(ValueError, match="labels must be -100 where attention_mask is 0"):
        sequence_logps(models.build(), ids, labels, attention_mask=mask, packed=packed)


def test_unknown_values_of_packed_are_refused():
    with pytest.raises(ValueError, match="packed must be 'auto', True or False, got 'true'"):
        sequence_logps(models.build(), torch.tensor([[9, 10]]), packed="true")
