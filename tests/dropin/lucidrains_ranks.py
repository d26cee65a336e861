"""What every rank does in test_lucidrains_ranks.py; run as a program: rank, world size, meeting file, output."""

import ranks
import torch

from vqkernels.dropin.lucidrains import ResidualVQ, VectorQuantize

SHARES = {1: [[48]] * 4, 2: [[24, 24], [40, 8], [48, 0], [1, 47]]}
LAYERS = {
    "ema": (VectorQuantize, {"codebook_size": 12}),
    "heads": (VectorQuantize, {"codebook_size": 12, "heads": 2, "codebook_dim": 2, "separate_codebook_per_head": True}),
    "not synced": (VectorQuantize, {"codebook_size": 12, "sync_codebook": False}),
    "revived": (VectorQuantize, {"codebook_size": 12, "threshold_ema_dead_code": 3, "kmeans_init": True}),
    "residual": (
        ResidualVQ,
        {"codebook_size": 12, "num_quantizers": 4, "quantize_dropout": True, "shared_codebook": True},
    ),
}


def build() -> dict[str, torch.nn.Module]:
    layers = {}
    for name, (kind, arguments) in LAYERS.items():
        torch.manual_seed(11)
        layers[name] = kind(dim=4, **arguments)
    return layers


def trained(rank: int, world: int, layers: dict[str, torch.nn.Module]) -> dict[str, dict[str, torch.Tensor]]:
    """States after some steps, in which ranks have uneven shares of one batch, and random numbers of their own."""
    torch.manual_seed(rank)
    for number, shares in enumerate(SHARES[world]):
        rows = torch.randn(48, 4, generator=torch.Generator().manual_seed(number))
        mine = rows.split(shares)[rank].unsqueeze(0)
        for layer in layers.values():
            layer(mine)
    return {name: layer.state_dict() for name, layer in layers.items()}


def run(rank: int, world: int, meeting: str = "") -> dict[str, dict[str, torch.Tensor]]:
    layers = build()  # before the process group, as training frameworks do
    with ranks.joined(rank, world, meeting):
        return trained(rank, world, layers)


if __name__ == "__main__":
    ranks.main(run)
