"""`--model fusedalign` of the lm-evaluation-harness against its own `hf` model."""

import functools
import itertools
import json
import logging
import random
import re
import runpy
import sys
from collections import deque
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("lm_eval")

import lm_eval  # noqa: E402
import lm_eval.tasks  # noqa: E402
import lm_eval.utils  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.registry import get_model  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

import fusedalign.harness.model as harness_model  # noqa: E402
from fusedalign.embedded import build_embedded_model  # noqa: E402
from fusedalign.harness import FusedLM  # noqa: E402
from fusedalign.harness.rows import Row, shared_groups, single_groups, take_batch, unique_rows  # noqa: E402

REPOSITORY = Path(__file__).parents[1]
WORDS = (REPOSITORY / "README.md").read_text().split()


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    return str(build_embedded_model(tmp_path_factory.mktemp("embedded")))


@pytest.fixture(scope="module")
def hf(embedded):
    return HFLM(embedded, device="cpu", batch_size=8)


@pytest.fixture
def fused(embedded):
    return FusedLM(embedded, device="cpu", batch_size="auto")


def words(generator, count):
    start = generator.randrange(len(WORDS) - count)
    return " ".join(WORDS[start : start + count])


def instances(arguments, kind="loglikelihood"):
    return [Instance(request_type=kind, doc={}, arguments=x, idx=i) for i, x in enumerate(arguments)]


def ragged(model, seed=0):
    """Requests with answers of one and more tokens, some greedy; empty contexts, duplicates, rows above 512 tokens."""
    generator = random.Random(seed)
    pairs = [("", words(generator, 5)), ("", words(generator, 1))]
    for count in (2, 15, 60, 300):
        question = words(generator, count)
        pairs += [(question, " " + words(generator, k)) for k in (1, 2, 9)]
        pairs += [(question, f" {letter}") for letter in "abc"]
        pairs += [(question + " ", "yes"), (words(generator, count), " " + words(generator, 3))]
    contexts = [context for context, _ in pairs if context][:12:3]
    answers = model.generate_until(
        instances([(x, {"until": ["\0"], "max_gen_toks": 3}) for x in contexts]), disable_tqdm=True
    )
    pairs += [(context, text) for context, text in zip(contexts, answers, strict=True) if text.strip()]
    generator.shuffle(pairs)
    return [*pairs, pairs[0], pairs[5]]


@pytest.fixture(scope="module")
def pairs(hf):
    return ragged(hf)


@pytest.fixture(scope="module")
def expected(hf, pairs):
    want = hf.loglikelihood(instances(pairs), disable_tqdm=True)
    assert {greedy for _, greedy in want} == {True, False}
    return want


def assert_equal(got, want, tolerance=1e-4):
    assert [x for x, _ in got] == pytest.approx([x for x, _ in want], abs=tolerance, rel=tolerance)
    assert [x for _, x in got] == [x for _, x in want]


# Loglikelihood


@pytest.mark.parametrize("batch_size", [1, 3, "auto"])
def test_loglikelihood_equals_hf(embedded, pairs, expected, batch_size):
    model = FusedLM(embedded, device="cpu", batch_size=batch_size)
    assert model._packs
    assert_equal(model.loglikelihood(instances(pairs), disable_tqdm=True), expected)


def test_answers_follow_the_order_of_requests(fused, pairs, expected):
    order = list(range(len(pairs)))
    random.Random(1).shuffle(order)
    got = fused.loglikelihood(instances([pairs[i] for i in order]), disable_tqdm=True)
    assert_equal(got, [expected[i] for i in order])


def gpt_neox(**sizes):
    config = transformers.GPTNeoXConfig(
        **sizes, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    return transformers.GPTNeoXForCausalLM(config)


def gpt2(**sizes):
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, n_embd=16, n_layer=2, n_head=2))


def bloom(**sizes):
    return transformers.BloomForCausalLM(transformers.BloomConfig(**sizes, hidden_size=16, n_layer=2, n_head=2))


def mamba(**sizes):
    return transformers.MambaForCausalLM(
        transformers.MambaConfig(**sizes, hidden_size=16, num_hidden_layers=2, state_size=4)
    )


OTHERS = {"gpt_neox": gpt_neox, "gpt2": gpt2, "bloom": bloom, "mamba": mamba}
SIZES = {"vocab_size": 419, "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 0}
PACKED = ["qwen3", "tied", "mistral", "cohere", "granite", "phi", "qwen3_moe", "gpt_neox", "gpt2"]
PADDED = ["gemma2", "falcon_h1", "bloom", "mamba"]


@pytest.fixture
def tiny(monkeypatch):
    pytest.importorskip("trl")
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "trl"))
    import tiny

    return tiny


def hf_and_fused(tiny, name, dtype=torch.float32, adapter=None, **options):
    torch.manual_seed(0)
    model = (OTHERS[name](**SIZES) if name in OTHERS else tiny.MODELS[name]()).to(dtype).eval()
    if adapter is not None:
        model = pytest.importorskip("peft").get_peft_model(model, adapter).eval()
    options |= {"tokenizer": tiny.tokenizer(), "max_length": 48}
    hf = HFLM(model, batch_size=4, **options)
    return hf, FusedLM(model, batch_size=2, **options)


def token_requests(model, seed=0, vocab=419):
    """Requests as the harness tokenises them; every third continuation starts greedily."""
    generator = random.Random(seed)
    requests = []
    for count in (1, 2, 7, 20, 46, 60):
        context = [generator.randrange(3, vocab) for _ in range(count)]
        greedy = model._model_call(torch.tensor([context[-47:]]))[0, -1].argmax().item()
        for answer in ([greedy], [5], [greedy, 5], [7, 8, 9, 10], [greedy], list(range(3, 20))):
            requests.append((("", ""), context, answer))
    generator.shuffle(requests)
    return requests


@pytest.mark.parametrize("name", PACKED + PADDED)
def test_families_equal_hf(tiny, name):
    hf, fused = hf_and_fused(tiny, name)
    requests = token_requests(hf)
    want = hf._loglikelihood_tokens(requests, disable_tqdm=True)
    assert {greedy for _, greedy in want} == {True, False}
    assert_equal(fused._loglikelihood_tokens(requests, disable_tqdm=True), want)
    assert fused._packs == (name in PACKED)


@pytest.mark.parametrize("name", ["qwen3", "gemma2"])
def test_half_precision_equals_hf(tiny, name):
    hf, fused = hf_and_fused(tiny, name, torch.bfloat16, softmax_dtype="float32")
    requests = token_requests(hf)
    got, want = (model._loglikelihood_tokens(requests, disable_tqdm=True) for model in (fused, hf))
    assert [x for x, _ in got] == pytest.approx([x for x, _ in want], rel=2e-2)


def test_mixed_precision_equals_hf(tiny):
    hf, fused = hf_and_fused(tiny, "qwen3", mixed_precision_dtype="bfloat16", softmax_dtype="float32")
    requests = token_requests(hf)
    got, want = (model._loglikelihood_tokens(requests, disable_tqdm=True) for model in (fused, hf))
    assert [x for x, _ in got] == pytest.approx([x for x, _ in want], rel=2e-2)
    _, exact = hf_and_fused(tiny, "qwen3")
    in_fp32 = exact._loglikelihood_tokens(requests, disable_tqdm=True)
    assert [x for x, _ in got] != pytest.approx([x for x, _ in in_fp32], rel=1e-5)  # autocast is on


def test_a_text_split_at_several_positions_equals_hf_without_reuse(tiny):
    """With logits reuse `hf` reads the logits of other tokens for shorter continuations, so reuse is off."""
    hf, fused = hf_and_fused(tiny, "qwen3", logits_cache=False)
    requests = [(("", ""), [9, 8, 7], [6, 5]), (("", ""), [9, 8], [7, 6, 5]), (("", ""), [9], [8, 7, 6, 5])]
    want = hf._loglikelihood_tokens(requests, disable_tqdm=True)
    assert_equal(fused._loglikelihood_tokens(requests, disable_tqdm=True), want)
    cached, _ = hf_and_fused(tiny, "qwen3")
    assert cached._loglikelihood_tokens(requests, disable_tqdm=True)[0][0] != pytest.approx(want[0][0], rel=1e-3)


@pytest.mark.parametrize(("context", "continuation"), [([], [5]), ([5], []), ([5], [6] * 49)])
def test_unanswerable_requests_raise(tiny, context, continuation):
    _, fused = hf_and_fused(tiny, "qwen3")
    with pytest.raises(ValueError, match=r"expected a context of 1 token or more .* in request 1$"):
        fused._loglikelihood_tokens([(("", ""), [5], [6]), (("", ""), context, continuation)], disable_tqdm=True)


def test_truncated_rows_are_counted(tiny, caplog):
    _, fused = hf_and_fused(tiny, "qwen3")
    requests = [(("", ""), [5] * 60, [6]), (("", ""), [5] * 48, [6]), (("", ""), [5] * 49, [6])]
    with caplog.at_level(logging.WARNING, "fusedalign"):
        fused._loglikelihood_tokens(requests, disable_tqdm=True)
    assert "2 of 3 requests are cut from the left to max_length=48" in caplog.text


# Rolling


@pytest.mark.parametrize("batch_size", [2, "auto"])
def test_rolling_loglikelihood_equals_hf(embedded, hf, monkeypatch, batch_size):
    generator = random.Random(2)
    texts = [(words(generator, count),) for count in (400, 2, 30, 700, 90)]
    want = hf.loglikelihood_rolling(instances(texts), disable_tqdm=True)
    model = FusedLM(embedded, device="cpu", batch_size=batch_size)
    # it would allocate logits at the largest size
    monkeypatch.setattr(FusedLM, "_detect_batch_size", lambda *_, **__: pytest.fail("batch size by logits"))
    got = model.loglikelihood_rolling(instances(texts), disable_tqdm=True)
    assert got == pytest.approx(want, rel=1e-5)
    assert model.batch_size == batch_size


def test_ranks_with_fewer_windows_run_as_many(fused, hf):
    """As under `accelerate launch`, where in `hf` each rank runs as many windows as the rank with the most."""
    texts = instances([(words(random.Random(3), 700),)])
    want = hf.loglikelihood_rolling(texts, disable_tqdm=True)
    fused._world_size = 2
    fused.accelerator = SimpleNamespace(gather=lambda x: torch.stack([x, x + 3]), unwrap_model=lambda x: x)
    assert fused.loglikelihood_rolling(texts, disable_tqdm=True) == pytest.approx(want, rel=1e-5)


# Rows, batches


def packed_tokens(monkeypatch, model, requests):
    sizes = []

    def pack_rows(*args, **options):
        sizes.append(original(*args, **options))
        return sizes[-1]

    original = harness_model.pack_rows
    monkeypatch.setattr(harness_model, "pack_rows", pack_rows)
    model._loglikelihood_tokens(requests, disable_tqdm=True)
    return [batch.tokens for batch in sizes]


def test_shared_prefixes_are_computed_once(tiny, monkeypatch):
    _, fused = hf_and_fused(tiny, "qwen3")
    fused._rows_per_batch = "auto"
    shots = list(range(10, 30))
    requests = []
    for question in range(5):
        context = [*shots, 100 + question, 40, 41]
        requests += [(("", ""), context, [answer, 42, answer]) for answer in (50, 51, 52, 53)]
        requests += [(("", ""), context, [answer]) for answer in (60, 61, 62)]
    # The shots, the first question with its answers, and per further question 4 times 3 tokens and 2 answer tokens:
    # further questions share only the shots.
    assert packed_tokens(monkeypatch, fused, requests) == [20 + (3 + 4 * 2) + 4 * 4 * (3 + 2)]


def random_rows(seed):
    """Random rows that share prefixes of many lengths, some rows being prefixes of others."""
    generator = random.Random(seed)
    texts = [[generator.randrange(3) for _ in range(generator.choice((1, 4, 30, 60)))] for _ in range(8)]
    requests = []
    for _ in range(60):
        text = generator.choice(texts)
        requests.append((text[: generator.randrange(1, len(text) + 1)], [generator.randrange(4) for _ in range(3)]))
    return requests


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_batches_hold_each_request_once_and_fit_the_budget(seed, padded):
    requests = random_rows(seed)
    rows = unique_rows(requests, 40)
    groups = single_groups(rows) if padded else shared_groups(rows)
    for group in groups:
        for row in group:
            assert row.input_ids[: row.shared] == group[0].input_ids[: row.shared]
    queue, numbers, budget = deque(groups), [], 90
    while queue:
        batch = take_batch(queue, budget, padded=padded)
        flat = [row for group in batch for row in group]
        numbers += [continuation.request for row in flat for continuation in row.continuations]
        if padded:
            assert len(flat) * max(map(len, flat)) <= budget
        else:
            packed_size = sum(len(group[0]) + sum(len(row) - row.shared for row in group[1:]) for group in batch)
            assert packed_size <= budget
            assert max(map(len, batch)) * len(batch) <= 4 * len(flat)
    assert sorted(numbers) == list(range(len(requests)))
    for row in rows:
        for number, tokens, end in row.continuations:
            context, continuation = requests[number]
            assert tokens == continuation
            assert list(row.input_ids[:end]) == [*context, *continuation][-41:][:-1]


def test_a_row_larger_than_the_budget_is_its_own_batch():
    queue = deque(single_groups([Row((1,) * 50), Row((2,) * 40)]))
    assert [len(group[0]) for group in take_batch(queue, 10, padded=True)] == [50]
    assert len(queue) == 1


def test_questions_of_different_length_form_separate_groups():
    """Sharing a long question saves more than sharing the short instruction before all questions."""
    instruction = (1, 2, 3, 4, 5, 6)
    rows = [Row((*instruction, *(10 * q + i for i in range(30)), answer)) for q in (1, 2) for answer in (7, 8, 9)]
    groups = shared_groups(rows)
    assert [len(group) for group in groups] == [3, 3]
    assert [[row.shared for row in group] for group in groups] == [[0, 36, 36]] * 2


# Faults


@pytest.mark.parametrize("name", ["qwen3", "gemma2"])
def test_out_of_memory_halves_the_batches(tiny, monkeypatch, caplog, name):
    hf, fused = hf_and_fused(tiny, name)
    fused._rows_per_batch = "auto"
    requests = token_requests(hf)
    tried = []

    def scarce(head, hidden, *args, **options):
        tried.append(len(hidden))
        if len(hidden) > 40:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(head, hidden, *args, **options)

    original = harness_model.head_logps
    monkeypatch.setattr(harness_model, "head_logps", scarce)
    with caplog.at_level(logging.WARNING, "fusedalign"):
        got = fused._loglikelihood_tokens(requests, disable_tqdm=True)
    assert_equal(got, hf._loglikelihood_tokens(requests, disable_tqdm=True))
    failures = sum(size > 40 for size in tried)
    limits = [int(x) for x in re.findall(r"out of memory: batches of at most (\d+) tokens", caplog.text)]
    assert len(limits) == failures >= 2
    assert all(2 * after <= before + 1 for before, after in itertools.pairwise(limits))
    tried.clear()
    fused._loglikelihood_tokens(requests, disable_tqdm=True)
    assert max(tried) <= 40  # the smaller budget is kept


def test_a_row_that_does_not_fit_alone_raises(tiny, monkeypatch):
    _, fused = hf_and_fused(tiny, "qwen3")

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(harness_model, "head_logps", full)
    with pytest.raises(torch.OutOfMemoryError):
        fused._loglikelihood_tokens([(("", ""), [5, 6], [7]), (("", ""), [8, 9], [7])], disable_tqdm=True)


def test_encoder_decoders_are_refused(tiny):
    model = tiny.MODELS["t5"]()
    with pytest.raises(ValueError, match=r"^expected a decoder-only model, got the encoder-decoder t5: use --model hf"):
        FusedLM(model, tokenizer=tiny.tokenizer())


def test_unreadable_heads_are_refused(tiny):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["lm_head"], use_dora=True, task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny.MODELS["qwen3"](), config)
    with pytest.raises((TypeError, ValueError), match=r"^expected .*: use --model hf$"):
        FusedLM(model, tokenizer=tiny.tokenizer())


def test_prompt_learning_is_refused(tiny):
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny.MODELS["qwen3"](), config)
    with pytest.raises(ValueError, match="got PROMPT_TUNING, which puts virtual tokens before each row: use --model"):
        FusedLM(model, tokenizer=tiny.tokenizer())


# Integration with the harness


def test_the_registry_knows_the_name():
    assert get_model("fusedalign") is FusedLM


def test_the_entry_point_names_the_registered_class():
    """Harness versions with entry points compare both."""
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    name = project["entry-points"]["lm_eval.models"]["fusedalign"]
    assert name == f"{FusedLM.__module__}:{FusedLM.__name__}"


def test_adapters_equal_hf(embedded, tmp_path, hf, pairs, expected):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(1)
    peft.get_peft_model(hf.model.__class__.from_pretrained(embedded), config).save_pretrained(tmp_path)
    options = {"peft": str(tmp_path), "device": "cpu", "batch_size": 8}
    want = HFLM(embedded, **options).loglikelihood(instances(pairs[:12]), disable_tqdm=True)
    fused = FusedLM(embedded, **options)
    assert fused._packs
    assert_equal(fused.loglikelihood(instances(pairs[:12]), disable_tqdm=True), want)
    assert want[0][0] != pytest.approx(expected[0][0], rel=1e-3)


def test_adapters_on_the_head_equal_hf(tiny):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False, task_type="CAUSAL_LM")
    hf, fused = hf_and_fused(tiny, "qwen3", adapter=config)
    requests = token_requests(hf)
    want = hf._loglikelihood_tokens(requests, disable_tqdm=True)
    assert_equal(fused._loglikelihood_tokens(requests, disable_tqdm=True), want)
    assert fused._packs


def test_generation_equals_hf(fused, hf):
    texts = [(words(random.Random(5), count), {"until": ["."], "max_gen_toks": 6}) for count in (3, 12)]
    want = hf.generate_until(instances(texts), disable_tqdm=True)
    assert fused.loglikelihood(instances([("a", " b")]), disable_tqdm=True)
    fused.batch_size_per_gpu = 2
    assert fused.generate_until(instances(texts), disable_tqdm=True) == want


def test_answers_are_cached_as_hf_caches_them(fused, hf, pairs):
    texts = instances([(words(random.Random(6), 20),)])
    caches = []
    for model in (fused, hf):
        cache = {}
        hook = SimpleNamespace(add_partial=lambda kind, key, value, cache=cache: cache.update({(kind, key): value}))
        model.set_cache_hook(hook)
        model.loglikelihood(instances(pairs[:6]), disable_tqdm=True)
        model.loglikelihood_rolling(texts, disable_tqdm=True)
        caches.append(cache)
    hf.set_cache_hook(lm_eval.api.model.CacheHook(None))
    assert caches[0].keys() == caches[1].keys()
    assert len(caches[0]) == len({*pairs[:6]}) + 1


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Two local tasks: four-way multiple choice, and perplexity of texts."""
    folder, generator = tmp_path_factory.mktemp("tasks"), random.Random(7)
    questions = [
        {"question": words(generator, 8), "choices": [words(generator, k) for k in (1, 2, 3, 5)], "answer": i % 4}
        for i in range(8)
    ]
    texts = [{"text": words(generator, count)} for count in (10, 300)]
    for name, rows in (("questions", questions), ("texts", texts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {
        name: "dataset_path: json\ntest_split: test\n"
        f"dataset_kwargs: {{cache_dir: {folder}, data_files: {{test: {folder}/{name}.jsonl}}}}"
        for name in ("questions", "texts")
    }
    (folder / "questions.yaml").write_text(
        f"task: local_questions\n{data['questions']}\noutput_type: multiple_choice\ndoc_to_text: '{{{{question}}}}'\n"
        "doc_to_choice: '{{choices}}'\ndoc_to_target: '{{answer}}'\nnum_fewshot: 2\nfewshot_split: test\n"
        "metric_list: [{metric: acc}, {metric: acc_norm}]\n"
    )
    (folder / "texts.yaml").write_text(
        f"task: local_texts\n{data['texts']}\noutput_type: loglikelihood_rolling\ndoc_to_text: ''\n"
        "doc_to_target: '{{text}}'\nmetric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]\n"
    )
    return folder


def test_an_evaluation_equals_the_metrics_of_hf(embedded, tasks):
    manager = lm_eval.tasks.TaskManager(include_path=str(tasks), include_defaults=False)
    results = [
        lm_eval.simple_evaluate(
            model=name,
            model_args={"pretrained": embedded},
            tasks=["local_questions", "local_texts"],
            batch_size=batch_size,
            device="cpu",
            task_manager=manager,
            bootstrap_iters=0,
            apply_chat_template=True,
        )["results"]
        for name, batch_size in (("hf", 4), ("fusedalign", "auto"))
    ]
    want, got = results
    assert got["local_questions"].keys() == want["local_questions"].keys()
    for task in want:
        numbers = {key: value for key, value in want[task].items() if isinstance(value, float)}
        assert numbers
        assert {key: got[task][key] for key in numbers} == pytest.approx(numbers, rel=1e-5)


def test_the_command_registers_the_model_name(embedded, tasks, tmp_path, monkeypatch):
    """`python -m fusedalign.harness` is `lm_eval` with the name registered."""
    # The harness's own tasks are 15,000 files, and its table needs six more packages.
    manager = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", manager)
    monkeypatch.setattr(lm_eval.utils, "make_table", str)
    arguments = f"run --model fusedalign --model_args pretrained={embedded} --tasks local_texts --device cpu"
    arguments += f" --batch_size auto --include_path {tasks} --output_path {tmp_path / 'out'}"
    monkeypatch.setattr(sys, "argv", ["lm_eval", *arguments.split()])
    runpy.run_module("fusedalign.harness", run_name="__main__")
    (results_file,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(results_file.read_text())["results"]["local_texts"]["word_perplexity,none"] > 1


@pytest.mark.parametrize(
    ("model_args", "message"),
    [
        ("pretrained={}/none", "none"),
        ("pretrained={},nonsense=1", "unexpected keyword argument 'nonsense'"),
        ("dtype=float32", "missing 1 required positional argument: 'pretrained'"),
    ],
)
def test_wrong_model_arguments_are_one_line_errors(embedded, tasks, capsys, monkeypatch, model_args, message):
    words = ["run", "--model", "fusedalign", "--model_args", model_args.format(embedded), "--tasks", "local_texts"]
    monkeypatch.setattr(sys, "argv", ["lm_eval", *words, "--device", "cpu", "--include_path", str(tasks)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("fusedalign.harness", run_name="__main__")
    assert stop.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("fusedalign: error: ")
    assert message in last
