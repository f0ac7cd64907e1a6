"""The goldens of a pack on this machine: what `vivace verify` does, without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vivace.runtime import open_pack, verify_pack


def verify_folder(path: Path, *, backend: str, threads: int | None) -> tuple[dict[str, Any], str, bool]:
    """Check every file of a pack and run its goldens row by row. Returns: data, text, and whether all holds."""
    pack = open_pack(path)
    found = verify_pack(pack, backend=backend, threads=threads)
    files, size = len(pack.manifest.files), sum(info.bytes for info in pack.manifest.files)
    data = {"pack": str(path), "files": files, "bytes": size, "plan_hash": pack.plan.hash, **found.to_dict()}
    return data, f"{path}: {files} files, {size / 2**20:.1f} MiB, all as the manifest says\n{found}", found.holds
