"""Which rows make a batch: work in steps, work in passes, and what a plain loop gets from `fedsim.batches`."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import fedsim
from fedsim.config.experiment import Experiment
from fedsim.core.errors import UserError
from fedsim.core.seeding import stream
from fedsim.data.batches import BatchSampler, pad
from fedsim.runs.build import prepare

ROWS = np.array([3, 5, 8, 13, 21, 34, 55])


def rng(*names: str | int) -> np.random.Generator:
    return stream(0, *(names or ("test",)))


@pytest.mark.parametrize(
    ("rows", "size", "steps"), [(90, 128, 20), (90, 128, 1), (7, 3, 5), (7, 7, 2), (1, 4, 3), (10, 3, 10)]
)
def test_work_in_steps_draws_full_batches_from_reshuffled_passes(rows: int, size: int, steps: int) -> None:
    """The contract's own example is 90 rows and a batch of 128: the batch spans passes and is full."""
    held = np.arange(100, 100 + rows)
    batches = BatchSampler(size).batches(held, rng(), steps)
    assert [len(b) for b in batches] == [size] * steps
    stream_of_rows = np.concatenate(batches)
    passes = [stream_of_rows[i : i + rows] for i in range(0, len(stream_of_rows), rows)]
    for one in passes[:-1]:
        assert sorted(one) == held.tolist(), "each pass is every row once"
    assert len(set(passes[-1])) == len(passes[-1]), "the pass that is under way repeats no row"
    if rows >= 7 and len(passes) > 2:
        assert passes[0].tolist() != passes[1].tolist(), "reshuffled from pass to pass"


def test_work_in_epochs_keeps_the_short_last_batch() -> None:
    batches = BatchSampler(3, epochs=2).batches(ROWS, rng(), None)
    assert [len(b) for b in batches] == [3, 3, 1, 3, 3, 1]
    first, second = np.concatenate(batches[:3]), np.concatenate(batches[3:])
    assert sorted(first) == sorted(second) == ROWS.tolist() and first.tolist() != second.tolist()


def test_drop_last_leaves_the_short_batch_of_every_pass_out() -> None:
    batches = BatchSampler(3, epochs=2, drop_last=True).batches(ROWS, rng(), None)
    assert [len(b) for b in batches] == [3, 3, 3, 3]
    kept = BatchSampler(3, epochs=2).batches(ROWS, rng(), None)
    assert [b.tolist() for b in batches] == [b.tolist() for b in kept if len(b) == 3], "the same shuffle"


def test_without_shuffle_rows_come_in_order() -> None:
    assert np.concatenate(BatchSampler(3, epochs=1, shuffle=False).batches(ROWS, rng(), None)).tolist() == ROWS.tolist()
    endless = np.concatenate(BatchSampler(4, shuffle=False).batches(ROWS, rng(), 4))
    assert endless.tolist() == [*ROWS, *ROWS, *ROWS[:2]]


def test_count_is_the_number_of_batches() -> None:
    axes = ([1, 3, 7, 8, 200], [False, True], [None, 1, 3], [0, 1, 6, 7, 90], [None, 1, 5])
    for size, drop_last, epochs, held, steps in itertools.product(*axes):
        draw = BatchSampler(size, epochs=epochs, drop_last=drop_last)
        expected = len(draw.batches(np.arange(held), rng(), steps))
        assert draw.count(held, steps) == expected, (size, drop_last, epochs, held, steps)


def test_the_same_stream_draws_the_same_batches_and_leaves_the_rows_alone() -> None:
    rows = ROWS.copy()
    first, second, other = (BatchSampler(2, epochs=2).batches(rows, rng(n), None) for n in ("a", "a", "b"))
    assert [b.tolist() for b in first] == [b.tolist() for b in second] != [b.tolist() for b in other]
    assert rows.tolist() == ROWS.tolist()


def test_a_longer_stream_begins_like_a_shorter_one() -> None:
    """Steps of a round are a prefix: raising `local.steps` changes no earlier batch."""
    short, long = (BatchSampler(4).batches(ROWS, rng(), n) for n in (3, 9))
    assert [b.tolist() for b in long[:3]] == [b.tolist() for b in short]


# ------------------------------------------------------------------------------------------------ padding


def test_padding_by_hand() -> None:
    """Two rows, prompts of 2 and 1 tokens: the positions before each answer token are scored, no other."""
    batch = pad([np.array([5, 6, 7, 8]), np.array([9, 4])], [2, 1], 0)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8], [9, 4, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.lengths.tolist() == [4, 2]
    assert list(zip(batch.rows.tolist(), batch.cols.tolist(), batch.targets.tolist(), strict=True)) == [
        (0, 1, 7),
        (0, 2, 8),
        (1, 0, 4),
    ]
    assert {t.dtype for t in (batch.input_ids, batch.attention_mask, batch.targets)} == {torch.int64}


def test_a_pad_token_inside_an_answer_is_scored() -> None:
    """Where the pad token is the end-of-text token, the end of an answer must still be learnt."""
    batch = pad([np.array([5, 6, 0]), np.array([5, 6, 7, 0])], [1, 1], 0)
    assert batch.targets.tolist() == [6, 0, 6, 7, 0]
    assert batch.attention_mask.sum(1).tolist() == [3, 4]


def test_classes_are_the_targets_of_a_head() -> None:
    batch = pad([np.array([5, 6]), np.array([9])], [], 1, np.array([2, 0]))
    assert batch.targets.tolist() == [2, 0] and batch.input_ids.tolist() == [[5, 6], [9, 1]]
    assert len(batch.rows) == len(batch.cols) == 0


def test_on_the_cpu_a_batch_stays_where_it_is() -> None:
    batch = pad([np.array([5, 6])], [1], 0)
    assert batch.to(torch.device("cpu")) is batch


# ------------------------------------------------------------------------------------------------ fedsim.batches


def experiment(**local: int | bool) -> Experiment:
    counts = [[6, 59, 25], [40, 0, 0]]
    return Experiment(
        rounds=3, partition={"name": "class_counts", "counts": counts}, local={"batch_size": 128, **local}
    )


def test_the_batches_of_a_client_are_rows_it_holds() -> None:
    exp = experiment(steps=3)
    parts = prepare(exp)
    for number, name in enumerate(("site-1", "site-2")):
        batches = fedsim.batches(exp, name, 1)
        assert [len(b) for b in batches] == [128] * 3
        assert set(np.concatenate(batches)) == set(parts.partition.rows(number).tolist())
        assert [b.tolist() for b in fedsim.batches(exp, number, 1)] == [b.tolist() for b in batches]
    assert np.concatenate(batches)[:40].tolist() != np.concatenate(fedsim.batches(exp, "site-2", 2))[:40].tolist()


def test_central_draws_from_every_row_as_often_as_the_config_says() -> None:
    """90 and 40 rows in passes: 1 + 1 steps of 128; central makes one pass over 130 rows, 128 and 2."""
    exp = experiment(epochs=1)
    parts = prepare(exp)
    batches = fedsim.batches(exp, "central", 2)
    assert [len(b) for b in batches] == [128, 2]
    everything = sorted(np.concatenate([parts.partition.rows(c) for c in (0, 1)]).tolist())
    assert sorted(np.concatenate(batches).tolist()) == everything
    assert [len(b) for b in fedsim.batches(experiment(steps=3), "central", 1)] == [128] * 6, (
        "as many rows as both sites"
    )
    matched = Experiment.from_dict(experiment(steps=3).to_dict() | {"central": {"match": "steps"}})
    assert [len(b) for b in fedsim.batches(matched, "central", 1)] == [128] * 3, "as many steps as one site"


@pytest.mark.parametrize(
    ("client", "round", "why"),
    [
        ("site-3", 1, "'site-3' is none of this partition's: site-1, site-2"),
        ("site-1", 0, "round: 0"),
        ("site-1", 4, "1 to rounds=3"),
    ],
)
def test_a_client_or_round_that_does_not_exist_is_refused(client: str, round: int, why: str) -> None:
    with pytest.raises(UserError, match=why):
        fedsim.batches(experiment(steps=1), client, round)
