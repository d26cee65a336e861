"""The options of the search, of quantization and of its gradient: each has its name, type and order here alone.

An operator takes them one by one, after its tensors, because a schema knows no records: `*options` is what its callers
give, and what its functions take and make into a record again. A NamedTuple, because it costs a third less per call
than a frozen dataclass and needs no code to be taken apart.
"""

from typing import NamedTuple


class SearchOptions(NamedTuple):
    """What `vqkernels::nearest` takes after z, codebook and mask."""

    channel_dim: int
    metric: str
    precision: str


class QuantizeOptions(NamedTuple):
    """What `vqkernels::quantize` takes after z, codebook and mask, and `residual_quantize` after its levels."""

    channel_dim: int
    metric: str
    precision: str
    statistics: bool

    @property
    def search(self) -> SearchOptions:
        return SearchOptions(self.channel_dim, self.metric, self.precision)


class GradientOptions(NamedTuple):
    """What `vqkernels::quantize_backward` and `residual_quantize_backward` take last."""

    channel_dim: int
    gradient: str
    codebook_gradient: bool  # whether it is wanted


def schema_of(options: type[NamedTuple]) -> str:
    """The part of an operator's schema that its options are. A field with a default has it in the schema, too."""
    fields = options.__annotations__
    defaults = options._field_defaults
    texts = {name: f'"{value}"' if isinstance(value, str) else str(value) for name, value in defaults.items()}
    return ", ".join(
        f"{kind.__name__} {name}" + (f"={texts[name]}" if name in texts else "") for name, kind in fields.items()
    )
