"""Whatever changes what a text encoder computes is a miss; whatever moves it about is not."""

import pytest
import torch
from tests.models.pipelines.texts import TEXTS, Encode, clip_config, clip_tokenizer, same, stable_diffusion
from transformers import CLIPTextModel

from vivace.models.pipelines.module_state import Serials
from vivace.models.pipelines.prompts import PromptCache, cached_encode_prompt


@pytest.fixture
def pipe():
    return stable_diffusion()


@pytest.fixture
def cache():
    return PromptCache()


def set_one_weight(pipe):
    with torch.no_grad():
        pipe.text_encoder.final_layer_norm.bias[3] += 1.0


def add_behind_the_version(pipe):
    pipe.text_encoder.encoder.layers[0].mlp.fc1.weight.data += 0.01


def round_trip_through_bfloat16(pipe):
    pipe.text_encoder.to(torch.bfloat16)
    pipe.text_encoder.to(torch.float32)


def another_encoder(pipe):
    torch.manual_seed(1)
    pipe.text_encoder = CLIPTextModel(clip_config()).eval()


def another_tokenizer(pipe):
    pipe.tokenizer = clip_tokenizer()


def one_more_token(pipe):
    pipe.tokenizer.add_tokens(["snowfox"])
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer))


def eager_attention(pipe):
    pipe.text_encoder.set_attn_implementation("eager")


@pytest.mark.parametrize(
    "change",
    [
        set_one_weight,
        add_behind_the_version,
        round_trip_through_bfloat16,
        another_encoder,
        another_tokenizer,
        one_more_token,
        eager_attention,
        lambda pipe: pipe.text_encoder.to(torch.bfloat16),
        lambda pipe: pipe.text_encoder.train(),
    ],
)
def test_another_text_encoder_misses(pipe, cache, change):
    encode = Encode(pipe, cache)
    encode()
    change(pipe)
    encode()
    encode()
    assert encode.outcomes == ["miss", "miss", "hit"]


class LoraLinear(torch.nn.Module):
    """A linear layer with adapters, with the attributes by which LoRA layers are known."""

    def __init__(self, base):
        super().__init__()
        self.base_layer, self.scaling = base, {"style": 1.0}
        self.active_adapters, self.merged_adapters, self.disable_adapters = ["style"], [], False
        self.lora = torch.nn.Linear(base.in_features, base.out_features, bias=False)

    def forward(self, x):
        out = self.base_layer(x)
        for name in () if self.disable_adapters else self.active_adapters:
            out = out + self.scaling[name] * self.lora(x)
        return out


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.scaling.update(style=0.5),
        lambda layer: layer.active_adapters.clear(),
        lambda layer: setattr(layer, "disable_adapters", True),
        lambda layer: layer.lora.weight.data.mul_(2.0),
    ],
)
def test_another_lora_state_misses(pipe, cache, change):
    attention = pipe.text_encoder.encoder.layers[0].self_attn
    attention.q_proj = LoraLinear(attention.q_proj)
    encode = Encode(pipe, cache)
    first = encode()
    change(attention.q_proj)
    assert not torch.equal(encode()[0], first[0])
    encode()
    assert encode.outcomes == ["miss", "miss", "hit"]


def test_weights_loaded_in_inference_mode_are_keyed(cache):
    with torch.inference_mode():
        pipe = stable_diffusion()
        encode = cached_encode_prompt(pipe, cache)
        first = encode(TEXTS[0], "cpu", 1, True)
        same(first, encode(TEXTS[0], "cpu", 1, True))
        pipe.text_encoder.final_layer_norm.bias.add_(1.0)
        assert not torch.equal(encode(TEXTS[0], "cpu", 1, True)[0], first[0])
    assert cache.summary()["hits"] == 1


def test_dropout_in_training_mode_goes_to_the_encoder(pipe, cache):
    for layer in pipe.text_encoder.encoder.layers:
        layer.self_attn.dropout = 0.5
    pipe.text_encoder.train()
    encode = cached_encode_prompt(pipe, cache)
    with torch.no_grad():
        assert not torch.equal(encode(TEXTS[0], "cpu", 1, True)[0], encode(TEXTS[0], "cpu", 1, True)[0])
    assert sum(cache.summary()["bypassed"].values()) == 2 and cache.summary()["entries"] == 0


def test_a_forward_hook_of_the_caller_is_called_every_time(pipe, cache):
    seen = []
    pipe.text_encoder.register_forward_hook(lambda *_: seen.append(1))
    encode = cached_encode_prompt(pipe, cache)
    with torch.no_grad():
        encode(TEXTS[0], "cpu", 1, False)
        encode(TEXTS[0], "cpu", 1, False)
    assert len(seen) == 2 and sum(cache.summary()["bypassed"].values()) == 2


def test_weights_offloaded_layer_by_layer_are_keyed(pipe, cache):
    from accelerate import cpu_offload

    cpu_offload(pipe.text_encoder, torch.device("cpu"))
    assert next(pipe.text_encoder.parameters()).device.type == "meta"
    encode = Encode(pipe, cache)
    encode()
    encode()
    assert encode.outcomes == ["miss", "hit"]


def test_a_model_that_offload_moves_to_other_addresses_still_hits(pipe, cache):
    from accelerate import cpu_offload_with_hook

    cpu_offload_with_hook(pipe.text_encoder, torch.device("cpu"))
    encode = Encode(pipe, cache)
    encode()
    for parameter in pipe.text_encoder.parameters():
        parameter.data = parameter.data.clone()
    encode()
    assert encode.outcomes == ["miss", "hit"]


def test_a_number_is_never_given_to_another_object():
    serials, seen = Serials(), set()
    for _ in range(100):
        thing = torch.nn.Linear(1, 1)  # often where the one before was
        assert serials(thing) == serials(thing)
        seen.add(serials(thing))
        del thing
    assert len(seen) == 100


def test_an_object_without_weak_references_keeps_its_number():
    class Closed:
        __slots__ = ()

    serials, thing = Serials(), Closed()
    assert serials(thing) == serials(thing) != serials(Closed())
