"""The record of a run survives resumes, second runs, Ctrl-C and full disks; failures of extras stop no training."""

import errno
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time

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
def finished(model, tmp_path_factory):
    """The output folder of a run of four steps; tests copy it."""
    output = tmp_path_factory.mktemp("runs") / "finished"
    assert main(["sft", *words(model, output)]) == 0
    return output


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
    from fusedalign import demo

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
    assert main(["demo"]) == 0, capsys.readouterr().err
    assert f"plot: {tmp_path / 'demo' / 'demo.png'}" in capsys.readouterr().out
    no_matplotlib(monkeypatch)
    assert main(["demo"]) == 0
    printed = capsys.readouterr()
    assert "| final loss " in printed.out
    assert "plot: " not in printed.out
    assert f"model: {tmp_path / 'demo' / 'dpo-fusedalign'}  metrics: " in printed.out
    messages = [line for line in printed.err.splitlines() if "pip install matplotlib" in line]
    assert messages == ["fusedalign: warning: the plot was left out: it needs matplotlib (pip install matplotlib)"]


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
