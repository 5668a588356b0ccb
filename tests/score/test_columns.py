"""The columns of a file of scores."""

import math

import pyarrow as pa
import pytest

from fusedalign.score import columns
from fusedalign.score.records import Answer, Example, Score, Window

WINDOW = Window([1, 2, 3], [-100, 2, 3])


def single(row, text_bytes=None, name="completion"):
    return Example(row, (Answer(name, (WINDOW,), text_bytes),))


def pair(row):
    return Example(row, (Answer("chosen", (WINDOW,)), Answer("rejected", (WINDOW,))))


def test_single_answers_have_their_columns():
    table = columns.table([single(3), single(5)], [(Score(-6.0, 3, True),), (Score(-1.0, 2, False),)])
    assert table.to_pydict() == {
        "row": [3, 5],
        "logps": [-6.0, -1.0],
        "mean_logps": [-2.0, -0.5],
        "num_tokens": [3, 2],
        "perplexity": pytest.approx([math.exp(2), math.exp(0.5)]),
        "is_greedy": [True, False],
    }
    assert [str(x) for x in table.schema.types] == ["int64", "double", "double", "int64", "double", "bool"]


def test_plain_text_has_bits_per_byte():
    table = columns.table([single(0, 4, "text")], [(Score(-8 * math.log(2), 3, False),)])
    assert table.column_names[-2:] == ["num_bytes", "bits_per_byte"]
    assert table["num_bytes"].to_pylist() == [4]
    assert table["bits_per_byte"].to_pylist() == pytest.approx([2.0])


def test_pairs_with_a_reference_have_reward_columns():
    scores = [(Score(-3.0, 3, True), Score(-5.0, 4, False)), (Score(-4.0, 1, False), Score(-4.0, 2, False))]
    reference = [(Score(-4.0, 3, True), Score(-4.5, 4, False)), (Score(-3.0, 1, False), Score(-6.0, 2, False))]
    table = columns.table([pair(0), pair(1)], scores, reference, 0.5)
    got = table.to_pydict()
    per_answer = ["logps", "mean_logps", "num_tokens", "perplexity", "is_greedy"]
    assert table.column_names == [
        "row",
        *(f"chosen_{name}" for name in per_answer),
        *(f"rejected_{name}" for name in per_answer),
        *("margin", "accuracy", "ref_chosen_logps", "ref_rejected_logps", "chosen_reward", "rejected_reward"),
        *("reward_margin", "reward_accuracy"),
    ]
    assert got["margin"] == [2.0, 0.0]
    assert got["accuracy"] == [True, False]
    assert got["ref_chosen_logps"] == [-4.0, -3.0]
    assert got["ref_rejected_logps"] == [-4.5, -6.0]
    assert got["chosen_reward"] == [0.5, -0.5]
    assert got["rejected_reward"] == [-0.25, 1.0]
    assert got["reward_margin"] == [0.75, -1.5]
    assert got["reward_accuracy"] == [True, False]
    assert columns.table([pair(0), pair(1)], scores).column_names == table.column_names[:13]


def test_single_answers_with_a_reference_have_a_reward():
    table = columns.table([single(0)], [(Score(-3.0, 3, True),)], [(Score(-5.0, 3, True),)], 0.1)
    assert table.column_names[-2:] == ["ref_logps", "reward"]
    assert table["reward"].to_pylist() == pytest.approx([0.2])


def test_token_columns_are_optional():
    per_token = {"ranks": [0.0, 70000.0], "logps": [-0.5, -2.5], "entropy": [0.25, 1.0]}
    table = columns.table([pair(0)], [(Score(-3.0, 2, False, per_token),) * 2])
    names = ["token_logps", "token_entropies", "token_ranks"]
    assert [name for name in table.column_names if "token_" in name] == [
        f"{answer}_{name}" for answer in ("chosen", "rejected") for name in names
    ]
    assert table["chosen_token_ranks"].to_pylist() == [[0.0, 70000.0]]
    assert table["rejected_token_logps"].to_pylist() == [[-0.5, -2.5]]
    assert table.schema.field("chosen_token_entropies").type == pa.list_(pa.float32())


def test_non_finite_values_are_kept():
    scores = [
        (Score(float("nan"), 3, False), Score(-1.0, 1, True)),
        (Score(-1e6, 1, False), Score(-math.inf, 1, False)),
    ]
    got = columns.table([pair(0), pair(1)], scores).to_pydict()
    assert math.isnan(got["margin"][0])
    assert got["accuracy"] == [False, True]
    assert got["chosen_perplexity"][1] == math.inf
    assert got["margin"][1] == math.inf


def test_no_example_gives_an_empty_table():
    assert columns.table([], []).schema == pa.schema([("row", pa.int64())])


def test_every_column_is_described():
    described = columns.PER_ANSWER | columns.PER_ROW | columns.WITH_REFERENCE
    scores = (Score(-3.0, 1, False, {"logps": [-3.0], "entropy": [1.0], "ranks": [2.0]}),)
    table = columns.table([single(0, 7, "text")], [scores], [scores], 0.1)
    pairs = columns.table([pair(0)], [scores * 2], [scores * 2], 0.1)
    documented = {columns.prefixed(answer, name) for answer in ("text", "chosen", "rejected") for name in described}
    assert {*table.column_names, *pairs.column_names} <= documented
    assert set(table.column_names) | {"margin", "accuracy", "reward_margin", "reward_accuracy"} == set(described)


def test_mismatched_scores_are_refused():
    with pytest.raises(ValueError, match=r"expected scores of 1 examples, one an answer \(2\), got 1"):
        columns.table([pair(0)], [(Score(-3.0, 1, False),)])
    with pytest.raises(ValueError, match="beta must be given with a reference"):
        columns.table([single(0)], [(Score(-3.0, 1, False),)], [(Score(-3.0, 1, False),)])
