"""The models of the benches: the bundled one, and DiTs of published sizes with random weights.

Random weights are drawn from a fixed seed and written once as a folder that both `vivace.load` and `diffusers` read.
Nothing in them is zero, the adaLN layers included, so no block is the identity.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vivace.bench.artefacts import Artefact
from vivace.models.dit import DiT
from vivace.models.dit_config import TIME_FEATURES, DiTConfig
from vivace.models.load import WEIGHTS, OpenModel, open_model

SEED = 7
FORMAT = 1  # of the folders; raise it when the weights change
SCHEDULER = {
    "_class_name": "DDIMScheduler", "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear",
    "num_train_timesteps": 1000, "prediction_type": "v_prediction", "clip_sample": False,
}  # fmt: skip


@dataclass(frozen=True)
class BenchModel:
    """A model and where its files are. sizes: of a model with random weights, None for a bundled one.

    stored: dtype of the weights on disk; largest models are kept in bfloat16, so every runtime starts from those.
    """

    name: str
    sizes: DiTConfig | None = None
    stored: str = "float32"

    @cached_property
    def artefact(self) -> Artefact | None:
        """The folder of a model with random weights; None for a bundled one."""
        if self.sizes is None:
            return None
        key = {"format": FORMAT, "config": self.sizes.to_dict(), "seed": SEED, "stored": self.stored}
        return Artefact(f"model-{self.short}", key, self._write)

    @property
    def short(self) -> str:
        """The name as part of a file's."""
        return self.name.lower().replace("/", "-")

    @property
    def folder(self) -> Path:
        """The model's folder, with transformer/ and scheduler/; written when it is not there."""
        return WEIGHTS / self.name if self.artefact is None else self.artefact.get() / self.short

    @cached_property
    def opened(self) -> OpenModel:
        """Configuration, schedule and fingerprint, without weights."""
        return open_model(self.folder)

    @property
    def scheduler(self) -> Mapping[str, Any]:
        """The scheduler's configuration, as on disk."""
        config: dict[str, Any] = json.loads((self.folder / "scheduler" / "scheduler_config.json").read_text())
        return config

    def transformer(self, dtype: torch.dtype = torch.float32) -> Any:
        """The network as a `diffusers` object."""
        import diffusers

        kind = diffusers.DiTTransformer2DModel
        # The call of the base class: that of the models complains about every change of dtype.
        return torch.nn.Module.to(kind.from_pretrained(self.folder / "transformer"), dtype).eval().requires_grad_(False)

    def inputs(self, batch: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
        """x [batch, C, H, W] of one noise, t float32 [batch], labels int64 [batch]: a class, then the null label."""
        config = self.opened.config
        x = torch.randn(1, config.channels, config.size, config.size, generator=torch.Generator().manual_seed(SEED))
        labels = torch.full((batch,), config.classes)
        labels[: max(1, batch // 2)] = min(207, config.classes - 1)
        return x.repeat(batch, 1, 1, 1).to(dtype), torch.full((batch,), 500.0), labels

    @property
    def tokens(self) -> int:
        """Image tokens of a picture."""
        rows, columns = self.opened.config.grid
        return rows * columns

    def _write(self, place: Path) -> None:
        """Draw the weights and write the folder."""
        assert self.sizes is not None
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(SEED)
            model = DiT(self.sizes)
            for block in model.blocks:  # a table as trained ones are; of unit deviation it would drown the timestep
                block.condition.label.weight.mul_(0.1)
        root = place / self.short
        model.save(root / "transformer", getattr(torch, self.stored))
        (root / "scheduler").mkdir()
        (root / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER, indent=1) + "\n")


def flops(config: DiTConfig, *, modulation: bool = True) -> float:
    """Multiplications and additions of one sample, one branch; without `modulation`: as with hoisted vectors."""
    width, tokens = config.width, config.grid[0] * config.grid[1]
    patch = config.patch**2
    block = 24 * tokens * width**2 + 4 * tokens**2 * width
    ends = 2 * tokens * width * patch * (config.channels + config.out_channels)
    inside = 2 * width * (TIME_FEATURES + width + 6 * width)  # of a block's own conditioner
    return float(config.layers * (block + modulation * inside) + ends + modulation * 4 * width**2)


def sizes(layers: int, heads: int, head_dim: int, *, size: int = 32, classes: int = 1000) -> DiTConfig:
    """A DiT with patches of 2 on latents of 4 channels, without learned variance."""
    return DiTConfig(heads, head_dim, 4, 4, layers, size, 2, classes)


MODELS: dict[str, BenchModel] = {
    model.name: model
    for model in (
        BenchModel("emoji"),
        BenchModel("DiT-S/2", sizes(12, 6, 64)),
        BenchModel("DiT-B/2", sizes(12, 12, 64)),
        BenchModel("DiT-XL/2", sizes(28, 16, 72), "bfloat16"),
    )
}
