"""FSDP1 flattens Parameters: what a forward would write into one is refused, and everything else trains."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from vqkernels.nn import VectorQuantizer


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("use_orig_params", [False, True])
@pytest.mark.parametrize("options", [dict(init="kmeans"), dict(revive="rows"), dict(revive="rows", ema_decay=0.9)])
def test_a_codebook_that_a_forward_writes_needs_moving_averages(group, options, use_orig_params):
    model = nn.Sequential(nn.Linear(4, 4), VectorQuantizer(4, 8, **options))
    wrapped = FullyShardedDataParallel(model, use_orig_params=use_orig_params, device_id=torch.device("cpu"))
    z = torch.randn(30, 4)
    if "ema_decay" in options:
        wrapped(z)[2].backward()
        assert model[1].ema_steps == 1
    else:
        with pytest.raises(RuntimeError, match=r"FSDP1\) has flattened cannot be written .* set ema_decay"):
            wrapped(z)
