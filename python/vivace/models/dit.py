"""The native DiT: a class-conditional diffusion transformer with adaLN-zero, in parts that a compiler can use.

    embed(x)              patches and positions: the stem, once for all guidance branches
    condition(t, labels)  every modulation vector of the network; does not depend on x, so it can leave the loop
    block(i, h, mod)      one transformer block
    head(h, mod)          final modulation, projection, pixels

Sizes: n samples, B branches, N tokens, D width, L blocks; rows R = B*n, branch-major. A sample's prediction has the
same bits alone and in a batch (see `rowwise`). Files are those of the diffusers `DiTTransformer2DModel`.
Source: Peebles and Xie 2023, section 3.2 and figure 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vivace.errors import ArgumentError, DtypeError, ShapeError
from vivace.models.dit_config import TIME_FEATURES, DiTConfig
from vivace.models.dit_files import read_dit, write_dit
from vivace.models.rowwise import gelu, linear, silu

if TYPE_CHECKING:
    from vivace.models.tokens.merge import Merged

NORM_EPS = 1e-6  # of the attention and final norms; that of the MLP is in the configuration

# Queries, keys and values [R, H, N, D/H] of a row's tokens -> keys and values that its queries attend to.
Held = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class Modulation(NamedTuple):
    """Modulation vectors of all blocks and of the head.

    blocks: [L, B, n, 6, D]: shift, 1 + scale, gate of the attention, then of the MLP; final: [B, n, 2, D]: shift,
    1 + scale.
    """

    blocks: Tensor
    final: Tensor

    @property
    def branches(self) -> int:
        """Number of guidance branches B."""
        return self.final.shape[0]

    def select(self, index: Tensor) -> Modulation:
        """Vectors of some samples: index int64 [m] into n; the way to use vectors made before the loop."""
        return Modulation(self.blocks.index_select(2, index), self.final.index_select(1, index))

    def of_block(self, i: int) -> tuple[Tensor, ...]:
        """The six vectors of block i, each [R, 1, D]."""
        return _vectors(self.blocks[i])

    def of_half(self, i: int, half: int) -> tuple[Tensor, ...]:
        """Shift, 1 + scale and gate of block i's attention (half 0) or MLP (half 1), each [R, 1, D]."""
        return self.of_block(i)[3 * half : 3 * half + 3]

    def of_head(self) -> tuple[Tensor, ...]:
        """The two vectors of the head, each [R, 1, D]."""
        return _vectors(self.final)


def _vectors(packed: Tensor) -> tuple[Tensor, ...]:
    """[B, n, k, D] as k tensors [R, 1, D]."""
    return packed.flatten(0, 1).unsqueeze(2).unbind(1)


class Conditioner(nn.Module):
    """(t, label) -> SiLU(MLP(features of t) + embedding of the label) -> six modulation vectors of a block."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.time_in = nn.Linear(TIME_FEATURES, width)
        self.time_out = nn.Linear(width, width)
        table = torch.empty(classes + 1, width)  # random numbers of "meta" import a second's worth of torch
        self.label = nn.Embedding.from_pretrained(table if table.is_meta else table.normal_())
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """SiLU of the conditioning vector. features [n, 256], labels int64 [B, n] -> [B, n, D]."""
        time = linear(silu(linear(features, self.time_in)), self.time_out)
        return silu(self.label(labels) + time)


class Block(nn.Module):
    """h + gate * attention(norm(h)), then h + gate * mlp(norm(h)); each norm scaled and shifted by the modulation."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width = config.width
        self.heads, self.mlp_eps, self.approximate = config.heads, config.norm_eps, config.gelu
        self.condition = Conditioner(config.classes, width)
        self.qkv = nn.Linear(width, 3 * width, bias=config.attention_bias)
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def attention(
        self, hidden: Tensor, shift: Tensor, scale: Tensor, held: Held | None = None, merged: Merged | None = None
    ) -> Tensor:
        """Self-attention of the modulated norm, before its gate. [R, N, D] -> [R, N, D]; `scale` is 1 + scale."""
        x = torch.addcmul(shift, F.layer_norm(hidden, (hidden.shape[-1],), eps=NORM_EPS), scale)
        if merged is not None:
            return merged.unmerge(self._attended(merged.merge(x), held))
        return self._attended(x, held)

    def _attended(self, x: Tensor, held: Held | None) -> Tensor:
        rows, tokens, width = x.shape
        qkv = linear(x, self.qkv).view(rows, tokens, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if held is not None:
            key, value = held(query, key, value)
        x = F.scaled_dot_product_attention(query, key, value)
        return linear(x.transpose(1, 2).reshape(rows, tokens, width), self.out)

    def mlp(self, hidden: Tensor, shift: Tensor, scale: Tensor, merged: Merged | None = None) -> Tensor:
        """Feed-forward network of the modulated norm, before its gate. [R, N, D] -> [R, N, D]."""
        x = torch.addcmul(shift, F.layer_norm(hidden, (hidden.shape[-1],), eps=self.mlp_eps), scale)
        x = x if merged is None else merged.merge(x)
        x = linear(gelu(linear(x, self.up), self.approximate), self.down)
        return x if merged is None else merged.unmerge(x)

    def forward(self, hidden: Tensor, modulation: tuple[Tensor, ...]) -> Tensor:
        """One block; the input is left as it is."""
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        hidden = torch.addcmul(hidden, gate1, self.attention(hidden, shift1, scale1))
        return torch.addcmul(hidden, gate2, self.mlp(hidden, shift2, scale2))


class DiT(nn.Module):
    """A denoiser for serving: latents, timesteps and one label per branch in, one prediction per branch out."""

    positions: Tensor

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        width, patch = config.width, config.patch
        self.patches = nn.Linear(config.channels * patch * patch, width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.final_modulation = nn.Linear(width, 2 * width)
        self.final = nn.Linear(width, patch * patch * config.out_channels)
        positions = torch.empty(0) if self.patches.weight.is_meta else self.position_table(config.grid)
        self.register_buffer("positions", positions, persistent=False)
        self.requires_grad_(False).eval()

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of weights, hidden states and predictions."""
        return self.patches.weight.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.patches.weight.device

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        """prediction_b = DiT(x, t, labels[b]) for every branch b.

        Args:
            x: [n, C, H, W] in the model's dtype; H and W are multiples of the patch.
            t: timesteps in units of the training schedule, any real dtype, [n].
            labels: class ids int64 [B, n]; `config.classes` is the null label.
        Returns: B tensors [n, C, H, W], contiguous. Of a learned-variance model the mean only.
        Raises: ShapeError, DtypeError.
        """
        self._check(x, t, labels)
        hidden, modulation = self.embed(x), self.condition(t, labels)
        hidden = hidden.repeat(modulation.branches, 1, 1)
        for i in range(len(self.blocks)):
            hidden = self.block(i, hidden, modulation)
        return self.head(hidden, modulation, (x.shape[2], x.shape[3]))

    def embed(self, x: Tensor, ids: Tensor | None = None) -> Tensor:
        """Patches to tokens plus positions. [n, C, H, W] -> [n, N, D]; repeat it for every branch.

        ids: integers [n, M]: of each sample these tokens alone, [n, M, D].
        """
        n, channels, height, width = x.shape
        patch = self.config.patch
        grid = (height // patch, width // patch)
        cells = x.view(n, channels, grid[0], patch, grid[1], patch).permute(0, 2, 4, 1, 3, 5)
        cells, positions = cells.reshape(n, grid[0] * grid[1], channels * patch * patch), self._positions_at(grid)
        if ids is not None:
            cells, positions = cells[torch.arange(n, device=ids.device)[:, None], ids], positions[ids]
        return linear(cells, self.patches).add_(positions)

    def condition(self, t: Tensor, labels: Tensor) -> Modulation:
        """Modulation vectors of the whole network from timesteps [n] and labels [B, n]; independent of x."""
        branches, n = labels.shape
        features, layers = self.time_features(t), self.layers()
        hidden = [layer.condition.forward(features, labels) for layer in layers]
        vectors = [linear(h, layer.condition.modulation) for h, layer in zip(hidden, layers, strict=True)]
        packed = torch.stack(vectors).view(len(layers), branches, n, 6, self.config.width)
        final = linear(hidden[0], self.final_modulation).view(branches, n, 2, self.config.width)
        packed[:, :, :, 1::3] += 1
        final[:, :, 1] += 1
        return Modulation(packed, final)

    def block(self, i: int, hidden: Tensor, modulation: Modulation) -> Tensor:
        """Block i on hidden states [R, N, D]."""
        return self.layers()[i].forward(hidden, modulation.of_block(i))

    def fresh(
        self,
        i: int,
        half: int,
        hidden: Tensor,
        modulation: Modulation,
        held: Held | None = None,
        merged: Merged | None = None,
    ) -> Tensor:
        """What half of block i, 0 its attention and 1 its MLP, gives before its gate; [R, N, D].

        merged: which of its tokens are merged meanwhile, None: none.
        """
        block, (shift, scale, _) = self.layers()[i], modulation.of_half(i, half)
        own = hidden, shift, scale
        return block.mlp(*own, merged) if half else block.attention(*own, held, merged)

    def joined(self, i: int, half: int, hidden: Tensor, modulation: Modulation, fresh: Tensor) -> Tensor:
        """hidden + gate * fresh, to the bits of `block`."""
        return torch.addcmul(hidden, modulation.of_half(i, half)[2], fresh)

    def head(
        self,
        hidden: Tensor,
        modulation: Modulation,
        size: tuple[int, int] | None = None,
        ids: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Hidden states [R, N, D] -> B predictions [n, C, H, W]; `size` (H, W), default the native one.

        ids: integers [n, M]: hidden states are of these tokens; pixels of others are 0.
        """
        config = self.config
        shift, scale = modulation.of_head()
        x = torch.addcmul(shift, F.layer_norm(hidden, (config.width,), eps=NORM_EPS), scale)
        height, width = size or (config.size, config.size)
        patch = config.patch
        x = linear(x, self.final)
        if ids is not None:
            some, rows = x, torch.arange(len(x), device=ids.device)
            x = some.new_zeros((len(some), height // patch * (width // patch), some.shape[2]))
            x[rows[:, None], ids.repeat(modulation.branches, 1)] = some
        x = x.view(-1, height // patch, width // patch, patch, patch, config.out_channels)
        x = x[..., : config.channels].permute(0, 5, 1, 3, 2, 4).reshape(-1, config.channels, height, width)
        return x.chunk(modulation.branches)

    @classmethod
    def load(cls, folder: str | PathLike[str], dtype: torch.dtype = torch.float32) -> DiT:
        """Read a transformer folder in the diffusers format, shards included; on the CPU. Raises ModelError."""
        return cls.of(*read_dit(folder, dtype))

    @classmethod
    def of(cls, config: DiTConfig, parameters: Mapping[str, Tensor]) -> DiT:
        """The model of these parameters, which are not copied; those of further blocks are left out."""
        with torch.device("meta"):
            model = cls(config)
        model.load_state_dict({name: parameters[name] for name in model.state_dict()}, assign=True)
        model.positions = model.position_table(config.grid).to(model.dtype)
        return model.requires_grad_(False)

    def save(self, folder: str | PathLike[str], dtype: torch.dtype | None = None) -> None:
        """Write the folder that diffusers reads, all or nothing; dtype None is the model's. Raises OutputError."""
        write_dit(folder, self.config, self.state_dict(), dtype or self.dtype)

    def layers(self) -> Sequence[Block]:
        """The blocks under their type."""
        return cast("Sequence[Block]", self.blocks)

    def time_features(self, t: Tensor) -> Tensor:
        """[cos, sin](t * 10000^(-i/127)), i = 0..127, in float32 as the models were trained. [n] -> [n, 256]."""
        half = TIME_FEATURES // 2
        exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / (half - 1)
        angle = t.to(torch.float32)[:, None] * torch.exp(exponent)
        return torch.cat((angle.cos(), angle.sin()), dim=1).to(self.dtype)

    def _positions_at(self, grid: tuple[int, int]) -> Tensor:
        """Position table [N, D] of a grid; the stored one for the native grid."""
        if grid == self.config.grid:
            return self.positions
        return self.position_table(grid).to(self.dtype)

    def position_table(self, grid: tuple[int, int]) -> Tensor:
        """sin-cos of column, then of row, each D/2 wide, coordinates rescaled to the native grid; float32 [N, D]."""
        base, quarter, device = self.config.grid[0], self.config.width // 4, self.device
        rows, columns = (torch.arange(k, dtype=torch.float32, device=device) / (k / base) for k in grid)
        omega = torch.arange(quarter, dtype=torch.float64, device=device) / quarter
        omega = 1.0 / 10000**omega
        column, row = torch.meshgrid(columns, rows, indexing="xy")
        tables = [torch.outer(axis.reshape(-1), omega) for axis in (column, row)]
        return torch.cat([f(table) for table in tables for f in (torch.sin, torch.cos)], dim=1).float()

    def _check(self, x: Tensor, t: Tensor, labels: Tensor) -> None:
        """Refuse what the network cannot take, before any work."""
        channels, patch = self.config.channels, self.config.patch
        if x.ndim != 4 or x.shape[1] != channels or x.shape[2] % patch or x.shape[3] % patch or 0 in x.shape[2:]:
            need = f"[n, {channels}, H, W] with H and W multiples of {patch}"
            raise ShapeError(f"DiT: x has shape {tuple(x.shape)}; need {need}")
        if x.dtype != self.dtype:
            raise DtypeError(f"DiT: x is {x.dtype}, the model is {self.dtype}; convert one of them")
        if t.shape != x.shape[:1] or labels.ndim != 2 or labels.shape[1] != x.shape[0] or labels.shape[0] == 0:
            got = f"t {tuple(t.shape)} and labels {tuple(labels.shape)}"
            raise ShapeError(f"DiT: {got} for {x.shape[0]} samples; need t [n] and labels [branches, n]")
        if labels.dtype not in (torch.int64, torch.int32):
            raise DtypeError(f"DiT: labels are {labels.dtype}; need int64 or int32 class ids")
        if labels.device.type == "cpu" and labels.numel():
            low, high, null = int(labels.min()), int(labels.max()), self.config.classes
            if low < 0 or high > null:
                raise ArgumentError(f"DiT: labels from {low} to {high}; need class ids 0..{null} ({null} is no class)")
