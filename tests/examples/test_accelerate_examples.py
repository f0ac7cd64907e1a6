"""The examples around `vivace.accelerate`, run as a user runs them: a process each, on their tiny stand-ins."""

import importlib.util
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from PIL import Image

FOLDER = Path(__file__).resolve().parents[2] / "examples"
SAYS = {
    "accelerate_sd3": ("dpmpp_2m + guidance", "12/12 evaluations, 19/19 branch evaluations", "executor pipeline"),
    "accelerate_flux": ("nfe 14", "14/14 evaluations, 14/14 branch evaluations", "executor pipeline"),
    "img2img_inpaint": (
        "StableDiffusion3Img2ImgPipeline: own scheduler bit for bit: True; unipc: 12 of 20 rows",
        "StableDiffusion3InpaintPipeline: own scheduler bit for bit: True; unipc: 12 of 20 rows",
    ),
}


@pytest.mark.parametrize("name", SAYS)
def test_the_example_runs_and_says_what_it_did(name, tmp_path):
    picture = tmp_path / "picture.png"
    run = subprocess.run(
        [sys.executable, str(FOLDER / f"{name}.py"), "--out", str(picture)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    assert all(text in run.stdout for text in SAYS[name])
    with Image.open(picture) as image:
        assert image.size == (32, 32)


@pytest.mark.parametrize("name", ["accelerate_sd3", "accelerate_flux"])
def test_the_example_is_ten_lines(name):
    lines = (FOLDER / f"{name}.py").read_text().split('"""')[2].splitlines()
    code = [line for line in lines if line and not line.startswith(("import ", "args ="))]
    assert len(code) <= 10


def test_a_model_of_the_users_takes_the_place_of_the_stand_in(monkeypatch):
    spec = importlib.util.spec_from_file_location("tiny_example", FOLDER / "tiny.py")
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    asked = {}

    def opened(path, **options):
        asked.update(options, path=path)
        return tiny.sd3()

    monkeypatch.setattr(tiny.DiffusionPipeline, "from_pretrained", opened)
    _, inputs = tiny.open_pipeline(Namespace(model="folder", prompt="a fox"), tiny.flux)
    assert asked == {"path": "folder", "dtype": torch.bfloat16, "use_safetensors": True}
    assert inputs == {"prompt": "a fox"}
