"""Prompts find their class: everyday prompts with the classes a person would accept."""

import json

import pytest

from vivace.errors import PromptError
from vivace.models.load import WEIGHTS
from vivace.models.prompts import ClassName, Match, Prompts

EVERYDAY = {
    "red heart": "black heart suit",  # U+2665, drawn red
    "heart": "black heart suit",
    "hearts": "black heart suit",
    "blue heart": "blue heart",
    "black heart": "black heart",
    "Grinning  Face": "grinning face",
    "grining face": "grinning face",
    "cat": "cat",
    "a cat": "cat",
    "a photo of a cat": "cat",
    "cat on the moon": "cat",
    "black cat": "cat",
    "pizza": "slice of pizza",
    "pizzza": "slice of pizza",
    "rocket": "rocket",
    "rokcet": "rocket",
    "dog face": "dog face",
    "the dog": "dog",
    "big fluffy dog": "dog",
    "hotdog": "hot dog",
    "house": "house with garden",
    "tree": "evergreen tree",
    "christmas tree": "christmas tree",
    "sun": "sun with face",
    "moon": "crescent moon",
    "star": "glowing star",
    "phone": "mobile phone",
    "bear": "bear face",
    "panda": "panda face",
    "robot": "robot face",
    "poop": "pile of poo",
    "thumbs up": "thumbs up sign",
    "crying": "crying face",
    "smile": "white smiling face",
    "beer": "beer mug",
    "cake": "birthday cake",
    "apple": "red apple",
    "green apple": "green apple",
    "bannana": "banana",
    "elefant": "elephant",
    "purple elephant": "elephant",
    "snow man": "snowman",
    "ice-cream": "ice cream",
    "Pi\u00f1ata": "pinata",
    "T-Rex": "t-rex",
    "xray": "x-ray",
    "plane": "airplane",
    "bicycle": "bicycle",
    "present": "wrapped present",
    "music": "musical note",
    "strawberries": "strawberry",
    "tears of joy": "face with tears of joy",
}


@pytest.fixture(scope="module")
def prompts():
    entries = json.loads((WEIGHTS / "emoji" / "names.json").read_text())
    return Prompts([ClassName(**entry) for entry in entries], 1000)


@pytest.mark.parametrize("prompt", EVERYDAY)
def test_everyday_prompts(prompts, prompt):
    found = prompts.find(prompt)
    assert found.name == EVERYDAY[prompt]
    assert 0 < found.score <= 100


def test_every_name_codepoint_and_character_finds_itself(prompts):
    for entry in prompts.names:
        for how, prompt in (
            ("name", entry.name.upper()),
            ("codepoint", entry.codepoint.lower()),
            ("emoji", chr(int(entry.codepoint[2:], 16)) + "\ufe0f"),
            ("id", entry.id),
            ("id", f" {entry.id} "),
        ):
            assert prompts.find(prompt) == Match(entry.id, entry.name, entry.codepoint, 100.0, how)


@pytest.mark.parametrize("prompt", ["", None, 1000, "1000"])
def test_nothing_asked_for_is_the_null_label(prompts, prompt):
    assert prompts.find(prompt) == Match(1000, "", "", 100.0, "null")


def test_emoji_variants_find_their_class(prompts):
    assert prompts.find("\U0001f44d\U0001f3fd").name == "thumbs up sign"  # with a skin tone
    assert prompts.find("\u2764\ufe0f").name == "black heart suit"  # not a class itself: by its Unicode name
    assert prompts.find("\u2764\ufe0f").how == "fuzzy"


@pytest.mark.parametrize(
    "prompt", ["xyzzy", "qwertyuiop", "submarine", "red submarine", "angry face", "???", "U+1F6FF"]
)
def test_a_miss_suggests_the_closest(prompts, prompt):
    with pytest.raises(PromptError) as error:
        prompts.find(prompt)
    message = str(error.value)
    assert prompt in message
    if prompt not in ("???", "U+1F6FF"):
        assert 3 <= len(message.split("closest: ")[1].split(", ")) <= 5


def test_short_words_of_other_spelling_are_other_words(prompts):
    for prompt in ("moose", "lock", "coffee"):
        with pytest.raises(PromptError):
            prompts.find(prompt)


@pytest.mark.parametrize("prompt", [-1, 1001, "-5", "99999999999999999999", True, 1.5, ["cat"]])
def test_impossible_prompts_are_refused(prompts, prompt):
    with pytest.raises(PromptError, match="prompt"):
        prompts.find(prompt)


def test_a_model_without_names_takes_ids_only():
    bare = Prompts([], 10)
    assert bare.find(3) == Match(3, "", "", 100.0, "id")
    assert bare.find(None).id == 10
    with pytest.raises(PromptError, match=r"no class names; need a class id 0..9"):
        bare.find("cat")
