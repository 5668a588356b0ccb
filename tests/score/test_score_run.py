"""A complete scoring run: shards, interruptions, several ranks, and files that must not be touched."""

import contextlib
import errno
import json
import math
import os
import pty
import signal
import subprocess
import time

import pyarrow.parquet
import pytest

from fusedalign.score import run as run_module
from fusedalign.score.records import Answer, Example, RefusedRow, Score, Window
from fusedalign.score.run import POLICY, REFERENCE, Run, refused_path, score_run
from fusedalign.score.shards import ScoredRow, SettingsMismatchError, Shard, ShardStore, shard_order

ROWS = 43


class Pairs:
    """Rows of two answers; every seventh is refused."""

    def __len__(self):
        return ROWS

    def examples(self, start, stop):
        refused = [RefusedRow(row, f"row {row} is empty") for row in range(start, stop) if row % 7 == 3]
        rows = sorted(set(range(start, stop)) - {row for row, _ in refused})
        one = Window([1, 2], [-100, 2])
        return [Example(row, (Answer("chosen", (one,)), Answer("rejected", (one,)))) for row in rows], refused


class FakeScorer:
    """A scorer that derives scores from the row and the model name; one row fails with one model."""

    max_tokens = 10

    def __init__(self, name=POLICY, log=None):
        self.name, self.log = name, log

    def scores(self, examples, advance=None):
        if self.log is not None:
            self.log.append([example.row for example in examples])
        salt = 0.25 if self.name == REFERENCE else 0.5
        results = []
        for example in examples:
            values = [Score(-math.exp(math.sin(example.row + salt + k)), 3 + k, bool(k)) for k in (0, 1)]
            results.append("out of memory" if example.row == 5 and self.name == REFERENCE else tuple(values))
        return results


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(ShardStore.__init__, "__defaults__", (4,))


def make(out, rank=0, ranks=1, reference=True, log=None, **settings):
    models = {POLICY: lambda: FakeScorer(POLICY, log)}
    if reference:
        models[REFERENCE] = lambda: FakeScorer(REFERENCE, log)
    beta = 0.1 if reference else None
    return Run(Pairs(), out, {"model": "a", "beta": beta, **settings}, models, beta, rank, ranks)


def content(out):
    return out.read_bytes(), out.with_suffix(".refused.jsonl").read_text()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The file of an uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "scores.parquet"
    defaults = ShardStore.__init__.__defaults__
    ShardStore.__init__.__defaults__ = (4,)
    try:
        score_run(make(out))
    finally:
        ShardStore.__init__.__defaults__ = defaults
    return content(out)


@pytest.mark.parametrize("reference", [False, True])
def test_every_row_is_scored_or_refused_once(tmp_path, reference):
    out = tmp_path / "scores.parquet"
    finished = score_run(make(out, reference=reference))
    rows = pyarrow.parquet.read_table(out)["row"].to_pylist()
    refused = [json.loads(line)["row"] for line in out.with_suffix(".refused.jsonl").read_text().splitlines()]
    assert sorted(rows + refused) == list(range(ROWS))
    assert rows == sorted(rows)
    assert (5 in refused) == reference
    assert (finished.rows, finished.scored, [row for row, _ in finished.refused]) == (ROWS, len(rows), refused)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["scores.parquet", "scores.refused.jsonl"]


def in_child(body):
    """Run `body` in a forked process; return its exit status, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        code = 1
        with contextlib.suppress(BaseException):
            body()
            code = 0
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def steps(action):
    """Call `action(n)` before the n-th file operation (open for writing, fsync, link or rename)."""
    count = 0

    def counting(function):
        def wrapper(*args, **kwargs):
            nonlocal count
            count += 1
            action(count)
            return function(*args, **kwargs)

        return wrapper

    for name in ("fsync", "replace", "link"):
        setattr(os, name, counting(getattr(os, name)))
    return lambda: count


def test_a_run_killed_at_any_step_resumes_to_the_same_file(tmp_path, uninterrupted):
    def count(body_out):
        total = steps(lambda n: None)
        score_run(make(body_out))
        (tmp_path / "count").write_text(str(total()))

    assert in_child(lambda: count(tmp_path / "first.parquet")) == 0
    total = int((tmp_path / "count").read_text())
    assert total > 40
    for k in range(20):
        step = 1 + k * (total - 1) // 19
        out = tmp_path / f"{k}.parquet"

        def killed(out=out, step=step):
            steps(lambda n: os.kill(os.getpid(), signal.SIGKILL) if n == step else None)
            score_run(make(out))

        assert in_child(killed) == -signal.SIGKILL
        score_run(make(out))
        assert content(out) == uninterrupted
        assert not list(tmp_path.glob(f"{k}.parquet.*"))  # neither shards nor temporary files of the finished run


def test_finished_shards_are_not_recomputed(tmp_path):
    out, log = tmp_path / "scores.parquet", []
    store = make(out).store

    class StopError(Exception):
        pass

    class Stopping(FakeScorer):
        def scores(self, examples, advance=None):
            if len(log) == 3:
                raise StopError
            return super().scores(examples, advance)

    run = make(out, log=log)
    stopping = Run(run.source, out, run.settings, {**run.models, POLICY: lambda: Stopping(POLICY, log)}, run.beta)
    with pytest.raises(StopError):
        score_run(stopping)
    assert len(store.missing(POLICY)) == store.shards - 3
    log.clear()
    score_run(run)
    assert len(log) == (store.shards - 3) + store.shards
    log.clear()
    score_run(run)  # is finished
    assert log == []


@pytest.mark.parametrize("damage", ["data", "shorter", "note", "lost"])
def test_a_damaged_shard_is_recomputed(tmp_path, uninterrupted, damage):
    out, log = tmp_path / "scores.parquet", []
    run = make(out, log=log)
    store = run.store
    store.claim(POLICY, {"max_tokens": 10})
    run_module._fill(run, store, POLICY, run.models[POLICY])
    data, note = store._paths(POLICY, 4)
    if damage == "data":
        data.write_bytes(data.read_bytes().replace(b"3", b"4", 1))
    elif damage == "shorter":
        data.write_bytes(data.read_bytes()[:-1])
    elif damage == "note":
        note.write_text("{")
    else:
        data.unlink()
    log.clear()
    assert store.missing(POLICY) == [4]
    score_run(run)
    assert log[0] == [row for row in range(16, 20) if row % 7 != 3]
    assert len(log) == 1 + store.shards
    assert content(out) == uninterrupted


def test_a_full_disk_keeps_finished_shards(tmp_path, uninterrupted, monkeypatch):
    out, original, count = tmp_path / "scores.parquet", os.fsync, []

    def fsync(descriptor):
        count.append(descriptor)
        if len(count) > 9:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left"):
        score_run(make(out))
    assert not list(tmp_path.glob("**/*.tmp"))
    monkeypatch.setattr(os, "fsync", original)
    assert 0 < len(make(out).store.missing(POLICY)) < make(out).store.shards
    score_run(make(out))
    assert content(out) == uninterrupted


def test_a_full_tmpfs_keeps_finished_shards(tmp_path, uninterrupted):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24k", "tmpfs", str(disk)], capture_output=True)
    if mount.returncode:
        pytest.skip("needs permission to mount a file system")
    out = disk / "scores.parquet"
    try:
        with pytest.raises(OSError, match="No space left"):
            score_run(make(out))
        assert not list(disk.glob("**/*.tmp"))
        subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
        score_run(make(out))
        assert content(out) == uninterrupted
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("source", ["number", "model", "run"])
def test_a_shard_of_another_run_is_recomputed(tmp_path, uninterrupted, source):
    """A complete shard with a valid checksum, copied from another run."""
    out = tmp_path / "scores.parquet"
    run, other_run = make(out), make(tmp_path / "other.parquet", model="b")
    for each, name in ((run, POLICY), (run, REFERENCE), (other_run, POLICY)):
        each.store.claim(name, {"max_tokens": 10})
        run_module._fill(each, each.store, name, each.models[name])
    number, model, store = {
        "number": (3, POLICY, run.store), "model": (4, REFERENCE, run.store), "run": (4, POLICY, other_run.store),
    }[source]  # fmt: skip
    for other_path, place in zip(store._paths(model, number), run.store._paths(POLICY, 4), strict=True):
        place.write_bytes(other_path.read_bytes())
    assert run.store.missing(POLICY) == [4]
    score_run(run)
    assert content(out) == uninterrupted


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"\xff"])
def test_damaged_settings_are_rewritten(tmp_path, uninterrupted, damage):
    out = tmp_path / "scores.parquet"
    run = make(out)
    run.store.claim(POLICY, {"max_tokens": 10})
    (run.store.folder / POLICY / "settings.json").write_bytes(damage)
    score_run(run)
    assert content(out) == uninterrupted


def test_a_file_system_without_hard_links_works(tmp_path, uninterrupted, monkeypatch):
    def link(own, path):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    score_run(make(tmp_path / "scores.parquet"))
    assert content(tmp_path / "scores.parquet") == uninterrupted


def test_the_finished_file_is_synced_before_shards_are_deleted(tmp_path, monkeypatch):
    out, log = tmp_path / "scores.parquet", []
    fsync, replace, remove = os.fsync, os.replace, ShardStore.remove

    def noting(name, function):
        def wrapper(*args):
            target = os.readlink(f"/proc/self/fd/{args[0]}") if name == "fsync" else str(args[-1])
            log.append((name, target))
            return function(*args)

        return wrapper

    monkeypatch.setattr(os, "fsync", noting("fsync", fsync))
    monkeypatch.setattr(os, "replace", noting("replace", replace))
    monkeypatch.setattr(ShardStore, "remove", lambda self: (log.append(("remove", "")), remove(self)))
    score_run(make(out))
    renamed = log.index(("replace", str(out)))
    assert any(name == "fsync" and "/finished" in target for name, target in log[:renamed])
    assert log[renamed + 1 :] == [("fsync", str(tmp_path)), ("remove", "")]


@pytest.mark.parametrize("processes", [2, 4])
def test_uncoordinated_processes_write_the_same_file(tmp_path, uninterrupted, processes):
    """The same command started twice without torchrun: both are rank 0, and neither fails or damages the file."""
    for attempt in range(3):
        out = tmp_path / str(attempt) / "scores.parquet"
        out.parent.mkdir()
        children = []
        for _ in range(processes):
            pid = os.fork()
            if pid == 0:
                code = 1
                with contextlib.suppress(BaseException):
                    finished = score_run(make(out))
                    code = 0 if finished.rows == ROWS else 2
                os._exit(code)
            children.append(pid)
        assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0] * processes
        assert content(out) == uninterrupted
        assert sorted(p.name for p in out.parent.iterdir()) == ["scores.parquet", "scores.refused.jsonl"]


def test_a_rank_stops_if_the_run_is_already_finished(tmp_path):
    """Also if the finished file has been moved since, as a reference cache is."""
    out, log = tmp_path / "scores.parquet", []

    class Late(FakeScorer):
        def scores(self, examples, advance=None):
            if not log:
                score_run(make(out, reference=False))
                out.unlink()
            return super().scores(examples, advance)

    run = make(out, 1, 2, reference=False)
    assert score_run(Run(run.source, out, run.settings, {POLICY: lambda: Late(POLICY, log)}, None, 1, 2)) is None
    assert len(log) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["scores.refused.jsonl"]


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_the_work_and_write_the_same_file(tmp_path, uninterrupted, ranks):
    out = tmp_path / "scores.parquet"
    children = []
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            code = 1
            with contextlib.suppress(BaseException):
                score_run(make(out, rank, ranks))
                code = 0
            os._exit(code)
        children.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0] * ranks
    assert content(out) == uninterrupted
    assert sorted(p.name for p in tmp_path.iterdir()) == ["scores.parquet", "scores.refused.jsonl"]


def test_other_ranks_compute_the_shards_of_a_dead_rank(tmp_path, uninterrupted):
    """Rank 0 alone of four writes the whole file."""
    out = tmp_path / "scores.parquet"
    score_run(make(out, 0, 4))
    assert content(out) == uninterrupted


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_each_rank_visits_its_own_shards_first_then_all(ranks):
    for rank in range(ranks):
        order = list(shard_order(11, rank, ranks))
        assert sorted(order) == list(range(11))
        own = len(range(rank, 11, ranks))
        assert all(shard % ranks == rank for shard in order[:own])


@pytest.mark.parametrize("finished", [False, True])
def test_other_settings_are_refused(tmp_path, finished):
    out = tmp_path / "scores.parquet"
    run = make(out)
    if finished:
        score_run(run)
    else:
        run.store.claim(POLICY, {"max_tokens": 10})
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(SettingsMismatchError, match=r"--out must be new or of the same settings, .* model a, not b"):
        score_run(make(out, model="b"))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("what", ["text", "parquet"])
def test_unrelated_files_are_not_touched(tmp_path, what):
    out = tmp_path / "scores.parquet"
    if what == "text":
        out.write_text("my notes")
    else:
        pyarrow.parquet.write_table(pyarrow.table({"a": [1]}), out)
    before = out.read_bytes()
    with pytest.raises(ValueError, match="--out must be new or an undamaged file of `fusedalign score`"):
        score_run(make(out))
    assert out.read_bytes() == before


@pytest.mark.parametrize("part", [0.1, 0.4, 0.9])
def test_damage_to_the_finished_file_is_detected(tmp_path, part):
    out = tmp_path / "scores.parquet"
    score_run(make(out))
    table = pyarrow.parquet.ParquetFile(out).metadata.row_group(3).column(2)
    place = table.data_page_offset + int(part * table.total_compressed_size)
    damaged = bytearray(out.read_bytes())
    damaged[place] ^= 1
    out.write_bytes(damaged)
    with pytest.raises(ValueError, match="--out must be new or an undamaged file of `fusedalign score`"):
        score_run(make(out))


@pytest.mark.parametrize("damage", [None, "", "{}\n", "{"])
def test_a_missing_list_of_refused_rows_is_detected(tmp_path, damage):
    run = make(tmp_path / "scores.parquet")
    score_run(run)
    if damage is None:
        refused_path(run.out).unlink()
    else:
        refused_path(run.out).write_text(damage)
    with pytest.raises(ValueError, match=r"scores.refused.jsonl must hold the 7 rows that could not be scored, got 0"):
        score_run(run)


def test_a_resumed_run_keeps_the_earlier_budget(tmp_path):
    """A resumed run then has the batches of an uninterrupted one."""
    out, budgets = tmp_path / "scores.parquet", []
    run = make(out, reference=False)
    run.store.claim(POLICY, {"max_tokens": 77})

    class Noting(FakeScorer):
        def scores(self, examples, advance=None):
            budgets.append(self.max_tokens)
            return super().scores(examples, advance)

    score_run(Run(run.source, out, run.settings, {POLICY: Noting}))
    assert set(budgets) == {77}


def test_a_terminal_shows_rows_tokens_and_the_time_left(tmp_path, monkeypatch):
    """Also a terminal without a known width, such as that of `script`."""
    master, slave = pty.openpty()
    with os.fdopen(slave, "w") as terminal:
        monkeypatch.setattr("sys.stderr", terminal)
        with run_module._progress("scoring, policy", 10, 2, rank=0) as advance:
            time.sleep(0.15)
            advance(3, 600)
        with run_module._progress("scoring, reference", 10, 0, rank=1) as advance:
            advance(3, 600)
        os.set_blocking(master, False)
        screen = ""
        with contextlib.suppress(BlockingIOError):
            while True:
                screen += os.read(master, 65536).decode()
    os.close(master)
    assert "scoring, policy" in screen
    assert " 5/10 " in screen
    assert "tokens/s" in screen
    assert "<00:00" in screen
    assert "reference" not in screen


def test_a_log_gets_periodic_lines(capsys, monkeypatch):
    for seconds, is_shown in ((30, False), (0.01, True)):
        monkeypatch.setattr(run_module, "_LOG_SECONDS", seconds)
        with run_module._progress("scoring, policy", 10, 0, rank=0) as advance:
            for _ in range(2):
                time.sleep(0.02)
                advance(3, 600)
        assert ("tokens/s" in capsys.readouterr().err) == is_shown


def test_a_run_without_scorable_rows_finishes(tmp_path):
    class Nothing(Pairs):
        def examples(self, start, stop):
            return [], [RefusedRow(row, "it is empty") for row in range(start, stop)]

    run = make(tmp_path / "scores.parquet")
    for _ in range(2):  # the second reads the finished file
        finished = score_run(Run(Nothing(), run.out, run.settings, run.models, run.beta))
        assert (finished.rows, finished.scored, len(finished.refused)) == (ROWS, 0, ROWS)
    assert pyarrow.parquet.read_table(run.out).num_rows == 0
    lines = refused_path(run.out).read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"row": i, "reason": "it is empty"} for i in range(ROWS)]


def test_shards_store_values_bitwise(tmp_path):
    store = ShardStore(tmp_path, 4, {})
    store.claim(POLICY, {})
    score = Score(-1 / 3, 2, True, {"logps": [-0.1, -1e-300], "ranks": [0, 5]})
    shard = Shard([ScoredRow(0, ("text",), (12,), (score,))], [RefusedRow(3, "ü\n\x00")])
    store.write(POLICY, 0, shard)
    assert store.read(POLICY, 0) == shard
    with pytest.raises(ValueError, match=r"shard 1 of .* must be there and undamaged"):
        store.read(POLICY, 1)
