"""`fusedalign bench`: data, exact results, rows with their claims, and the command."""

import dataclasses
import json
import sys

import pytest
import torch

from fusedalign import impls
from fusedalign.bench import peers
from fusedalign.bench.cases import CASES, Case, parse_cases
from fusedalign.bench.data import TARGET, make_data, statistics
from fusedalign.bench.exact import BUDGETS, reference, relative_error
from fusedalign.bench.measure import covered, median_ms, peak_bytes
from fusedalign.bench.microbatches import ROWS
from fusedalign.bench.runner import Settings, run
from fusedalign.bench.stage import Figures, Stage, report
from fusedalign.bench.table import header, markdown, section
from fusedalign.bench.tasks import TASKS
from fusedalign.cli import main

SMALL = Case("small", 32, 24, 300)


def report_of(impls, *, tasks=tuple(TASKS), case=SMALL, dtype=torch.float32):
    """The report of a run on the CPU, and its rows by task and impl."""
    settings = Settings([TASKS[t] for t in tasks], [case], peers.choose(impls), "trained", 0, dtype, "cpu")
    *earlier, report = run(settings)
    assert [len(r.cases[0].tables) for r in earlier] == list(range(1, len(tasks)))
    return report, {(t.task, row.impl): row for t in report.cases[0].tables for row in t.rows}


# The data


def test_trained_data_resemble_a_trained_model():
    case = Case("a real vocabulary, a narrow head", 128, 128, 151936)
    s = statistics(make_data("trained", case, dtype=torch.bfloat16, device="cpu", seed=1))
    assert s.entropy == pytest.approx(TARGET.entropy, abs=0.1)
    assert 60 <= s.likely <= 101
    assert s.tail == pytest.approx(TARGET.tail, abs=0.02)
    assert s.tiles_12 == pytest.approx(TARGET.tiles_12, abs=0.1)
    assert s.tiles_14 == pytest.approx(TARGET.tiles_14, abs=0.1)
    assert s.tiles_16 == pytest.approx(TARGET.tiles_16, abs=0.05)


def test_targets_of_trained_data_are_sampled_from_the_model():
    """The mean negative log-probability equals the mean entropy, up to sampling noise."""
    case = Case("many tokens", 4096, 64, 1000, softcap=20.0)
    data = make_data("trained", case, dtype=torch.float32, device="cpu", seed=0)
    nll = reference(TASKS["sft"], data, seed=0).loss
    assert nll == pytest.approx(statistics(data).entropy, abs=0.15)


@pytest.mark.parametrize("kind", ["trained", "random"])
def test_data_depend_on_the_seed_only(kind):
    first, repeated, other = (make_data(kind, SMALL, dtype=torch.bfloat16, device="cpu", seed=s) for s in (3, 3, 4))
    assert first.hidden.shape == (32, 24)
    assert first.weight.shape == (300, 24)
    assert first.targets.shape == (32,)
    for name in ("hidden", "weight", "targets"):
        assert torch.equal(getattr(first, name), getattr(repeated, name))
        assert not torch.equal(getattr(first, name), getattr(other, name))


def test_statistics_equal_hand_computed_values():
    """One-hot hidden states pick rows of log-probabilities as their logits."""
    p = torch.full((4, 512), 2.0**-20)
    p[:, 0] = 0.75 - 510 * 2.0**-20  # column 0 is likely for every token
    p[:, 1] = 0.25
    data = make_data("random", Case("", 4, 4, 512), dtype=torch.float32, device="cpu", seed=0)
    s = statistics(data._replace(hidden=torch.eye(4), weight=p.log().T.contiguous()))
    assert s.entropy == pytest.approx(-(p[0] * p[0].log()).sum().item(), abs=1e-5)
    assert s.likely == 2
    assert s.tail == pytest.approx(510 * 2.0**-20, rel=1e-3)
    assert (s.tiles_12, s.tiles_14, s.tiles_16) == (0.5, 0.5, 0.5)  # the first 256 columns, not the second


def test_statistics_are_means_over_tokens():
    """Also if the last chunk is shorter than the others."""
    data = make_data("random", Case("", 130, 16, 512), dtype=torch.float32, device="cpu", seed=0)
    logps = (data.hidden.double() @ data.weight.double().T).log_softmax(-1)
    assert statistics(data).entropy == pytest.approx(-(logps.exp() * logps).sum(-1).mean().item(), rel=1e-5)


def test_custom_cases_are_parsed():
    names = parse_cases(["tiny,llama3-8b", "N=64,D=8,V=100,softcap=5"])
    assert names == [CASES["tiny"], CASES["llama3-8b"], Case("N=64,D=8,V=100,softcap=5", 64, 8, 100, 5.0)]
    assert names[2].flops == 2 * 64 * 8 * 100


# The exact answer


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_the_reference_equals_autograd(task, softcap):
    data = make_data("trained", dataclasses.replace(SMALL, softcap=softcap), dtype=torch.float32, device="cpu", seed=0)
    exact = reference(TASKS[task], data, seed=0)
    hidden, weight = (x.double().requires_grad_() for x in (data.hidden, data.weight))
    logits = hidden @ weight.T
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    loss = exact.loss_of(logits.log_softmax(-1).gather(-1, data.targets[:, None]).squeeze(-1))
    loss.backward()
    assert exact.loss == pytest.approx(loss.item(), rel=1e-12)
    assert relative_error(exact.hidden_grad, hidden.grad) < 1e-12
    if TASKS[task].trains_head:
        assert relative_error(exact.weight_grad, weight.grad) < 1e-12
    else:
        assert exact.weight_grad is None


def test_relative_error_equals_hand_computed_values():
    exact = torch.randn(20000, 3)  # more rows than one chunk
    assert relative_error(1.25 * exact, exact) == pytest.approx(0.25, rel=1e-4)
    assert relative_error(exact.bfloat16(), exact) < 2**-8


# Measurements


def test_peak_counts_simultaneous_allocations():
    """Two tensors allocated in turn count once, two at the same time count twice."""

    def in_turn():
        torch.ones(2**18)
        torch.ones(2**18)

    def at_the_same_time():
        return torch.ones(2**18), torch.ones(2**18)

    assert peak_bytes(in_turn, "cpu") == 2**20
    assert peak_bytes(at_the_same_time, "cpu") == 2**21


def test_the_median_is_of_at_least_5_runs_after_2_warmups():
    calls = []
    assert median_ms(lambda: calls.append(0), "cpu") > 0
    assert len(calls) == 2 + 20


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_l2_is_flushed_before_each_measured_call_and_not_counted_as_its_memory():
    calls = []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        median_ms(lambda: calls.append(0), "cuda")
    flushes = [event for event in profiler.events() if event.name == "aten::zero_"]
    assert len(flushes) == len(calls) - 2 > 0
    allocated = torch.cuda.memory_allocated()
    assert peak_bytes(lambda: torch.ones(2**18, device="cuda"), "cuda") == 2**20
    assert torch.cuda.memory_allocated() == allocated


# Rows


def test_the_pytorch_impl_is_exact_in_every_task():
    _, rows = report_of("pytorch,eager")
    assert set(rows) == {(task, impl) for task in TASKS for impl in ("pytorch", "eager")}
    for (task, impl), row in rows.items():
        assert row.reason is None, row.reason
        assert row.over_budget == ()
        assert row.speedup == pytest.approx(rows[task, "eager"].total_ms / row.total_ms)
        assert set(row.errors) == ({"loss", "dH"} if task == "frozen" else {"loss", "dH", "dW"})
        assert row.ours == (impl == "pytorch")
        assert row.total_u / row.total_ms == pytest.approx(row.forward_u / row.forward_ms)
        gradients = 4 * SMALL.hidden_size * (SMALL.tokens + (0 if task == "frozen" else SMALL.vocab))
        assert row.total_mib - row.over_gradients_mib == pytest.approx(gradients / 2**20)
    logits = 4 * SMALL.tokens * SMALL.vocab / 2**20
    assert rows["logps", "eager"].forward_mib >= logits > rows["logps", "pytorch"].forward_mib


def test_bf16_logits_exceed_the_budget_and_our_impls_do_not():
    report, rows = report_of("pytorch,eager", tasks=["logps"], dtype=torch.bfloat16, case=Case("", 64, 64, 2048))
    assert rows["logps", "pytorch"].over_budget == ()
    assert rows["logps", "pytorch"].speedup > 0
    assert set(rows["logps", "eager"].over_budget) == {"loss", "dH", "dW"}
    assert rows["logps", "eager"].speedup is None
    assert "baseline; error: loss, dH, dW" in markdown(report)


class Scaled(torch.autograd.Function):
    """The identity with a gradient scaled by a wrong factor."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return ctx.factor * grad, None


def wrong_eager(factor):
    """Eager code with a wrong gradient of the hidden states; raises without a factor."""

    def logps(d):
        if factor is None:
            raise RuntimeError("a | kernel\nbroke")
        return peers._eager().logps(d._replace(hidden=Scaled.apply(d.hidden, factor)))

    return peers.Implementation("wrong", lambda: peers.Functions(logps))


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_a_wrong_gradient_gets_no_speedup(monkeypatch, factor):
    monkeypatch.setattr(peers, "PEERS", (*peers.PEERS, wrong_eager(factor)))
    report, rows = report_of("eager,wrong", tasks=["logps"])
    row = rows["logps", "wrong"]
    assert row.reason is None, row.reason
    assert row.over_budget == ("dH",)
    assert row.speedup is None
    assert row.total_ms > 0
    assert row.errors["dW"] < BUDGETS[torch.float32]["dW"]
    if factor == 1.01:
        assert row.errors["dH"] == pytest.approx(0.01, rel=1e-3)
    (line,) = [x for x in markdown(report).splitlines() if x.startswith("| wrong ")]
    assert "| error: dH " in line


def test_a_failed_row_does_not_stop_the_others(monkeypatch):
    monkeypatch.setattr(peers, "PEERS", (wrong_eager(None), *peers.PEERS))
    report, rows = report_of("wrong,eager", tasks=["sft"])
    assert rows["sft", "wrong"].reason == "RuntimeError: a | kernel broke"
    assert rows["sft", "eager"].total_ms > 0
    (line,) = [x for x in markdown(report).splitlines() if x.startswith("| wrong ")]
    assert line.count("|") == 13
    assert line.endswith("RuntimeError: a / kernel broke |")


@pytest.mark.parametrize(
    ("impl", "module", "command"),
    [
        ("liger-fused", "liger_kernel", "pip install 'liger-kernel>=0.8.5'"),
        ("liger-token", "liger_kernel", "pip install 'liger-kernel[cutedsl]>=0.8.5'"),
        ("cce", "cut_cross_entropy", "git+https://github.com/apple/ml-cross-entropy.git"),
        ("cce-exact", "cut_cross_entropy", "git+https://github.com/apple/ml-cross-entropy.git"),
        ("trl", "trl", "pip install 'trl>=1.16'"),
    ],
)
def test_a_missing_peer_says_what_to_install(monkeypatch, impl, module, command):
    class Gone:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == module:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Gone(), *sys.meta_path])
    _, rows = report_of(f"{impl},eager", tasks=["sft"])
    reason = rows["sft", impl].reason
    assert reason.startswith("not installed: ")
    assert command in reason
    assert rows["sft", "eager"].speedup == 1.0


def test_pytorchs_own_function_is_a_peer_where_it_exists(monkeypatch):
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        _, rows = report_of("torch-fused,eager")
        for task in TASKS:
            assert rows[task, "torch-fused"].over_budget == ()  # in fp32
        monkeypatch.delattr(torch.nn, "LinearCrossEntropyOptions")
    _, rows = report_of("torch-fused,eager", tasks=["sft"])
    assert rows["sft", "torch-fused"].reason.startswith("needs PyTorch 2.13's linear_cross_entropy, this is ")


def test_a_peer_without_softcap_reports_it_for_its_tasks(monkeypatch):
    eager = peers.Implementation("plain", peers._eager, tasks=("sft",), softcap=False)
    monkeypatch.setattr(peers, "PEERS", (eager,))
    _, rows = report_of("plain", case=dataclasses.replace(SMALL, softcap=5.0))
    assert {key: row.reason for key, row in rows.items()} == {("sft", "plain"): "has no softcap"}


def test_trl_is_the_baseline_if_it_runs():
    pytest.importorskip("trl")
    report, rows = report_of("pytorch,eager,trl", tasks=["frozen"])
    assert report.cases[0].tables[0].baseline == "trl"
    assert rows["frozen", "trl"].over_budget == ()  # in fp32
    assert "speed-up over trl" in markdown(report)
    assert rows["frozen", "pytorch"].speedup == pytest.approx(
        rows["frozen", "trl"].total_ms / rows["frozen", "pytorch"].total_ms
    )


def test_every_own_impl_is_a_row(monkeypatch):
    monkeypatch.setitem(impls.MODULES, "new", impls.Entry("fusedalign.impls.new", "own"))
    names = list(peers.implementations())
    assert [x.name for x in peers.choose("ours")] == ["triton", "pytorch", "new", "triton-256MiB"]
    assert names.index("new") < names.index("eager")
    _, rows = report_of("new", tasks=["logps"])
    assert "impl='new' cannot do this" in rows["logps", "new"].reason


# The command


def test_the_command_writes_what_it_prints(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "a" / "b"
    argv = ["bench", "sft", "frozen", "--cases", "N=16,D=8,V=300", "--cases", "N=8,D=8,V=99,softcap=4"]
    assert main([*argv, "--impls", "pytorch,eager,liger-fused", "--wide", "--out", str(out)]) == 0, (
        capsys.readouterr().err
    )
    printed = capsys.readouterr().out
    assert (out / "bench.md").read_text().strip() == printed.strip()
    assert (out / "bench.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((out / "bench.json").read_text())
    assert [case["case"]["vocab"] for case in report["cases"]] == [300, 99]
    assert [table["task"] for table in report["cases"][1]["tables"]] == ["sft", "frozen"]
    first = report["cases"][0]["tables"][0]["rows"]
    assert [row["impl"] for row in first] == ["pytorch", "eager", "liger-fused"]
    assert first[0]["errors"].keys() == {"loss", "dH", "dW"}
    for text in ("torch", "U = ", "TFLOP/s before the rows", "a trained model's", "N=8, D=8, V=99, softcap=4"):
        assert text in printed


def test_json_holds_the_whole_report():
    report, _ = report_of("eager,liger-fused", tasks=["sft"])
    back = json.loads(json.dumps(dataclasses.asdict(report)))
    row = report.cases[0].tables[0].rows[0]
    assert back["cases"][0]["tables"][0]["rows"][0]["total_ms"] == row.total_ms
    assert back["cases"][0]["statistics"]["entropy"] == report.cases[0].statistics.entropy
    assert back["machine"]["torch"] == torch.__version__
    assert markdown(report) == header(report) + "\n\n" + section(report.cases[0], report)


def test_profile_lists_kernels_and_shares(capsys):
    assert main(["bench", "logps", "--profile", "eager", "--cases", "N=16,D=8,V=300"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[0].startswith("eager, logps, N=16, D=8, V=300: ")
    assert any("log_softmax_backward" in line for line in lines)
    shares = [float(line.split("%")[0]) for line in lines[2:]]
    assert sum(shares) == pytest.approx(100, abs=5)


def test_covered_time_merges_overlaps():
    assert covered([(4, 6), (0, 2), (1, 3), (4.5, 5)]) == 5


def test_microbatches_prints_what_the_forwards_hold(tmp_path, capsys):
    """Saved tensors count once per micro-batch, unless keep_head=False saves nothing."""
    argv = ["bench", "microbatches", "--count", "4", "--wide", "--out", str(tmp_path / "new")]
    names = ["full logits", "chunked loss on the logits", "cce", "pytorch"]
    assert main([*argv, "--rows", ";".join(names)]) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    assert (tmp_path / "new" / "microbatches.md").read_text() == printed
    rows = {row["name"]: row for row in json.loads((tmp_path / "new" / "microbatches.json").read_text())["rows"]}
    assert list(rows) == names
    assert "impl='cce' cannot do this" in rows["cce"]["reason"] or torch.cuda.is_available()
    for name in ("full logits", "chunked loss on the logits", "pytorch"):
        assert rows[name]["errors"].keys() == {"loss", "dH", "dW"}
        assert max(rows[name]["errors"].values()) < BUDGETS[torch.float32]["dH"], name
    if not torch.cuda.is_available():
        n, d, v = 32, 24, 300
        inputs = 4 * (v * d + 4 * n * d)
        assert rows["full logits"]["peak_gb"] * 1e9 >= inputs + 4 * 4 * n * v
        assert inputs + 4 * 2 * v * d < rows["pytorch"]["peak_gb"] * 1e9 < rows["full logits"]["peak_gb"] * 1e9


def test_microbatches_in_flight_hold_head_gradients_only_with_keep_head():
    stage = Stage(Case("", 64, 16, 200), 6, data="trained", seed=0, dtype=torch.float32, device="cpu")
    head = 200 * 16 * 4 / 1e9
    loads = [peers.fused(impl="pytorch", keep_head=keep) for keep in (True, False)]
    kept, lean = (stage.measure(peers.Implementation("x", load)) for load in loads)
    assert kept.peak_gb - lean.peak_gb > 3 * head
    assert max(kept.errors["dH"], lean.errors["dH"]) < 1e-5


def test_microbatches_with_a_softcap_are_exact():
    stage = Stage(Case("", 16, 8, 100, softcap=2.0), 2, data="trained", seed=0, dtype=torch.float32, device="cpu")
    for name in ("full logits", "full logits, fp32", "chunked loss on the logits", "pytorch"):
        errors = stage.measure(ROWS[name]).errors
        assert max(errors.values()) < 1e-5, (name, errors)


def test_microbatches_quotes_reported_numbers_only_for_their_shape():
    figures = [Figures("full logits", False, None, 9.9, 100.0, {"loss": 1e-3, "dH": 1e-3, "dW": 1e-3})]
    text = report(CASES["qwen3-1.7b"], 8, figures, torch.bfloat16, "cpu")
    assert "reported then" in text
    assert "10.50" in text
    assert "error: loss" in text
    assert "reported then" not in report(CASES["qwen3-1.7b"], 4, figures, torch.bfloat16, "cpu")


def test_help_names_every_option(capsys):
    assert main(["bench", "--help"]) == 0
    out = capsys.readouterr().out
    for word in (*TASKS, *CASES, *peers.implementations(), "--profile", "--out", "--data"):
        assert word in out
    assert main(["--help"]) == 0
    assert "bench" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["gpro"], "a task must be one of logps, sft, frozen, dpo, got 'gpro'"),
        (["trll"], "got 'trll'; did you mean trl?"),
        (["microbatches", "--rows", "full logits; vllm"], "rows must be all, or among full logits; full logits, fp32;"),
        (["microbatches", "--count", "0"], "--count must be at least 1, got 0"),
        (["microbatches", "--case", "tiny,llama3-8b"], "--case must be one case, got 'tiny,llama3-8b'"),
        (["microbatches", "--fast"], "expected flags of fusedalign bench microbatches, got the unknown --fast"),
        (["--cases", "llama"], "a case must be one of qwen3-1.7b, llama3-8b, qwen3-4b, gemma2-2b, tiny, or like N="),
        (["--cases", "N=8,D=8"], "a case must have N, D and V, and may have a softcap, got 'N=8,D=8'"),
        (["--cases", "N=8,D=x,V=9"], "N, D and V of a case must be integers and softcap a number, got"),
        (["--cases", "N=6,D=8,V=9"], "a case must have N a multiple of 4"),
        (["--impls", "pytorch,vllm"], "impls must be among all, ours, "),
        (["--data", "real"], "--data must be one of trained, random, got 'real'"),
        (["--seed"], "--seed: expected one argument"),
        (["--fast"], "expected flags of fusedalign bench, got the unknown --fast"),
        (["--profile", "all"], "--profile must name one impl"),
        (["--profile", "eager", "--out", "x"], "without --out"),
    ],
)
def test_errors_are_one_line(capsys, argv, message):
    assert main(["bench", *argv]) == 2
    err = capsys.readouterr().err.strip()
    assert message in err
    assert len(err.splitlines()) == 1


def test_profile_of_a_missing_peer_is_an_error(capsys):
    if "liger_kernel" in sys.modules:
        pytest.skip("liger_kernel has been imported")
    assert main(["bench", "sft", "--profile", "liger-fused", "--cases", "N=16,D=8,V=300"]) == 2
    assert "liger-fused: " in capsys.readouterr().err


def test_out_without_matplotlib_warns_first_and_skips_the_plot(monkeypatch, capsys, tmp_path):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    argv = ["bench", "sft", "frozen", "--impls", "eager", "--cases", "N=8,D=8,V=50"]
    assert main([*argv, "--out", str(tmp_path)]) == 0
    first, *others = capsys.readouterr().err.splitlines()
    assert first == "fusedalign: warning: the plot was left out: it needs matplotlib (pip install matplotlib)"
    assert not [line for line in others if "matplotlib" in line]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench.json", "bench.md"]


def test_a_failed_plot_keeps_all_rows(monkeypatch, capsys, tmp_path):
    figure = pytest.importorskip("matplotlib.figure")

    def savefig(self, path, **_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(figure.Figure, "savefig", savefig)
    argv = ["bench", "sft", "frozen", "--impls", "eager", "--cases", "N=8,D=8,V=50"]
    assert main([*argv, "--out", str(tmp_path)]) == 0
    messages = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fusedalign: ")]
    assert len(messages) == 1
    assert "No space left on device" in messages[0]
    assert [table["task"] for table in tables(tmp_path)] == ["sft", "frozen"]


def tables(folder):
    """The tables of the only case in bench.json, read by a strict JSON parser."""
    (case,) = json.loads((folder / "bench.json").read_text(), parse_constant=pytest.fail)["cases"]
    return case["tables"]


def test_writes_that_fail_on_a_full_disk_are_retried(monkeypatch, capsys, tmp_path):
    """All tables are printed; a failed write is retried with the next table, or is an error at the end."""
    from fusedalign.bench import table

    write, full = table.replace_text, [True]

    def replace(path, text):
        if full[0]:
            full[0] = stays
            raise OSError(28, "No space left on device")
        write(path, text)

    monkeypatch.setattr(table, "replace_text", replace)
    argv = ["bench", "sft", "frozen", "--impls", "eager", "--cases", "N=8,D=8,V=50", "--out", str(tmp_path)]
    for stays, status in ((False, 0), (True, 2)):
        full[0] = True
        assert main(argv) == status
        printed = capsys.readouterr()
        assert printed.out.count("| eager ") == 2
        assert ("fusedalign: error: [Errno 28]" in printed.err) == stays
    assert [table["task"] for table in tables(tmp_path)] == ["sft", "frozen"]


@pytest.mark.parametrize("word", [[], ["microbatches"]])
def test_an_unwritable_out_is_an_error_before_the_measurements(capsys, tmp_path, word):
    (tmp_path / "file").write_text("")
    assert main(["bench", *word, "--out", str(tmp_path / "file")]) == 2
    err = capsys.readouterr().err.strip()
    assert err.startswith("fusedalign: error: --out must be a folder that can be written to, got ")
    assert len(err.splitlines()) == 1


def test_nan_is_null_in_json(monkeypatch, tmp_path):
    monkeypatch.setattr(peers, "PEERS", (*peers.PEERS, wrong_eager(float("nan"))))
    argv = ["bench", "logps", "--impls", "eager,wrong", "--cases", "N=8,D=8,V=50", "--out", str(tmp_path)]
    assert main(argv) == 0
    (table,) = tables(tmp_path)
    assert table["rows"][1]["errors"]["dH"] is None
    assert table["rows"][1]["over_budget"] == ["dH"]
    assert table["rows"][0]["errors"]["dH"] < 1e-5


def test_nan_is_null_in_the_json_of_microbatches(monkeypatch, tmp_path):
    nan = Figures("full logits", False, None, 1.0, float("inf"), {"loss": float("nan"), "dH": 0.0, "dW": 0.0})
    monkeypatch.setattr(Stage, "measure", lambda *_: nan)
    assert main(["bench", "microbatches", "--rows", "full logits", "--out", str(tmp_path)]) == 0
    text = (tmp_path / "microbatches.json").read_text()
    (row,) = json.loads(text, parse_constant=pytest.fail)["rows"]
    assert (row["ms"], row["errors"]["loss"]) == (None, None)


def test_tables_without_a_row_are_left_out(capsys):
    assert main(["bench", "--impls", "liger-fused", "--cases", "N=8,D=8,V=50"]) == 0
    out = capsys.readouterr().out
    assert [line.split(":")[0] for line in out.splitlines() if line.startswith("### ")] == ["### sft"]
    assert "| liger-fused " in out
    assert "After the rows" in out


@pytest.mark.parametrize("words", [["--impls", "liger-fused"], ["--profile", "liger-fused"]])
@pytest.mark.parametrize("tasks", [["logps"], ["sft", "dpo"]])
def test_a_task_without_any_impl_is_refused(capsys, words, tasks):
    assert main(["bench", *tasks, *words]) == 2
    err = capsys.readouterr().err.strip()
    assert f"a task must be one that the impls have, got {tasks[-1]!r}: liger-fused has sft" in err
    assert len(err.splitlines()) == 1


def test_a_failed_case_or_table_does_not_stop_the_others(monkeypatch, capsys, tmp_path):
    """Data or exact results that do not fit in memory."""
    from fusedalign.bench import runner

    make, answer = runner.inputs, runner.reference

    def inputs(case, settings):
        if case.vocab == 51:
            raise torch.OutOfMemoryError("too much")
        return make(case, settings)

    def reference(task, data, *, seed):
        if task.name == "sft" and len(data.weight) == 50:
            raise RuntimeError("broke")
        return answer(task, data, seed=seed)

    monkeypatch.setattr(runner, "inputs", inputs)
    monkeypatch.setattr(runner, "reference", reference)
    cases = [word for v in (50, 51, 52) for word in ("--cases", f"N=8,D=8,V={v}")]
    assert main(["bench", "logps", "sft", "dpo", "--impls", "eager", *cases, "--out", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert printed.out.count("| eager ") == 2 + 3
    assert "N=8,D=8,V=50 sft: RuntimeError: broke; N=8,D=8,V=51: out of memory" in printed.err
    assert (tmp_path / "bench.png").is_file()
    cases = json.loads((tmp_path / "bench.json").read_text())["cases"]
    assert [len(case["tables"]) for case in cases] == [2, 3]


def test_ctrl_c_keeps_the_rows_of_microbatches(monkeypatch, capsys):
    def measure(self, row):
        if row.name == "pytorch":
            raise KeyboardInterrupt
        return Figures(row.name, False, None, 1.0, 1.0, {"loss": 0.0, "dH": 0.0, "dW": 0.0})

    monkeypatch.setattr(Stage, "measure", measure)
    assert main(["bench", "microbatches", "--rows", "full logits;pytorch"]) == 130
    assert "| full logits | 1 " in capsys.readouterr().out
