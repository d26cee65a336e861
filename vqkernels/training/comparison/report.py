"""The report of a comparison: every number in it is a field of `Comparison`, rounded."""

from collections.abc import Mapping

import torch

from vqkernels.training.comparison.collapse import Collapse
from vqkernels.training.comparison.contenders import CONTINUOUS, DECAY
from vqkernels.training.comparison.measures import Figures
from vqkernels.training.comparison.run import Comparison, Pictures, data_name
from vqkernels.training.pictures import image_grid
from vqkernels.training.report import Block, Document, Gallery, Heading, Listing, Paragraph, Picture, Plot, Table, plots

PAPER = (("VAE", 4.51), ("VQ-VAE", 4.67), ("VIMCO", 5.14))  # van den Oord et al. 2017, section 4.1
GOAL = 0.3  # bits per dimension that the VQ-VAE may lie above the VAE
COLLAPSED = 1.0  # bits per image: below it the latents hold next to nothing of the image


def document(found: Comparison, pictures: Pictures, facts: Mapping[str, str], command: str) -> Document:
    """The report.

    Args:
        facts: what the figures depend on, such as the machine and the versions.
        command: what reproduces it.
    """
    name, (channels, height, width) = data_name(found.settings.run.data), found.shape
    run = found.settings.run
    summary = (
        f"{found.images['train']:,} training images of {name}, {width}×{height}×{channels}; "
        f"{run.vqvae.steps:,} steps of {run.vqvae.batch_size} images for each model, seed {run.seed}. "
        f"Figures are of {found.images['evaluated']:,} held-out images."
    )
    blocks: list[Block] = [
        *_likelihoods(found),
        *_collapse(found.collapse, found.images["collapse_evaluated"]),
        *_use(found),
        *_pictures(found, pictures),
        *_curves(found),
        *_settings(found, facts, command),
    ]
    return Document(f"VQ-VAE and VAE side by side: {name}", summary, tuple(blocks))


def verdict(found: Comparison) -> str:
    """Whether the better VQ-VAE is as near to the VAE as it should be."""
    vae = next(x for x in found.figures if x.name == CONTINUOUS)
    best = min((x for x in found.figures if x.name != CONTINUOUS), key=lambda x: x.likelihoods.best_bound or 0.0)
    assert best.likelihoods.best_bound is not None
    gap = best.likelihoods.best_bound - vae.likelihoods.bound
    uniform = best.likelihoods.bound - vae.likelihoods.bound
    return (
        f"{best.name} with its trained prior needs {best.likelihoods.best_bound:.2f} bits per dimension, the VAE "
        f"{vae.likelihoods.bound:.2f}: {_difference(gap)}, {'within' if gap <= GOAL else 'not within'} the {GOAL} that "
        f"were aimed at. With the uniform prior it is {_difference(uniform)}."
    )


def _difference(gap: float) -> str:
    return f"{abs(gap):.2f} {'more' if gap >= 0 else 'fewer'}"


def _likelihoods(found: Comparison) -> list[Block]:
    rows = []
    for figures in found.figures:
        likelihoods, discrete = figures.likelihoods, figures.name != CONTINUOUS
        rows.append(
            (
                figures.name,
                f"{likelihoods.given_latents:.3f}",
                f"{likelihoods.rate:.3f}",
                f"{likelihoods.bound:.3f}",
                f"{likelihoods.best_rate:.3f}" if likelihoods.best_rate is not None else "–",
                f"{likelihoods.best_bound:.3f}" if discrete else "–",
                "–" if discrete else f"{likelihoods.best_bound:.3f}",
                f"{figures.squared_error:.4f}",
            )
        )
    parts = {
        "pixels given latents": [x.likelihoods.given_latents for x in found.figures],
        "latents": [_best_rate(x) for x in found.figures],
    }
    samples = found.settings.importance_samples
    return [
        Heading("Bits per dimension"),
        Paragraph(verdict(found), strong=True),
        Table(
            (
                "model",
                "pixels given latents",
                "latents: uniform prior, KL",
                "bound: uniform prior, ELBO",
                "codes, trained prior",
                "bound, trained prior",
                f"importance-weighted, {samples} samples",
                "squared error",
            ),
            tuple(rows),
            "Upper bounds of −log2 p(x) per pixel and channel; lower is better. A VQ-VAE: −log2 p(x | codes) − log2 "
            "p(codes), with the uniform prior and with a PixelCNN that was trained on the codes afterwards. A VAE: the "
            "evidence lower bound (its prior is a standard normal distribution), and the importance-weighted one. The "
            "trained prior is a second model with steps of its own, which a VAE does not have; the columns before it "
            "are without.",
        ),
        Plot(
            "bits_per_dimension",
            plots.bars(parts, [x.name for x in found.figures], across="bits per dimension"),
            "What an image costs: its pixels given the latents, and the latents (trained prior; KL divergence).",
        ),
        Paragraph(
            "The paper's own figures are of CIFAR-10, after 250,000 steps of 128 images. They are not comparable digit "
            "for digit: the CIFAR-10 images at hand where this was developed are JPEG re-encodings, whose pixels are "
            "not those of the original files; the likelihood and the sizes are the ones named below; and the training "
            "is a small fraction of the paper's. What can be set beside one another is the distance between VQ-VAE and "
            "VAE, 0.16 bits in the paper."
        ),
        _beside_the_paper(found),
    ]


def _beside_the_paper(found: Comparison) -> Table:
    vae = next(x for x in found.figures if x.name == CONTINUOUS)
    ours = {"VAE": f"{vae.likelihoods.bound:.2f}"}
    discrete = [x.likelihoods.best_bound for x in found.figures if x.likelihoods.best_bound and x is not vae]
    ours["VQ-VAE"] = f"{min(discrete):.2f}"
    return Table(
        ("bits per dimension", "paper, CIFAR-10", f"here, {data_name(found.settings.run.data)}"),
        tuple((name, f"{value:.2f}", ours.get(name, "not trained")) for name, value in PAPER),
        "The VQ-VAE here is the better of the two, with its trained prior.",
    )


def _best_rate(figures: Figures) -> float:
    best = figures.likelihoods.best_rate
    return figures.likelihoods.rate if best is None else best


def _collapse(collapse: Collapse, images: int) -> list[Block]:
    gone, kept = collapse.vae_kl < COLLAPSED, collapse.vqvae_gain > COLLAPSED
    dimensions = collapse.dimensions

    def row(name: str, given: float, cost: float | None, shuffled: float | None, use: str) -> tuple[str, ...]:
        return (
            name,
            f"{given:.2f}",
            "–" if cost is None else f"{cost:.2f}",
            f"{(given + (cost or 0.0)) / dimensions:.3f}",
            "–" if shuffled is None else f"{shuffled - given:.2f}",
            "–" if shuffled is None else f"{collapse.alone - given:.2f}",
            use,
        )

    return [
        Heading("Collapse"),
        Paragraph(
            f"With an autoregressive decoder the VAE's divergence is {collapse.vae_kl:.2f} bits an image and "
            f"{collapse.active_units} of its {collapse.units} units are active: "
            f"its posterior has {'' if gone else 'not '}collapsed. The VQ-VAE's codes have a perplexity of "
            f"{collapse.perplexity:.1f} of {collapse.codebook_size}, and an image's own codes are worth "
            f"{collapse.vqvae_gain:.1f} bits beside another image's: they are {'' if kept else 'not '}used.",
            strong=True,
        ),
        Table(
            (
                "PixelCNN decoder",
                "pixels given latents, bits an image",
                "latents: KL, uniform prior",
                "bound, bits per dimension",
                "own latents' gain over another image's",
                "gain over no latents",
                "in use",
            ),
            (
                row("without latents", collapse.alone, None, None, "–"),
                row(
                    "VAE",
                    collapse.vae_given_latents,
                    collapse.vae_kl,
                    collapse.vae_shuffled,
                    f"{collapse.active_units} of {collapse.units} units",
                ),
                row(
                    "VQ-VAE (EMA)",
                    collapse.vqvae_given_codes,
                    collapse.codes_cost,
                    collapse.vqvae_shuffled,
                    f"perplexity {collapse.perplexity:.1f} of {collapse.codebook_size}",
                ),
            ),
            f"Grey images rounded to {collapse.levels} intensities, {images:,} held-out ones. The decoder is a "
            "PixelCNN over the pixels, which sees the latents at every place. Bits here are of rounded images, and do "
            "not compare with those above. The VQ-VAE's bound counts its codes under the uniform prior.",
        ),
        Plot(
            "collapse",
            plots.bars(
                {"gain": [collapse.vae_gain, collapse.vqvae_gain]},
                ["VAE", "VQ-VAE (EMA)"],
                across="bits an image that its own latents are worth, beside another image's",
            ),
            "What a strong decoder takes from the latents.",
        ),
    ]


def _use(found: Comparison) -> list[Block]:
    rows = []
    for x in found.figures:
        use = x.use
        rows.append(
            (
                x.name,
                f"{use.kl_per_image:.1f}",
                "–" if use.active_units is None else f"{use.active_units} of {use.of}",
                "–" if use.perplexity is None else f"{use.perplexity:.1f} of {use.of}",
                "–" if use.codes_in_use is None else f"{use.codes_in_use * 100:.1f} %",
                _percent(x.probe),
            )
        )
    rows.append(("pixels", "–", "–", "–", "–", _percent(found.pixels_probe)))
    caption = (
        "KL of a VQ-VAE against the uniform prior is the constant codes × ln K. Active: the posterior mean's variance "
        "over the images exceeds 0.01. Perplexity and codes in use are of the held-out images."
    )
    if found.chance is not None:
        caption += (
            f" Probe: a logistic regression on {found.images['probed']:,} training images, the same for all, on code "
            "vectors, posterior means, or pixels, averaged over the grid to 4×4 (pixels 8×8); per cent of held-out "
            f"images. The most frequent class is {found.chance:.1f} %."
        )
    return [
        Heading("Use of the latents, with the convolutional decoder"),
        Table(
            ("model", "KL an image, nats", "active units", "perplexity", "codes in use", "linear probe"),
            tuple(rows),
            caption,
        ),
    ]


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f} %"


def _pictures(found: Comparison, pictures: Pictures) -> list[Block]:
    names = list(pictures.reconstructions)
    rows = [pictures.originals, *(pictures.reconstructions[name] for name in names)]
    return [
        Heading("Reconstructions and samples"),
        Picture(
            "reconstructions",
            image_grid(torch.cat(rows), len(pictures.originals)),
            f"Held-out images in the first row; below it {', '.join(names[:-1])} and {names[-1]}.",
        ),
        Gallery(
            tuple(
                Picture(
                    f"samples_{number}",
                    image_grid(images, 8),
                    f"{name}: " + ("latents from N(0, 1)" if name == CONTINUOUS else "codes from its trained prior"),
                )
                for number, (name, images) in enumerate(pictures.samples.items(), start=1)
            )
        ),
    ]


def _curves(found: Comparison) -> list[Block]:
    return [
        Heading("Training"),
        Plot(
            "curves",
            plots.curves(found.curves, across="steps", up="held-out bits per dimension"),
            "The bound during training: uniform prior for the VQ-VAEs, ELBO for the VAE.",
        ),
        Table(
            ("model", "encoder", "decoder", "codebook", "prior", "all but the prior", "seconds"),
            tuple(
                (
                    x.name,
                    *(f"{x.parameters[part]:,}" for part in ("encoder", "decoder", "quantizer", "prior")),
                    f"{sum(count for part, count in x.parameters.items() if part != 'prior'):,}",
                    f"{x.seconds:.0f}",
                )
                for x in found.figures
            ),
            "Parameters, and seconds of training (of a VQ-VAE with its prior). The decoders are the same; the VAE's "
            "encoder gives means and variances, so its last layer is twice as wide, and the VQ-VAEs have a codebook "
            "instead.",
        ),
    ]


def _settings(found: Comparison, facts: Mapping[str, str], command: str) -> list[Block]:
    settings = found.settings
    run, prior, collapse = settings.run.vqvae, settings.run.prior, settings.collapse
    rows = [
        ("training images", f"{found.images['train']:,}"),
        ("held-out images", f"{found.images['held_out']:,}, of which {found.images['evaluated']:,} are measured"),
        ("seed", str(settings.run.seed)),
        ("latents", f"{found.grid[0]}×{found.grid[1]} of {run.code_dim} channels; {run.codebook_size} codes"),
        (
            "width",
            f"{run.hidden_channels} channels, {run.residual_blocks} residual blocks, {run.downsamplings} downsamplings",
        ),
        ("likelihood", str(run.likelihood).replace("_", " ")),
        ("training", f"{run.steps:,} steps of {run.batch_size}, Adam, {run.learning_rate:g}, {run.schedule}"),
        ("codebook", f"beta {run.beta}, init {run.init}, revive {run.revive}; EMA decay {DECAY}"),
        (
            "prior",
            f"{prior.model}, {prior.num_layers} layers of {prior.hidden_channels}, {prior.steps:,} steps of "
            f"{prior.batch_size}, {prior.learning_rate:g}, dropout {prior.dropout}",
        ),
        (
            "collapse",
            f"PixelCNN of {collapse.num_layers} layers of {collapse.hidden_channels}, {collapse.features} features, "
            f"{collapse.steps:,} steps of {collapse.batch_size}, {collapse.learning_rate:g}; "
            f"{found.collapse.seconds:.0f} seconds",
        ),
    ]
    return [
        Heading("Settings, machine and versions"),
        Listing(command),
        Table(("setting", "value"), tuple(rows)),
        Table(("machine and versions", ""), tuple((name, value) for name, value in facts.items())),
    ]
