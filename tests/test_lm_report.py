"""What a run writes of its completions."""

import json
from datetime import date

from rlhf.lm.report import sample_rows


def test_samples_are_spread_over_the_round_and_keep_the_rows_columns() -> None:
    texts = [({"prompt": f"p{i // 2}", "metadata": {"for": "the verifier"}}, f"c{i}", float(i)) for i in range(8)]
    assert sample_rows(texts, 3, 2) == [
        {"step": 3, "prompt": "p0", "completion": "c0", "score": 0.0},
        {"step": 3, "prompt": "p2", "completion": "c4", "score": 4.0},
    ]
    assert sample_rows(texts, 3, 0) == []
    assert len(sample_rows(texts, 3, 100)) == 8


def test_a_rows_columns_may_have_any_name_and_type() -> None:
    """A step of the row's own would be taken for the run's when the run is resumed."""
    row = {"step": "by step", "score": "A", "asked": date(2026, 11, 20), "choices": ["yes", "no"]}
    (line,) = sample_rows([(row, "yes", 1.0)], 7, 4)
    assert json.loads(json.dumps(line)) == {
        "step": 7,
        "asked": "2026-11-20",
        "choices": ["yes", "no"],
        "completion": "yes",
        "score": 1.0,
    }
