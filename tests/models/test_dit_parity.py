import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from vivace.models.dit import DiT  # noqa: E402
