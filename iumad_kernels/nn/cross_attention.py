"""Multi-head attention of one modality over another."""

from __future__ import annotations

from torch import Tensor, nn

from iumad_kernels.ops.cross_attention import cross_attention


class CrossAttention(nn.Module):
    """Projections, attention and output projection: tokens of ``x_query`` look up tokens of ``x_context``.

    Args:
        embed_dim: features of x_query and of the output, D. num_heads divides it.
        context_dim: features of x_context, default D.
        bias: of the four projections. dropout: of the attention weights, while training.
        residual: add x_query to the output. norm: a LayerNorm over each input before the projections (pre-norm).

    Shapes: x_query (batch, Lq, D), x_context (batch, Lk, context_dim) -> (batch, Lq, D); with ``need_weights`` also the
    weights averaged over the heads, (batch, Lq, Lk).

    The parameters ``q_proj``, ``k_proj``, ``v_proj`` and ``out_proj`` are those of ``torch.nn.MultiheadAttention``, whose
    checkpoints ``load_state_dict`` accepts as they are; :meth:`from_multihead_attention` converts a module.

    >>> attention = CrossAttention(64, 8, residual=True, norm=True)
    >>> attention(torch.randn(2, 49, 64), torch.randn(2, 196, 64)).shape
    torch.Size([2, 49, 64])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        context_dim: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        residual: bool = False,
        norm: bool = False,
    ) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim < 1 or embed_dim % num_heads:
            raise ValueError(
                f"CrossAttention: num_heads = {num_heads} must divide embed_dim = {embed_dim} and be positive"
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"CrossAttention: dropout = {dropout}, expected 0 <= dropout < 1")
        context_dim = embed_dim if context_dim is None else context_dim
        self.embed_dim, self.context_dim, self.num_heads = embed_dim, context_dim, num_heads
        self.dropout, self.residual = dropout, residual
        self.norm_query = nn.LayerNorm(embed_dim) if norm else nn.Identity()
        self.norm_context = nn.LayerNorm(context_dim) if norm else nn.Identity()
        self.q_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        self.k_proj = nn.Linear(context_dim, embed_dim, bias=bias)
        self.v_proj = nn.Linear(context_dim, embed_dim, bias=bias)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.xavier_uniform_(projection.weight)
        for parameter in (p.bias for p in (self.q_proj, self.k_proj, self.v_proj, self.out_proj)):
            if parameter is not None:
                nn.init.zeros_(parameter)
        self.register_load_state_dict_pre_hook(_split_multihead_attention)

    @classmethod
    def from_multihead_attention(
        cls, source: nn.MultiheadAttention, *, residual: bool = False, norm: bool = False
    ) -> CrossAttention:
        """A module with the weights (copied) of ``source``; raises ValueError for what it cannot represent."""
        if source.bias_k is not None or source.add_zero_attn:
            raise ValueError(
                "CrossAttention: add_bias_kv and add_zero_attn of MultiheadAttention are not supported"
            )
        if source.kdim != source.vdim:
            raise ValueError(f"CrossAttention: kdim = {source.kdim} and vdim = {source.vdim} must be equal")
        result = cls(
            source.embed_dim,
            source.num_heads,
            context_dim=source.kdim,
            bias=source.in_proj_bias is not None,
            dropout=source.dropout,
            residual=residual,
            norm=norm,
        )
        result.load_state_dict(source.state_dict(), strict=not norm)
        return result.to(source.out_proj.weight).train(source.training)

    def forward(
        self,
        x_query: Tensor,
        x_context: Tensor,
        *,
        attn_mask: Tensor | None = None,
        need_weights: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend; ``attn_mask`` broadcasts to (batch, heads, Lq, Lk), bool (True takes part) or additive."""
        for name, x, dim in (
            ("x_query", x_query, self.embed_dim),
            ("x_context", x_context, self.context_dim),
        ):
            if x.dim() != 3 or x.shape[2] != dim:
                raise ValueError(
                    f"CrossAttention: {name} has shape {tuple(x.shape)}, expected (batch, length, {dim})"
                )
        if x_query.shape[0] != x_context.shape[0]:
            raise ValueError(
                f"CrossAttention: x_context has batch {x_context.shape[0]}, expected {x_query.shape[0]} as x_query"
            )
        context = self.norm_context(x_context)
        query, key, value = (
            projected.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for projected in (
                self.q_proj(self.norm_query(x_query)),
                self.k_proj(context),
                self.v_proj(context),
            )
        )
        dropout = self.dropout if self.training else 0.0
        attended = cross_attention(query, key, value, attn_mask, dropout, need_weights=need_weights)
        out, weights = attended if isinstance(attended, tuple) else (attended, None)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        if self.residual:
            out = out + x_query
        return out if weights is None else (out, weights)

    def extra_repr(self) -> str:
        """The options, for printing."""
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, context_dim={self.context_dim}, "
            f"dropout={self.dropout}, residual={self.residual}"
        )


def _split_multihead_attention(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Renames the entries of a ``torch.nn.MultiheadAttention`` checkpoint in place."""
    names = ("q_proj", "k_proj", "v_proj")
    for kind in ("weight", "bias"):
        packed = state.pop(f"{prefix}in_proj_{kind}", None)
        if packed is not None:
            state.update({f"{prefix}{name}.{kind}": part for name, part in zip(names, packed.chunk(3))})
    for name in names:
        separate = state.pop(f"{prefix}{name}_weight", None)
        if separate is not None:
            state[f"{prefix}{name}.weight"] = separate
