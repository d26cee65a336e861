"""Checkpoints of the standard GatedPixelCNN: the same logits, the same samples, and mistakes that are named."""

import pytest
import torch

from benchmarks.standard_pixelcnn import MaskedPixelCNN, StandardPixelCNN
from vqkernels.models import PixelCNN, from_gated_pixelcnn


def standard(layers: int = 4) -> StandardPixelCNN:
    torch.manual_seed(0)
    return StandardPixelCNN(codes=30, dim=8, layers=layers, classes=3).double()


@pytest.mark.parametrize("layers", [1, 2, 4])
@pytest.mark.parametrize("prefix", ["", "module.", "prior.model."])
def test_the_logits_are_theirs(layers, prefix):
    theirs, codes, labels = standard(layers), torch.randint(30, (5, 6, 6)), torch.tensor([0, 1, 2, 2, 1])
    before = {key: value.clone() for key, value in theirs.state_dict().items()}
    ours = from_gated_pixelcnn({prefix + key: value for key, value in before.items()})
    torch.testing.assert_close(ours(codes, labels), theirs(codes, labels), rtol=0, atol=1e-12)
    sample = ours.sample((5, 6, 6), labels=labels, top_k=1)
    assert torch.equal(theirs(sample, labels).argmax(1), sample)
    assert ours.sample((5, 3, 7), labels=labels).shape == (5, 3, 7)  # which theirs cannot


def test_the_masked_statement_is_ours():
    """What the benchmark trains against computes the same loss from the same weights."""
    torch.manual_seed(0)
    ours = PixelCNN(30, hidden_channels=8, num_layers=3, num_classes=3).double()
    masked = MaskedPixelCNN(30, 8, 3, 3).double()
    masked.load_cropped(ours.state_dict())
    codes, labels = torch.randint(30, (3, 5, 7)), torch.tensor([0, 1, 2])
    torch.testing.assert_close(masked(codes, labels), ours(codes, labels), rtol=0, atol=1e-12)


def test_mistakes_are_named():
    state = dict(standard().state_dict())
    for change, sentence in [
        ({"extra": torch.zeros(1)}, "has a key that no GatedPixelCNN has: extra"),
        ({"layers.0.horiz_resid.bias": None}, "it has no layers.0.horiz_resid.bias"),
        ({"embedding.weight": None}, "it has no embedding.weight"),
        (
            {"output_conv.2.bias": torch.zeros(3)},
            r"head.3.bias must have shape \(30,\), but .* \(3,\)",
        ),
    ]:
        changed = {key: value for key, value in {**state, **change}.items() if value is not None}
        with pytest.raises(ValueError, match=sentence):
            from_gated_pixelcnn(changed)
