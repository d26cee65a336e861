"""Draws of rows: distinct, covering, spread evenly, repeatable, and blind to what is masked or not finite."""

import pytest
import torch

from vqkernels.nn.random import count_rows, draw_positions, hashed, step_key, take_rows
from vqkernels.nn.rows import RowLayout, Rows


def step(number):
    return torch.tensor(number)


@pytest.mark.parametrize("total", [0, 1, 5, 16, 17, 1000, 2**40])
def test_positions_are_distinct_in_range_and_as_many_as_there_can_be(total):
    for number in range(20):
        draws = hashed(step(7), step(number), 17)
        for turn in (draws[16], None):
            positions, real = draw_positions(draws[:16], torch.tensor(total), turn)
            drawn = positions[real]
            assert len(drawn) == len(drawn.unique()) == min(total, 16)
            assert ((drawn >= 0) & (drawn < total)).all()
        assert drawn.equal(drawn.sort().values)


def test_every_row_is_drawn_equally_often():
    times = torch.zeros(37)
    for number in range(4000):
        draws = hashed(step(0), step(number), 9)
        positions, real = draw_positions(draws[:8], torch.tensor(37), draws[8])
        times[positions[real]] += 1
    expected = 4000 * 8 / 37
    assert ((times - expected).abs() < 5 * expected**0.5).all()


def test_the_hash_looks_uniform_and_depends_on_all_its_keys():
    first = hashed(step(0), step(0), 4096)
    assert first.min() >= 0 and first.max() < 2**32 and len(first.unique()) == 4096
    frequency = torch.bincount(first >> 28, minlength=16)
    assert ((frequency - 256).abs() < 5 * 16).all()
    for other in (hashed(step(1), step(0), 4096), hashed(step(0), step(1), 4096), hashed(step(-1), step(0), 4096)):
        assert (first == other).float().mean() < 0.01 and (first[1:] == other[:-1]).float().mean() < 0.01
    assert hashed(step(0), step(0), 4096).equal(first) and hashed(step(2**63 - 1), step(2**62), 4).max() < 2**32
    assert not hashed(step(2**32), step(0), 8).equal(hashed(step(0), step(0), 8))


def test_step_keys_of_different_seeds_and_steps_differ():
    keys = {int(step_key(step(seed), step(number))) for seed in (0, 1, -1, 2**40) for number in range(100)}
    assert len(keys) == 400 and all(-(2**63) <= key < 2**63 for key in keys)


@pytest.mark.parametrize("shape,channel_dim", [((4, 5, 6), 2), ((4, 6, 5), 1), ((2, 6, 2, 5), 1), ((20, 6), 1)])
@pytest.mark.parametrize("number,separate", [(1, False), (2, False), (2, True)])
def test_taken_rows_are_the_rows_that_count(shape, channel_dim, number, separate):
    z = torch.randn(shape)
    mask = torch.rand(z.select(channel_dim, 0).shape) < 0.5
    z = torch.where(mask.unsqueeze(channel_dim), z, torch.nan)
    rows = RowLayout.of(z, 6, channel_dim, mask=mask, heads=number, separate=separate).split(z)
    total = count_rows(rows)
    assert total == mask.sum() * (number if number > 1 and not separate else 1)
    positions = torch.arange(rows.number + 3)
    taken, usable = take_rows(rows, positions, torch.ones_like(positions, dtype=torch.bool))
    values = rows.values.movedim(rows.channel_dim, -1)
    if separate:
        expected = torch.stack([values[h][mask] for h in range(number)])
    else:
        expected = values[rows.mask].unsqueeze(0)
    assert usable[:, : int(total)].all() and not usable[:, int(total) :].any()
    assert taken[:, : int(total)].equal(expected) and taken[:, int(total) :].eq(0).all()


def test_rows_that_are_not_finite_or_not_there_are_not_usable():
    z = torch.randn(6, 3)
    z[2, 1], z[4, 0] = torch.nan, torch.inf
    positions = torch.tensor([-1, 0, 2, 3, 4, 6])
    taken, usable = take_rows(Rows(z, None, 1, False), positions, torch.tensor([True, True, True, False, True, True]))
    assert usable.tolist() == [[False, True, False, False, False, False]]
    assert taken[0, 1].equal(z[0]) and taken[0, 2:].eq(0).all()
