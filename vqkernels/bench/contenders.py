"""The contenders of each kind of case. Those of a VQ-VAE step are models: see `run`."""

from .entropy_peers import ENTROPY
from .layers import TRAINING, Layer
from .peers import SEARCH, Peer
from .residual_peers import RESIDUAL

CONTENDERS: dict[str, tuple[Peer | Layer, ...]] = {
    "search": SEARCH,
    "training": TRAINING,
    "entropy": ENTROPY,
    **RESIDUAL,
}
