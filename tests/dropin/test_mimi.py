"""Mimi: parity with `transformers`, layer by layer and in the whole model; Kyutai's names of the same state."""

import pytest
import torch
from dropin.parity import assert_same_codes, assert_same_state, load_both_ways

from vqkernels import restore_quantizers, swap_quantizers
from vqkernels.dropin import mimi, swap

transformers = pytest.importorskip("transformers")
PEERS = transformers.models.mimi.modeling_mimi
SIZES = dict(
    hidden_size=16,
    num_filters=4,
    codebook_size=64,
    codebook_dim=8,
    vector_quantization_hidden_dimension=8,
    num_quantizers=4,
    num_hidden_layers=1,
    intermediate_size=16,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=8,
    upsampling_ratios=[4, 2],
    upsample_groups=16,
)


def config(**options):
    return transformers.MimiConfig(**(SIZES | options))


def model():
    torch.manual_seed(0)
    built = transformers.MimiModel(config()).eval()
    for name, buffer in built.quantizer.named_buffers():
        if name.endswith("embed_sum"):
            buffer.normal_()
        elif name.endswith("cluster_usage"):
            buffer.uniform_(0.5, 2)
            buffer[3] = 0  # at the clamp
    return built


def test_a_whole_model_encodes_and_decodes_the_same_and_is_restored():
    theirs, ours = model(), model()
    peers = list(ours.quantizer.acoustic_residual_vector_quantizer.layers)
    report = swap_quantizers(ours)
    assert [e.name for e in report.swapped] == [
        f"quantizer.{part}_residual_vector_quantizer.layers.{i}"
        for part, count in (("semantic", 1), ("acoustic", 3))
        for i in range(count)
    ]
    assert_same_state(ours, theirs, rtol=0, atol=0)
    audio = torch.randn(2, 1, 4800)
    with torch.no_grad():
        codes, codes_ = (m.encode(audio).audio_codes for m in (ours, theirs))
        assert (codes == codes_).float().mean() >= 0.999 and codes.shape == codes_.shape
        values = theirs.decode(codes_).audio_values
        torch.testing.assert_close(ours.decode(codes_).audio_values, values)
        torch.testing.assert_close(ours(audio).audio_values, theirs(audio).audio_values, rtol=1e-3, atol=1e-3)
        ours.double()  # the peer would go on with the codes that it computed in float32
        torch.testing.assert_close(ours.decode(codes_).audio_values.float(), values, rtol=1e-3, atol=1e-3)
    state = {k: v * 1.5 if v.is_floating_point() else v for k, v in ours.state_dict().items()}
    ours.load_state_dict(state)
    restore_quantizers(ours)
    layers = ours.quantizer.acoustic_residual_vector_quantizer.layers
    assert list(layers) == peers and type(layers[0].codebook) is PEERS.MimiEuclideanCodebook
    assert all(value.equal(state[key]) for key, value in ours.state_dict().items())
    book = layers[0].codebook
    assert book.embed.equal(book.embed_sum / book.cluster_usage.clamp(min=1e-5)[:, None])  # its cache is of now


@pytest.mark.parametrize("kind", ["VectorQuantization", "EuclideanCodebook"])
def test_layers_alone(kind):
    peer = getattr(PEERS, f"Mimi{kind}")
    theirs, built = peer(config()), getattr(mimi, f"Mimi{kind}")(config())
    load_both_ways(built, theirs)
    for name, value in theirs.named_buffers():
        value.uniform_(1, 2) if name.endswith("usage") else value.normal_()
    ours = swap.ADAPTERS[f"{peer.__module__}.{peer.__qualname__}"](theirs)
    built.load_state_dict(theirs.state_dict())
    x = torch.randn(5, 8, 300) if kind == "VectorQuantization" else torch.randn(5, 300, 8)
    rows = x.transpose(1, 2).reshape(-1, 8) if kind == "VectorQuantization" else x.reshape(-1, 8)
    codes = getattr(theirs, "codebook", theirs).embed
    for layer in (ours, built):
        assert_same_codes(layer.encode(x), theirs.encode(x), rows, codes)
        assert layer.decode(layer.encode(x)).equal(theirs.decode(layer.encode(x)))


def test_codes_follow_their_sums():
    book = mimi.MimiEuclideanCodebook(config())
    assert not book.embed.any()
    book.embed_sum.normal_()
    book.cluster_usage.fill_(2)
    assert book.embed.equal(book.embed_sum / 2)
    book.load_state_dict({key: torch.full_like(value, 4) for key, value in book.state_dict().items()})
    assert book.embed.eq(1).all()
    book.to(torch.float64)
    assert book.embed.dtype == torch.float64
    with torch.inference_mode():
        book.embed_sum.add_(4)
    assert book.embed.eq(2).all()


def test_codes_follow_data_that_no_version_counts():
    layer = mimi.MimiVectorQuantization(config())
    x = torch.randn(2, 8, 40)
    layer.encode(x)
    layer.codebook.embed_sum.data.copy_(torch.randn_like(layer.codebook.embed_sum))
    nearest = torch.cdist(x.mT, layer.codebook.embed_sum).argmin(-1)
    assert layer.encode(x).equal(nearest)
    assert layer.decode(nearest).equal(layer.codebook.embed_sum[nearest].mT)


def test_a_batch_gets_the_codes_of_its_rows_alone():
    layer = mimi.MimiVectorQuantization(config(codebook_size=512))
    layer.codebook.embed_sum.normal_()
    x = torch.randn(16, 8, 40)
    assert layer.encode(x).equal(torch.cat([layer.encode(one[None]) for one in x]))


@pytest.mark.parametrize("old", [False, True])
def test_kyutais_names(old):
    names = ("inited", "cluster_size", "embed_avg") if old else ("_initialized", "cluster_usage", "embedding_sum")
    split = PEERS.MimiSplitResidualVectorQuantizer(config())
    theirs = {}
    for key, value in split.state_dict().items():
        value = torch.randn_like(value)
        key = key.replace("semantic_residual_vector_quantizer", "rvq_first").replace(
            "acoustic_residual_vector_quantizer", "rvq_rest"
        )
        key = key.replace(".layers", ".vq.layers").replace(".codebook.", "._codebook.")
        for name, kyutai in zip(("initialized", "cluster_usage", "embed_sum"), names, strict=True):
            if key.endswith(f".{name}"):
                key = key.removesuffix(name) + kyutai
        theirs[f"quantizer.{key}"] = value
    assert (
        f"quantizer.rvq_rest.vq.layers.2._codebook.{names[2]}" in theirs
        and "quantizer.rvq_first.input_proj.weight" in theirs
    )
    found = mimi.from_moshi(theirs)
    split.load_state_dict({key.removeprefix("quantizer."): value for key, value in found.items()})
    sums = theirs[f"quantizer.rvq_rest.vq.layers.2._codebook.{names[2]}"]
    assert split.acoustic_residual_vector_quantizer.layers[2].codebook.embed_sum.equal(sums)
    assert mimi.from_moshi(found).keys() == found.keys()
