"""`fusedalign bench trl`: its data, what a row measures, the processes, the table and the files."""

import dataclasses
import json
import math
import random
import re
import runpy
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl")

from fusedalign.bench.training import command, plot, processes, worker
from fusedalign.bench.training.data import examples
from fusedalign.bench.training.settings import (
    ALL_MIXES,
    EQUAL,
    MAX_LENGTH,
    MIXES,
    SIDES,
    SIZES,
    TRAININGS,
    Job,
    LogNormal,
    Measured,
)
from fusedalign.bench.training.table import COLUMNS, Result, describe_mix, difference, header, line
from fusedalign.bench.training.worker import build, measure
from fusedalign.cli import main


def words(text):
    return len(text.split())


# Data


@pytest.mark.parametrize("lengths", [LogNormal(150, 1.0, 1024), LogNormal(1400, 0.6, 3000), LogNormal(240, 0.8, 1024)])
def test_lengths_are_log_normal_and_capped(lengths):
    generator = random.Random(1)
    drawn = sorted(lengths.draw(generator) for _ in range(20_000))
    assert statistics.median(drawn) == pytest.approx(lengths.median, rel=0.05)
    below = drawn[int(0.1587 * len(drawn))]  # one sigma
    assert math.log(lengths.median / below) == pytest.approx(lengths.sigma, rel=0.06)
    above_cap = 0.5 * math.erfc(math.log(lengths.cap / lengths.median) / lengths.sigma / math.sqrt(2))
    assert drawn[-1] == lengths.cap
    assert drawn.count(lengths.cap) / len(drawn) == pytest.approx(above_cap, rel=0.2)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("training", ["sft", "dpo", "kto"])
def test_lengths_differ_between_steps_and_agree_between_processes(mix, training):
    job = Job(training, "0.6b", mix, "trl", steps=4)
    rows, tokens = examples(job)
    assert (rows, tokens) == examples(dataclasses.replace(job, side="packed-liger"))
    assert len(rows) == len(tokens) * job.batch == 6 * (8 if training == "dpo" else 16)
    assert len(set(tokens)) == len(tokens)
    steps = [rows[i : i + job.batch] for i in range(0, len(rows), job.batch)]
    answers = ("chosen", "rejected") if training == "dpo" else ("completion",)
    longest = {max(words(row["prompt"]) + words(row[x]) for row in step for x in answers) for step in steps}
    assert len(longest) == len(steps)
    assert tokens == [sum(words(row["prompt"]) + words(row[x]) + 1 for row in step for x in answers) for step in steps]
    if training == "kto":
        assert [row["label"] for row in rows] == [True, False] * (len(rows) // 2)


def test_no_row_of_any_mix_is_truncated():
    for mix in ALL_MIXES.values():
        assert mix.prompt.cap + max(mix.chosen.cap, mix.rejected.cap) + 1 <= MAX_LENGTH


@pytest.mark.parametrize("training", ["sft", "orpo"])
def test_equal_mix_is_8_rows_of_2048_tokens(training):
    rows, tokens = examples(Job(training, "0.6b", EQUAL, "trl", steps=1))
    assert set(tokens) == {8 * 2048}
    assert {words(row["prompt"]) for row in rows} == {1024}


@pytest.mark.parametrize(
    ("training", "columns"),
    [
        ("dpo", ["prompt_ids", "chosen_ids", "prompt_ids", "rejected_ids"]),
        ("simpo", ["chosen_input_ids", "rejected_input_ids"]),
        ("kto", ["prompt_ids", "completion_ids"]),
    ],
)
def test_tokens_are_counted_as_the_trainer_sees_them(training, columns, tmp_path):
    job = Job(training, "tiny", "chat", "trl", steps=1)
    with worker.quiet():
        trainer, tokens = build(job, str(tmp_path))
    data = trainer.train_dataset
    assert sum(len(ids) for column in columns for ids in data[column]) == sum(tokens)
    assert 1 not in {token for column in columns for ids in data[column] for token in ids}  # <unk>


# One training


def test_a_row_has_the_times_tokens_slots_and_losses_of_its_steps(monkeypatch, tmp_path):
    """Measured by the program that each new process runs."""
    job, path = Job("sft", "tiny", "chat", "trl", steps=2), tmp_path / "measured.json"
    monkeypatch.setattr(sys, "argv", ["program", json.dumps(dataclasses.asdict(job)), str(path)])
    runpy.run_module(processes.PROGRAM, run_name="__main__")
    measured = processes.measured(json.loads(path.read_text()))
    rows, tokens = examples(job)
    assert measured.reason == ""
    assert len(measured.ms) == 3
    assert min(measured.ms) > 0
    assert measured.tokens == tuple(tokens[:3])
    steps = [rows[i : i + job.batch] for i in range(0, 3 * job.batch, job.batch)]
    longest = [max(words(row["prompt"]) + words(row["completion"]) + 1 for row in step) for step in steps]
    assert measured.slots == tuple(job.batch * length for length in longest)  # in this order: rows are not shuffled
    assert len(measured.losses) == 4
    assert (measured.gpu_ms, measured.peak_bytes, measured.precompute_seconds) == (None, None, None)


@pytest.mark.parametrize("training", ["kto", pytest.param("dpo", marks=pytest.mark.slow)])
def test_a_precomputed_reference_is_timed_before_the_first_step(monkeypatch, training):
    """With TRL's own class, without Liger kernels (which need a GPU)."""
    monkeypatch.setitem(SIDES, "stored", dataclasses.replace(SIDES["trl"], precomputed=True))
    live, stored = (measure(Job(training, "tiny", "chat", side, steps=1)) for side in ("trl", "stored"))
    assert (live.reason, stored.reason) == ("", "")
    assert live.precompute_seconds is None
    assert stored.precompute_seconds > 0
    assert stored.tokens == live.tokens
    assert [2 * slots for slots in stored.slots] == list(live.slots)  # of the reference
    assert difference(live.losses, stored.losses) < 1e-5


@pytest.mark.parametrize("training", ["sft", "dpo-lora", pytest.param("kto", marks=pytest.mark.slow)])
def test_all_rows_log_the_same_losses(training):
    rows = [measure(Job(training, "tiny", "chat", side, steps=1)) for side in ("trl", "padded", "packed")]
    assert [row.reason for row in rows] == [""] * 3
    for row in rows[1:]:
        assert difference(rows[0].losses, row.losses) < 1e-5
        assert row.tokens == rows[0].tokens
    assert rows[2].slots < rows[1].slots == rows[0].slots


def test_medians_and_rates_exclude_the_first_step():
    measured = Measured(ms=(9000.0, 100.0, 400.0, 100.0), tokens=(7, 30, 60, 30), slots=(9, 40, 80, 30))
    assert (measured.first_ms, measured.median_ms, measured.slowest_ms) == (9000.0, 100.0, 400.0)
    assert measured.tokens_per_second == pytest.approx(120 / 0.6)
    assert measured.slots_per_step == 50


def test_a_trainer_exception_becomes_the_reason(monkeypatch):
    def broken(*_):
        raise RuntimeError("a | kernel\nbroke")

    monkeypatch.setattr(worker, "build", broken)
    assert measure(Job("sft", "tiny", "chat", "trl")) == Measured(reason="RuntimeError: a | kernel broke")


# Processes


@pytest.mark.slow
def test_a_row_is_measured_in_another_process():
    measured = processes.measure_alone(Job("sft", "tiny", "chat", "trl", steps=1))
    assert measured.reason == ""
    assert len(measured.ms) == 2
    assert isinstance(measured.losses, tuple)


def test_each_process_has_empty_caches_of_its_own(monkeypatch):
    environments = []

    def run(words, env, **_):
        folders = [env["TRITON_CACHE_DIR"], env["TORCHINDUCTOR_CACHE_DIR"]]
        assert not any(Path(folder).exists() for folder in folders)
        environments.extend(folders)
        job = Job(**json.loads(words[-2]))
        Path(words[-1]).write_text(json.dumps(dataclasses.asdict(Measured(losses=(job.steps, math.nan)))))
        return subprocess.CompletedProcess(words, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    for steps in (3, 4):
        losses = processes.measure_alone(Job("sft", "tiny", "chat", "trl", steps=steps)).losses
        assert losses[0] == steps
        assert math.isnan(losses[1])
    assert len(set(environments)) == 4
    assert not any(Path(folder).parent.exists() for folder in environments)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'a line' >&2; echo 'Error: broken' >&2; exit 3", "the process ended with status 3: Error: broken"),
        ("kill -9 $$", "the process was ended by signal 9 (Killed)"),
        ("exit 0", "the process ended with status 0: no output"),
    ],
)
def test_a_dead_process_reports_its_reason(monkeypatch, tmp_path, script, reason):
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    assert processes.measure_alone(Job("sft", "tiny", "chat", "trl")) == Measured(reason=reason)


# Command

GIB = 2**30
FIGURES = {
    "trl": Measured((900.0, 400.0, 500.0, 400.0), (9, 80, 80, 80), (9, 8, 8, 8), (2.0, 1.0), 300.0, 8 * GIB, 4 * GIB),
    "padded": Measured((9.0, 300.0, 310.0, 300.0), (9, 80, 80, 80), (9, 8, 8, 8), (2.0, 1.1), 250.0, 7 * GIB, 3 * GIB),
    "packed": Measured((950.0, 200.0, 200.0, 200.0), (9, 80, 80, 80), (9, 4, 4, 4), (2.0, 1.0), 90.0, 6 * GIB, 2 * GIB),
}


@pytest.fixture
def figures(monkeypatch):
    """Replace measurements by fixed figures per side; "jobs" records the jobs in order."""
    jobs: list[Job] = []
    figures_by_side = dict(FIGURES)

    def measure_alone(job):
        jobs.append(job)
        result = figures_by_side[job.side]
        if isinstance(result, BaseException):
            raise result
        return result

    monkeypatch.setattr(processes, "measure_alone", measure_alone)
    figures_by_side["jobs"] = jobs
    return figures_by_side


def tables(text):
    """{title: {row: cells}}."""
    tables_by_title: dict = {}
    for printed in text.splitlines():
        if printed.startswith("## "):
            rows = tables_by_title[printed.removeprefix("## ")] = {}
        elif printed.startswith("| "):
            name, *cells = (cell.strip() for cell in printed.strip("|").split("|"))
            rows[name] = cells
    return tables_by_title


def run_command(*words):
    return main(["bench", "trl", *words])


def test_a_table_for_each_training_and_mix_with_ratios_and_losses(figures, capsys):
    assert run_command("sft", "dpo", "--rows", "packed,trl,padded", "--wide") == 0
    printed = capsys.readouterr()
    printed_tables = tables(printed.out)
    assert list(printed_tables) == [
        "SFT: tiny Qwen3, chat",
        "SFT: tiny Qwen3, long",
        "DPO, all weights: tiny Qwen3, chat",
        "DPO, all weights: tiny Qwen3, long",
    ]
    assert [job.side for job in figures["jobs"]] == ["trl", "padded", "packed"] * 4
    for rows in printed_tables.values():
        assert rows.pop("") == list(COLUMNS)
        assert list(rows) == ["TRL", "padded", "packed"]
        assert rows["TRL"] == ["900", "400", "500", "300", "184.6", "8", "8", "4", "1.00", "-", "-"]
        assert rows["padded"] == ["9", "300", "310", "250", "263.7", "8", "7", "3", "1.33", "-", "1e-01"]
        assert rows["packed"] == ["950", "200", "200", "90", "400", "4", "6", "2", "2.00", "-", "0e+00"]
    assert describe_mix("chat") in printed.out
    assert "chat: prompt 150 / 1 / 1024, chosen 280 / 0.8 / 1024, rejected 240 / 0.8 / 1024 (" in printed.out
    assert max(map(len, printed.out.splitlines()[3:])) <= 120


def test_rows_are_compared_with_both_of_stock_trl(figures):
    results = [Result(Job("dpo", "1.7b", "long", side), FIGURES["trl"]) for side in ("trl", "trl-liger")]
    results[1] = results[1]._replace(measured=FIGURES["padded"])
    last = Result(Job("dpo", "1.7b", "long", "precomputed"), FIGURES["packed"])
    cells = [cell.strip() for cell in line(last, results).strip("|").split("|")]
    assert cells[-3:] == ["2.00", "1.50", "0e+00"]
    assert line(results[1], results[:1]).split("|")[-3].strip() == "1.00"


def test_failed_and_out_of_memory_rows_do_not_stop_the_others(figures, capsys):
    figures |= {"padded": Measured(reason="RuntimeError: a | kernel broke"), "trl": Measured(reason="out of memory")}
    assert run_command("orpo", "--rows", "trl,padded,packed", "--mixes", "long", "--wide") == 2
    printed = capsys.readouterr()
    (rows,) = tables(printed.out).values()
    assert rows["TRL"] == ["-"] * 10 + ["out of memory"]
    assert rows["padded"] == ["-"] * 10 + ["failed"]
    assert rows["packed"][:2] == ["950", "200"]
    assert rows["packed"][-3:] == ["-", "-", "-"]
    assert "* padded: RuntimeError: a | kernel broke" in printed.out.splitlines()
    errors = [text for text in printed.err.splitlines() if text.startswith("fusedalign: error: ")]
    assert len(errors) == 1
    expected = "bench trl: ORPO: tiny Qwen3, long, padded failed: RuntimeError: a | kernel broke"
    assert errors[0].startswith(f"fusedalign: error: {expected}")
    assert "out of memory" not in errors[0]


def test_running_out_of_memory_is_a_result_and_exits_0(figures, capsys):
    figures["trl"] = Measured(reason="out of memory")
    assert run_command("kto", "--rows", "trl", "--mixes", "chat") == 0
    assert "| out of memory |" in capsys.readouterr().out


def test_ctrl_c_keeps_the_measured_rows(figures, capsys, tmp_path):
    figures["packed"] = KeyboardInterrupt()
    assert run_command("sft", "--rows", "trl,padded,packed", "--out", str(tmp_path)) == 130
    (rows,) = tables(capsys.readouterr().out).values()
    assert list(rows) == ["", "TRL", "padded"]
    assert [row["side"] for row in json.loads((tmp_path / "trl.json").read_text())["rows"]] == ["trl", "padded"]


def test_a_note_reports_the_time_of_the_reference(figures, capsys, monkeypatch):
    monkeypatch.setattr(command, "_sides", lambda *_, **__: ["trl", "precomputed"])
    figures["precomputed"] = dataclasses.replace(FIGURES["packed"], precompute_seconds=12.34)
    assert run_command("dpo", "--mixes", "chat") == 0
    out = capsys.readouterr().out
    assert "* precomputed: the reference took 12.3 s for the 112 rows of all steps, before the first one" in out
    figures["jobs"].clear()
    assert run_command("sft", "--mixes", "chat") == 0
    assert [job.side for job in figures["jobs"]] == ["trl"]  # no reference model


def test_out_holds_the_printed_tables_all_figures_and_bars(figures, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    figures["padded"] = Measured(reason="out of memory")
    words = ["sft", "kto", "--rows", "trl,padded,packed", "--sizes", "tiny,0.6b", "--out", str(tmp_path)]
    assert run_command(*words, "--steps", "3", "--wide") == 0
    printed = capsys.readouterr()
    assert (tmp_path / "trl.md").read_text() == printed.out
    report = json.loads((tmp_path / "trl.json").read_text())
    assert len(report["rows"]) == 2 * 2 * 2 * 3
    assert report["rows"][0]["ms"] == list(FIGURES["trl"].ms)
    assert report["rows"][1]["reason"] == "out of memory"
    assert report["mixes"]["long"]["prompt"] == {"median": 1400, "sigma": 0.6, "cap": 3000}
    assert (tmp_path / "trl.png").read_bytes().startswith(b"\x89PNG")
    assert "warning" not in printed.err


@pytest.mark.parametrize("gpu", [True, False])
def test_bars_show_memory_if_measured_and_a_slot_for_failures(monkeypatch, tmp_path, gpu):
    figure = pytest.importorskip("matplotlib.figure")
    seen = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, path, **_: seen.append(self))
    measured = Measured(ms=FIGURES["packed"].ms, pass_bytes=2 * GIB if gpu else None)
    jobs = [Job(name, "1.7b", mix, "packed") for mix in ("chat", "long") for name in ("sft", "kto")]
    results = [Result(job, measured) for job in jobs[:3]] + [Result(jobs[3], Measured(reason="out of memory"))]
    plot.draw(results, tmp_path / "trl.png")
    panels = seen[0].axes
    assert [panel.get_ylabel() for panel in panels[::2]] == ["ms a step", "GiB of the passes"][: 1 + gpu]
    heights = [[bar.get_height() for bar in panel.patches] for panel in panels]
    assert heights == [[200.0, 200.0], [200.0], [2.0, 2.0], [2.0]][: 2 + 2 * gpu]
    assert [[label.get_text() for label in panel.get_xticklabels()] for panel in panels[:2]] == [["SFT", "KTO"]] * 2


def test_default_is_dpo_on_both_mixes_with_all_rows_that_can_run(figures, capsys):
    assert run_command() == 0
    assert {(job.training, job.size, job.mix) for job in figures["jobs"]} == {
        ("dpo", "tiny", "chat"),
        ("dpo", "tiny", "long"),
    }
    err = capsys.readouterr().err
    assert "the rows trl-liger, packed-liger, precomputed are left out: they need a GPU" in err


def test_equal_replaces_the_mixes(figures, capsys):
    assert run_command("sft", "--equal", "--rows", "trl") == 0
    assert list(tables(capsys.readouterr().out)) == ["SFT: tiny Qwen3, equal"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ppo"], "a training must be one of sft, sft-lora, dpo, dpo-lora, orpo, simpo, kto, got 'ppo'"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--batch", "3"], "--batch must be an even number of rows, at least 2, got 3"),
        (["--impl", "cuda"], "impl must be one of auto, triton, liger, cce, pytorch"),
        (["--sizes", "0.6b,7b"], "--sizes must be one of 0.6b, 1.7b, tiny, got '7b'"),
        (["--mixes", "code"], "--mixes must be one of chat, long, got 'code'"),
        (["--mixes", "chat", "--equal"], "--equal takes the place of --mixes, got both"),
        (["--rows", "trl,unsloth"], "--rows must be one of trl, trl-liger, padded, packed, packed-liger, precomputed"),
        (["--rows", "packed-liger"], "the rows packed-liger need a GPU"),
        (["--fast"], "expected flags of fusedalign bench trl, got the unknown --fast"),
        (["--rows", "trl", "--out", "/proc/nothing"], "--out must be a folder that can be written to"),
    ],
)
def test_bad_arguments_are_refused(figures, capsys, words, message):
    assert run_command(*words) == 2
    err = capsys.readouterr().err.strip()
    assert message in err
    assert len(err.splitlines()) == 1
    assert figures["jobs"] == []


def test_batch_sets_the_rows_per_step(figures, capsys):
    assert run_command("sft", "dpo", "--rows", "trl", "--mixes", "chat", "--batch", "4") == 0
    assert "4 rows a step (SFT, KTO), or 2 pairs" in " ".join(capsys.readouterr().out.split())
    assert [len(examples(job)[0]) // job.all_steps for job in figures["jobs"]] == [4, 2]


def test_rows_unknown_to_the_training_are_refused(figures, capsys, monkeypatch):
    monkeypatch.setattr(command, "_sides", lambda *_, **__: ["precomputed"])
    assert run_command("sft", "orpo", "--rows", "precomputed") == 2
    assert "--rows must name a row that sft, orpo has, got precomputed" in capsys.readouterr().err


def test_help_and_header_explain_rows_columns_and_mixes(capsys):
    assert run_command("--help") == 0
    out = capsys.readouterr().out
    for word in (*TRAININGS, *SIZES, *MIXES, *SIDES, *COLUMNS, "--equal", "--out", "--steps"):
        assert re.search(rf"(?m)(^|\W){re.escape(word)}(\W|$)", out), word
    assert max(map(len, out.splitlines())) <= 100
    text = header([Job("dpo", "tiny", mix, side) for mix in ALL_MIXES for side in SIDES])
    for word in (*ALL_MIXES, *(side.title for side in SIDES.values()), *COLUMNS):
        assert f"\n* {word}: " in text


def test_a_loss_of_nan_is_the_largest_difference():
    assert difference((1.0, 2.0, 4.0), (1.0, 2.5, 4.0)) == 0.25
    assert math.isnan(difference((1.0, 2.0, 3.0), (1.0, float("nan"), 9.0)))
