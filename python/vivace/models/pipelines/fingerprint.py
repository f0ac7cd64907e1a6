"""What identifies a network object: configuration and weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from vivace.errors import UnsupportedError
from vivace.models.pipelines.families import plain


class Fingerprint:
    """SHA-256 of configuration and weights of modules, computed again only when a parameter was changed or moved."""

    def __init__(self) -> None:
        self._state: Any = None
        self._digest = ""

    def __call__(self, modules: Mapping[str, Any]) -> str:
        tensors = [(name, plain(module).state_dict()) for name, module in modules.items()]
        state = [
            (name, key, tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version)
            for name, found in tensors
            for key, tensor in found.items()
        ]
        if state != self._state:
            self._digest, self._state = self._hash(modules, tensors), state
        return self._digest

    @staticmethod
    def _hash(modules: Mapping[str, Any], tensors: Sequence[tuple[str, Mapping[str, torch.Tensor]]]) -> str:
        digest = hashlib.sha256()
        for name, found in tensors:
            config = {key: value for key, value in dict(modules[name].config).items() if not key.startswith("_")}
            digest.update(json.dumps(config, sort_keys=True, default=str).encode())
            for key in sorted(found):
                if found[key].is_meta:
                    raise UnsupportedError(
                        f"spec: weight {key!r} is offloaded and cannot be read for the fingerprint; load the model "
                        "before enable_sequential_cpu_offload, or offload whole models"
                    )
                tensor = found[key].detach().cpu().contiguous()
                digest.update(f"\0{key}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
                digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()
