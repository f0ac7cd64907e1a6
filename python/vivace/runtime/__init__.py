"""Runs a pack: the whole loop without torch.

session = vivace.runtime.open_pack("pack").session()
session("red heart", n=4, seed=1).images[0].save("heart.png")
"""

from __future__ import annotations

from vivace.runtime.pack import Pack, open_pack
from vivace.runtime.session import PackResult, PackSession
from vivace.runtime.verify import Verified, verify_pack

__all__ = ["Pack", "PackResult", "PackSession", "Verified", "open_pack", "verify_pack"]
