"""A newcomer's first hour: the built wheel in an environment of its own, an empty folder, and a shell."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import venv
from pathlib import Path

import pytest

pytest.importorskip("hatchling")
pytest.importorskip("hatch_fancy_pypi_readme")
pytest.importorskip("pip")
pytest.importorskip("trl")
pytestmark = pytest.mark.slow  # a dozen commands, each importing torch and TRL

ROOT = Path(__file__).parents[1]
LIMIT = 240  # seconds of one command, on a busy machine
ROWS = 16


class Shell:
    """Runs command lines in one folder, as a user types them."""

    def __init__(self, environment: Path, folder: Path) -> None:
        self.folder = folder
        path = os.pathsep.join([str(environment / "bin"), os.environ["PATH"]])
        self.variables = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        self.variables |= {"PATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def start(self, line: str) -> subprocess.Popen:
        """Start a command line in a process group of its own, as an interactive shell does."""
        return subprocess.Popen(
            ["bash", "-c", line],
            cwd=self.folder, env=self.variables, start_new_session=True, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def run(self, line: str) -> str:
        """The output of a command line, which must end with 0, without a traceback or a warning."""
        with self.start(line) as process, ended(process):
            out, err = process.communicate(timeout=LIMIT)
        assert process.returncode == 0, f"{line}\n{out}\n{err}"
        assert "Traceback" not in out + err
        assert "Warning" not in err, f"{line}\n{err}"
        return out

    def interrupt(self, line: str, when: str) -> str:
        """The errors of a command line that gets Ctrl-C once it has printed a line that matches `when`."""
        with self.start(line) as process, ended(process):
            watchdog = threading.Timer(LIMIT, kill, [process])
            watchdog.start()
            assert any(re.search(when, text) for text in process.stdout), process.stderr.read()
            os.killpg(process.pid, signal.SIGINT)
            err = process.communicate(timeout=LIMIT)[1]
            watchdog.cancel()
        assert process.returncode == 130, err
        assert "Traceback" not in err
        return err


def kill(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


@contextlib.contextmanager
def ended(process: subprocess.Popen):
    """Kill the process group on an exception."""
    try:
        yield
    except BaseException:
        kill(process)
        raise


@pytest.fixture(scope="module")
def shell(tmp_path_factory):
    folder = tmp_path_factory.mktemp("newcomer")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder / "dist"],
        cwd=ROOT, check=True, timeout=60, capture_output=True,
    )  # fmt: skip
    (wheel,) = (folder / "dist").glob("*.whl")
    environment = folder / "env"
    venv.create(environment, with_pip=False)
    (site,) = environment.glob("lib/python*/site-packages")
    pip = [sys.executable, "-m", "pip", "--python", environment / "bin" / "python"]
    command = [*pip, "install", "--quiet", "--no-index", "--no-deps", wheel]
    subprocess.run(command, check=True, timeout=120, capture_output=True)
    # Torch and the other dependencies are those of these tests.
    (site / "packages.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    home = folder / "home"
    home.mkdir()
    return Shell(environment, home)


def suggested(out: str, purpose: str) -> str:
    """The command after `purpose` in the last lines of a training."""
    (line,) = re.findall(rf"^{purpose}.*?: (.*)$", out, flags=re.MULTILINE)
    return line


def record(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


def check_run(folder: Path, out: str, steps: int, method: str) -> None:
    """Check that a run's closing line names files, that they exist, and what they say."""
    (line,) = re.findall(r"^model: .*$", out, flags=re.MULTILINE)
    named = dict(re.findall(r"(\w+): (\S+)", line))
    assert set(named) == {"model", "metrics", "plot", "record", "card"}
    for path in named.values():
        assert (folder.parents[1] / path).exists(), path
    assert folder.parents[1] / named["model"] == folder
    assert (folder / "model.safetensors").stat().st_size > 2**20
    assert method.upper() in (folder / "README.md").read_text()
    facts = record(folder)
    assert facts["state"] == "finished"
    assert f"fusedalign {method} " in facts["command"]
    assert last_step(folder) == steps


def last_step(folder: Path) -> int:
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["step"]


def test_a_newcomers_first_hour(shell):
    home = shell.folder
    pairs = [
        {
            "prompt": [{"role": "user", "content": f"What is {i} and {i}?"}],
            "chosen": [{"role": "assistant", "content": f"It is {i + i}."}],
            "rejected": [{"role": "assistant", "content": "Find out yourself."}],
        }
        for i in range(ROWS)
    ]

    # What there is, and what would happen.
    assert Path(shell.run("python -c 'import fusedalign; print(fusedalign.__file__)'").strip()).is_relative_to(
        home.parent / "env"
    )
    names = [line.split()[0] for line in shell.run("fusedalign recipes").splitlines() if line[0] != " "]
    assert {"sft", "dpo", "kto", "orpo"} <= set(names)
    shell.run("fusedalign recipes sft > mine.yaml")
    checked = shell.run("fusedalign check sft --config mine.yaml")
    assert "memory of a step" in checked
    assert "what was decided" in checked
    assert [path.name for path in home.iterdir()] == ["mine.yaml"]

    # SFT on the embedded data, then on the user's own pairs: their chosen answers.
    out = shell.run("fusedalign sft --config mine.yaml --max_steps 2")
    check_run(home / "runs" / "sft", out, 2, "sft")
    assert "--dataset_name recipes/data/preferences " in suggested(out, "train on preferences")
    (home / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    out = shell.run("fusedalign sft --config mine.yaml --dataset_name pairs.jsonl --max_steps 2 --output_dir runs/own")
    check_run(home / "runs" / "own", out, 2, "sft")

    # The commands that the last lines suggest.
    assert shell.run(suggested(out, "try")).strip()
    shell.run(suggested(out, "score"))
    assert (home / "runs" / "own" / "scores.parquet").is_file()
    out = shell.run(suggested(out, "train on preferences"))
    check_run(home / "runs" / "own-dpo", out, 3 * ROWS // 8, "dpo")
    assert "rewards/margins" in (home / "runs" / "own-dpo" / "metrics.jsonl").read_text()
    scored = shell.run(suggested(out, "score"))
    assert re.search(rf"^scored +{ROWS}$", scored, flags=re.MULTILINE)


def test_ctrl_c_prints_what_resumes_the_run(shell):
    folder = shell.folder / "runs" / "long"
    words = "--config dpo --output_dir runs/long --max_steps 12 --eval_strategy no"
    saved = "--logging_steps 1 --save_strategy steps --save_steps 2"
    err = shell.interrupt(f"fusedalign dpo {words} {saved}", r"^ +4/12 ")
    assert record(folder)["state"] == "interrupted"
    assert last_step(folder) < 12
    out = shell.run(suggested(err, "go on"))
    check_run(folder, out, 12, "dpo")
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert sorted({*steps}) == list(range(1, 13))
    assert [run["state"] for run in record(folder)["previous"]] == ["interrupted"]
