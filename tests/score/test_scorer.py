"""Scoring within a token budget: scores independent of batching, and recovery from out-of-memory errors."""

import models
import pytest
import torch
import transformers

from fusedalign.score import scorer as scorer_module
from fusedalign.score.records import Answer, Example, Window
from fusedalign.score.scorer import PER_TOKEN, Scorer
from fusedalign.score.units import batches, make_units, packed_tokens


@pytest.mark.parametrize("packed", [False, "auto"])
@pytest.mark.parametrize("family", models.FAMILIES)
@pytest.mark.parametrize("rows", [models.pairs, models.texts])
def test_scores_equal_full_logits(family, packed, rows):
    model, examples = models.build(family), rows(9)
    scorer = Scorer(model, packed=packed, max_tokens=100, per_token=PER_TOKEN)
    assert scorer.packed == (packed == "auto" and family != "gemma2")
    models.assert_scores(model, examples, scorer.scores(examples))


def test_scores_do_not_depend_on_the_budget():
    model, examples = models.build(), models.pairs(12)
    expected, *others = [Scorer(model, max_tokens=n).scores(examples) for n in (10_000, 64, 1)]
    for scores in others:
        for row, want in zip(scores, expected, strict=True):
            for a, b in zip(row, want, strict=True):
                assert (a.tokens, a.is_greedy) == (b.tokens, b.is_greedy)
                assert a.logps == pytest.approx(b.logps, abs=1e-3)


def test_bf16_scores_are_within_bf16_rounding():
    model = models.build(dtype=torch.bfloat16)
    examples = models.pairs(8)
    models.assert_scores(model, examples, Scorer(model).scores(examples), tolerance=0.15)


@pytest.mark.parametrize("packed", [False, True])
def test_batches_fit_the_budget(packed):
    units = list(make_units(enumerate(models.pairs(30) + models.texts(5)), packed=packed))
    found = list(batches(units, 90, packed=packed))
    assert sorted(key for batch in found for unit in batch for key in unit.keys) == sorted(
        key for unit in units for key in unit.keys
    )
    for batch in found:
        assert len({len(unit.windows) for unit in batch}) == 1
        if packed:
            taken = sum(map(packed_tokens, batch))
        else:
            taken = len(batch) * max(len(unit.windows[0].input_ids) for unit in batch)
        assert taken <= 90 or len(batch) == 1
    assert len(found) < len(units)


@pytest.mark.parametrize("long", [False, True])
def test_examples_with_one_prompt_share_its_computation(long):
    """Separate rows with one prompt, as in KTO or multiple choice: a prompt long enough to pay is computed once."""
    g = torch.Generator().manual_seed(0)
    prompts = [models.ids(12 if long else 3, g) for _ in range(3)]
    examples = [
        Example(i, (Answer("completion", (models.window(prompts[i % 3], models.ids(1 + i % 5, g)),)),))
        for i in range(31)
    ]
    model, sizes = models.build(), []
    model.get_input_embeddings().register_forward_pre_hook(lambda m, args: sizes.append(args[0].numel()))
    scorer = Scorer(model, packed=True)
    sizes.clear()
    models.assert_scores(model, examples, scorer.scores(examples))
    tokens = sum(len(e.answers[0].windows[0].input_ids) for e in examples)
    assert (sum(sizes) < 0.6 * tokens) == long


def fails_above(monkeypatch, limit, error=torch.OutOfMemoryError):
    """Make batches above `limit` token slots run out of memory; return the list of sizes tried."""
    sizes, original = [], scorer_module.select_logps

    def select(model, ids, labels, mask, **options):
        sizes.append(int(mask.sum()))
        if sizes[-1] > limit:
            raise error("CUDA out of memory" if error is torch.OutOfMemoryError else "can't allocate memory")
        return original(model, ids, labels, mask, **options)

    monkeypatch.setattr(scorer_module, "select_logps", select)
    return sizes


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
@pytest.mark.parametrize("packed", [False, True])
def test_running_out_of_memory_halves_the_batch(monkeypatch, packed, error):
    model, examples = models.build(), models.pairs(12)
    want = Scorer(model, packed=packed).scores(examples)
    scorer = Scorer(model, packed=packed, max_tokens=1000)
    sizes = fails_above(monkeypatch, 120, error)
    got = scorer.scores(examples)
    assert max(sizes) > 120
    for a, b in zip(got, want, strict=True):
        assert [x.logps for x in a] == pytest.approx([x.logps for x in b], abs=1e-3)
    assert scorer.max_tokens < 1000  # the next shard starts with the smaller budget
    first = len(sizes)
    scorer.scores(examples)
    assert sum(size > 120 for size in sizes[first:]) < sum(size > 120 for size in sizes[:first])


def test_a_row_that_never_fits_is_refused_by_name(monkeypatch):
    model, examples = models.build(), models.pairs(6)
    longest = max(len(a.windows[0].input_ids) for e in examples for a in e.answers)
    fails_above(monkeypatch, longest - 1)
    got = Scorer(model).scores(examples)
    for example, result in zip(examples, got, strict=True):
        fits = all(len(a.windows[0].input_ids) < longest for a in example.answers)
        assert isinstance(result, tuple) == fits
        if not fits:
            assert f"out of memory with this row's {longest} tokens alone" in result


def test_other_errors_are_not_swallowed(monkeypatch):
    def select(*args, **options):
        raise RuntimeError("expected scalar type Half")

    monkeypatch.setattr(scorer_module, "select_logps", select)
    with pytest.raises(RuntimeError, match="expected scalar type Half"):
        Scorer(models.build(), max_tokens=64).scores(models.pairs(2))


def test_a_nan_score_is_refused_by_name():
    model = models.build()
    with torch.no_grad():
        model.get_input_embeddings().weight[50] = float("nan")
    plain = Example(0, (Answer("text", (Window([4, 5, 6], [4, 5, 6]),)),))
    broken = Example(1, (Answer("text", (Window([4, 50, 6], [4, 50, 6]),)),))
    scored, refused = Scorer(model, packed=False, max_tokens=1).scores([plain, broken])
    assert scored[0].tokens == 2
    assert "the model's log-probability is nan" in refused


def test_a_token_outside_the_vocabulary_is_refused_by_name():
    plain = Example(0, (Answer("text", (Window([4, 5, 6], [4, 5, 6]),)),))
    foreign = Example(1, (Answer("text", (Window([4, models.VOCAB, 6], [4, 5, 6]),)),))
    refused, scored = Scorer(models.build()).scores([foreign, plain])
    assert scored[0].tokens == 2
    assert refused == f"token id {models.VOCAB} must be below the model's vocabulary of {models.VOCAB}"


def test_progress_counts_each_example_and_token_once():
    examples, reports = models.pairs(10) + models.texts(7), []
    Scorer(models.build(), max_tokens=80).scores(examples, lambda rows, tokens: reports.append((rows, tokens)))
    assert sum(rows for rows, _ in reports) == 17
    assert sum(tokens for _, tokens in reports) == sum(
        len(w.input_ids) for e in examples for a in e.answers for w in a.windows
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"packed": "yes"}, "packed must be 'auto', True or False, got 'yes'"),
        ({"max_tokens": 0}, "max_tokens must be 'auto' or a number of tokens above 0, got 0"),
        ({"max_tokens": "all"}, "max_tokens must be 'auto' or a number"),
        ({"per_token": ["rank"]}, "per_token must be of logps, entropy, ranks, got 'rank'"),
    ],
)
def test_bad_options_raise(options, message):
    with pytest.raises(ValueError, match=message):
        Scorer(models.build(), **options)


def test_packed_true_refuses_with_the_reason():
    with pytest.raises(ValueError, match=r"packed=True needs a model that can run packed: .*softcap"):
        Scorer(models.build("gemma2"), packed=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("packed", [False, "auto"])
def test_scores_on_a_gpu_equal_full_logits(packed):
    model = models.build().cuda()
    examples = models.pairs(40)
    scores = Scorer(model, packed=packed, per_token=PER_TOKEN).scores(examples)
    models.assert_scores(model.cpu(), examples, scores, tolerance=5e-3)


@pytest.mark.parametrize(
    "words",
    [
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to",
        "Triton Error [CUDA]: out of memory",
    ],
)
def test_out_of_memory_errors_outside_the_allocator_halve_the_batch(monkeypatch, words):
    examples, sizes = models.pairs(6), []
    original = scorer_module.select_logps

    def select(model, ids, *rest, **options):
        sizes.append(len(ids))
        if len(ids) > 4:
            raise RuntimeError(words)
        return original(model, ids, *rest, **options)

    model = models.build()
    want = Scorer(model).scores(examples)
    monkeypatch.setattr(scorer_module, "select_logps", select)
    got = Scorer(model).scores(examples)
    assert max(sizes) > 4
    assert [[s.tokens for s in row] for row in got] == [[s.tokens for s in row] for row in want]


@pytest.mark.parametrize("packed", [False, True])
def test_an_out_of_memory_last_row_loses_no_earlier_result(monkeypatch, packed):
    """The longer answer of the last pair never fits: the pair is refused by name, all earlier rows are scored."""
    g = torch.Generator().manual_seed(0)
    one = Example(0, (Answer("text", (models.window(models.ids(3, g), models.ids(4, g)),)),))
    prompt = models.ids(3, g)
    answers = [
        Answer(name, (models.window(prompt, models.ids(n, g)),)) for name, n in (("chosen", 9), ("rejected", 30))
    ]
    scorer = Scorer(models.build(), packed=packed, max_tokens=64)
    fails_above(monkeypatch, 20)
    scored, refused = scorer.scores([one, Example(1, tuple(answers))])
    assert scored[0].tokens == 4
    assert refused == "rejected: out of memory with this row's 33 tokens alone"


def test_scoring_packs_models_with_dropout():
    config = transformers.GPT2Config(vocab_size=models.VOCAB, n_positions=64, n_embd=16, n_layer=1, n_head=2)
    scorer = Scorer(transformers.GPT2LMHeadModel(config).eval())
    assert scorer.packed, scorer.refusal
