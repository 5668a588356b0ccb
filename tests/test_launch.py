"""Commands on several processes: through `accelerate launch` and torchrun."""

import json
import os
import sys
from datetime import timedelta
from pathlib import Path

import guarded
import pytest
import torch
import torch.distributed as dist

from fusedalign import reports
from fusedalign.cli import main

pytest.importorskip("trl")
METHODS = ["sft", "dpo", "kto", "cpo", "simpo", "orpo"]


@pytest.fixture
def launched(monkeypatch):
    """The arguments of each launch; nothing is started."""
    from fusedalign.trl import launch

    calls = []

    for name in ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(launch, "_run", lambda command, variables: calls.append(command[3:]) or 0)
    monkeypatch.setattr(launch.torch.accelerator, "device_count", lambda: 8)  # TRL's configurations start 8 processes
    return calls


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "words",
    [
        ["--accelerate_config", "fsdp2"],
        ["--accelerate_config=fsdp2"],
        ["--accelerate-config", "fsdp2"],
        ["--accelerate-config=fsdp2"],
        ["--accelerate_config", "zero2", "--accelerate_config=fsdp2"],
    ],
    ids=" ".join,
)
def test_every_form_of_accelerate_config_launches(launched, method, words):
    assert main([method, *words, "--seed", "3"]) == 0
    ((option, file, *command),) = launched
    assert (option, file.rpartition("/")[2]) == ("--config_file", "fsdp2.yaml")
    assert command == ["-m", "fusedalign", method, *words, "--seed", "3"]


@pytest.mark.parametrize(
    ("processes", "given", "threads"), [(4, None, "4"), (32, None, "1"), (4, "7", "7"), (1, None, None)]
)
def test_processes_share_the_cores(monkeypatch, processes, given, threads):
    """As torchrun does not: it warns, and takes one thread."""
    from fusedalign.trl import launch

    environment = []
    for name in ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    monkeypatch.setattr(launch, "_run", lambda command, variables: environment.append(os.environ | variables) or 0)
    monkeypatch.setattr(launch.torch.accelerator, "device_count", lambda: 32)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    assert main(["dpo", "--num_processes", str(processes), "--seed", "3"]) == 0
    assert environment[0].get("OMP_NUM_THREADS") == threads


@pytest.mark.parametrize("form", ["--config FILE", "--config=FILE"])
def test_accelerate_config_in_a_file_launches(launched, tmp_path, form):
    file = tmp_path / "mine.yaml"
    file.write_text("accelerate_config: multi_gpu\nseed: 3\n")
    assert main(["dpo", "--beta", "0.2", *form.replace("FILE", str(file)).split()]) == 0
    assert main(["dpo", *form.replace("FILE", str(file)).split(), "--accelerate_config=single_gpu"]) == 0
    first, second = launched
    assert first[1].endswith("multi_gpu.yaml")
    assert first[2:] == ["-m", "fusedalign", "dpo", "--config", str(file), "--beta", "0.2"]
    assert second[1].endswith("single_gpu.yaml")  # flags take precedence


def test_a_user_accelerate_file_is_passed_on(launched, tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text("distributed_type: 'NO'\n")
    assert main(["sft", f"--accelerate_config={file}"]) == 0
    assert launched[0][:2] == ["--config_file", str(file)]


def test_launcher_flags_are_passed_on(launched, tmp_path):
    """Like `trl sft --num_processes 2`, from flags and from the file."""
    assert main(["sft", "--num_processes", "2", "--seed", "3", "--main_process_port=29511"]) == 0
    assert main(["sft", "--accelerate_config", "fsdp2", "--num-processes=4"]) == 0
    file = tmp_path / "mine.yaml"
    file.write_text("num_processes: 8\nmulti_gpu: true\nuse_fsdp: false\nseed: 3\n")
    assert main(["sft", "--config", str(file)]) == 0
    first, second, third = launched
    flags = ["--num_processes", "2", "--main_process_port=29511", "--multi_gpu"]
    assert first == [*flags, "-m", "fusedalign", "sft", "--seed", "3"]
    assert second[2:] == ["--num-processes=4", "-m", "fusedalign", "sft", "--accelerate_config", "fsdp2"]
    assert third == ["--num_processes", "8", "--multi_gpu", "-m", "fusedalign", "sft", "--config", str(file)]


@pytest.mark.parametrize(
    ("words", "adds"),
    [
        (["--num_processes", "2"], True),
        (["--num-processes=2", "--use_cpu", "true"], True),
        (["--accelerate_config", "single_gpu", "--num_processes", "2"], True),
        (["--accelerate_config", "single_gpu"], False),  # its file has num_processes: 8
        (["--num_processes", "1"], False),
        (["--num_processes", "2", "--multi_gpu"], False),
        (["--accelerate_config", "multi_gpu", "--num_processes", "2"], False),
        (["--accelerate_config", "fsdp2", "--num_processes", "2"], False),
        (["--num_processes", "2", "--use_fsdp"], False),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else None,
)
def test_several_processes_are_not_dropped(launched, words, adds):
    """Without --multi_gpu accelerate would start one, unless it finds several GPUs."""
    assert main(["dpo", *words]) == 0
    launcher_flags = launched[0][: launched[0].index("-m")]
    assert launcher_flags.count("--multi_gpu") == (adds or "--multi_gpu" in words)


def test_several_processes_by_the_launchers_cpu_flag_are_refused(launched, capsys):
    assert main(["dpo", "--num_processes", "2", "--cpu"]) == 2
    assert "num_processes must be 1 with --cpu, which starts one process, got 2" in capsys.readouterr().err
    assert not launched


def test_a_configuration_for_one_gpu_launches_on_one(launched, monkeypatch):
    from fusedalign.trl import launch

    monkeypatch.setattr(launch.torch.accelerator, "device_count", lambda: 1)
    assert main(["dpo", "--accelerate_config", "single_gpu"]) == 0
    assert launched


def test_flags_known_to_both_stay_training_fields(launched, tmp_path):
    """gradient_accumulation_steps and debug are launcher flags too."""
    assert main(["sft", "--gradient_accumulation_steps", "2", "--accelerate_config", "fsdp2"]) == 0
    assert launched[0][2:5] == ["-m", "fusedalign", "sft"]
    assert launched[0][5:7] == ["--gradient_accumulation_steps", "2"]


def test_arguments_are_checked_before_the_launch(launched, capsys):
    for words, message in (
        (["--accelerate_config", "fsdp2", "--bata", "1"], "unknown --bata"),
        (["--num_processes", "2", "--seed", "x"], "--seed must be an integer, got 'x'"),
        (["--accelerate_config=nowhere"], "accelerate_config must be a file that exists or one of"),
    ):
        assert main(["dpo", *words]) == 2
        assert message in capsys.readouterr().err
    assert not launched


def test_a_launched_process_does_not_launch_again(launched, monkeypatch, capsys):
    """A launched process does not launch again, and reports launcher flags as unknown."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert main(["dpo", "--accelerate_config", "fsdp2", "--dataset_name", "nowhere.jsonl"]) == 2
    assert "nowhere.jsonl" in capsys.readouterr().err
    assert main(["dpo", "--num_processes", "2"]) == 2
    assert "--num_processes must come before `-m fusedalign`" in capsys.readouterr().err
    assert not launched


@pytest.mark.parametrize("words", [["--accelerate_config", "fsdp2"], ["--num_processes", "2"]], ids=" ".join)
def test_under_torchrun_words_for_the_launcher_are_refused(launched, monkeypatch, capsys, words):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert main(["dpo", *words]) == 2
    assert f"{words[0].removeprefix('--')} must be left out under torchrun" in capsys.readouterr().err.replace("--", "")
    assert not launched


@pytest.mark.skipif(torch.accelerator.is_available(), reason="one process for each accelerator")
@pytest.mark.parametrize(("processes", "uses_cpu"), [("1", False), ("2", True)])
def test_processes_without_an_accelerator_are_ranks_on_the_cpu(monkeypatch, tmp_path, processes, uses_cpu):
    """transformers trains in each process alone, unless it is told to use the CPU."""
    from fusedalign.trl import arguments

    parsed = []
    monkeypatch.setenv("WORLD_SIZE", processes)
    monkeypatch.setattr(arguments.Parser, "parse_dict", lambda self, values, **_: parsed.append(values) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        arguments.parse("dpo", ["--output_dir", str(tmp_path)])
    assert parsed[0]["use_cpu"] == uses_cpu


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_mixed_precision_of_the_launcher_is_read(monkeypatch, tmp_path, precision):
    """It takes effect where the arguments have none."""
    from trl import DPOConfig

    from fusedalign.trl.options import mixed_precision

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    args = DPOConfig(str(tmp_path), bf16=False, use_cpu=True)
    assert mixed_precision(args) == {"no": None, "bf16": torch.bfloat16}[precision]


def test_ranks_print_a_shared_error_once_and_an_error_of_their_own_with_the_rank(monkeypatch, capsys):
    server = dist.TCPStore("localhost", 0, is_master=True)
    launch = {"WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "localhost"}
    for name, value in {**launch, "MASTER_PORT": str(server.port)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(reports, "_PATIENCE", timedelta(seconds=1))
    printed = []
    for rank, words in ((0, ["of-both"]), (1, ["of-both"]), (1, ["of-one"])):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert main(words) == 2
        printed.append(capsys.readouterr().err)
    assert printed[0].startswith("fusedalign: error: command must be")
    assert printed[1] == ""
    assert printed[2].startswith("[rank 1] fusedalign: error: command must be")
    del server
    assert main(["of-both"]) == 2  # the launcher has ended
    assert capsys.readouterr().err.startswith("[rank 1] fusedalign: error: ")


@pytest.mark.parametrize(
    ("line", "rank", "command"),
    [
        ("python torchrun --nproc_per_node 2 -m fusedalign dpo --seed 3", "0", "torchrun --nproc_per_node 2 -m"),
        ("python torchrun --nproc_per_node 2 script.py", "0", ""),
        ("bash -c fusedalign dpo --seed 3", None, ""),
    ],
)
def test_the_command_that_resumes_a_run_has_its_launcher(monkeypatch, line, rank, command):
    from fusedalign.trl import launch

    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setattr(launch.psutil.Process, "cmdline", lambda self: line.split())
    expected = ["python", *command.split(), "fusedalign"] if command else ["fusedalign"]
    assert launch.command_line("dpo", ["--seed", "3"]) == ([*expected, "dpo"], ["--seed", "3"])
    monkeypatch.setenv("FUSEDALIGN_WORDS", "--num_processes 2 --run_name 'a b'")  # started by this command itself
    words = ["--num_processes", "2", "--run_name", "a b"]
    assert launch.command_line("dpo", ["--run_name", "a b"]) == (["fusedalign", "dpo"], words)


def test_after_ctrl_c_a_launcher_is_waited_for(monkeypatch):
    """It gets Ctrl-C too, and ends its processes; killed at once it would leave them behind."""
    from fusedalign.trl import launch

    waits = iter([KeyboardInterrupt(), 130])

    class Process:
        def __init__(self, command, env):
            assert env["FUSEDALIGN_WORDS"] == "--seed 3"

        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda *_: None  # noqa: E731

        def wait(self):
            result = next(waits)
            if isinstance(result, KeyboardInterrupt):
                raise result
            return result

    monkeypatch.setattr(launch.subprocess, "Popen", Process)
    with pytest.raises(KeyboardInterrupt):
        launch._run(["accelerate"], {"FUSEDALIGN_WORDS": "--seed 3"})
    assert not list(waits)


ROOT = Path(__file__).parents[1]
PREFERENCES = ROOT / "recipes/data/preferences"
COMMANDS = {
    "torchrun": [*guarded.TORCHRUN, "--nproc_per_node=2", "-m", "fusedalign"],
    "accelerate launch": [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--multi_gpu", "--num_processes=2", "--main_process_port=0", "-m", "fusedalign"),
    ],
    "accelerate_config": [sys.executable, "-m", "fusedalign"],
    "num_processes": [sys.executable, "-m", "fusedalign"],
}
LAUNCHER = {
    "accelerate_config": ["--accelerate_config=multi_gpu", "--num_processes=2", "--main_process_port=0"],
    "num_processes": ["--num_processes=2", "--use_cpu=true", "--main_process_port=0"],
}
TRAIN = [
    "--max_steps=2",
    "--logging_steps=1",
    "--eval_strategy=no",
    "--max_length=64",
    "--per_device_train_batch_size=2",
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "method", "packed"),
    [
        ("torchrun", "dpo", "false"),
        ("accelerate launch", "sft", "false"),
        ("accelerate_config", "orpo", "true"),
        ("num_processes", "kto", "false"),
    ],
)
def test_two_ranks_train_into_one_folder_and_print_once(monkeypatch, tmp_path, launcher, method, packed):
    monkeypatch.chdir(ROOT)  # recipes name their data from there
    recipe = ["--config", f"recipes/{method}.yaml", "--model_name_or_path=embedded", f"--output_dir={tmp_path / 'run'}"]
    words = [method, *recipe, *TRAIN, f"--fused_packed={packed}", *LAUNCHER.get(launcher, [])]
    ended = guarded.run([*COMMANDS[launcher], *words], limit=240)
    assert ended.status == 0, ended.stderr[-4000:]
    for line in ("batches: ", "model: ", "trained "):
        assert sum(text.startswith(line) for text in ended.stdout.splitlines()) == 1, ended.stdout
    steps = [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 2]  # the last one is the summary
    assert (tmp_path / "run/model.safetensors").is_file()
    assert json.loads((tmp_path / "run/run.json").read_text())["machine"]["processes"] == 2
    assert not (tmp_path / "run/run.lock").exists()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [name for name in COMMANDS if name != "num_processes"])
def test_two_ranks_score_into_the_file_of_one_process(monkeypatch, tmp_path, launcher):
    monkeypatch.chdir(ROOT)
    words = ["score", "--model_name_or_path=embedded", f"--dataset_name={PREFERENCES}", "--max_length=64"]
    assert main([*words, f"--out={tmp_path / 'one.parquet'}"]) == 0
    ended = guarded.run(
        [*COMMANDS[launcher], *words, f"--out={tmp_path / 'two.parquet'}", *LAUNCHER.get(launcher, [])], limit=240
    )
    assert ended.status == 0, ended.stderr[-4000:]
    assert ended.stdout.count("accuracy ") == ended.stdout.count("wrote ") - 1 == 1, ended.stdout
    assert (tmp_path / "two.parquet").read_bytes() == (tmp_path / "one.parquet").read_bytes()
    assert not list(tmp_path.glob("*.shards"))
