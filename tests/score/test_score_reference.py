"""`fusedalign score --ref_cache`: written with the arguments of a training and read by that training."""

import json

import pytest

from fusedalign.cli import main
from fusedalign.embedded import build_embedded_model, data_directory

TRAINING = {
    "max_steps": 3, "per_device_train_batch_size": 4, "logging_steps": 1, "save_strategy": "no", "report_to": "none",
    "eval_strategy": "steps", "eval_steps": 3, "per_device_eval_batch_size": 8, "learning_rate": 1e-3, "use_cpu": True,
    "max_length": 64, "disable_tqdm": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(build_embedded_model(tmp_path_factory.mktemp("model") / "m"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for split, count in (("train", 12), ("test", 8)):
        lines = (data_directory() / "preferences" / f"{split}.jsonl").read_text().splitlines()[:count]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder)


@pytest.fixture
def config(model, data, tmp_path):
    path = tmp_path / "training.yaml"
    fields = {"model_name_or_path": model, "dataset_name": data, **TRAINING}
    path.write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in fields.items()))
    return str(path)


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    clocks = ("runtime", "per_second", "epoch", "flos")
    return [{name: x for name, x in line.items() if not any(clock in name for clock in clocks)} for line in lines]


@pytest.mark.parametrize(
    ("method", "adapters"),
    [
        ("dpo", True),
        ("kto", False),
        pytest.param("dpo", False, marks=pytest.mark.slow),
        pytest.param("kto", True, marks=pytest.mark.slow),
    ],
)
def test_training_with_the_cache_equals_a_live_reference(config, tmp_path, capsys, method, adapters):
    words = ["--use_peft", "--lora_target_modules", "all-linear", "--lora_r", "2"] if adapters else []
    cache = tmp_path / "ref.parquet"
    assert main(["score", "--ref_cache", str(cache), "--method", method, "--config", config, *words]) == 0
    assert f"train with --ref_logps {cache}" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.glob("ref*")) == ["ref.parquet"]
    runs = []
    for name, cache_flags in (("live", []), ("cached", ["--ref_logps", str(cache)])):
        folder = tmp_path / name
        assert main([method, "--config", config, *words, *cache_flags, "--output_dir", str(folder)]) == 0
        runs.append(metrics(folder))
    for live, cached in zip(*runs, strict=True):
        assert live.keys() == cached.keys()
        for key, value in live.items():
            if "accuracies" in key and abs(live.get("rewards/margins", 1)) < 1e-5:
                continue  # both rewards are 0 before the first step, up to rounding
            assert cached[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key
    assert any("rewards/chosen" in name for line in runs[0] for name in line)


def test_prompts_are_computed_once(config, tmp_path, capsys, monkeypatch):
    from fusedalign.score import scorer

    units = []
    original = scorer.batches

    def batches(planned, *rest, **options):
        planned = list(planned)
        units.extend(planned)
        return original(planned, *rest, **options)

    monkeypatch.setattr(scorer, "batches", batches)
    assert main(["score", "--ref_cache", str(tmp_path / "r.parquet"), "--config", config]) == 0
    assert all(len(unit.windows) >= 2 for unit in units)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "sft"], "--method must be dpo or kto with --ref_cache, got 'sft'"),
        (["--method", "dpo", "--max_tokens_per_batch", "x"], "max_tokens_per_batch must be auto or a number"),
        (["--max_tokens_per_batch", "0"], "max_tokens_per_batch must be auto or a number of tokens above 0, got '0'"),
        (["--model_name_or_path", "/nowhere"], "model_name_or_path must name a folder that exists"),
        (["--learning_rte", "1"], "did you mean --learning_rate?"),
    ],
)
def test_bad_arguments_are_one_line_errors(config, tmp_path, capsys, words, message):
    assert main(["score", "--ref_cache", str(tmp_path / "r.parquet"), "--config", config, *words]) == 2
    err = capsys.readouterr().err.strip()
    assert message in err.splitlines()[-1]


@pytest.mark.parametrize("content", [None, "a file of the user"])
def test_a_file_that_is_not_a_cache_is_not_overwritten(config, tmp_path, capsys, monkeypatch, content):
    from fusedalign.trl import train

    monkeypatch.setattr(train, "find_model", None)  # checked before anything is loaded
    file = tmp_path / "taken"
    file.mkdir() if content is None else file.write_text(content)
    assert main(["score", "--ref_cache", str(file), "--config", config]) == 2
    assert f"--ref_cache must name the file to write, got {file}, which is " in capsys.readouterr().err
    assert file.is_dir() if content is None else file.read_text() == content


def test_an_interrupted_run_resumes_only_with_the_same_arguments(config, tmp_path, capsys, monkeypatch):
    from fusedalign.trl import ref_cache

    words = ["score", "--ref_cache", str(tmp_path / "ref.parquet"), "--config", config]
    with monkeypatch.context() as patch:
        patch.setattr(ref_cache, "write_cache", _interrupt)
        assert main(words) == 130
    capsys.readouterr()
    assert main([*words, "--max_length", "48"]) == 2
    leftover = tmp_path / "ref.parquet.scores.parquet"
    message = f"got {tmp_path / 'ref.parquet'} with a run of others in {leftover}: give another name, or delete that"
    assert message in capsys.readouterr().err
    assert main(words) == 0
    assert [path.name for path in tmp_path.glob("ref*")] == ["ref.parquet"]


def _interrupt(*args):
    raise KeyboardInterrupt


def test_another_truncation_is_refused(config, tmp_path, capsys):
    cache = tmp_path / "ref.parquet"
    assert main(["score", "--ref_cache", str(cache), "--config", config]) == 0
    capsys.readouterr()
    words = ["--ref_logps", str(cache), "--max_length", "48", "--output_dir", str(tmp_path / "o")]
    assert main(["dpo", "--config", config, *words]) == 2
    assert "ref_logps must be a cache made with max_length=48" in capsys.readouterr().err


def test_an_existing_cache_is_used_or_refused(config, tmp_path, capsys, monkeypatch):
    cache = tmp_path / "ref.parquet"
    words = ["score", "--ref_cache", str(cache), "--config", config]
    cache.write_text("my notes")
    assert main(words) == 2
    assert "which is another file than a reference cache" in capsys.readouterr().err
    assert cache.read_text() == "my notes"
    cache.unlink()
    assert main(words) == 0
    content = cache.read_bytes()
    for flags, name in ((["--max_length", "48"], "max_length, rows"), (["--dtype", "bfloat16"], "dtype, weights")):
        assert main([*words, *flags]) == 2
        assert f"with another {name}" in capsys.readouterr().err
    monkeypatch.setattr("fusedalign.score.reference.score_run", lambda run: pytest.fail("scored again"))
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert main(words) == 0
    assert capsys.readouterr().out.count("is there already") == 1
    assert cache.read_bytes() == content
    assert sorted(path.name for path in tmp_path.glob("ref*")) == ["ref.parquet"]
