"""The summary table and the histogram."""

import math
import struct

import pyarrow as pa
import pytest

from fusedalign.reports import plot_failure
from fusedalign.score import columns
from fusedalign.score.records import Answer, Example, RefusedRow, Score, Window
from fusedalign.score.summary import histogram, summary

WINDOW = Window([1, 2], [-100, 2])
CHOSEN = [Score(-2.0, 2, True), Score(-6.0, 3, False), Score(-12.0, 4, False), Score(-4.0, 1, False)]
REJECTED = [Score(-3.0, 2, False), Score(-5.0, 3, False), Score(-14.0, 4, False), Score(-9.0, 1, False)]


def pairs(reference=None, scores=None):
    examples = [Example(i, (Answer("chosen", (WINDOW,)), Answer("rejected", (WINDOW,)))) for i in range(4)]
    return columns.table(examples, scores or list(zip(CHOSEN, REJECTED, strict=True)), reference, reference and 0.5)


def singles(name="completion", text_bytes=None, scores=CHOSEN):
    examples = [Example(i, (Answer(name, (WINDOW,), text_bytes),)) for i in range(len(scores))]
    return columns.table(examples, [(score,) for score in scores])


def cells(text, label):
    """The cells of a line after its label."""
    (line,) = [line for line in text.splitlines() if line.strip().startswith(label)]
    return line.strip()[len(label) :].split()


def test_single_answers_are_summarised():
    text = summary(singles(), {"model": "embedded"})
    assert cells(text, "model") == ["embedded"]
    assert cells(text, "rows") == ["4"]
    assert cells(text, "scored") == ["4"]
    assert cells(text, "refused") == ["0"]
    assert cells(text, "tokens") == ["10"]
    assert cells(text, "mean over rows") == ["-2.5000"]
    assert cells(text, "median   ") == ["-2.5000"]
    assert cells(text, "25th percentile") == ["-3.2500"]
    assert cells(text, "5th percentile") == ["-3.8500"]
    assert cells(text, "perplexity of all tokens") == [f"{math.exp(24 / 10):.4f}"]
    assert cells(text, "median over rows") == [f"{math.exp(2.5):.4f}"]
    assert cells(text, "greedy") == ["25.0", "%"]
    assert "margin" not in text
    assert "bits per byte" not in text


def test_pairs_are_summarised_with_margin_and_accuracy():
    text = summary(pairs(), {})
    assert cells(text, "tokens") == ["10", "10"]
    assert cells(text, "perplexity of all tokens") == [f"{math.exp(x / 10):.4f}" for x in (24, 31)]
    assert cells(text, "margin, nats, mean") == ["1.7500"]
    assert cells(text, "accuracy") == ["75.0", "%", "(3", "of", "4", "pairs)"]
    assert "reward" not in text


def test_rewards_are_summarised():
    text = summary(pairs(reference=list(zip(REJECTED, CHOSEN, strict=True))), {})
    assert cells(text, "implicit reward, mean") == ["0.8750", "-0.8750"]
    assert cells(text, "reward margin, mean") == ["1.7500"]
    assert cells(text, "reward accuracy") == ["75.0", "%", "(3", "of", "4", "pairs)"]


def test_text_is_summarised_in_bits_per_byte():
    text = summary(singles("text", 10), {})
    assert cells(text, "bytes") == ["40"]
    assert cells(text, "bits per byte") == [f"{24 / 40 / math.log(2):.4f}"]


def test_refused_rows_are_counted_by_reason():
    refused = [RefusedRow(i, f"text must be text, got {i}") for i in range(7)]
    refused += [RefusedRow(i, f"messages[{i}].role must be text, got None") for i in range(3)]
    refused += [RefusedRow(50 + i, f"reason {chr(97 + i)}") for i in range(5)]
    text = summary(singles(), {"refused": refused})
    assert cells(text, "rows") == ["19"]
    assert cells(text, "refused") == ["15"]
    lines = [line.split(maxsplit=1) for line in text.splitlines()]
    assert ["7", "text must be text"] in lines
    assert ["3", "messages[...].role must be text"] in lines
    assert ["2", "for other reasons"] in lines
    assert text.count("text must be text") == 1


def test_lines_fit_a_terminal():
    about = {
        "model": "q" * 150,
        "data set": "a long name " * 20,
        "refused": [RefusedRow(i, "why not " * 40) for i in range(3)],
    }
    text = summary(pairs(), about)
    assert max(map(len, text.splitlines())) <= 100
    words = " ".join(text.split())
    assert [words.count(part) for part in ("a long name", "why not")] == [20, 40]
    assert text.count("q") == 150


def test_non_finite_values_are_excluded_and_counted():
    scores = [*CHOSEN, Score(math.nan, 5, False), Score(-math.inf, 6, False)]
    text = summary(singles(scores=scores), {})
    assert cells(text, "not finite, left out below") == ["2"]
    assert cells(text, "mean over rows") == ["-2.5000"]
    assert cells(text, "perplexity of all tokens") == [f"{math.exp(24 / 10):.4f}"]
    assert cells(text, "tokens") == ["21"]


def test_only_non_finite_values_print_dashes():
    text = summary(singles("text", 3, [Score(math.nan, 5, False)]), {})
    assert cells(text, "mean over rows") == ["-"]
    assert cells(text, "perplexity of all tokens") == ["-"]
    assert cells(text, "bits per byte") == ["-"]


def test_no_scored_row_is_summarised():
    text = summary(columns.table([], []), {"refused": [RefusedRow(i, "text must be text") for i in range(2)]})
    assert cells(text, "scored") == ["0"]
    assert cells(text, "rows") == ["2"]


def test_tables_of_several_chunks_give_the_same_summary():
    table = pa.concat_tables([pairs(), pairs()])
    assert table["row"].num_chunks == 2
    assert summary(table, {}) == summary(table.combine_chunks(), {})


def size(path):
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", content[16:24])


def test_histogram_has_one_panel_per_quantity(tmp_path):
    pytest.importorskip("matplotlib")
    one, two, three = (tmp_path / f"{n}.png" for n in (1, 2, 3))
    histogram(singles(), one)
    histogram(pairs(), two)
    histogram(pairs(reference=list(zip(REJECTED, CHOSEN, strict=True))), three)
    widths = [size(path)[0] for path in (one, two, three)]
    assert widths == [widths[0], 2 * widths[0], 3 * widths[0]]


@pytest.mark.parametrize("table", [columns.table([], []), singles(scores=[Score(math.nan, 1, False)])])
def test_histogram_without_finite_scores_fails(table, tmp_path):
    pytest.importorskip("matplotlib")
    failure = plot_failure(lambda path: histogram(table, path), tmp_path / "none.png")
    assert failure.endswith("ValueError: expected a finite score to draw, got none")
    assert not (tmp_path / "none.png").exists()


def test_histogram_skips_non_finite_columns(tmp_path):
    pytest.importorskip("matplotlib")
    scores = [(a, Score(-math.inf, 1, False)) for a in CHOSEN]
    histogram(pairs(scores=scores), tmp_path / "some.png")
    assert size(tmp_path / "some.png")[0] > 0
