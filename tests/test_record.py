"""The record of a run survives resumes, second runs, Ctrl-C and full disks; failures of extras stop no training."""

import contextlib
import errno
import io
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")
import transformers

from fusedalign.cli import main

psutil = pytest.importorskip("psutil")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a model of two small layers and a data file."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("model")
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {chr(c): i for i, c in enumerate(range(97, 123), 3)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=29,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    rows = [{"prompt": "abc"[i % 3] * (i % 4 + 1), "completion": "yes"} for i in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def words(model, output, **options):
    options = {
        "model_name_or_path": model,
        "dataset_name": model / "rows.jsonl",
        "output_dir": output,
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 2,
        "report_to": "none",
        "disable_tqdm": "true",
        "bf16": "false",
        "use_cpu": "true",
        **options,
    }
    return [word for key, value in options.items() if value is not None for word in (f"--{key}", str(value))]


def lines(output):
    """The metrics, read by a strict JSON parser."""

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in (output / "metrics.jsonl").read_text().splitlines()]


def steps(output):
    return [row["step"] for row in lines(output) if "loss" in row]


@pytest.fixture(scope="module")
def printed_run(model, tmp_path_factory):
    """The output folder of a run of four steps, and the lines that it has printed."""
    output = tmp_path_factory.mktemp("runs") / "a finished run"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert (
            main(["sft", *words(model, output, eval_strategy="steps", eval_steps=4, dataset_test_split="train")]) == 0
        )
    return output, printed.getvalue().splitlines()


@pytest.fixture(scope="module")
def finished(printed_run):
    """The output folder of a run of four steps; tests copy it."""
    return printed_run[0]


@pytest.fixture
def finished_run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "out")


def error(capsys):
    """The only error line on stderr."""
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fusedalign: error: ")]
    assert len(err) == 1, err
    return err[0]


def stop_at(monkeypatch, step, what=KeyboardInterrupt):
    """Interrupt the training at the end of a step, after its metrics line and checkpoint."""

    def end(self, args, state, control, **kwargs):
        if state.global_step == step:
            state.log_history.append({"loss": 1.0, "step": step})  # by now the checkpoint of an earlier step is saved
            raise what

    monkeypatch.setattr(transformers.trainer_callback.DefaultFlowCallback, "on_log", end, raising=False)


# Metrics over two runs


@pytest.mark.parametrize("word", ["last", "true", "True"])
def test_a_resume_keeps_earlier_metrics(model, finished_run, word):
    before = (finished_run / "metrics.jsonl").read_text().splitlines()
    assert main(["sft", *words(model, finished_run, max_steps=6, resume_from_checkpoint=word)]) == 0
    after = (finished_run / "metrics.jsonl").read_text().splitlines()
    assert after[:4] == before[:4]  # byte for byte
    assert steps(finished_run) == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in lines(finished_run) if "train_runtime" in row] == [6]


def test_a_resume_after_an_interruption_logs_each_step_once(model, tmp_path, monkeypatch, capsys):
    """Step 3 was logged but is lost after checkpoint 2: it is trained and logged again."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        assert main(["sft", *words(model, out)]) == 130
    assert len(lines(out)) in (2, 3)
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 1.0}\n{"step": 4, "lo')  # and a line truncated by a kill
    assert main(["sft", *words(model, out, resume_from_checkpoint="last")]) == 0, capsys.readouterr().err
    assert steps(out) == [1, 2, 3, 4]


def test_a_resume_equals_a_run_without_an_interruption(model, finished_run, finished, tmp_path, monkeypatch):
    out = tmp_path / "interrupted"
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        assert main(["sft", *words(model, out)]) == 130
    assert main(["sft", *words(model, out, resume_from_checkpoint="last")]) == 0
    for got, want in zip(lines(out)[:4], lines(finished)[:4], strict=True):
        assert {**got, "num_tokens": 0} == pytest.approx({**want, "num_tokens": 0}, rel=1e-5)


def test_a_resume_accepts_a_file_and_a_folder_elsewhere(model, finished_run, tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text("resume_from_checkpoint: true\n")
    assert main(["sft", "--config", str(config), *words(model, finished_run, max_steps=5)]) == 0
    assert steps(finished_run) == [1, 2, 3, 4, 5]
    other = tmp_path / "other"
    resume = finished_run / "checkpoint-2"
    assert main(["sft", *words(model, other, resume_from_checkpoint=resume, save_strategy="no")]) == 0
    assert steps(other) == [1, 2, 3, 4]


def test_a_truncated_checkpoint_is_skipped(model, finished_run):
    (finished_run / "checkpoint-4" / "trainer_state.json").write_text('{"global_step": 4, "log_hist')
    assert main(["sft", *words(model, finished_run, resume_from_checkpoint="last")]) == 0
    assert steps(finished_run) == [1, 2, 3, 4]
    assert json.loads((finished_run / "checkpoint-4" / "trainer_state.json").read_text())["global_step"] == 4


@pytest.mark.parametrize("word", ["false", "none"])
def test_words_for_no_resume_start_a_new_run(model, tmp_path, word):
    out = tmp_path / "out"
    assert main(["sft", *words(model, out, resume_from_checkpoint=word, max_steps=1)]) == 0
    assert steps(out) == [1]


# What is refused


def test_a_finished_folder_is_refused_and_untouched(model, finished_run, capsys, monkeypatch):
    from fusedalign.trl import train

    monkeypatch.setattr(train, "load_data", lambda *_: pytest.fail("refused after the data were loaded"))
    before = {path: path.read_bytes() for path in finished_run.rglob("*") if path.is_file()}
    assert main(["sft", *words(model, finished_run)]) == 2
    message = error(capsys)
    assert "output_dir must hold no earlier run" in message
    assert "--overwrite_output_dir" in message
    assert "--resume_from_checkpoint last" in message
    assert {path: path.read_bytes() for path in finished_run.rglob("*") if path.is_file()} == before


def test_a_folder_with_a_model_or_metrics_alone_is_refused(model, tmp_path, capsys):
    for name in ("model.safetensors", "adapter_model.safetensors", "model-00001-of-00002.safetensors", "metrics.jsonl"):
        out = tmp_path / name.partition(".")[0]
        out.mkdir()
        (out / name).write_text('{"step": 1, "loss": 2.0}\n')
        assert main(["sft", *words(model, out)]) == 2
        message = error(capsys)
        assert f"with {name}; --overwrite_output_dir" in message
        assert "resume" not in message  # there is no checkpoint


def test_an_interrupted_run_is_not_restarted_by_accident(model, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        assert main(["sft", *words(model, out)]) == 130
    capsys.readouterr()
    assert main(["sft", *words(model, out)]) == 2
    assert "with checkpoint-2, metrics.jsonl; --resume_from_checkpoint last goes on from checkpoint-2" in error(capsys)


@pytest.mark.parametrize("flag", [["--overwrite_output_dir"], ["--overwrite_output_dir", "true"]])
def test_overwrite_starts_a_new_run(model, finished_run, flag):
    (finished_run / "adapter_config.json").write_text("{}")
    argv = words(model, finished_run, max_steps=1, save_strategy="no")
    assert main(["sft", *argv, *flag]) == 0
    assert steps(finished_run) == [1]
    assert not list(finished_run.glob("checkpoint-*"))  # otherwise `last` would mean one of the earlier run
    assert not (finished_run / "adapter_config.json").exists()
    assert (finished_run / "model.safetensors").is_file()


def test_overwrite_keeps_all_files_until_training_begins(model, finished_run, capsys):
    argv = words(model, finished_run, dataset_name="nowhere.jsonl")
    assert main(["sft", *argv, "--overwrite_output_dir"]) == 2
    assert "nowhere.jsonl" in error(capsys)
    assert steps(finished_run) == [1, 2, 3, 4]
    assert (finished_run / "checkpoint-4").is_dir()


@pytest.mark.parametrize("method", ["dpo", "kto", "cpo", "simpo"])
def test_overwrite_keeps_all_files_where_the_loss_is_misspelt(model, finished_run, capsys, method):
    argv = words(model, finished_run, loss_type="sigmod", dataset_name="recipes/data/preferences")
    assert main([method, *argv, "--overwrite_output_dir"]) == 2
    assert "loss_type must be one of" in error(capsys)
    assert (finished_run / "model.safetensors").is_file()
    assert (finished_run / "checkpoint-4").is_dir()


@pytest.mark.parametrize("name", [".", "checkpoint-2"])
def test_overwrite_does_not_remove_the_model_it_starts_from(finished_run, model, capsys, name):
    argv = words(model, finished_run, model_name_or_path=finished_run / name)
    assert main(["sft", *argv, "--overwrite_output_dir"]) == 2
    assert "output_dir must not hold the model that is trained" in error(capsys)
    assert (finished_run / "model.safetensors").is_file()


def test_resuming_an_earlier_checkpoint_drops_later_ones_only_on_request(model, finished_run, capsys):
    argv = words(model, finished_run, max_steps=3, resume_from_checkpoint=finished_run / "checkpoint-2")
    assert main(["sft", *argv]) == 2
    assert "no checkpoint later than the one to go on from" in error(capsys)
    assert main(["sft", *argv, "--overwrite_output_dir"]) == 0
    assert steps(finished_run) == [1, 2, 3]
    assert (finished_run / "checkpoint-2").is_dir()
    assert not (finished_run / "checkpoint-4").exists()


@pytest.mark.parametrize("value", ["last", "true"])
def test_a_missing_checkpoint_is_an_error(model, tmp_path, capsys, value):
    assert main(["sft", *words(model, tmp_path / "out", resume_from_checkpoint=value)]) == 2
    message = error(capsys)
    assert f"resume_from_checkpoint={value} must find a checkpoint in output_dir" in message
    assert "--save_strategy" in message


def test_a_folder_that_is_not_a_checkpoint_is_an_error(model, finished_run, tmp_path, capsys):
    for value in (tmp_path / "nowhere", model):
        assert main(["sft", *words(model, tmp_path / "out", resume_from_checkpoint=value)]) == 2
        assert error(capsys).endswith(f"a trainer_state.json, got {value} (--debug shows the traceback)")
    assert main(["sft", *words(model, tmp_path / "out", resume_from_checkpoint=finished_run)]) == 2
    assert f"got {finished_run}; the last one in there is {finished_run / 'checkpoint-4'}" in error(capsys)


def test_a_checkpoint_of_another_model_is_an_error(model, finished_run, tmp_path, capsys):
    weights = transformers.LlamaConfig.from_pretrained(model)
    weights.hidden_size = 16
    transformers.LlamaForCausalLM(weights).save_pretrained(finished_run / "checkpoint-4")
    assert main(["sft", *words(model, finished_run, max_steps=6, resume_from_checkpoint="last")]) == 2
    error(capsys)
    assert not (finished_run / "run.lock").exists()


# The lock


def holder(pid, host=None, started=None):
    started = psutil.Process(pid).create_time() if started is None else started
    return json.dumps({"pid": pid, "host": host or socket.gethostname(), "started": started})


def test_a_running_lock_refuses_a_second_run(model, tmp_path, capsys):
    """The error names the running process; its files are not touched."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "run.lock").write_text(holder(os.getppid()))
    (out / "metrics.jsonl").write_text('{"step": 1}\n')
    assert main(["sft", *words(model, out), "--overwrite_output_dir"]) == 2
    message = error(capsys)
    assert f"held by process {os.getppid()} on {socket.gethostname()}, started 20" in message
    assert (out / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert (out / "run.lock").exists()


def test_a_second_run_during_training_is_refused(model, tmp_path, monkeypatch, capsys):
    """A second run starts while the first one trains."""
    from types import SimpleNamespace

    from fusedalign.trl.folder import claimed

    out, refused = tmp_path / "out", []

    def second(self, args, state, control, **kwargs):
        training = SimpleNamespace(output_dir=str(out), resume_from_checkpoint=None, process_index=0)
        overwrite, source = SimpleNamespace(overwrite_output_dir=True), SimpleNamespace(model_name_or_path=str(model))
        with pytest.raises(ValueError, match=f"held by process {os.getpid()} on") as caught:
            claimed(SimpleNamespace(training=training, fused=overwrite, model=source)).__enter__()
        refused.append(caught)

    monkeypatch.setattr(transformers.trainer_callback.DefaultFlowCallback, "on_step_begin", second)
    assert main(["sft", *words(model, out)]) == 0, capsys.readouterr().err
    assert len(refused) == 4
    assert steps(out) == [1, 2, 3, 4]
    assert not (out / "run.lock").exists()


@pytest.mark.parametrize("kind", ["ended", "a process that has its number now"])
def test_the_lock_of_a_process_that_ended_is_taken_over(model, tmp_path, kind):
    out = tmp_path / "out"
    out.mkdir()
    if kind == "ended":
        process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        lock = holder(process.pid)
        process.kill()
        process.wait()
    else:
        lock = holder(os.getppid(), started=psutil.Process(os.getppid()).create_time() - 3600)
    (out / "run.lock").write_text(lock)
    assert main(["sft", *words(model, out, max_steps=1)]) == 0
    assert not (out / "run.lock").exists()


@pytest.mark.parametrize("kind", ["elsewhere", "empty", "nameless"])
def test_a_lock_that_cannot_be_checked_is_left_alone(model, tmp_path, capsys, kind):
    lock = {"elsewhere": holder(os.getpid(), host="elsewhere"), "empty": "", "nameless": "{}"}[kind]
    out = tmp_path / "out"
    out.mkdir()
    (out / "run.lock").write_text(lock)
    assert main(["sft", *words(model, out)]) == 2
    assert f"if that run is over, remove {out / 'run.lock'}" in error(capsys)
    assert (out / "run.lock").read_text() == lock


def test_a_lock_taken_over_by_another_process_is_an_error(tmp_path):
    from fusedalign.trl.lock import locked

    with locked(tmp_path) as lock:
        lock.check()
        (tmp_path / "run.lock").write_text(holder(os.getppid()))
        with pytest.raises(ValueError, match=f"held by process {os.getppid()} on"):
            lock.check()
    assert (tmp_path / "run.lock").exists()  # the lock of the other process stays


def test_an_output_directory_that_is_a_file_is_an_error(model, tmp_path, capsys):
    (tmp_path / "out").write_text("")
    assert main(["sft", *words(model, tmp_path / "out")]) == 2
    assert f"output_dir must be a folder that can be written to, got {tmp_path / 'out'}" in error(capsys)


# Valid JSON lines


def test_nan_is_written_as_null(model, tmp_path, monkeypatch):
    """Also in a checkpoint, which a resume reads the earlier lines from."""
    import trl

    out, log = tmp_path / "out", trl.SFTTrainer.log

    def log_with_nan(self, logs, *rest):
        return log(self, {**logs, "a": float("nan"), "b": float("-inf")}, *rest)

    monkeypatch.setattr(trl.SFTTrainer, "log", log_with_nan)
    assert main(["sft", *words(model, out, max_steps=2)]) == 0
    assert [row["a"] for row in lines(out)] == [None] * 3
    assert main(["sft", *words(model, out, max_steps=3, resume_from_checkpoint="last")]) == 0
    assert [(row["a"], row["b"]) for row in lines(out)] == [(None, None)] * 4
    assert all(row["loss"] > 0 for row in lines(out)[:3])


def test_torch_and_numpy_scalars_are_written_as_numbers():
    import numpy as np

    from fusedalign.reports import to_json

    row = {
        "loss": torch.tensor(0.5),
        "bad": torch.tensor(float("nan")),
        "n": np.int64(3),
        "x": np.float32(0.25),
        "inf": np.float64("inf"),
        "each": torch.tensor([1.0, float("nan")]),
        "flag": np.bool_(True),
        "pair": (1, None, "a"),
        "dtype": torch.float32,
    }
    assert json.loads(to_json(row), parse_constant=pytest.fail) == {
        "loss": 0.5,
        "bad": None,
        "n": 3,
        "x": 0.25,
        "inf": None,
        "each": [1.0, None],
        "flag": True,
        "pair": [1, None, "a"],
        "dtype": "torch.float32",
    }


# Full disks


def test_a_disk_that_fills_up_warns_once_and_training_continues(model, tmp_path, monkeypatch, capsys):
    """One warning is printed, training continues, and the lines are written once there is room."""
    from fusedalign.trl.record import MetricsFile

    append, tries = MetricsFile._append, []

    def full(self, text):
        tries.append(text)
        if len(tries) == 2:
            append(self, text[:10])
            raise OSError(errno.ENOSPC, "No space left on device")
        append(self, text)

    monkeypatch.setattr(MetricsFile, "_append", full)
    out = tmp_path / "out"
    assert main(["sft", *words(model, out)]) == 0
    assert steps(out) == [1, 2, 3, 4]
    messages = [line for line in capsys.readouterr().err.splitlines() if "No space left" in line]
    assert len(messages) == 1
    assert messages[0].startswith("fusedalign: warning: ")


def test_a_disk_that_stays_full_warns_and_saves_the_model(model, tmp_path, monkeypatch, capsys):
    from fusedalign.trl.record import MetricsFile

    def full(self, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(MetricsFile, "_append", full)
    monkeypatch.setattr(MetricsFile, "_replace", full)
    out = tmp_path / "out"
    assert main(["sft", *words(model, out)]) == 0
    printed = capsys.readouterr()
    assert f"\nmodel: {out}  plot: {out / 'metrics.png'}  record: " in printed.out
    assert "metrics.jsonl lacks lines" in printed.err
    assert (out / "model.safetensors").is_file()


def no_matplotlib(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)


def full_disk(monkeypatch):
    from matplotlib.figure import Figure

    def savefig(self, path, **_):
        path.write_bytes(b"\x89PN")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", savefig)


def broken_library(monkeypatch):
    from matplotlib.figure import Figure

    monkeypatch.setattr(Figure, "subplots", lambda *_, **__: [][1])


@pytest.mark.parametrize(
    ("breaks", "message"),
    [
        (no_matplotlib, "it needs matplotlib (pip install matplotlib)"),
        (full_disk, "No space left on device"),
        (broken_library, "IndexError"),
    ],
)
def test_a_failed_plot_does_not_fail_the_run(model, tmp_path, monkeypatch, capsys, breaks, message):
    breaks(monkeypatch)
    out = tmp_path / "out"
    assert main(["sft", *words(model, out, max_steps=1)]) == 0
    printed = capsys.readouterr()
    assert f"\nmodel: {out}  metrics: {out / 'metrics.jsonl'}  record: {out / 'run.json'}" in printed.out
    messages = [line for line in printed.err.splitlines() if line.startswith("fusedalign: ")]
    assert len(messages) == 1
    assert messages[0].startswith("fusedalign: warning: the plot")
    assert message in messages[0]
    assert (out / "model.safetensors").is_file()
    assert not (out / "metrics.png").exists()


def test_the_demo_runs_twice_and_without_matplotlib(model, tmp_path, monkeypatch, capsys):
    """The demo overwrites its own folders; run with one-step recipes and this small model."""
    from fusedalign.demo import command as demo

    rows = [{"prompt": "a" * (i + 1), "chosen": "yes", "rejected": "no"} for i in range(4)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for method in ("sft", "dpo"):
        fields = words(model, "", model_name_or_path=None, dataset_name=tmp_path / "pairs.jsonl", max_steps=1)
        fields = {name.removeprefix("--"): value for name, value in zip(fields[::2], fields[1::2], strict=True)}
        fields |= {"eval_strategy": "epoch", "dataset_test_split": "train", "save_strategy": "'no'"}
        (tmp_path / f"{method}.yaml").write_text(
            "".join(
                f"{name}: {value}\n" for name, value in fields.items() if name not in ("output_dir", "disable_tqdm")
            )
        )
    monkeypatch.setattr(demo, "data_directory", lambda: tmp_path / "data")
    monkeypatch.setattr(demo, "EMBEDDED_NAME", str(model))
    monkeypatch.setattr(demo, "OUTPUT", tmp_path / "demo")
    monkeypatch.setattr(demo, "_answer", lambda trainer: "")
    with monkeypatch.context() as terminal:
        terminal.setattr(sys.stderr, "isatty", lambda: True)
        assert main(["demo"]) == 0, capsys.readouterr().err
    printed = capsys.readouterr()
    assert f"plot: {tmp_path / 'demo' / 'demo.png'}" in printed.out
    assert "1/3  SFT" not in printed.out
    shares = [int(x) for x in re.findall(r"([0-9]+)% \|", printed.err)]
    assert shares == sorted(shares), "one bar for all trainings"
    assert shares[-1] == 100
    assert "\x1b[3" not in printed.err, "no colours"
    no_matplotlib(monkeypatch)
    results = []
    plot = demo.plot
    monkeypatch.setattr(demo, "plot", lambda values, path: [results.append(values), plot(values, path)])
    assert main(["demo"]) == 0
    printed = capsys.readouterr()
    _check_demo(*results)
    assert printed.out.startswith("1/3  SFT")
    assert "%" not in printed.err
    assert max(map(len, printed.out.split("\n\n")[1].splitlines())) <= 100
    assert "| final loss " in printed.out
    assert "plot: " not in printed.out
    assert f"model: {tmp_path / 'demo' / 'dpo-fusedalign'}  metrics: " in printed.out
    messages = [line for line in printed.err.splitlines() if "pip install matplotlib" in line]
    assert messages == ["fusedalign: warning: the plot was left out: it needs matplotlib (pip install matplotlib)"]


def _check_demo(results):
    """The loss layer that the demo measures is the one that its trainers ran: one tile of TRL's, none of ours."""
    logits = results.tokens * results.vocab
    assert 12 * logits <= results.memory.full_logits < 13 * logits
    assert results.memory.stock > results.tokens * 32_768 * 4 > results.memory.fused > 0
    assert dict(results.losses["stock TRL"]) == pytest.approx(dict(results.losses["fusedalign"]), abs=1e-4)
    assert all(each.packed > 0 for each in results.slots.values())


# Ctrl-C


def test_ctrl_c_reports_what_is_kept_and_how_to_resume(model, tmp_path, monkeypatch, capsys):
    out = tmp_path / "a run"
    argv = [*words(model, out), "--overwrite_output_dir"]
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        assert main(["sft", *argv]) == 130
    interrupted, kept, resume = capsys.readouterr().err.strip().splitlines()[-3:]
    assert interrupted == "fusedalign: interrupted"
    assert kept == f"kept: {out / 'checkpoint-2'} (step 2), {out / 'metrics.jsonl'}"
    assert resume.startswith("go on: fusedalign sft --model_name_or_path ")
    command = shlex.split(resume)[4:]
    assert command == [*words(model, out), "--resume_from_checkpoint", "last"]
    assert not (out / "run.lock").exists()
    assert main(["sft", *command]) == 0
    assert steps(out) == [1, 2, 3, 4]
    with monkeypatch.context() as patch:  # the second time the arguments are not added twice
        stop_at(patch, 5)
        assert main(["sft", *command, "--max_steps", "6"]) == 130
    assert capsys.readouterr().err.count("resume_from_checkpoint") == 1


def test_ctrl_c_without_a_checkpoint_says_so(model, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        assert main(["sft", *words(model, out, save_strategy="no")]) == 130
    kept, none, restart = capsys.readouterr().err.strip().splitlines()[-3:]
    assert kept == f"kept: {out / 'metrics.jsonl'}"
    assert "no checkpoint was saved: --save_strategy steps --save_steps N" in none
    assert restart.endswith("--overwrite_output_dir")


def test_ctrl_c_before_training_keeps_the_folder(model, finished_run, monkeypatch, capsys):
    from fusedalign.trl import train

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "load_data", stop)
    assert main(["sft", *words(model, finished_run), "--overwrite_output_dir"]) == 130
    err = capsys.readouterr().err
    assert "nothing was trained yet" in err
    assert "go on" not in err
    assert steps(finished_run) == [1, 2, 3, 4]


@pytest.mark.slow
def test_killed_and_interrupted_processes_resume(model, tmp_path):
    """A killed run leaves a lock that the next run takes over; that one is interrupted, and the third finishes."""
    out = tmp_path / "out"
    argv = words(model, out, max_steps=100_000, save_steps=20)

    def until(step, signal_number, *more):
        command = [sys.executable, "-m", "fusedalign", "sft", *argv, *more]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        while not (out / f"checkpoint-{step}" / "trainer_state.json").is_file():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        process.send_signal(signal_number)
        return process.communicate()[1], process.returncode

    assert until(40, signal.SIGKILL)[1] == -signal.SIGKILL
    assert (out / "run.lock").is_file()
    err, status = until(80, signal.SIGINT, "--resume_from_checkpoint", "last")
    assert status == 130
    assert "Traceback" not in err
    assert "go on: fusedalign sft" in err
    end = max(int(path.name.partition("-")[2]) for path in out.glob("checkpoint-*")) + 5
    assert main(["sft", *argv, "--resume_from_checkpoint", "last", "--max_steps", str(end)]) == 0
    assert steps(out) == list(range(1, end + 1))


# run.json


def record(output):
    return json.loads((output / "run.json").read_text(), parse_constant=pytest.fail)


def test_a_run_is_recorded(model, finished):
    run = record(finished)
    assert run["state"] == "finished"
    assert run["command"].startswith(f"fusedalign sft --model_name_or_path {model} --dataset_name ")
    assert shlex.split(run["command"])[-2:] == ["--dataset_test_split", "train"]
    assert run["started"] <= run["ended"]
    assert run["versions"]["transformers"] == transformers.__version__
    assert run["data"] == {"train_rows": 8, "eval_rows": 8}
    assert run["changed"]["max_steps"] == 4
    assert "learning_rate" not in run["changed"]
    assert run["configuration"]["training"]["learning_rate"] == 2e-5  # of TRL's configuration
    assert run["configuration"]["fused"]["fused_impl"] == "auto"
    assert run["decisions"]["impl"] == {"option": "auto", "serving": "pytorch"}
    assert run["decisions"]["batches"]["layout"] == "right-padded without a mask"
    assert (run["machine"]["processes"], run["resumed_from"], run["previous"]) == (1, None, [])
    rows = lines(finished)
    assert run["steps"] == 4
    assert run["tokens"] == rows[3]["num_tokens"] > 0
    assert run["tokens_per_second"] == pytest.approx(run["tokens"] / run["training_seconds"])
    last = {name: value for row in rows for name, value in row.items()}
    assert run["metrics"] == last


def test_a_resume_keeps_the_earlier_record_and_overwriting_does_not(model, finished_run):
    first = record(finished_run)
    assert main(["sft", *words(model, finished_run, max_steps=5, resume_from_checkpoint="last")]) == 0
    second = record(finished_run)
    first.pop("previous")
    assert second["previous"] == [first]
    assert second["resumed_from"] == {"checkpoint": str(finished_run / "checkpoint-4"), "step": 4}
    assert main(["sft", *words(model, finished_run, max_steps=1, overwrite_output_dir="true")]) == 0
    assert record(finished_run)["previous"] == []


def test_a_run_that_ends_early_is_recorded_without_secrets(model, tmp_path, monkeypatch, capsys):
    """Also quiet, with --log_level error."""
    monkeypatch.setenv("TRACKER_API_KEY", "my-key-in-the-environment")
    out = tmp_path / "out"
    quiet = {"log_level": "error", "hub_token": "my-token", "overwrite_output_dir": "true"}
    ends = {"interrupted": KeyboardInterrupt, "failed": RuntimeError("my-key-in-the-environment of hf_abcdefgh01 and")}
    for state, end in ends.items():
        with monkeypatch.context() as patch:
            stop_at(patch, 2, end)
            assert main(["sft", *words(model, out, **quiet)]) == (130 if state == "interrupted" else 2)
        assert record(out)["state"] == state
        assert record(out)["steps"] == 2
        assert record(out)["configuration"]["training"]["hub_token"] == "<redacted>"
    assert record(out)["error"] == "RuntimeError: <redacted> of <redacted> and"
    text = (out / "run.json").read_text()
    assert not [secret for secret in ("my-token", "my-key", "hf_abc") if secret in text]
    assert " step " not in capsys.readouterr().out


def test_no_file_of_a_run_holds_the_token_of_the_hub(model, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "of-the-environment")
    out = tmp_path / "out"
    assert main(["sft", *words(model, out, hub_token="the-given-token", max_steps=1, save_strategy="steps")]) == 0
    files = [path for path in out.rglob("*") if path.is_file()]
    assert [path.name for path in files].count("training_args.bin") == 2
    assert not [path for path in files if b"the-given-token" in path.read_bytes()]
    assert os.environ["HF_TOKEN"] == "the-given-token"  # for the push


def test_a_record_that_cannot_be_written_or_described_costs_a_warning(model, tmp_path, monkeypatch, capsys):
    from fusedalign.trl import run_file, train

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    out = tmp_path / "out"
    monkeypatch.setattr(run_file, "replace_text", fail)
    monkeypatch.setattr(train, "describe", lambda *_: [][1])
    assert main(["sft", *words(model, out, max_steps=1)]) == 0
    printed = capsys.readouterr()
    assert "run.json cannot be written, the run goes on without it: No space left" in printed.err
    assert "run.json is incomplete: IndexError" in printed.err
    assert "record: " not in printed.out
    assert (out / "model.safetensors").is_file()


def test_secrets_are_hidden_by_name_and_wherever_their_values_occur():
    from fusedalign.trl.redaction import Redactor

    options = {"token": "swordfish", "eos_token": "</s>", "max_tokens": 5, "nested": [{"db_password": "abc"}]}
    redactor = Redactor(options)
    hidden = "<redacted>"
    assert redactor.data(options) == {
        "token": hidden,
        "eos_token": "</s>",
        "max_tokens": 5,
        "nested": [{"db_password": hidden}],
    }
    argv = ["--hub_token", "a", "--api-key=b", "--eos_token", "c", "--init", '{"token": "swordfish"}', "http://u:p@h/d"]
    shown = ["--hub_token", hidden, f"--api-key={hidden}", "--eos_token", "c", "--init", f'{{"token": "{hidden}"}}']
    assert redactor.words(argv) == [*shown, f"http://{hidden}@h/d"]


def test_secrets_are_hidden_where_only_their_name_tells():
    """No source holds their values: a trainer may have dropped the field."""
    from fusedalign.trl.redaction import HIDDEN, Redactor

    redactor = Redactor()
    argv = ["--model_init_kwargs", '{"token": "a \\"b", "revision": "main"}', "https://h/d?access_token=abc&page=2"]
    shown = [f'{{"token": "{HIDDEN}", "revision": "main"}}', f"https://h/d?access_token={HIDDEN}&page=2"]
    assert redactor.words(argv) == ["--model_init_kwargs", *shown]
    assert redactor.words(["--eos-token", "</s>", "--pad-token=<p>"]) == ["--eos-token", "</s>", "--pad-token=<p>"]
    keys = {"aws_secret_access_key": "abc", "account_key": "abc", "sort_key": "abc"}
    assert redactor.data(keys) == {"aws_secret_access_key": HIDDEN, "account_key": HIDDEN, "sort_key": "abc"}


def test_the_lines_that_a_run_prints_have_no_secrets(model, tmp_path, monkeypatch, capsys):
    """The command that goes on, the next commands, and errors: a terminal's text is pasted into bug reports."""
    out, secret = tmp_path / "out", {"hub_token": "sword-fish"}
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        assert main(["sft", *words(model, out, **secret)]) == 130
    assert "--hub_token '<redacted>'" in capsys.readouterr().err
    assert main(["sft", *words(model, out, resume_from_checkpoint="last", **secret)]) == 0
    printed = capsys.readouterr()
    assert "sword-fish" not in printed.out + printed.err
    for more in (["--model_init_kwargs", '{"token": "hunter-two"'], ["--run_name", "a", "hf_abcdefgh01"]):
        assert main(["sft", *words(model, tmp_path / "other", **secret), *more]) == 2
    assert main(["sft", *words(model, out, dataset_name="sword-fish.jsonl", **secret)]) == 2
    printed = capsys.readouterr().err
    assert printed.count("fusedalign: error: ") == 3
    assert not [x for x in ("sword-fish", "hunter-two", "hf_abc") if x in printed], printed


def test_commits_are_those_of_the_repositories_that_hold_the_files(tmp_path, monkeypatch):
    from fusedalign import provenance

    def git(*arguments):
        name = ["-c", "user.name=n", "-c", "user.email=e@x"]
        subprocess.run(["git", "-C", tmp_path, *name, *arguments], check=True, capture_output=True)

    assert provenance.commit(tmp_path) is None
    git("init")
    (tmp_path / "a.txt").write_text("a")
    git("add", "a.txt")
    git("commit", "-m", "a")
    head = provenance.commit(tmp_path)
    assert len(head["commit"]) == 40
    assert head["dirty"] is False
    (tmp_path / "a.txt").write_text("b")
    assert provenance.commit(tmp_path) == {**head, "dirty": True}
    (tmp_path / "__init__.py").write_text("")  # installed into an environment in the repository
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "provenance.py"))
    assert provenance.package_commit() is None
    git("add", "__init__.py")
    assert provenance.package_commit()["commit"] == head["commit"]
    monkeypatch.setenv("PATH", "")
    assert provenance.commit(tmp_path) is None


# What is printed


def test_steps_are_lines_of_a_table(printed_run):
    output, printed = printed_run
    first = next(i for i, line in enumerate(printed) if " step " in line)
    header, *table = printed[first : first + 6]
    assert header.split() == ["step", "epoch", "loss", "accuracy", "entropy", "grad", "norm", "lr", "tokens/s"]
    rows = [row for row in lines(output) if "loss" in row]
    for text, row in zip(table, rows, strict=False):
        cells = text.split()
        assert cells[0] == f"{row['step']}/4"
        assert [float(cell) for cell in cells[2:3] + cells[4:6]] == pytest.approx(
            [row["loss"], row["entropy"], row["grad_norm"]], rel=1e-3
        )
        assert float(cells[7].replace(",", "")) > 0
    assert table[4].split()[:2] == ["eval", "4/4"]
    assert printed[first + 6].startswith("trained 4 steps in ")
    assert all(len(line) <= 100 for line in printed[first : first + 7])
    assert "{'" not in "".join(printed)


def test_the_table_keeps_to_100_columns_and_repeats_its_header_rarely(monkeypatch, capsys):
    from types import SimpleNamespace

    from fusedalign.trl import steps

    monkeypatch.setattr(steps, "peak_memory", lambda device: 1234.5678)
    table = steps.StepTable(SimpleNamespace(rate=1234567.8, mean_rate=None))
    state = SimpleNamespace(is_world_process_zero=True, global_step=123456, max_steps=1234567)
    small = -1.23456e-05
    logs = {
        "loss": small,
        "rewards/accuracies": 0.123456,
        "rewards/margins": small,
        "mean_token_accuracy": 0.5,
        "grad_norm": float("nan"),
        "learning_rate": 1.23456e-06,
        "epoch": 123.456,
    }
    for _ in range(60):
        table.on_log(SimpleNamespace(device=None), state, None, logs=logs)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 62
    assert max(map(len, printed)) <= 100
    assert "margin" in printed[0]
    assert [i for i, line in enumerate(printed) if line == printed[0]] == [0, 41]
    row = "123456 123.46 -1.23e-05 0.123 -1.23e-05 nan 1.23e-06 1,234,568 1234.57"
    assert " ".join(printed[1].split()) == row


def test_the_last_lines_name_the_files_and_commands_that_run(model, printed_run, tmp_path, monkeypatch, capsys):
    output, printed = printed_run
    quoted = shlex.quote(str(output / "run.json"))
    (files,) = (i for i, line in enumerate(printed) if line.startswith("model: "))
    assert f"  record: {quoted}  " in printed[files]
    commands = {purpose: shlex.split(command) for purpose, command in (x.split(": ", 1) for x in printed[files + 1 :])}
    train, score, answer = commands.values()
    assert list(commands) == ["train on preferences (chosen and rejected in PAIRS.jsonl)", "score", "try"]
    monkeypatch.chdir(tmp_path)
    pairs = [{"prompt": "ab", "chosen": "a", "rejected": "b"}] * 2
    (tmp_path / "PAIRS.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    quick = words(model, "", model_name_or_path=None, dataset_name=None, output_dir=None, max_steps=1)
    assert main([*train[1:], *quick]) == 0
    assert main([*score[1:-1], str(tmp_path / "scores.parquet")]) == 0
    capsys.readouterr()
    assert answer[:2] == ["python", "-c"]
    exec(answer[2], {})
    assert capsys.readouterr().out.strip()


def test_commands_name_folders_beside_the_run(tmp_path, monkeypatch):
    from fusedalign.trl.suggestions import _sibling

    monkeypatch.chdir(tmp_path)
    assert _sibling("runs/sft", "dpo") == os.path.join("runs", "sft-dpo")
    assert _sibling(".", "dpo") == f"{tmp_path}-dpo"


def test_an_adapters_card_record_and_next_commands(model, tmp_path, monkeypatch, capsys):
    """CPO, whose trainer logs no tokens, with pairs and a progress bar on a terminal."""
    rows = [{"prompt": "abc", "chosen": "a" * i, "rejected": "b"} for i in range(1, 5)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    options = {"use_peft": "true", "lora_target_modules": "q_proj", "disable_tqdm": "false", "save_strategy": "no"}
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    argv = words(model, out, dataset_name=tmp_path / "pairs.jsonl", max_steps=2, **options)
    assert main(["cpo", *argv]) == 0
    printed = capsys.readouterr()
    # TRL ends a completion with an EOS and begins a prompt with a BOS where the tokenizer does.
    assert record(out)["tokens"] == sum(3 + len(row[side]) + 1 for row in rows for side in ("chosen", "rejected"))
    assert "2/2" in printed.err
    assert " margin " in printed.out
    assert "{'" not in printed.out + printed.err
    assert f"\nmerge: fusedalign merge {out} --out {out}-merged\n" in printed.out
    assert record(out)["decisions"]["parameters"]["trained"] < record(out)["decisions"]["parameters"]["all"]
    card = (out / "README.md").read_text()
    assert "library_name: peft" in card
    assert f"base_model: {model}" in card


# The model card


def test_the_card_names_base_model_and_folder(model, finished):
    card = (finished / "README.md").read_text()
    assert card.startswith("---\n")
    assert f"fine-tuned version of `{model}`." in card
    assert f'pipeline("text-generation", model="{finished}"' in card
    assert "trained with SFT" in card
    assert "None" not in card


def test_a_card_that_fails_or_would_replace_another_text_costs_a_warning(model, tmp_path, monkeypatch, capsys):
    import trl

    out = tmp_path / "out"
    monkeypatch.setattr(trl.SFTTrainer, "create_model_card", lambda *_, **__: [][1])
    assert main(["sft", *words(model, out, max_steps=1, save_strategy="no")]) == 0
    assert "warning: the model card was left out: IndexError: list index out of range" in capsys.readouterr().err
    assert not (out / "README.md").exists()
    (out / "README.md").write_text("# My notes\n")
    monkeypatch.undo()
    argv = words(model, out, max_steps=1, save_strategy="no", overwrite_output_dir="true")
    assert main(["sft", *argv]) == 0
    assert f"the model card was left out: {out / 'README.md'} is another text" in capsys.readouterr().err
    assert (out / "README.md").read_text() == "# My notes\n"


@pytest.mark.parametrize("adapter", [False, True])
def test_checkpoints_adapters_and_a_push_leave_another_text_alone(model, tmp_path, monkeypatch, adapter, capsys):
    """TRL writes its card at each checkpoint and before a push, PEFT adds to the file with each adapter."""
    out, pushed = tmp_path / "out", []

    class Hub:
        def upload_folder(self, folder_path, **_):
            pushed.append((Path(folder_path) / "README.md").read_text())

    monkeypatch.setattr("transformers.trainer.hf_api", Hub)
    monkeypatch.setattr(transformers.Trainer, "init_hf_repo", lambda self, **_: setattr(self, "hub_model_id", "me/x"))
    options = {"max_steps": 2, "save_steps": 1, "push_to_hub": "true", "hub_strategy": "end"}
    lora = ["--use_peft", "--lora_r", "2", "--lora_target_modules", "all-linear"] if adapter else []
    assert main(["sft", *words(model, out, **options), *lora]) == 0, capsys.readouterr().err
    assert {*pushed} == {(out / "README.md").read_text()}
    assert f"`{model}`" in pushed[0] or adapter
    pushed.clear()
    (out / "README.md").write_text("# My notes\n")
    assert main(["sft", *words(model, out, overwrite_output_dir="true", **options), *lora]) == 0
    assert {*pushed} == {"# My notes\n"}
    assert (out / "README.md").read_text() == "# My notes\n"
    assert "is another text" in capsys.readouterr().err


# Trackers


def test_an_unknown_or_missing_tracker_is_an_error_before_the_data_are_read(model, tmp_path, monkeypatch, capsys):
    from fusedalign.trl.trackers import check_trackers

    argv = words(model, tmp_path / "out", dataset_name="nowhere.jsonl")
    assert main(["sft", *argv, "--report_to", "tensorbord"]) == 2
    assert "got 'tensorbord'; did you mean tensorboard?" in error(capsys)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"report_to=trackio needs .* not installed: pip install trackio,"):
        check_trackers(["trackio"])
    monkeypatch.undo()
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "swanlab").mkdir()  # a folder of logs is no package
    with pytest.raises(ValueError, match="pip install swanlab"):
        check_trackers(["swanlab"])


def test_tensorboard_gets_every_metric(model, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    out = tmp_path / "out"
    assert main(["sft", *words(model, out, max_steps=2, report_to="tensorboard")]) == 0
    (folder,) = (out / "runs").iterdir()
    events = accumulator.EventAccumulator(str(folder)).Reload()
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(
        [row["loss"] for row in lines(out) if "loss" in row]
    )
