"""Relaunching commands through `accelerate launch`, with which arguments."""

import pytest

from fusedalign.cli import main

pytest.importorskip("trl")
METHODS = ["sft", "dpo", "kto", "cpo", "simpo", "orpo"]


@pytest.fixture
def launched(monkeypatch):
    """The arguments of each launch; nothing is started."""
    from fusedalign.trl import launch

    calls = []

    class Process:
        returncode = 0

    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    monkeypatch.setattr(launch.subprocess, "run", lambda command: calls.append(command[3:]) or Process())
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
    assert first == ["--num_processes", "2", "--main_process_port=29511", "-m", "fusedalign", "sft", "--seed", "3"]
    assert second[2:] == ["--num-processes=4", "-m", "fusedalign", "sft", "--accelerate_config", "fsdp2"]
    assert third == ["--num_processes", "8", "--multi_gpu", "-m", "fusedalign", "sft", "--config", str(file)]


def test_flags_known_to_both_stay_training_fields(launched, tmp_path):
    """gradient_accumulation_steps and debug are launcher flags too."""
    assert main(["sft", "--gradient_accumulation_steps", "2", "--accelerate_config", "fsdp2"]) == 0
    assert launched[0][2:5] == ["-m", "fusedalign", "sft"]
    assert launched[0][5:7] == ["--gradient_accumulation_steps", "2"]


def test_arguments_are_checked_before_the_launch(launched, capsys):
    for words, message in (
        (["--accelerate_config", "fsdp2", "--bata", "1"], "unknown --bata"),
        (["--num_processes", "2", "--seed", "x"], "invalid int value"),
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
