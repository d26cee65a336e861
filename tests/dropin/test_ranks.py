"""Averages over two gloo processes are those of one process on the joined batch; the layers are older than the group.

Run as a program it is one of the processes: rank, world size, meeting file, output.
"""

import pytest
import ranks
import torch

from vqkernels.dropin.encodec import EuclideanCodebook
from vqkernels.dropin.lucidrains import ResidualVQ
from vqkernels.dropin.rosinality import Quantize

SHARES = {1: [[40]] * 4, 2: [[20, 20], [37, 3], [40, 0], [0, 40]]}
LAYERS = {
    "rosinality": lambda: Quantize(4, 12),
    "encodec": lambda: EuclideanCodebook(4, 12),
    "encodec from data": lambda: EuclideanCodebook(4, 12, kmeans_init=True),
}


LEFT_OUT = {
    "rosinality": LAYERS["rosinality"],
    "encodec from data": LAYERS["encodec from data"],
    "lucidrains": lambda: ResidualVQ(
        dim=4,
        num_quantizers=3,
        codebook_size=12,
        kmeans_init=True,
        threshold_ema_dead_code=2,
        quantize_dropout=True,
        sync_codebook=False,
    ),
}


def learned_alone() -> dict[str, torch.Tensor]:
    """The states of layers that leave the process group out, after some steps."""
    torch.manual_seed(3)
    layers = {name: build() for name, build in LEFT_OUT.items()}
    for layer in layers.values():
        layer.synchronise = False  # lucidrains' has an argument
        for _ in range(4):
            layer(torch.randn(1, 40, 4))
    return {f"{name}.{key}": value for name, layer in layers.items() for key, value in layer.state_dict().items()}


def built() -> dict[str, torch.nn.Module]:
    torch.manual_seed(3)
    return {name: build() for name, build in LAYERS.items()}


def trained(layers: dict[str, torch.nn.Module], rank: int, world: int) -> dict[str, torch.Tensor]:
    for step in range(4):
        x = torch.randn(40, 4, generator=torch.Generator().manual_seed(step))
        for layer in layers.values():
            layer(x.split(SHARES[world][step])[rank])
    return {f"{name}.{key}": value for name, layer in layers.items() for key, value in layer.state_dict().items()}


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[dict[str, dict[str, torch.Tensor]]]:
    """What two processes learned, together and alone."""
    return ranks.start(__file__, 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.slow
def test_two_processes_agree_with_one_on_the_joined_batch(two):
    first, second = (rank["joined"] for rank in two)
    alone = trained(built(), 0, 1)
    assert first.keys() == second.keys() == alone.keys()
    for key, value in first.items():
        assert value.equal(second[key]), key
        if "from data" not in key:  # rank 0 begins with the codes of its own rows
            torch.testing.assert_close(value, alone[key], rtol=1e-4, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")
    assert first["encodec from data.inited"].item() == 1 and first["encodec from data.embed"].isfinite().all()


@pytest.mark.slow
def test_layers_of_one_rank_alone_leave_the_group_out(two):
    apart = two[1]["alone"]
    for key, value in learned_alone().items():
        torch.testing.assert_close(apart[key], value, msg=lambda m, key=key: f"{key}: {m}")


def run(rank: int, world: int, meeting: str) -> dict[str, dict[str, torch.Tensor]]:
    early = built()
    with ranks.joined(rank, world, meeting):
        return {"joined": trained(early, rank, world), "alone": learned_alone() if rank == 1 else {}}


if __name__ == "__main__":
    ranks.main(run)
