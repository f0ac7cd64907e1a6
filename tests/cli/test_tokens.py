"""`--tokens`, and the heat maps of `generate` and `profile`."""

import json

import pytest
from PIL import Image

from vivace.cli import main
from vivace.engine.plan import Plan


def call(capsys, *words):
    """(exit code, stdout, stderr) of the command."""
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, words)))
    out, err = capsys.readouterr()
    return ended.value.code or 0, out, err


SHORT = ("--steps", "4", "--threads", "1")


def test_a_plan_of_tokens_says_how_many(capsys, tmp_path):
    path = tmp_path / "plan.json"
    code, out, err = call(capsys, "plan", "new", "--steps", 6, "--tokens", "keep=0.5,first=2", "--bind", "--out", path)
    assert code == 0, err
    assert [step.variant.keep for step in Plan.load(path).steps] == [64, 64, 32, 32, 32, 64]
    assert out.count("32/64 deviation") == 3


def test_pictures_and_their_heat_map(capsys, tmp_path):
    out, heat = tmp_path / "out.png", tmp_path / "heat.png"
    words = ("--tokens", "keep=0.25,first=1", "--show-tokens", heat, "--out", out, "--json")
    code, said, err = call(capsys, "generate", "red heart", *SHORT, *words)
    assert code == 0, err
    rows = json.loads(said)["prompts"][0]["receipt"]["rows"]
    assert [row["tokens"] for row in rows] == [None, 16, 16, None]  # None: all
    with Image.open(heat) as map_, Image.open(out) as picture:
        assert map_.size[0] % picture.size[0] == 0 and map_.mode == "RGB" and len(map_.getcolors(1 << 20)) > 1


def test_a_profile_writes_the_map_of_its_plan(capsys, tmp_path):
    plan, heat = tmp_path / "plan.json", tmp_path / "heat.png"
    assert call(capsys, "plan", "new", "--steps", 4, "--tokens", "keep=0.5,first=1", "--out", plan)[0] == 0
    code, _, err = call(capsys, "profile", "--plan", plan, "--tokens", heat, "--threads", 1)
    assert code == 0 and heat.exists(), err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("generate", "red heart", "--show-tokens", "{}"), "computes all tokens"),
        (("plan", "new", "--tokens", "keep=2"), "a share of the tokens"),
        (("plan", "new", "--tokens", "share=0.5"), "share"),
        (("plan", "new", "--tokens", "keep"), "write key=value"),
        (("profile", "--tokens", "{}"), "computes all tokens"),
    ],
)
def test_a_mistake_is_one_line(capsys, tmp_path, words, message):
    heat = tmp_path / "heat.png"
    code, _, err = call(capsys, *(str(word).format(heat) for word in words))
    assert code == 2 and message in err and err.count("\n") == 1 and not heat.exists()
