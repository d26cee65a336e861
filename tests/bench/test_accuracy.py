"""The judge of indices finds what is wrong, in the sample and outside it."""

import torch

from vqkernels import reference
from vqkernels.bench import accuracy


def test_a_planted_wrong_index_is_counted_for_who_gave_it():
    z, codebook = torch.randn(500, 6), torch.randn(33, 6)
    right = reference.nearest(z, codebook)
    wrong = right.clone()
    wrong[[3, 77, 400]] = (wrong[[3, 77, 400]] + 1) % 33
    told = accuracy.judge(z, codebook, {"ours": right, "theirs": wrong})
    assert told.wrong == {"ours": 0, "theirs": 3} and told.checked == 500 and told.disputed == 3


def test_rows_in_dispute_are_checked_outside_the_sample(monkeypatch):
    monkeypatch.setattr(accuracy, "_SCORES", 1.0)  # the sample shrinks to its least, 64 rows
    z, codebook = torch.randn(5000, 4), torch.randn(16, 4)
    right = reference.nearest(z, codebook)
    wrong = right.clone()
    wrong[::500] = (wrong[::500] + 1) % 16
    told = accuracy.judge(z, codebook, {"first": wrong, "second": right})
    assert told.wrong == {"first": 10, "second": 0} and told.checked < 100


def test_the_contract_in_pieces_is_the_contract(monkeypatch):
    monkeypatch.setattr(accuracy, "_CHUNK", 100)
    z, codebook = torch.randn(101, 5), torch.randn(17, 5)
    assert torch.equal(accuracy.contract(z, codebook), reference.nearest(z, codebook))
