"""The C++ example builds against ONNX Runtime alone and gives the latents and pictures of the Python runtime."""

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from PIL import Image
from tests.export.flat_runs import cached_pack

SOURCE = Path(__file__).resolve().parents[2] / "examples/cpp_runtime"


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The example, compiled; headers from VIVACE_ORT_INCLUDE or the system's folders, the library from the wheel."""
    places = [os.environ.get("VIVACE_ORT_INCLUDE", ""), "/usr/include/onnxruntime", "/usr/local/include/onnxruntime"]
    include = next((place for place in places if place and Path(place, "onnxruntime_c_api.h").exists()), None)
    compiler = shutil.which("g++") or shutil.which("clang++")
    library = next(Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.*"), None)
    if include is None:
        pytest.skip("no headers of ONNX Runtime: name their folder in VIVACE_ORT_INCLUDE")
    if compiler is None or library is None:
        pytest.skip("no C++ compiler, or ONNX Runtime as no shared library")
    folder = tmp_path_factory.mktemp("cpp")
    (folder / "libonnxruntime.so.1").symlink_to(library)
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", f"-I{include}"]
    where = [str(folder / "libonnxruntime.so.1"), f"-Wl,-rpath,{folder}"]
    made = folder / "run_pack"
    subprocess.run([compiler, *flags, str(SOURCE / "main.cpp"), *where, "-o", str(made)], check=True)
    return made


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    return cached_pack(tmp_path_factory.mktemp("cpp"))


def test_it_gives_the_latents_and_pictures_of_the_python_runtime(program, pack, tmp_path):
    wanted = pack.session(threads=1)(12, n=2, seed=2**40 + 3)
    command = [program, pack.path, "--label", "12", "--n", "2", "--seed", str(2**40 + 3)]
    command += ["--latents", tmp_path / "latents", "--out", tmp_path / "picture"]
    subprocess.run(list(map(str, command)), check=True, timeout=120)
    found = np.fromfile(tmp_path / "latents", np.float32).reshape(wanted.latents.shape)
    assert np.abs(found - wanted.latents).max() <= pack.manifest.tolerance * np.abs(wanted.latents).max()
    for j, image in enumerate(wanted.images):
        pixels = np.asarray(Image.open(tmp_path / f"picture-{j}.ppm")).astype(int)
        assert np.abs(pixels - np.asarray(image)).max() <= 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["/nowhere"], "program.txt: cannot be read"),
        (["PACK", "--speed", "9"], "unknown option --speed"),
        (["PACK", "--n", "0"], "a number of pictures from 1"),
        ([], "usage: run_pack PACK"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(program, pack, arguments, message):
    arguments = [str(pack.path) if word == "PACK" else word for word in arguments]
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and message in done.stderr and done.stderr.count("\n") == 1
