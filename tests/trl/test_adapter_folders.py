"""An adapter folder is a model: it can be trained further or merged, and what is saved loads again."""

import json
import math
import re
import shutil

import peft
import pytest
import tiny
import torch
import transformers
import trl

from fusedalign.cli import main
from fusedalign.trl import adapters

LORA = {"r": 4, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
#: Adapter positions, each with its base model.
ADAPTERS = {
    "lora": ("qwen3", lambda: peft.LoraConfig(target_modules=["q_proj", "v_proj"], **LORA)),
    "head": ("qwen3", lambda: peft.LoraConfig(target_modules=["q_proj", "lm_head"], **LORA)),
    "tied head": ("tied", lambda: peft.LoraConfig(target_modules=["lm_head"], **LORA)),
    "embedding": ("qwen3", lambda: peft.LoraConfig(target_modules=["embed_tokens"], **LORA)),
    "saved": ("qwen3", lambda: peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], **LORA)),
    "tokens": (
        "qwen3",
        lambda: peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=list(range(3, 15)), **LORA),
    ),
    "dora": ("qwen3", lambda: peft.LoraConfig(target_modules=["q_proj"], use_dora=True, **LORA)),
    "pissa": (
        "qwen3",
        lambda: peft.LoraConfig(target_modules=["q_proj"], **{**LORA, "init_lora_weights": "pissa"}),
    ),
    "ia3": (
        "qwen3",
        lambda: peft.IA3Config(
            target_modules=["k_proj", "v_proj"], feedforward_modules=[], init_ia3_weights=False, task_type="CAUSAL_LM"
        ),
    ),
    "vera": (
        "qwen3",
        lambda: peft.VeraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with base models, adapters of all kinds, and data."""
    folder = tmp_path_factory.mktemp("adapters")
    for name in ("qwen3", "tied"):
        torch.manual_seed(1)
        tiny.MODELS[name]().save_pretrained(folder / name)
        tiny.tokenizer().save_pretrained(folder / name)
    for name, (base, config) in ADAPTERS.items():
        torch.manual_seed(2)
        model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(folder / base), config())
        for parameter in model.parameters():
            if parameter.requires_grad and name != "pissa":
                parameter.data.normal_(std=0.3)
        model.save_pretrained(folder / name)
    for kind in ("sft", "dpo"):
        tiny.data(kind, 8).to_json(folder / f"{kind}.jsonl")
    return folder


def train(method, folder, model, out, *more):
    """Run the command; return its metrics of each step."""
    options = {
        "model_name_or_path": model,
        "dataset_name": folder / ("sft.jsonl" if method == "sft" else "dpo.jsonl"),
        "output_dir": out,
        "max_steps": 1,
        "logging_steps": 1,
        "per_device_train_batch_size": 8,
        "learning_rate": 0.01,
        "report_to": "none",
        "bf16": "false",
        "use_cpu": "true",
        "gradient_checkpointing": "false",
        "disable_tqdm": "true",
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    assert main([method, *words, *more]) == 0
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def logits(model):
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def merged_model(folder, name):
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / ADAPTERS[name][0])
    return peft.PeftModel.from_pretrained(base, folder / name)


def test_dpo_trains_further_on_a_folder_of_sft_with_lora(folder, tmp_path):
    """The reference is the model after SFT; the folder saved by DPO loads again, also for more DPO."""
    train("sft", folder, folder / "qwen3", tmp_path / "sft", "--use_peft", "--lora_target_modules", "q_proj")
    first = train("dpo", folder, tmp_path / "sft", tmp_path / "dpo", "--max_steps", "3")
    assert first[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first[2]["loss"] < first[0]["loss"]
    second_dpo = train("dpo", folder, tmp_path / "dpo", tmp_path / "again")
    assert second_dpo[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert second_dpo[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert second_dpo[0]["logps/chosen"] != pytest.approx(first[0]["logps/chosen"], abs=1e-3)
    config = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folder / "qwen3")


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_merged_model_gives_the_logits_of_base_and_adapter(folder, tmp_path, name, capsys):
    assert main(["merge", str(folder / name), "--out", str(tmp_path / "merged")]) == 0, capsys.readouterr().err
    assert capsys.readouterr().out == f"model: {tmp_path / 'merged'}\n"
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not isinstance(merged, peft.PeftModel)
    want, base = logits(merged_model(folder, name)), transformers.AutoModelForCausalLM.from_pretrained(folder / "qwen3")
    torch.testing.assert_close(logits(merged), want, rtol=1e-4, atol=1e-5)
    if name != "pissa":  # starts at the base model
        assert not torch.allclose(logits(base), want, atol=1e-3)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.get_vocab() == tiny.tokenizer().get_vocab()
    assert (tmp_path / "merged" / "generation_config.json").is_file()


def chosen_logps(model, folder):
    """The mean log-probability of the chosen answers, from logits."""
    tokenizer, sums = tiny.tokenizer(), []
    for line in (folder / "dpo.jsonl").read_text().splitlines():
        row = json.loads(line)
        prompt = len(tokenizer(row["prompt"])["input_ids"])
        ids = torch.tensor([tokenizer(row["prompt"] + row["chosen"] + "</s>")["input_ids"]])
        with torch.no_grad():
            logps = model.eval()(input_ids=ids).logits[:, :-1].log_softmax(-1)
        sums.append(logps.gather(-1, ids[:, 1:, None])[0, prompt - 1 :].sum().item())
    return sum(sums) / len(sums)


@pytest.mark.parametrize("name", ["lora", "tied head", "embedding", "tokens", "ia3", "vera"])
def test_the_reference_is_the_base_model_with_its_adapter(folder, tmp_path, name):
    """Also for adapters that TRL copies only in part: trained tokens, LoRA on embeddings, IA3, VeRA."""
    start = train("dpo", folder, folder / name, tmp_path / "out")[0]
    assert start["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert start["logps/chosen"] == pytest.approx(chosen_logps(merged_model(folder, name), folder), abs=1e-3)


@pytest.mark.parametrize("name", ["lora", "embedding"])
def test_the_reference_of_kto_is_the_base_model_with_its_adapter(folder, tmp_path, name):
    assert train("kto", folder, folder / name, tmp_path / "out")[0]["loss"] == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize("method", ["sft", "cpo", "simpo", "orpo"])
def test_every_method_trains_an_adapter_further(folder, tmp_path, method):
    """The saved folder holds an adapter on the same base model and its tokenizer; no other weights change."""
    train(method, folder, folder / "lora", tmp_path / "out")
    before, after = (peft.load_peft_weights(path, device="cpu") for path in (folder / "lora", tmp_path / "out"))
    assert before.keys() == after.keys()
    assert not all(torch.equal(before[name], after[name]) for name in before)
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert (tmp_path / "out" / "tokenizer_config.json").is_file()


@pytest.mark.parametrize("flags", [["--merge_adapter", "true"], ["--use_peft", "--lora_target_modules", "k_proj"]])
def test_adapters_are_merged_on_request_and_under_a_new_adapter(folder, tmp_path, flags):
    """The reference is the merged model, saved in the folder that the new adapter names as its base model."""
    start = train("dpo", folder, folder / "lora", tmp_path / "out", *flags)[0]
    assert start["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert start["logps/chosen"] == pytest.approx(chosen_logps(merged_model(folder, "lora"), folder), abs=1e-3)
    if "--use_peft" in flags:
        config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(tmp_path / "out" / "merged-model")
        assert config["target_modules"] == ["k_proj"]
    else:
        merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert not torch.equal(logits(merged), logits(merged_model(folder, "lora")))


def test_added_tokens_are_loaded_with_the_adapter(folder, tmp_path):
    """Base model, head and tokenizer take the vocabulary that training has enlarged."""
    tokenizer, base = tiny.tokenizer(), transformers.AutoModelForCausalLM.from_pretrained(folder / "qwen3")
    tokenizer.add_tokens(["<call>", "<answer>"])
    for i in range(len(tokenizer), base.config.vocab_size):
        tokenizer.add_tokens([f"<{i}>"])
    tokenizer.add_tokens(["<one more>"])
    base.resize_token_embeddings(len(tokenizer))
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"], **LORA)
    model = peft.get_peft_model(base, config)
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    start = train("dpo", folder, tmp_path / "adapter", tmp_path / "out")[0]
    assert start["loss"] == pytest.approx(math.log(2), abs=1e-6)
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert "<one more>" in saved.get_vocab()
    assert main(["merge", str(tmp_path / "adapter"), "--out", str(tmp_path / "merged")]) == 0
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.vocab_size == len(tokenizer)
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-5)


def test_an_adapter_of_the_embedded_model_can_move_with_it(folder, tmp_path, monkeypatch, capsys):
    """The base model is saved in the first training's output directory: both may move; if missing, one line says so."""
    monkeypatch.chdir(tmp_path)
    peft_words = ["--use_peft", "--lora_target_modules", "q_proj", "v_proj"]
    data = ["--dataset_name", "recipes/data/sft", "--max_length", "32", "--per_device_train_batch_size", "1"]
    train("sft", folder, "embedded", tmp_path / "first", *peft_words, *data)
    (tmp_path / "first").rename(tmp_path / "second")
    assert main(["merge", "second", "--out", "merged"]) == 0, capsys.readouterr().err
    shutil.rmtree("second/embedded-model")
    assert main(["merge", "second", "--out", "other"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "base_model_name_or_path in the adapter_config.json of second must name a folder that exists" in error
    assert str(tmp_path / "first" / "embedded-model") in error


def test_unmergeable_adapters_are_refused(folder, tmp_path, capsys):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "qwen3")
    prompt = peft.get_peft_model(model, peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    prompt.save_pretrained(tmp_path / "prompt")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "model.txt").write_text("")
    (tmp_path / "file").write_text("")
    adapter, out = str(folder / "lora"), str(tmp_path / "out")
    for words, message in {
        (str(folder / "qwen3"), "--out", out): "ADAPTER must be a folder or Hub model with an adapter_config.json, got",
        (str(tmp_path / "prompt"), "--out", out): "can be merged, got .* with PROMPT_TUNING",
        (adapter, "--out", str(tmp_path / "full")): "--out must be a new or empty folder, got .* with model.txt",
        (adapter, "--out", str(tmp_path / "file" / "x")): "--out must be a folder that can be written to",
        (adapter,): "merge needs ADAPTER --out DIR, got no --out",
        (): "merge needs ADAPTER --out DIR, got no ADAPTER",
        ("nowhere", "--out", out): "ADAPTER must be a folder or Hub model with an adapter_config.json, got nowhere",
        ("./nowhere", "--out", out): "ADAPTER must name a folder that exists, got ./nowhere",
        (
            adapter,
            "--out",
            out,
            "--dtype",
            "int8",
        ): "--dtype must be one of auto, float32, bfloat16,",
    }.items():
        assert main(["merge", *words]) == 2, words
        (error,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("fusedalign: "))
        assert re.search(message, error), error
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_invalid_adapter_folders_are_refused(folder, tmp_path, capsys):
    """Each of these would train something other than the folder describes."""

    def changed(name, **config):
        shutil.copytree(folder / "lora", tmp_path / name)
        file = tmp_path / name / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config))
        return tmp_path / name

    merged_folder, other = changed("both"), changed("other", base_model_name_or_path=str(folder / "small"))
    shutil.copy(folder / "qwen3" / "model.safetensors", merged_folder)
    small = transformers.Qwen3Config(**{**tiny.SMALL, "hidden_size": 8}, head_dim=8)
    transformers.Qwen3ForCausalLM(small).save_pretrained(folder / "small")
    tiny.tokenizer().save_pretrained(folder / "small")
    broken = changed("broken")
    (broken / "adapter_config.json").write_text("{")
    partial = changed("partial", target_modules=["q_proj", "v_proj", "o_proj"])
    for path, message in {
        merged_folder: "must hold a model or an adapter, got .* with model.safetensors and adapter_config.json",
        other: "must fit its base model .*small, got",
        broken: "adapter_config.json in .* must be what PEFT writes",
        partial: "must fit its base model .*qwen3, got: Found missing adapter keys",
        changed("none", base_model_name_or_path=None): "of .*none must name the base model, got None",
        changed(
            "hub", base_model_name_or_path="org/gone"
        ): "of .*hub must name a model, got org/gone: there is no such",
        changed("twice", base_model_name_or_path=str(folder / "ia3")): "must be a folder with a config.json, got .*ia3",
    }.items():
        words = ["--model_name_or_path", str(path), "--dataset_name", str(folder / "dpo.jsonl"), "--max_steps", "1"]
        assert main(["dpo", *words, "--output_dir", str(tmp_path / "out")]) == 2, path
        (error,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("fusedalign: "))
        assert re.search(message, error), error


def test_merge_adapter_needs_an_adapter(folder, tmp_path, capsys):
    words = ["--model_name_or_path", str(folder / "qwen3"), "--dataset_name", str(folder / "dpo.jsonl")]
    assert main(["dpo", *words, "--output_dir", str(tmp_path / "out"), "--merge_adapter"]) == 2
    assert "merge_adapter must be false where model_name_or_path is no adapter" in capsys.readouterr().err


def test_dtype_and_quantisation_reach_the_base_model(folder, tmp_path, monkeypatch):
    arguments = {}

    def load(path, **options):
        arguments.update(options, path=path)
        raise RuntimeError("seen")

    monkeypatch.setattr(adapters, "create_model_from_path", load)
    monkeypatch.setattr(trl, "get_quantization_config", lambda model: f"4 bits: {model.load_in_4bit}")
    for method in ("dpo", "orpo"):
        arguments.clear()
        words = ["--model_name_or_path", str(folder / "lora"), "--dataset_name", str(folder / "dpo.jsonl")]
        flags = ["--output_dir", str(tmp_path / "out"), "--load_in_4bit", "--dtype", "bfloat16"]
        assert main([method, *words, *flags]) == 2
        assert arguments["path"] == str(folder / "qwen3")
        assert (arguments["quantization_config"], arguments["dtype"]) == ("4 bits: True", "bfloat16")
