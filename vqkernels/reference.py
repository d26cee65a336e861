"""The specification: the exactness contract and every operation, written plainly. Slow, any device, float64.

Tests, benchmarks and the curious import this file; nothing fast does. Shapes here are canonical: z `(N, D)`, codebook
`(K, D)`, mask `(N,)`; a leading head axis on all of them means one independent problem per head.

The contract. The index of row z is the lowest k that minimises

    S_k = sum over d = 0 .. D-1, in order, of (z_d - e_kd)^2

in float64 on the stored values, subtraction, multiplication and addition each rounded separately. For `metric="dot"` it
is the lowest k that maximises the sum of z_d * e_kd in the same arithmetic, for `metric="cosine"` that sum divided by
sqrt(sum of e_kd^2), where a zero code scores 0. A code with a NaN or an infinity is never chosen (all such: index 0). A
row with one gets index 0, code 0, and counts nowhere. A masked row gets index -1 and zeros.
"""

import math

import torch
from torch import Tensor

METRICS = ("euclidean", "dot", "cosine")
OPPOSITE = 2.0**-52  # |u + q|^2 of two unit vectors at or below which they are opposite to within rounding


def scores(z: Tensor, codebook: Tensor, metric: str = "euclidean") -> Tensor:
    """The contract's scores `(N, K)` in float64; the smallest is nearest. Non-finite codes and NaN scores are +inf."""
    rows, codes = z.detach().to(torch.float64), codebook.detach().to(torch.float64)
    total = rows.new_zeros(len(rows), len(codes))
    for d in range(rows.shape[1]):
        if metric == "euclidean":
            difference = rows[:, None, d] - codes[None, :, d]
            total = total + difference * difference
        else:
            total = total - rows[:, None, d] * codes[None, :, d]
    if metric == "cosine":
        norm = code_norms(codes)
        total = torch.where(norm > 0, total / norm.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
    never = ~codes.isfinite().all(1) | total.isnan()
    return total.masked_fill(never, torch.inf)


def code_norms(codes: Tensor) -> Tensor:
    """sqrt(sum of e_d^2) `(K,)` of float64 codes `(K, D)`: channels in order, and one correctly rounded root.

    On the CPU `torch.sqrt` may be off by one unit in the last place (it calls a vector library); `math.sqrt` is not.
    """
    square = codes.new_zeros(len(codes))
    for channel in codes.T:
        square = square + channel * channel
    if codes.device.type == "cpu":
        return torch.tensor([math.sqrt(x) if x >= 0 else x for x in square.tolist()], dtype=torch.float64)
    return square.sqrt()


def nearest(z: Tensor, codebook: Tensor, *, mask: Tensor | None = None, metric: str = "euclidean") -> Tensor:
    """The index of each row under the contract: `(N,)` int64."""
    if codebook.dim() == 3:
        masks = [None] * len(z) if mask is None else list(mask)
        heads = zip(z, codebook, masks, strict=True)
        return torch.stack([nearest(rows, codes, mask=m, metric=metric) for rows, codes, m in heads])
    table = scores(z.nan_to_num(0.0, 0.0, 0.0), codebook, metric)
    lowest = table.min(dim=1, keepdim=True).values
    # The lowest index among equals. Where every score is +inf that is the first finite code, or 0 if there is none.
    finite = codebook.detach().isfinite().all(1)
    equal = (table == lowest) & (finite | ~finite.any())
    indices = equal.int().argmax(dim=1)
    indices = torch.where(z.detach().isfinite().all(1), indices, 0)
    return indices if mask is None else torch.where(mask, indices, -1)


def code_probabilities(z: Tensor, codebook: Tensor, temperature: float, *, metric: str = "euclidean") -> Tensor:
    """With which probability sampling draws each code: `(N, K)` float64, `softmax(-scores / temperature)`.

    Q_tau of Lee et al. 2022, "Autoregressive Image Generation using Residual Quantization". Codes with a NaN or an
    infinity are never drawn.
    """
    return (-scores(z, codebook, metric) / temperature).softmax(1)


def statistics(z: Tensor, indices: Tensor, codebook_size: int, *, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """How many rows chose each code, `(K,)` int64, and their sums, `(K, D)` float64."""
    if z.dim() == 3:
        masks = [None] * len(z) if mask is None else list(mask)
        parts = [statistics(x, i, codebook_size, mask=m) for x, i, m in zip(z, indices, masks, strict=True)]
        return torch.stack([c for c, _ in parts]), torch.stack([s for _, s in parts])
    counted = (indices >= 0) & z.detach().isfinite().all(1)
    if mask is not None:
        counted = counted & mask
    rows, codes = z.detach()[counted].to(torch.float64), indices[counted]
    counts = torch.zeros(codebook_size, dtype=torch.int64, device=z.device)
    sums = torch.zeros(codebook_size, z.shape[1], dtype=torch.float64, device=z.device)
    for row, code in zip(rows, codes.tolist(), strict=True):
        counts[code] += 1
        sums[code] += row
    return counts, sums


def rotate(step: Tensor, z: Tensor, codes: Tensor) -> Tensor:
    """The linear map that takes each row z to its code e, applied to `step`; all `(..., D)`, computed in float64.

    Fifty et al. 2024, "Restructuring Vector Quantization with the Rotation Trick": with u = z/|z|, q = e/|e| and
    w = (u + q)/|u + q|, the map is |e|/|z| (I - 2 w w^T + 2 q u^T), constant with respect to z. Where u
    and q are opposite there is no such rotation, and w = 0 makes it the reflection that takes u to q. Where z or e is
    zero there is no direction: the map is the identity, which is the straight-through gradient.
    """
    wide, target = z.detach().to(torch.float64), codes.detach().to(torch.float64)
    step = step.to(torch.float64)
    z_norm, e_norm = (torch.linalg.vector_norm(x, dim=-1, keepdim=True) for x in (wide, target))
    directed = (z_norm != 0) & (e_norm != 0)
    one = torch.ones((), dtype=torch.float64, device=z.device)
    u, q = wide / torch.where(directed, z_norm, one), target / torch.where(directed, e_norm, one)
    square = (u + q).square().sum(-1, keepdim=True)
    w = torch.where(square > OPPOSITE, (u + q) / square.clamp_min(OPPOSITE).sqrt(), 0.0)
    turned = step - 2 * (step * w).sum(-1, keepdim=True) * w + 2 * (step * u).sum(-1, keepdim=True) * q
    return torch.where(directed, e_norm / torch.where(directed, z_norm, one) * turned, step)


def vector_quantize(
    z: Tensor,
    codebook: Tensor,
    *,
    mask: Tensor | None = None,
    metric: str = "euclidean",
    gradient: str = "straight_through",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantized rows, indices, codebook loss and commitment loss (van den Oord et al. 2017, equation 3).

    `codebook_loss = mean ||sg[z] - e||^2`, `commitment_loss = mean ||z - sg[e]||^2`, both over all unmasked elements;
    the gradient of the quantized rows passes straight through to z, or with `gradient="rotation"` through the transpose
    of the map of `rotate`. Differentiable by autograd in the inputs' dtype.
    Where a row is not finite, forward values hold but its gradient is NaN by contract, which autograd does not show.
    """
    indices = nearest(z, codebook, mask=mask, metric=metric)
    if codebook.dim() == 3:
        codes = torch.stack([e[i.clamp_min(0)] for e, i in zip(codebook, indices, strict=True)])
    else:
        codes = codebook[indices.clamp_min(0)]
    kept = (indices >= 0).unsqueeze(-1)
    elements = max(int(kept.sum()), 1) * z.shape[-1]
    zero = torch.zeros((), dtype=codes.dtype, device=codes.device)
    codebook_loss = torch.where(kept, z.detach() - codes, zero).square().sum() / elements
    commitment_loss = torch.where(kept, z - codes.detach(), zero).square().sum() / elements
    finite = torch.where(kept, z, 0.0).detach().isfinite().all(-1, keepdim=True)
    through = torch.where(kept & finite, z - z.detach(), 0.0)  # zero; it carries the gradient
    if gradient == "rotation":
        row = torch.where(kept & finite, z.detach(), 0.0)
        through = rotate(through, row, torch.where(kept, codes.detach(), zero))
    quantized = torch.where(kept, codes.detach(), zero).to(z.dtype) + through.to(z.dtype)
    return quantized, indices, codebook_loss, commitment_loss


def residual_vector_quantize(
    z: Tensor,
    codebooks: Tensor,
    *,
    levels: Tensor | None = None,
    metric: str = "euclidean",
    gradient: str = "straight_through",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantized rows, indices `(N, Q)`, codebook losses and commitment losses `(Q,)` of a residual quantizer.

    Zeghidour et al. 2021, "SoundStream", algorithm 1. `codebooks (Q, K, D)`; `levels (N,)` int64, how many of the Q
    levels each row passes (0: masked). r_0 = z in float32 (float64 where z is), and level q looks for the code e_q
    nearest to r_q under the contract; r_{q+1} = r_q - e_q, rounded once to r's dtype. Quantized is e_0 + e_1 + ... in
    that order, each sum rounded to float32 (float64 where the codebooks are). Gradients pass from level to level
    through z alone: the losses of level q are those of `vector_quantize` at r_q = z - sg[e_0 + ... + e_{q-1}].
    """
    number = codebooks.shape[0]
    passed = torch.full((len(z),), number, device=z.device) if levels is None else levels
    residual = z.detach().to(torch.float64 if z.dtype == torch.float64 else torch.float32)
    total = torch.zeros_like(z, dtype=torch.float64 if codebooks.dtype == torch.float64 else torch.float32)
    indices, codebook_losses, commitment_losses = [], [], []
    for q in range(number):
        mask = passed > q
        index = nearest(residual, codebooks[q], mask=mask, metric=metric)
        codes = codebooks[q][index.clamp_min(0)]
        kept = mask.unsqueeze(-1)
        finite = kept & residual.isfinite().all(-1, keepdim=True)
        carried = residual + torch.where(finite, z - z.detach(), 0.0).to(residual.dtype)
        elements = max(int(mask.sum()), 1) * z.shape[-1]
        codebook_losses.append(torch.where(kept, residual - codes, 0.0).square().sum() / elements)
        commitment_losses.append(torch.where(kept, carried - codes.detach(), 0.0).square().sum() / elements)
        total = torch.where(kept, codes.detach().to(total.dtype) if q == 0 else total + codes.detach(), total)
        residual = torch.where(kept, (residual.double() - codes.detach().double()).to(residual.dtype), residual)
        indices.append(index)
    finite = z.detach().isfinite().all(-1, keepdim=True)
    through = torch.where((passed > 0).unsqueeze(-1) & finite, z - z.detach(), 0.0)
    if gradient == "rotation":
        through = rotate(through, torch.where(finite, z.detach(), 0.0), total)
    quantized = total.to(z.dtype) + through.to(z.dtype)
    return quantized, torch.stack(indices, -1), torch.stack(codebook_losses), torch.stack(commitment_losses)


def entropy_loss(
    z: Tensor, codebook: Tensor, temperature: float, *, mask: Tensor | None = None, metric: str = "euclidean"
) -> tuple[Tensor, Tensor]:
    """Mean entropy of the rows' assignments, and entropy of their mean assignment, in nats; float64, with gradients.

    p_i = softmax over j of -|z_i - e_j|^2 / temperature, or of z_i.e_j / temperature with `metric="dot"`; the first is
    the mean over rows of -sum_j p_ij log p_ij, the second -sum_j m_j log m_j with m the mean of p_i over rows (Yu et
    al. 2023, "Language Model Beats Diffusion: Tokenizer is Key to Visual Generation"). Codes that are not finite have
    probability 0. A row that is not finite counts nowhere and makes both entropies NaN; its own gradient is NaN by
    contract, which autograd does not show. With no row that counts both are 0.
    """
    if codebook.dim() == 3:
        masks = [None] * len(z) if mask is None else list(mask)
        heads = zip(z, codebook, masks, strict=True)
        parts = [entropy_loss(rows, codes, temperature, mask=m, metric=metric) for rows, codes, m in heads]
        return torch.stack([a for a, _ in parts]), torch.stack([b for _, b in parts])
    rows = z if mask is None else z[mask]
    finite = rows.detach().isfinite().all(1)
    rows, codes = rows[finite].to(torch.float64), codebook[codebook.detach().isfinite().all(1)].to(torch.float64)
    logits = rows.new_zeros(len(rows), len(codes))
    for x, e in zip(rows.T, codes.T, strict=True):
        logits = logits + (x[:, None] * e if metric == "dot" else -(x[:, None] - e).square())
    logarithms = (logits / temperature).log_softmax(1)
    count = max(len(rows), 1)
    sample_entropy = -(logarithms.exp() * logarithms).sum() / count
    mean = logarithms.exp().sum(0) / count
    codebook_entropy = -(mean * torch.where(mean > 0, mean, 1.0).log()).sum()
    poison = 0.0 if bool(finite.all()) else torch.nan
    return sample_entropy + poison, codebook_entropy + poison
