"""The tokeniser of the COCO caption metrics in plain Python: Penn Treebank tokens, lower case, no punctuation.

`ptb` gives the tokens that `pycocoevalcap`'s ``PTBTokenizer`` gives, which starts Java for them (Stanford CoreNLP
3.4.1, ``PTBTokenizer -preserveLines -lowerCase``, then fifteen punctuation tokens left out). The rules describe the
answers of that program to generated probes, and no more; ``benchmarks/tokenizer_parity.py`` compares the two, and
docs/rewards/tokenizers.md says what was probed and where they differ.

How: at every place the rule that reads furthest wins, an earlier rule on a tie. A rule may read beyond its token; what
it read counts, and is read again. Rules see a copy of the text in which every character above ASCII stands for its
class, so that they stay small. A blank ends a token except between digits, after a numeric abbreviation (``no. 5``)
and in markup, so that words are tokenised on their own and kept.

A caption is one text: where the Java tool takes a carriage return, form feed or U+2028 for the end of a row (and
shifts all rows behind it), this is a blank.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from functools import cache, lru_cache

from reward_models.metrics.ptb_rules import DIGIT, LETTER, MARK, QUOTES, RAISED, STARTS, starting

# What the Java tool does with characters above ASCII, found by trying each; all others vanish and end a token.
_LETTERS = """
    aa b5 ba c0-d6 d8-f6 f8-2c1 2c6-2d1 2e0-2e4 2ec 2ee 370-374 376-377 37a-37d 386 388-3f5 3f7-481 48a-527
    531-559 561-587 5d0-5ea 5f0-5f2 620-64a 660-669 66e-66f 671-6d3 6d5 6e5-6e6 6ee-6fc 6ff 710 712-72f 74d-7a5
    7b1-7ea 7f4-7f5 7fa 800-815 81a 824 828 840-858 8a0 8a2-8ac 904-939 93d 950 958-961 966-96f 971-977 979-97f
    985-9b9 9bd 9ce 9dc-9e1 9e6-9f1 a05-a39 a59-a6f a72-a74 a85-ab9 abd ad0-ae1 ae6-aef b05-b39 b3d b5c-b61
    b66-b6f b71 b83-bb9 bd0 be6-bef c05-c33 c35-c39 c3d c58-c59 c60-c61 c66-c6f c85-cb9 cbd cde-ce1 ce6-cf2
    d05-d3a d3d d4e d60-d61 d66-d6f d7a-d7f d85-dc6 e01-e30 e32-e33 e40-e46 e50-e59 e81-e84 e87-e88 e8a e8d
    e94-e97 e99-e9f ea1-ea7 eaa-eab ead-eb0 eb2-eb3 ebd-ec6 ed0-f00 f20-f29 f40-f6c f88-f8c 1000-102a 103f-1049
    1050-1055 105a-105d 1061 1065-1066 106e-1070 1075-1081 108e 1090-1099 10a0-10fa 10fc-135a 1380-138f 13a0-13f4
    1401-166c 166f-167f 1681-169a 16a0-16ea 1700-170c 170e-1711 1720-1731 1740-1751 1760-1770 1780-17b3 17d7 17dc
    17e0-17e9 1810-1877 1880-18a8 18aa-191c 1946-19ab 19c1-19c7 19d0-19d9 1a00-1a16 1a20-1a54 1a80-1a99 1aa7
    1b05-1b33 1b45-1b4b 1b50-1b59 1b83-1ba0 1bae-1be5 1c00-1c23 1c40-1c7d 1ce9-1cec 1cee-1cf1 1cf5-1cf6 1d00-1dbf
    1e00-1fbc 1fbe 1fc2-1fcc 1fd0-1fdb 1fe0-1fec 1ff2-1ffc 2071 207f 2090-209c 2102 2107 210a-2113 2115 2119-211d
    2124 2126 2128 212a-212d 212f-2139 213c-213f 2145-2149 214e 2183-2184 2c00-2c2e 2c30-2c5e 2c60-2ce4 2ceb-2cee
    2cf2-2cf3 2d00-2d6f 2d80-2dde 2e2f 3005-3006 3031-3035 303b-303c 3041-3096 309d-309f 30a1-30fa 30fc-312d
    3131-318e 31a0-31ba 31f0-31ff 3400-4db5 4e00-9fcc a000-a48c a4d0-a4fd a500-a60c a610-a66e a67f-a697 a6a0-a6e5
    a717-a71f a722-a788 a78b-a78e a790-a793 a7a0-a7aa a7f8-a801 a803-a805 a807-a80a a80c-a822 a840-a873 a882-a8b3
    a8d0-a8d9 a8f2-a8f7 a8fb a900-a925 a930-a946 a960-a97c a984-a9b2 a9cf-a9d9 aa00-aa28 aa40-aa42 aa44-aa4b
    aa50-aa59 aa60-aa76 aa7a aa80-aaaf aab1 aab5-aab6 aab9-aabd aac0 aac2-aadd aae0-aaea aaf2-aaf4 ab01-ab2e
    abc0-abe2 abf0-d7fb f900-fb1d fb1f-fb28 fb2a-fbb1 fbd3-fd3d fd50-fdc7 fdf0-fdfb fe70-fefc ff10-ff19 ff21-ff3a
    ff41-ff5a ff66-ffdc
"""
_MARKS = """
    2c2-2c5 2d2-2df 2e5-2eb 2ed 2ef-36f 375 378-379 384-385 3f6 483-487 55a-55f 591-5bd 5bf 5c1-5c2 5c4-5c5 5c7
    615-61a 64b-65e 670 6d6-6e4 6e7-6ed 6fd-6fe 70f 711 730-74c 7a6-7b0 7eb-7f3 900-903 93c 93e-94e 951-955
    962-963 981-983 9bc 9be-9cd 9d7 9e2-9e3 a01-a03 a3c-a4f a81-a83 abc abe-acf b82 bbe-bcd c01-c03 c3e-c56
    d3e-d48 e31 e34-e3a e47-e4e eb1 eb4-ebc ec8-ecd
"""
_SYMBOLS = """
    80 91-94 96-97 a1-a9 ab-b4 b6-b9 bb-bf d7 f7 37e 387 589 5be 5c0 5c3 5c6 5f3-603 606-60c 614 61b 61e-61f 66a
    66d 6d4 700-70d 7f6-7f8 964-965 e3f e4f 1fbd 2013-2023 2026 2030-203b 203e-2042 2044 2070 2074-207e 2080-208e
    20a0 20a4 20ac 2100-2101 2103-2106 2108-2109 2114 2116-2118 211e-2123 2125 2127 2129 212e 213a-213b 2140-2144
    214a-214d 214f 2153-215e 2190-2bff 3001-3002 3012 30fb ff01-ff0f ff1a-ff20 ff3b-ff40 ff5b-ff65 ffe0-ffe1
    ffe5-ffe6
"""
_ZEROS = """
    660 6f0 7c0 966 9e6 a66 ae6 b66 be6 c66 ce6 d66 e50 ed0 f20 1040 1090 17e0 1810 1946 19d0 1a80 1a90 1b50 1bb0 1c40
    1c50 a620 a8d0 a900 a9d0 aa50 abf0 ff10
"""  # the zero of each script's ten digits

_SYMBOL, _GONE = "\xa7\0"  # stand-ins of the classes no rule speaks of
_THEMSELVES = "\xa0\xad\u058a\u066b\u066c\u2010\u2011\u2044\u3000\u3001"
_THEMSELVES += "".join(map(chr, range(0x2000, 0x200B)))
_RAISED_DIGITS = "\xb2\xb3\xb9\u2070\u2074-\u2079\u2080-\u2089"

_WRITTEN = {  # tokens written in another way
    **{"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"},
    **{"\xa2": "cents", "\xa3": "#", "\xa4": "$", "\x80": "$", "\u20a0": "$", "\u20ac": "$"},
    **{"\xbc": "1/4", "\xbd": "1/2", "\xbe": "3/4", "\u2153": "1/3", "\u2154": "2/3"},
    **{"&amp;": "&", "&lt;": "<", "&gt;": ">"},
}
_QUOTED = dict.fromkeys(map(ord, "\x91\u2018\u201b\u2039"), "`") | dict.fromkeys(map(ord, "\x92\u2019\u203a"), "'")
_QUOTED |= dict.fromkeys(map(ord, "\x93\xab\u201c"), "``") | dict.fromkeys(map(ord, "\x94\xbb\u201d"), "''")
_QUOTE_CHARACTERS = "'`\u201a\u201e\u201f" + "".join(map(chr, _QUOTED))
_DROPPED = {"'", "''", "`", "``", '"', ".", "?", "!", ",", ":", "-", ";", "\x85", "\u2026"}
_DROPPED |= {"...", "....", "--", "---", "----", "\x96", "\x97", "\u2013", "\u2014", "\u2015"}
_DROPPED |= {"\u058a", "\u2010", "\u2011"}  # hyphens between no letters
_DROPPED |= {"&apos;", "&quot;", ""}


class _Shapes(dict[int, str]):
    """Translation table for `str.translate`, filled as characters turn up: the stand-in of each character."""

    def __missing__(self, code: int) -> str:
        char = chr(code)
        if code < 128 or char in _THEMSELVES or re.match(f"[{QUOTES}]", char):
            out = char
        elif re.match(f"[{_RAISED_DIGITS}]", char):
            out = RAISED
        else:
            inside = [s for s, ranges in _classes().items() if bisect_right(ranges, code) % 2]
            out = inside[0] if inside else _GONE
        self[code] = out
        return out


@cache
def _classes() -> dict[str, list[int]]:
    """Per stand-in the code points where its ranges begin and (exclusive) end, in turn, ascending."""
    out = {DIGIT: [edge for zero in _ZEROS.split() for edge in (int(zero, 16), int(zero, 16) + 10)]}
    for stand_in, table in ((LETTER, _LETTERS), (MARK, _MARKS), (_SYMBOL, _SYMBOLS)):
        pairs = [item.partition("-") for item in table.split()]
        out[stand_in] = [edge for low, _, high in pairs for edge in (int(low, 16), int(high or low, 16) + 1)]
    return out


class _Words(dict[str, tuple[str, ...]]):
    """Tokens of the pieces between blanks, kept: captions repeat few words. Bounded."""

    def __missing__(self, piece: str) -> tuple[str, ...]:
        tokens = tuple(_scan(piece))
        if len(piece) <= 40 and len(self) < 100_000:
            self[piece] = tokens
        return tokens


_SHAPES, _WORDS = _Shapes(), _Words()
_ROWS = dict.fromkeys(map(ord, "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"), " ")
_HAS_DIGIT = re.compile(r"\d")
_BREAK = re.compile(r"(?<![\d).]) | (?!\d)")  # a blank that no rule but markup reads across
_START = re.compile(rf"\b[A-Za-z]\. +(?:{'|'.join(STARTS.split())})\b", re.IGNORECASE)
_CONTRACTION = re.compile(r"(n?)(?:[\x92\u2019]|(?-i:&apos;))([msdt]|re|ve|ll)", re.IGNORECASE)


@lru_cache(maxsize=10_000)
def _written(token: str) -> str:
    """A token (its text in the caption) as the Java tool prints it, lower case; "" if it is left out."""
    if "@" not in token:
        token = token.replace("\xad", "")  # soft hyphen
    if not token.strip(_QUOTE_CHARACTERS):
        token = token.translate(_QUOTED)
    if token in _DROPPED or token.lower() in ("&nbsp;", "&mdash;", "&md;"):
        return ""
    if token.lower() in _WRITTEN:
        return _WRITTEN[token.lower()]
    if token[-1] != ">":
        token = token.replace("(", "-lrb-").replace(")", "-rrb-")
        if "&amp;" in token and token.replace("&amp;", "").replace("+", "").replace("&", "").isalpha():
            token = token.replace("&amp;", "&")
        if contraction := _CONTRACTION.fullmatch(token):
            token = f"{contraction[1]}'{contraction[2]}"
    return token.lower()


def _scan(text: str) -> list[str]:
    """Tokens of a text by the rules."""
    shape = (text if text.isascii() else text.translate(_SHAPES)) + "\n\n"
    out: list[str] = []
    at, length = 0, len(text)
    while at < length:
        first = shape[at]
        if first <= " " or first == "\x7f":  # blank, control character or a character that vanishes
            at += 1
            continue
        furthest, end = at + 1, at + 1
        for rule in starting(first):
            reading = rule(shape, at)
            if reading and reading[0] > furthest:
                furthest, end = reading
        end = min(end, length)
        out += _written(text[at:end]).split()
        at = end
    return out


def ptb(text: str) -> list[str]:
    """Lower-case Penn Treebank tokens of one caption, punctuation left out; see the module docstring.

    A token never holds white space: where the Java tool writes a no-break space into one (``555 123 4567``), the
    scorers behind it split there, and so does this.
    """
    if not text.isprintable():
        text = text.translate(_ROWS)
    if "<" in text or ". " in text and _START.search(text):
        return _scan(text)
    out: list[str] = []
    for piece in _BREAK.split(text) if _HAS_DIGIT.search(text) else text.split(" "):
        out += _WORDS[piece]
    return out
