"""What of a text counts when answers are scored: its words for ROUGE-L, its form for exact match."""

import functools
import string
import unicodedata
from typing import TYPE_CHECKING

import regex

if TYPE_CHECKING:
    from rouge_score.tokenizers import Tokenizer

# Scripts that put no space between words: a letter with its marks is what can be told apart.
_UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"
# A word may hold zero-width joiners, as those of Persian and Hindi do.
_SPACED = rf"(?:(?!{_UNSPACED})[\p{{L}}\p{{Nd}}](?:(?!{_UNSPACED})[\p{{L}}\p{{M}}\p{{Nd}}\u200c\u200d])*)"
_WORD = regex.compile(rf"(?P<unspaced>{_UNSPACED}\p{{M}}*)|{_SPACED}")
_WORD_OR_PICTURE = regex.compile(rf"{_WORD.pattern}|(?P<symbol>(?=\p{{So}})\X)")
_WORD_OR_SYMBOL = regex.compile(rf"{_WORD.pattern}|(?P<symbol>(?!\s)\X)")
# What the package reads, where a letter is in it, with what it drops around it; else digits, or other letters.
_PIECE = regex.compile(
    r"(?P<before>[^a-z0-9]*)(?P<read>(?=[0-9]*[a-z])[a-z0-9]+)(?P<after>[^a-z0-9]*)|[0-9]+|[^a-z0-9]+"
)
_OTHER_LETTER = regex.compile(r"(?![A-Za-z])\p{L}")
# Selects how the character before it is drawn.
_VARIANT = regex.compile(r"\p{Variation_Selector}")
_ACCENTS_ALONE = regex.compile(r"(?:(?![a-z])\p{Latin}\p{M}*)+")
_ENGLISH_LETTER = regex.compile(r"[A-Za-z]")

_DROP_PUNCTUATION = str.maketrans("", "", string.punctuation)
_QUOTES = "\"'`´‘’‚‛“”„‟«»‹›「」『』"
_BEFORE, _AFTER = _QUOTES + "¿¡ ", _QUOTES + ".,;:!?…。，、；：！？। "


@functools.cache
def _package() -> "Tokenizer":
    # Imported on use: it brings NLTK and SciPy's statistics, which take seconds.
    from rouge_score.tokenizers import DefaultTokenizer

    return DefaultTokenizer(use_stemmer=True)


class Words:
    """Cuts two texts into the words that ROUGE-L compares; a tokenizer as the package rouge-score wants one.

    The package itself reads a-z and 0-9 and takes everything else for a space: so is English read here, stems and all.
    Words without any of these letters are words too; of scripts without spaces every letter is one. Letters that the
    package drops inside a word stay with their neighbours where both texts have some ("café" is no "cafà").

    Args:
      reference: where it has letters of A-Z, no more is counted than that. Where it has none, so are Latin words of
        accents alone, and pictures such as an emoji; where it has no letter and no digit at all, every symbol.
      answer: the text that is compared with it.
    """

    def __init__(self, reference: str, answer: str):
        self._english = bool(_ENGLISH_LETTER.search(reference))
        self._words = bool(_WORD.search(reference))
        self._unit = _WORD if self._english else _WORD_OR_PICTURE if self._words else _WORD_OR_SYMBOL
        self._joined = all(map(_OTHER_LETTER.search, (reference, answer)))

    def tokenize(self, text: str) -> list[str]:
        """The words of a text, in order."""
        if text.isascii() and self._words:
            return _package().tokenize(text)
        words = []
        for match in self._unit.finditer(unicodedata.normalize("NFC", _VARIANT.sub("", text.lower()))):
            one = match["unspaced"] or match.groupdict().get("symbol")
            words += [one] if one else self._pieces(match[0])
        return [word for word in words if not (self._english and _ACCENTS_ALONE.fullmatch(word))]

    def _pieces(self, word: str) -> list[str]:
        """A word as the package cuts it, each piece with the letters around it that the package drops."""
        pieces = []
        for match in _PIECE.finditer(word):
            before, read, after = match["before"], match["read"], match["after"]
            if read is None:
                pieces.append(match[0])
            else:
                (stem,) = _package().tokenize(read)
                pieces.append(f"{before}{stem}{after}" if self._joined else stem)
        return pieces


def plain_form(text: str) -> str:
    """Lower case, white space squeezed, without quotes around and marks that end a sentence after the text.

    Signs, decimal points and whatever else stands inside stay. A text of nothing but such marks stays as it is.
    """
    squeezed = " ".join(unicodedata.normalize("NFC", text.lower()).split())
    return squeezed.rstrip(_AFTER).lstrip(_BEFORE) or squeezed


def word_form(text: str) -> str:
    """Lower case, without ASCII punctuation, white space squeezed; articles stay ("a cat" is not "cat")."""
    return " ".join(text.lower().translate(_DROP_PUNCTUATION).split())
