"""What every rank does in test_lucidrains_ranks.py; run as a program: rank, world size, meeting file, output."""

import sys

import torch
import torch.distributed as dist

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


def run(rank: int, world: int, layers: dict[str, torch.nn.Module]) -> dict[str, dict[str, torch.Tensor]]:
    """States after some steps, in which ranks have uneven shares of one batch, and random numbers of their own."""
    torch.manual_seed(rank)
    for number, shares in enumerate(SHARES[world]):
        rows = torch.randn(48, 4, generator=torch.Generator().manual_seed(number))
        mine = rows.split(shares)[rank].unsqueeze(0)
        for layer in layers.values():
            layer(mine)
    return {name: layer.state_dict() for name, layer in layers.items()}


if __name__ == "__main__":
    place, size, meeting, output = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    built = build()  # before the process group, as training frameworks do
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=place, world_size=size)
    torch.save(run(place, size, built), output)
    dist.destroy_process_group()
