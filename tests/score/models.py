"""Tiny models, examples of all shapes, and an oracle from full logits."""

import math

import torch
import transformers

from fusedalign.score.records import Answer, Example, Window

VOCAB = 97
_SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "max_position_embeddings": 128,
}
FAMILIES = {
    "qwen3": lambda: transformers.Qwen3Config(**_SMALL, head_dim=8),
    "tied": lambda: transformers.LlamaConfig(**_SMALL, tie_word_embeddings=True),
    "softcap": lambda: transformers.Gemma3TextConfig(
        **_SMALL, head_dim=8, sliding_window=8, layer_types=["sliding_attention", "full_attention"],
        final_logit_softcapping=2.0,
    ),
    # Attention with a softcap, and recurrent state, cannot be packed.
    "gemma2": lambda: transformers.Gemma2Config(**_SMALL, head_dim=8, final_logit_softcapping=0.5),
}  # fmt: skip


def build(family="qwen3", seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family]())
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.to(dtype).eval()


def ids(count, generator):
    return torch.randint(3, VOCAB, (count,), generator=generator).tolist()


def window(prompt, answer):
    return Window(prompt + answer, [-100] * len(prompt) + answer)


def pairs(count, seed=0):
    """Pairs of uneven length; answers may share a prefix, be equal, or have one token."""
    g = torch.Generator().manual_seed(seed)
    examples = []
    for row in range(count):
        prompt = ids(int(torch.randint(1, 30, (), generator=g)), g)
        chosen = ids(int(torch.randint(1, 20, (), generator=g)), g)
        rejected = [chosen[:2] + ids(3, g), chosen, ids(1, g), ids(12, g)][row % 4]
        answers = (Answer("chosen", (window(prompt, chosen),)), Answer("rejected", (window(prompt, rejected),)))
        examples.append(Example(row, answers))
    return examples


def texts(count, seed=0):
    """Single-answer examples, some split into several windows."""
    g = torch.Generator().manual_seed(seed)
    examples = []
    for row in range(count):
        windows = [window(ids(4, g), ids(5 + row % 7, g)) for _ in range(1 + row % 3)]
        examples.append(Example(row, (Answer("text", tuple(windows), 11),)))
    return examples


@torch.no_grad()
def oracle(model, answer):
    """Logps, entropies, ranks and is_greedy of the counted tokens, in fp64 from full logits."""
    logps, entropies, ranks = [], [], []
    for each in answer.windows:
        model = model.double()
        logits = model(input_ids=torch.tensor([each.input_ids])).logits[0].double()
        table = logits.log_softmax(-1)
        for place, label in enumerate(each.labels[1:]):
            if label != -100:
                logps.append(table[place, label].item())
                entropies.append(-(table[place].exp() * table[place]).sum().item())
                ranks.append(int((logits[place] > logits[place, label]).sum()))
    return {"logps": logps, "entropy": entropies, "ranks": ranks}


def assert_scores(model, examples, scores, tolerance=2e-4):
    exact = type(model)(model.config).double().eval()
    exact.load_state_dict({name: x.double() for name, x in model.state_dict().items()})
    for example, answers in zip(examples, scores, strict=True):
        for answer, got in zip(example.answers, answers, strict=True):
            want = oracle(exact, answer)
            assert got.tokens == len(want["logps"])
            assert math.isclose(got.logps, math.fsum(want["logps"]), abs_tol=tolerance * max(1, got.tokens))
            assert got.is_greedy == (max(want["ranks"], default=0) == 0)
            for name, values in got.per_token.items():
                if name == "ranks":
                    assert values == want[name]
                else:
                    torch.testing.assert_close(values, want[name], rtol=tolerance, atol=tolerance)
