"""Prompts of packs: classes by name, tensors as they are, texts by tokenizers and encoders of the pack."""

from types import SimpleNamespace

import numpy as np
import pytest

import vivace
from tests.runtime.stand_in import LABELS, SPEC, Function, graphs_of, network
from vivace.errors import ArgumentError, PackError, PromptError, ShapeError
from vivace.runtime.calling import Caller, Fed, Opened
from vivace.runtime.kept import KeptPlanes
from vivace.runtime.manifest import Graph, Port
from vivace.runtime.prompts import given, prompts_of

BRANCHES = ("cond", "uncond")


def pack_of(folder=None, **prompts):
    return SimpleNamespace(path=folder, manifest=SimpleNamespace(prompts=prompts))


def test_classes_are_found_by_name_and_uncond_is_the_null_label():
    find = prompts_of(
        pack_of(kind="class", classes=3, names=[[0, "red heart", "U+2764"], [2, "pizza", ""]]), (), BRANCHES
    )
    found = find("pizza")
    assert found.tensors["cond"]["label"] == 2 and found.tensors["uncond"]["label"] == 3
    assert found.said["name"] == "pizza" and find("❤").said["id"] == 0 and find(1).said["id"] == 1
    with pytest.raises(PromptError, match="closest"):
        find("xylophone of doom")


def test_tensors_are_taken_by_branch_and_key():
    text = np.ones((1, 4, 8), np.float32)
    for prompt in (
        {"cond.a.b": text, "uncond.a.b": 0 * text},
        {"cond": {"a.b": text[0]}, "uncond": {"a.b": 0 * text[0]}},
    ):
        found = given(prompt, BRANCHES).tensors
        assert found["cond"]["a.b"].shape == (4, 8) and found["cond"]["a.b"].all() and not found["uncond"]["a.b"].any()


def test_the_perturbed_branch_has_the_prompt_of_cond():
    found = given({"cond": {"a": np.ones(2)}}, ("cond", "perturbed")).tensors
    assert found["perturbed"] is found["cond"]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("red heart", "encodes no text; give tensors"),
        ({"other.a": np.ones((1, 2))}, "branch 'other' is not among cond, uncond"),
        ({"cond.a": np.ones((2, 2))}, r"shape \(2, 2\); one prompt is needed"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(prompt, message):
    with pytest.raises(PromptError, match=message):
        prompts_of(pack_of(kind="tensors"), (), BRANCHES)(prompt)


def test_prompts_of_another_release_are_a_pack_error():
    with pytest.raises(PackError, match="kind 'sound'"):
        prompts_of(pack_of(kind="sound"), (), BRANCHES)


def encoder(key="clip"):
    """Ids [1, length] -> their floats and the count of the mask."""
    ports = (
        Port("ids", "int64", ("rows", "length"), "text", key),
        Port("mask", "int64", ("rows", "length"), "text_mask", key),
    )
    outs = (
        Port("states", "float32", ("rows", "length"), "condition", "text"),
        Port("count", "float32", ("rows",), "condition", "count"),
    )

    def run(ids, mask):
        return {"states": ids.astype(np.float32), "count": mask.sum(axis=1).astype(np.float32)}

    return Opened(Graph("encode", "encode.onnx", "encode", ports, outs), Function(run))


@pytest.fixture
def tokenizer(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = {"[PAD]": 0, "[UNK]": 1, "red": 2, "heart": 3, "bad": 4}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "clip.json"))
    said = {"file": "clip.json", "length": 4, "pad_id": 0, "pad_token": "[PAD]"}
    return pack_of(tmp_path, kind="text", tokenizers={"clip": said}, negative="bad")


def test_texts_are_tokenized_filled_cut_and_encoded_once(tokenizer):
    opened = encoder()
    find = prompts_of(tokenizer, (opened,), BRANCHES)
    found = find("red heart")
    assert found.tensors["cond"]["text"].tolist() == [2, 3, 0, 0] and found.tensors["cond"]["count"] == 2
    assert found.tensors["uncond"]["text"].tolist() == [4, 0, 0, 0] and found.said == "red heart"
    find("red heart")
    assert len(opened.runner.calls) == 2
    assert find("red red heart heart red").tensors["cond"]["text"].tolist() == [2, 2, 3, 3]


def test_texts_need_encoders_and_their_tokenizers(tokenizer):
    with pytest.raises(PromptError, match="no text encoders; give tensors"):
        prompts_of(tokenizer, (), BRANCHES)("red heart")
    with pytest.raises(PackError, match="describes no tokenizer 't5'"):
        prompts_of(tokenizer, (encoder("t5"),), BRANCHES)("red heart")
    with pytest.raises(PromptError, match="is no Unicode text"):
        prompts_of(tokenizer, (encoder(),), BRANCHES)("red \udcff")
    with pytest.raises(PromptError, match="int; this pack takes text"):
        prompts_of(tokenizer, (encoder(),), BRANCHES)(3)


@pytest.mark.parametrize(
    ("conditions", "error", "message"),
    [
        ({"cond": LABELS["cond"]}, ArgumentError, "tensor 'label' of branch 'uncond' is needed"),
        (
            {"cond": {"label": np.ones(2)}, "uncond": LABELS["uncond"]},
            ShapeError,
            r"'cond' has shape \(2,\); needs \(\)",
        ),
    ],
)
def test_conditions_that_no_graph_can_read_are_refused_before_any_row(conditions, error, message):
    plan = vivace.make_plan(vivace.NoiseSchedule.flow(), "euler", 2, prediction="v")
    plan = vivace.passes.apply_guidance(plan, 2.0).bind(SPEC)
    graphs = graphs_of(plan, None, network)
    with pytest.raises(error, match=message):
        Caller(graphs, plan, Fed(conditions, {}, KeptPlanes(BRANCHES, 1)))
    assert not next(iter(graphs.rows.values())).runner.calls
