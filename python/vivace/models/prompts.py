"""A prompt finds its class: by number, codepoint, emoji, exact name, or the closest name.

The closest name is found word by word. The score of a name, 0 to 100, is

    100 * (0.8 * share of the prompt's words that the name has + 0.2 * share of the name's words that the prompt has)

where the last noun of a phrase ("heart" in "red heart", "slice" in "slice of pizza") counts twice, words that say
little ("of", "sign", "face") count little, a word counts as present as far as its spelling agrees (90 % or more), and
a name of another colour than the prompt's loses. Nothing is looked up in a table of synonyms.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple
