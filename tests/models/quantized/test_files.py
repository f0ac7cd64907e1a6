import json
import os
from dataclasses import replace

import pytest
import torch
from tests.models.quantized.made import layer, same, weights

from vivace.errors import DtypeError, ModelError, OutputError, ShapeError
from vivace.models.quantized.weights import QuantizedLayer, QuantizedWeights


@pytest.mark.parametrize("format", ["int8", "fp8"])
@pytest.mark.parametrize("given", ["w", "w.safetensors", "w.json", "dit.v2"])
def test_a_round_trip_is_exact(tmp_path, format, given):
    made = weights(format)
    made.save(tmp_path / given)
    back = QuantizedWeights.load(tmp_path / given)
    assert same(made, back)
    assert back.source["recipe"] == made.source["recipe"] and back.source["versions"]["torch"] == torch.__version__
    stem = given.removesuffix(".safetensors").removesuffix(".json")
    assert sorted(os.listdir(tmp_path)) == [f"{stem}.json", f"{stem}.safetensors"]
    assert json.loads((tmp_path / f"{stem}.json").read_text())["kept"] == {"blocks.0.up": "sensitive"}


def test_tensors_that_share_memory_are_written_apart(tmp_path):
    one = layer(6, 4)
    third = replace(one, weight=one.weight[2:4], weight_scale=one.weight_scale[2:4])
    made = QuantizedWeights("int8", "a", {"x": one, "y": one, "z": third})
    made.save(tmp_path / "w")
    assert same(made, QuantizedWeights.load(tmp_path / "w"))
    assert (tmp_path / "w.safetensors").stat().st_size < 2000


def test_loaded_weights_outlive_the_file_and_may_be_written_again(tmp_path):
    weights().save(tmp_path / "w")
    back = QuantizedWeights.load(tmp_path / "w")
    other = replace(weights(), fingerprint="b")
    other.save(tmp_path / "w")  # replaces the files that `back` is mapped from
    assert same(back, weights()) and same(QuantizedWeights.load(tmp_path / "w"), other)
    back.save(tmp_path / "w")
    assert same(QuantizedWeights.load(tmp_path / "w"), weights())


def test_nothing_is_left_where_nothing_can_be_written(tmp_path):
    weights().save(tmp_path / "w")
    before = {file: (tmp_path / file).read_bytes() for file in os.listdir(tmp_path)}
    broken = replace(weights(), advice={"first": float("nan")})
    with pytest.raises(ModelError, match="advice"):
        broken.save(tmp_path / "w")
    zero = layer(2, 2)
    zero.weight_scale[1] = 0.0
    with pytest.raises(ModelError, match=r"x\.weight_scale.* not positive"):
        QuantizedWeights("int8", "a", {"x": zero}).save(tmp_path / "w")
    with pytest.raises(ModelError, match="layers"):
        QuantizedWeights("int8", "a", {"a\nb": layer(2, 2)}).save(tmp_path / "w")
    assert {file: (tmp_path / file).read_bytes() for file in os.listdir(tmp_path)} == before
    with pytest.raises(OutputError, match="nowhere"):
        weights().save(tmp_path / "nowhere" / "w")
    (tmp_path / "d.json").mkdir()
    with pytest.raises(OutputError, match="Is a directory"):
        weights().save(tmp_path / "d")
    assert sorted(os.listdir(tmp_path)) == ["d.json", "w.json", "w.safetensors"]


def test_a_big_file_is_mapped(tmp_path):
    depth = columns = 2048
    made = QuantizedWeights("int8", "a", {f"blocks.{i}.qkv": layer(columns, depth, seed=i) for i in range(4)})
    made.save(tmp_path / "w")
    back = QuantizedWeights.load(tmp_path / "w")
    mapped = [line for line in open("/proc/self/maps") if "w.safetensors" in line]
    assert mapped and same(made, back)


def test_another_model_is_refused(tmp_path):
    made = weights()
    made.check("a" * 64)
    with pytest.raises(ModelError, match="made for model aaaaaaaaaaaa, this one is bbb"):
        made.check("bbb")


def test_groups_are_half_open():
    made = weights()
    assert [made.group_of(t) for t in (-1.0, 249.9, 250.0, 500.4, 500.5, 1e9)] == [0, 0, 1, 1, 2, 2]
    assert QuantizedWeights("int8", "a", {}).group_of(3.0) == 0


def test_sizes_are_counted():
    assert weights().nbytes == 12 * 4 + 4 * (12 + 4 + 3) + 4 * 4 + 4 * 4


def test_what_does_not_fit_together_is_refused():
    good = layer(4, 3, groups=2)
    with pytest.raises(ShapeError, match="weight_scale has shape"):
        replace(good, weight_scale=torch.ones(3))
    with pytest.raises(ShapeError, match="smooth has shape"):
        replace(good, smooth=torch.ones(4))
    with pytest.raises(ShapeError, match="x_scale has shape"):
        replace(good, x_scale=torch.ones(2, 1))
    with pytest.raises(DtypeError, match=r"smooth is torch\.float64"):
        replace(good, smooth=torch.ones(3, dtype=torch.float64))
    with pytest.raises(DtypeError, match=r"weight is torch\.int32"):
        QuantizedLayer(torch.ones(2, 2, dtype=torch.int32), torch.ones(2))
    with pytest.raises(ShapeError, match="2 activation scales, the edges make 1"):
        QuantizedWeights("int8", "a", {"x": good})
    with pytest.raises(DtypeError, match="the format is 'fp8'"):
        QuantizedWeights("fp8", "a", {"x": good}, edges=(1.0,))
    with pytest.raises(ModelError, match="do not ascend"):
        QuantizedWeights("int8", "a", {}, edges=(2.0, 1.0))
    with pytest.raises(ModelError, match="both quantized and kept"):
        QuantizedWeights("int8", "a", {"x": layer(2, 2)}, kept={"x": "why"})


def test_dequantized_weights_have_the_factors_put_back():
    q = torch.tensor([[10, -20], [30, 127]], dtype=torch.int8)
    made = QuantizedLayer(q, torch.tensor([0.5, 2.0]), torch.tensor([1.0, 4.0]))
    assert made.dequantized().tolist() == [[5.0, -40.0], [60.0, 1016.0]]
