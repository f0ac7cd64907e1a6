"""A prompt finds its class: by number, codepoint, emoji, exact name, or the closest name.

The closest name is found word by word. The score of a name, 0 to 100, is

    100 * (0.8 * share of the prompt's words that the name has + 0.2 * share of the name's words that the prompt has)

where the noun a phrase is about ("heart" in "red heart") counts twice and words that say little ("with", "sign",
"face") count little; a misspelt word counts as far as it agrees; a name in another colour than the prompt's loses.
Nothing is looked up in a table of synonyms.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from rapidfuzz import fuzz, process
from rapidfuzz.distance import OSA

from vivace.errors import PromptError

CUT_OFF = 55.0  # score below which a name is not what the prompt meant
SPELLING = 0.75  # agreement (1 - edits / length) below which two words are different words
OTHER_COLOUR = 0.3
SAME_NOUN = 0.05
PREPOSITIONS = frozenset("of with without in on at to for from by behind over and wearing holding riding".split())
LIGHT = PREPOSITIONS.union("a an the some my photo picture image drawing emoji".split())
GENERIC = frozenset("sign symbol suit face mark".split())
COLOURS = frozenset("red orange yellow green blue purple violet pink brown black white grey gray".split())
# In the symbol blocks of Unicode, below this codepoint, these words tell how a glyph is drawn (filled, outlined), not
# its colour: U+2665 "black heart suit" is red.
DRAWN_BELOW = 0x2800
DRAWING = frozenset("black white heavy medium".split())


@dataclass(frozen=True, slots=True)
class ClassName:
    """A class the model knows: id, name, codepoint such as "U+1F600" (or "")."""

    id: int
    name: str
    codepoint: str = ""


@dataclass(frozen=True, slots=True)
class Match:
    """The class a prompt found. score: 0 to 100; how: "null", "id", "codepoint", "emoji", "name" or "fuzzy"."""

    id: int
    name: str
    codepoint: str
    score: float
    how: str


class Prompts:
    """The prompts of one model. `classes` is the number of classes and the id of the null label."""

    def __init__(self, names: Sequence[ClassName], classes: int) -> None:
        self.names, self.classes = tuple(names), classes
        self._by_id = {entry.id: entry for entry in self.names}
        self._by_codepoint = {int(entry.codepoint[2:], 16): entry for entry in self.names if entry.codepoint}
        self._by_name: dict[str, ClassName] = {}
        for entry in self.names:
            self._by_name.setdefault("".join(words_of(entry.name)), entry)

    def find(self, prompt: str | int | None) -> Match:
        """The class of a prompt; "" and None are the null label (no class). Raises PromptError with suggestions."""
        if prompt is None or prompt == "":
            return Match(self.classes, "", "", 100.0, "null")
        if isinstance(prompt, bool) or not isinstance(prompt, (str, int)):
            raise PromptError(f"prompt: {type(prompt).__name__}; need text, a class id or None")
        text = str(prompt).strip()
        if re.fullmatch(r"[+-]?[0-9]+", text):
            return self._find_id(int(text))
        if found := re.fullmatch(r"[uU]\+?([0-9a-fA-F]{4,6})", text):
            return self._find_codepoint(int(found[1], 16), text)
        letters = _emoji(text)
        if letters is not None and ord(letters) in self._by_codepoint:
            return _match(self._by_codepoint[ord(letters)], 100.0, "emoji")
        return self._find_name(_official_name(letters) if letters is not None else text, text)

    def suggest(self, text: str, limit: int = 5) -> list[str]:
        """Names closest to a text, best first."""
        ranked = [self.names[i].name for score, i in self._rank(text)[:limit] if score >= CUT_OFF / 2]
        plain = process.extract(text.lower(), [entry.name for entry in self.names], scorer=fuzz.ratio, limit=limit)
        return list(dict.fromkeys([*ranked, *(name for name, _, _ in plain)]))[:limit]

    def _find_id(self, number: int) -> Match:
        if number == self.classes:
            return Match(self.classes, "", "", 100.0, "null")
        if not 0 <= number < self.classes:
            raise PromptError(f"prompt: class id {number}; need 0..{self.classes - 1}, or {self.classes} for no class")
        return _match(self._by_id.get(number, ClassName(number, "")), 100.0, "id")

    def _find_codepoint(self, codepoint: int, text: str) -> Match:
        if codepoint in self._by_codepoint:
            return _match(self._by_codepoint[codepoint], 100.0, "codepoint")
        official = _official_name(chr(codepoint)) if codepoint < 0x110000 else ""
        raise self._miss(f"{text} ({official})" if official else text, official)

    def _find_name(self, name: str, text: str) -> Match:
        if not self.names:
            raise PromptError(f"prompt {text!r}: this model has no class names; need a class id 0..{self.classes - 1}")
        exact = self._by_name.get("".join(words_of(name)))
        if exact is not None:
            return _match(exact, 100.0, "name")
        ranking = self._rank(name)
        if not ranking or ranking[0][0] < CUT_OFF:
            raise self._miss(repr(text), name)
        score, i = ranking[0]
        return _match(self.names[i], round(score, 1), "fuzzy")

    def _miss(self, got: str, like: str) -> PromptError:
        close = self.suggest(like) if like and self.names else []
        hint = f"closest: {', '.join(close)}" if close else f"need a name, an emoji or an id 0..{self.classes - 1}"
        return PromptError(f"prompt {got}: no class of that name; {hint}")

    @cached_property
    def _phrases(self) -> list[Phrase]:
        """The names as words, in the order of `names`."""
        return [Phrase(_depicted(entry)) for entry in self.names]

    def _rank(self, text: str) -> list[tuple[float, int]]:
        """(score, position) of all names, best first, lower ids first among equals."""
        prompt = Phrase(words_of(text))
        if not prompt.words:
            return []
        vocabulary = {word for phrase in self._phrases for word in phrase.words}
        alike = {word: _alike(word, vocabulary) for word in prompt.words}
        scores = [(100 * _score(prompt, phrase, alike), i) for i, phrase in enumerate(self._phrases)]
        return sorted(scores, key=lambda pair: (-pair[0], pair[1]))


class Phrase:
    """Words of a prompt or name, their weights, and the noun it is about."""

    def __init__(self, words: list[str]) -> None:
        self.words = words
        self.noun = _noun(words)
        self.colours = COLOURS.intersection(words)
        self.weights = [_weight(word) for word in words]


def words_of(text: str) -> list[str]:
    """Lower-case words without accents or punctuation."""
    plain = unicodedata.normalize("NFKD", text).casefold()
    plain = "".join(letter for letter in plain if not unicodedata.combining(letter))
    return re.findall(r"[a-z0-9]+", plain.replace("'", ""))


def _score(prompt: Phrase, name: Phrase, alike: dict[str, dict[str, float]]) -> float:
    """Score of a name, about 0 to 1; see the head of this file."""
    has = total = 0.0
    used: dict[str, float] = {}
    for word, weight in zip(prompt.words, prompt.weights, strict=True):
        weight *= 2 if word == prompt.noun else 1
        near = alike[word]
        best = max(name.words, key=lambda other: near.get(other, 0.0), default="")
        degree = near.get(best, 0.0)
        has, total = has + weight * degree, total + weight
        if degree:
            used[best] = max(degree, used.get(best, 0.0))
    back = sum(weight * used.get(word, 0.0) for word, weight in zip(name.words, name.weights, strict=True))
    score = 0.8 * has / total + 0.2 * back / max(sum(name.weights), 1e-9)
    if name.noun in alike.get(prompt.noun, ()):
        score += SAME_NOUN
    if prompt.colours and name.colours - prompt.colours:
        score -= OTHER_COLOUR
    return min(score, 1.0)


def _alike(word: str, vocabulary: Iterable[str]) -> dict[str, float]:
    """Words of the vocabulary that could be meant by `word`, with their agreement in (0, 1]."""
    found = {}
    for other in vocabulary:
        if word == other:
            found[other] = 1.0
        elif len(word) >= 3 and _stem(word) == _stem(other):
            found[other] = 0.95
        elif len(word) >= 5 and other.endswith(word):  # "plane" in "airplane"
            found[other] = 0.85
        elif len(word) >= 5 and other.startswith(word) and len(other) <= len(word) + 3:  # "music" in "musical"
            found[other] = 0.85
        elif _may_be_misspelt(word, other):
            agreement = OSA.normalized_similarity(word, other, score_cutoff=SPELLING)
            if agreement:
                found[other] = agreement
    return found


def _may_be_misspelt(word: str, other: str) -> bool:
    """Whether closeness of spelling means anything: short words that differ in one letter are other words."""
    if len(word) < 4 or word[0] != other[0]:
        return False
    return len(word) != len(other) or len(word) > 5 or sorted(word) == sorted(other)


def _stem(word: str) -> str:
    """A word without the common endings of plurals and verbs."""
    for _ in range(2):
        for ending in ("ing", "es", "ed", "s", "e", "y"):
            if word.endswith(ending) and len(word) - len(ending) >= 3:
                word = word.removesuffix(ending)
                break
    return word


def _noun(words: list[str]) -> str:
    """The last telling word before the first preposition that follows one; "" without telling words."""
    noun = ""
    for word in words:
        if noun and word in PREPOSITIONS:
            break
        if word not in LIGHT and word not in GENERIC:
            noun = word
    return noun or next((word for word in reversed(words) if word not in LIGHT), "")


def _weight(word: str) -> float:
    """How much a word tells."""
    return 0.1 if word in LIGHT else 0.3 if word in GENERIC else 1.0


def _depicted(entry: ClassName) -> list[str]:
    """Words of a name, without those that only tell how a symbol is drawn."""
    words = words_of(entry.name)
    if entry.codepoint and int(entry.codepoint[2:], 16) < DRAWN_BELOW:
        return [word for word in words if word not in DRAWING]
    return words


def _emoji(text: str) -> str | None:
    """The character of a text that is one emoji, without variation selectors and skin tones; else None."""
    letters = [c for c in text if c != "\u200d" and not 0xFE00 <= ord(c) <= 0xFE0F and not 0x1F3FB <= ord(c) <= 0x1F3FF]
    if letters and ord(letters[0]) > 0xFF and not any(c.isalnum() or c.isspace() for c in letters):
        return letters[0]
    return None


def _official_name(letter: str) -> str:
    """The Unicode name of a character in lower case, without words about its drawing where they mean nothing else."""
    name = unicodedata.name(letter, "").lower()
    return " ".join(_depicted(ClassName(0, name, f"U+{ord(letter):04X}")))


def _match(entry: ClassName, score: float, how: str) -> Match:
    """A match of a known class."""
    return Match(entry.id, entry.name, entry.codepoint, score, how)
