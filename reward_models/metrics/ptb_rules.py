"""What one token of the Penn Treebank tokeniser may look like: the rules `reward_models.metrics.ptb` chooses from.

Each describes what the Java tool answered to generated probes (docs/rewards/tokenizers.md). A rule takes a shape, the
text with every character above ASCII replaced by the stand-in of its class, and a place in it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import cache
from itertools import chain, product, takewhile

Reading = tuple[int, int]  # where a rule stopped reading, where its token ends
Rule = Callable[[str, int], Reading | None]

# One stand-in per class; characters with a part of their own in a rule stand for themselves.
LETTER, MARK, DIGIT, RAISED = "\xe9\u0300\u0660\xb2"
QUOTES = r"'`\x91-\x94\xab\xbb\u2018-\u201f\u2039\u203a"

# Abbreviations. The first two may end a sentence, the next two not; the second of each pair wants a capital.
_ENDING = """
    al ala apr ariz assn aug bhd bldg blvd bros calif co colo conn corp cos ct dak dec esq est etc ext feb fla
    fri ga inc ind intl jan jr jul jun kan kans ky ltd mar md mich minn mo mon mont neb nev nov oct okla penn plc pte
    ppte pptes ppty pptys ptes pty ptys rd rt sep sept seq sq sr sys tel tenn thu thurs tue tues univ va vt wed wis
    wisc wyo
"""
_ENDING_CAPITAL = "ark az del ill la mass miss ore pa tex wash"
_TITLES = """
    adj adm adv alex assoc asst atty attys ave brig capt cf cie cmdr col comdr cpl dept det dr drs elec ens ft gen gov
    govs hon insp invt jos lieut lt maj messrs mfg mlle mme mr mrs ms msgr mt mtg natl pfc ph pres prof profs pvt rep
    reps rev sen sens sfc sgt spc st ste supt supts treas vs wm
"""
_NEVER_CAPITALS = {"mfg", "mtg", "ppte", "pptes", "ppty", "pptys", "pte", "ptes", "pty", "ptys"}
_NUMERIC = "art ca fig figs no nos op pp prop"  # before a number only
STARTS = """
    A About According Additionally After An As At But Earlier He Her Here However If In It Last Many More Now Once One
    Other Our She Since So Some Such That The Their Then There These They This We What When While Yet You
"""  # a single letter before one of these is no abbreviation (``plan b. The``)
_FILES = """
    bat bmp c cgi class cpp dll doc docx exe gif gz h htm html jar java jpeg jpg mov mp3 pdf php pl png ppt ps py sql
    tar txt wav x xml zip
"""


def _spellings(words: str, capital: str = "") -> str:
    """An alternation of abbreviations as written: small, Capitalised, CAPITALS."""
    small = words.split()
    out = {*small, *map(str.capitalize, small), *(w.upper() for w in small if w not in _NEVER_CAPITALS)}
    out |= {form for w in capital.split() for form in (w.capitalize(), w.upper())}
    return "|".join(sorted(out, key=lambda w: (-len(w), w)))


# Parts of patterns. ASCII letters match in both cases but for `(?-i:`.
_ACCENTED = "&[aeiou](?:acute|grave|uml);"
_CHAR = rf"(?:[a-z{LETTER}{MARK}\xad]|{_ACCENTED})"
_CHAR_OR_DIGIT = rf"(?:[a-z0-9{LETTER}{MARK}{DIGIT}\xad]|{_ACCENTED})"
_WORD = rf"{_CHAR}{_CHAR_OR_DIGIT}*+(?:[.!?]{_CHAR}{_CHAR_OR_DIGIT}*+)*+"  # dog, yahoo!inc, a.b
_ALNUM = rf"[a-z0-9{LETTER}{DIGIT}\xad]"
_CAPITALS = r"(?-i:[A-Z]++(?:(?:[+&]|&amp;)[A-Z]++)++)"  # R&D
_STARTS_WORD, _STARTS_ALNUM = rf"a-z&\xad{LETTER}{MARK}", rf"a-z0-9\xad{LETTER}{DIGIT}"

# Markup: <b>, </b>, <br/>, <a href="x">, <!-- x -->.
_BLANK = r"[ \t\xa0\u2000-\u200a\u3000]"
_NAME = "[a-z][a-z0-9_:.-]*+"
_ATTRIBUTE = rf"{_NAME}(?:\s*=\s*(?:\"[^\n\"]*\"|'[^\n']*'))?"
_TAG = rf"<(?:[!?][a-z-][^>\n]{{0,1000}}+|/?{_NAME}(?: +{_ATTRIBUTE})*\s*/? *)>"
_APOSTROPHE = r"(?:['`\x91\x92\u2018\u2019\u201b]|&apos;)"

# Apostrophes. Printed ones make contractions and shortened words; names take any.
_PRINTED = ("'", "\x92", "\u2019", "&apos;")
_AROUND = re.compile(rf"((?:{_WORD})?)({_APOSTROPHE})([a-z{LETTER}]*+)", re.IGNORECASE | re.ASCII)
_CLITICS = ("m", "s", "d", "re", "ve", "ll")
_SHORTENED = {"": ("em", "till", "til", "cause"), "cap": ("n",), "c": ("est",), "o": ("o",)}
_SHORTENED_TYPED = {"e": ("er",), "ev": ("ry",), "li": ("l",), "nat": ("l",), "c": ("mon",)}  # with ' alone
_PARTICLES = ("d", "l", "j", "ol")
# I and Y do not begin such names.
_NAME_LETTERS, _VOWELS = "dlonDLONABCEFGHJKMPQRSTUVWXZ", tuple("aeiouyAEIOUY")
_VOWELS_OR_CAPITALS = tuple("aeiouABCDEFGHIJKLMNOPQRSTUVWXYZ")


def _apostrophe(shape: str, at: int) -> Reading | None:
    """Words with an apostrophe: what stands left and right of it decides."""
    found = _AROUND.match(shape, at)
    if not found:
        return None
    left, mark, letters = found[1].lower(), found[2].lower(), found[3].lower()
    before, after = found.end(1), found.end(2)
    right = letters.partition(LETTER)[0]  # the ASCII letters it begins with
    clitic = next(filter(right.startswith, _CLITICS), "") if mark in _PRINTED else ""
    if _is_name(found[1], found[3]) and right != clitic:
        return found.end(), found.end()
    endings = _SHORTENED.get(left, ()) if mark in _PRINTED else ()
    endings += _SHORTENED_TYPED.get(left, ()) if mark == "'" else ()
    ending = next(filter(right.startswith, endings), "")
    if len(ending) > len(clitic):
        return after + len(ending), after + len(ending)  # 'em, cap'n
    if left and clitic:
        return after + len(clitic), before  # dog|'s
    if left[-1:] == "n" and right[:1] == "t" and left.isascii() and left.isalpha() and left[-2:] != "nn":
        return after + 1, after + 1 if left == "n" else before - 1  # do|n't, then n't
    if mark not in _PRINTED:
        return None
    if not left:
        return _after_apostrophe(after, mark, right)
    if left == "y" and right:
        return after + 1, after  # y'|all
    return (after, after) if left in _PARTICLES else None


def _is_name(left: str, right: str) -> bool:
    """O'Neil, d'Or, K'ung: one letter, then two or more. Ma'am, Ha'Aretz: vowel, then vowel or capital."""
    if len(left) == 1:
        return len(right) > 1 and left in _NAME_LETTERS
    return left.isalpha() and left.endswith(_VOWELS) and right.startswith(_VOWELS_OR_CAPITALS)


def _after_apostrophe(after: int, mark: str, right: str) -> Reading | None:
    """Tokens that begin with an apostrophe, which ends before `after`; `right`: the letters behind it."""
    clitic = next(filter(right.startswith, _CLITICS), "")
    if clitic and (right == clitic or mark != "'"):
        return after + len(clitic) + 1, after + len(clitic)  # 's
    if mark == "'" and right.startswith(("tis", "twas")):
        return after + len(right), after + 1  # 't|is
    return None


# Addresses may hold nearly anything. They are followed for 500 characters and 20 dots, so that time stays linear.
_ADDRESS = re.compile(r"""<?[^ \t\n"<>|()\xa0]{1,500}""")
_HIGH = "\\0\x7f-\x9f\xa1-\uffff"  # characters above ASCII may stand everywhere
_HOST_LABEL = re.compile(rf"[a-z#%&*+~{_HIGH}][a-z0-9#%&*+~{_HIGH}]*", re.IGNORECASE)
_WWW_LABEL = re.compile(r"[^!?,{}]+")
_DOMAIN, _SHORT_DOMAIN = re.compile("com|net|org|edu"), re.compile("[a-z]{2,4}", re.IGNORECASE)
_NEVER_LAST = ".,!?-{}"


def _address(shape: str, at: int) -> Reading | None:
    """http(s)://..., host.com/path, www.host.fr, mail@host: the longest of those that begin here."""
    found = _ADDRESS.match(shape, at)
    if not found or not any(sign in found[0] for sign in "@./"):
        return None
    run = found[0]
    length = max(_mail(run), 0 if run[0] == "<" else max(_web(run), _host(run)))
    if "@" in run[:length] and shape.startswith(">", at + length):
        length += 1
    return (at + length, at + length) if length else None


def _web(run: str) -> int:
    """Length of the http or https address `run` begins with: two characters at least."""
    scheme, colon, rest = run.partition("://")
    rest = rest.partition("{")[0].partition("}")[0].rstrip(_NEVER_LAST)
    return len(scheme + colon + rest) if scheme.lower() in ("http", "https") and len(rest) > 1 else 0


def _host(run: str) -> int:
    """Length of the host name `run` begins with, and of its path if that has two characters at least."""
    name, _, path = run.partition("/")
    labels = name.split(".", 20)
    www = labels[0].lower() == "www"
    label_of, domain_of = (_WWW_LABEL, _SHORT_DOMAIN) if www else (_HOST_LABEL, _DOMAIN)
    begin = length = 0
    for place, label in enumerate(labels):
        domain = domain_of.match(label)
        if domain and place > www:  # something.com, www.something.fr
            length = begin + domain.end()
        if not label_of.fullmatch(label):
            break
        begin += len(label) + 1
    path = path.rstrip(_NEVER_LAST)
    return length + 1 + len(path) if length == len(name) and len(path) > 1 else length


def _mail(run: str) -> int:
    """Length of the mail address `run` begins with: a letter or digit, anything, @, labels with single dots."""
    run = run.partition("{")[0].partition("}")[0]
    first = run.removeprefix("<")[:1]
    sign = run.rfind("@")
    while sign > 0 and run[sign + 1 : sign + 2] in ("", "."):
        sign = run.rfind("@", 0, sign)
    if sign < 1 or not (first.isascii() and first.isalnum()):
        return 0
    return sign + 1 + len(run[sign + 1 :].partition("..")[0].removesuffix("."))


# Groups of letters and digits joined by hyphens, slashes, dots; followed for 500 characters.
_HYPHENED = re.compile(r"[a-z0-9.,\xad-]{1,500}", re.IGNORECASE)
_SLASHED = re.compile(r"[a-z0-9/-]{1,500}", re.IGNORECASE)
_AFTER_STOP = ",;:\u3001"  # a full stop stays before these
_GROUP = re.compile(r"[a-z](?:\.[a-z])+\.|[a-z0-9\xad]+", re.IGNORECASE)  # U.S. or inch


def _dotted(shape: str, at: int) -> Reading | None:
    """5.5-inch, U.S.-based, 1,000-lb: dots and commas before the first hyphen, groups behind each."""
    found = _HYPHENED.match(shape, at)
    head, *groups = found[0].split("-") if found else [""]
    end = at + len(head)
    for group in groups:
        known = _GROUP.match(group)
        if known:
            end += 1 + known.end()
        if not known or known.end() < len(group):
            break
    if end == at + len(head):
        return None
    stop = shape[end] == "." and shape[end + 1] in _AFTER_STOP
    return (end + 2, end + 1) if stop else (end, end)


def _slashed(shape: str, at: int) -> Reading | None:
    """and/or, he/she/it, merry-go-round/x: two or three groups, each with at most two hyphened words behind it."""
    found = _SLASHED.match(shape, at)
    end, count = at - 1, 0
    for group in found[0].split("/")[:3] if found else []:
        first, *words = group.split("-")
        if not first:
            break
        behind = list(takewhile(str.isalpha, words[:2]))
        taken = "-".join([first, *behind])
        end, count = end + 1 + len(taken), count + 1
        if taken != group:
            break
    return (end, end) if count > 1 else None


@cache
def _number_shapes() -> frozenset[str]:
    """Telephone numbers, fractions and dates that are one token, every digit written as 0."""

    def zeros(low: int, high: int) -> list[str]:
        return ["0" * n for n in range(low, high + 1)]

    def joined(*parts: Iterable[str]) -> list[str]:
        return ["".join(choice) for choice in product(*parts)]

    own = joined(zeros(3, 4), ["", "-", " "], zeros(3, 5))  # 123-4567
    area = joined(zeros(2, 4), "- ")
    return frozenset(
        joined(["", "+", "++"], area, ["", *area], own)  # +44 20 7946 0958
        + joined("(", zeros(2, 3), [")", ") "], own)  # (555) 123-4567
        + joined(["", *joined(zeros(1, 4), "- ")], zeros(1, 4), "/\u2044", zeros(1, 4))  # 1-1/2
        + joined(zeros(1, 2), "-/", zeros(1, 2), "-/", zeros(2, 4))  # 10/11/2012
    )


_DIGIT_GROUPS = re.compile(f"[0-9{DIGIT}+() \xa0/\u2044-]{{3,22}}")
_AS_ZERO = dict.fromkeys(map(ord, "123456789" + DIGIT), "0") | {0xA0: " "}


def _digit_groups(shape: str, at: int) -> Reading | None:
    """The longest telephone number, fraction or date that begins here."""
    found = _DIGIT_GROUPS.match(shape, at)
    groups = found[0].translate(_AS_ZERO) if found else ""
    return next(((at + n, at + n) for n in range(len(groups), 2, -1) if groups[:n] in _number_shapes()), None)


@cache
def _smileys() -> tuple[frozenset[str], frozenset[str]]:
    """Faces on their side, :-) and such, and upright ones, ^_^ and (^.^)."""
    sideways = product(["", "<", ">"], ":;=", ["", *"'*-o"], "()[]{@|\\DOPdp")
    eyes = "'<=>^x~"
    upright = chain(
        product([*eyes, "-"], "_", [*eyes, "-"]),
        product("(", [*eyes, "-"], ["", "_", "."], [*eyes, "-"], ")"),
        product("(", eyes, "-", eyes, ")"),
    )
    return frozenset(map("".join, sideways)), frozenset(map("".join, upright))


def _smiley(shape: str, at: int) -> Reading | None:
    """The longest face that begins here; letters and digits may not follow one on its side."""
    sideways, upright = _smileys()
    for end in range(at + 5, at + 1, -1):
        if shape[at:end] in upright:
            return end, end
        follows = shape[end : end + 1]
        if shape[at:end] in sideways and not (follows.isascii() and follows.isalnum()):
            return end + 1, end
    return None


def _pattern(pattern: str) -> Rule:
    """The rule of a regular expression: its token is group 1 if it has one."""
    match = re.compile(pattern, re.IGNORECASE | re.ASCII).match

    def rule(shape: str, at: int) -> Reading | None:
        found = match(shape, at)
        return (found.end(), found.end(found.lastindex or 0)) if found else None

    return rule


def _abbreviations() -> list[tuple[str, str]]:
    """Abbreviations that keep their full stop, and file names."""
    ending = rf"(?-i:{_spellings(_ENDING, _ENDING_CAPITAL)})"
    files = "|".join(_FILES.split())
    starts = "|".join(form for word in STARTS.split() for form in (word, word.upper()))
    return [
        ("a-z", rf"(?:{ending}|(?-i:{_spellings(_TITLES)}))\."),
        ("a-z", rf"((?:{ending}|ph\.d)\.)(?s:..)"),
        ("a-z", r"[a-z](?:\.[a-z])*\."),  # a.m.
        ("a-z", rf"([a-z])\.[ \t]+(?:(?-i:{starts})[ \t\n]|{_TAG})"),  # plan b. The
        (_STARTS_WORD + _STARTS_ALNUM, rf"({_CHAR_OR_DIGIT}++(?:\.{_CHAR_OR_DIGIT}++)*\.(?:{files}))[\s.!?,]"),
        ("acfnop", rf"((?:{'|'.join(_NUMERIC.split())})\.){_BLANK}?[0-9{DIGIT}]"),
    ]


def _words() -> list[tuple[str, str]]:
    """Words, and words joined by hyphens, signs and dots."""
    particle = rf"(?:[dol]{_APOSTROPHE}(?={_ALNUM}{{2}}))?"  # d'Or-like
    group = rf"{particle}{_ALNUM}++"
    hyphened = rf"{group}(?:[-_\u058a\u2010\u2011]{group})*+"  # 2nd, t-shirt, a_b
    dotted = rf"(?:{_WORD}|{hyphened}|{_CAPITALS})\."
    return [
        (_STARTS_WORD, _WORD),
        (_STARTS_ALNUM, hyphened),
        ("a-z", _CAPITALS),
        (_STARTS_WORD + _STARTS_ALNUM, rf"({dotted})[{_AFTER_STOP}]"),
        ("a-z$", r"c\+\+|[cf]#|(?-i:[A-Z]*+\$)"),  # C++, US$
        ("@#", rf"@[a-z_][a-z_0-9]*+|#{_CHAR}++"),
    ]


def _signs() -> list[tuple[str, str]]:
    """Numbers, punctuation, markup and entities."""
    printed = f"(?:{'|'.join(_PRINTED)})"
    point = r"[.:,\xad\u066b\u066c]"
    entity = "amp|lt|gt|nbsp|quot|apos|mdash|md|cdq|odq|ht|lr|q[clr]|tl|ur|#[0-9]+"
    return [
        (r"'\x92\u2019&", rf"{printed}n{printed}?|{printed}[2-9]0s"),  # rock 'n' roll, '90s
        (r"'\x92\u2019&", rf"({printed}[0-9]{{2}})[ \t\n]"),  # '85
        (rf"0-9{DIGIT}+.:,\xad\u066b\u066c-", rf"[-+]?(?:{point}?[0-9{DIGIT}]++)++"),
        ("<", _TAG),
        ("'`", r"(['`])[a-z][^ \t\n]"),
        (r".!?@#<>*\\_-", r"\.{3,4}|-{5,}+|-{2,4}|[!?]++|@++|#++|<<|>>|\*++|\\\*|_++"),
        (RAISED, rf"{RAISED}++"),
        (QUOTES, f"'{{1,2}}|[{QUOTES[1:]}]{{1,2}}"),
        ("&", f"&(?:{entity});"),
    ]


@cache
def _rules() -> list[tuple[re.Pattern[str], Rule]]:
    """What a match can start with, and the rule, in order; made at first use."""
    split = [("c", "(can)not"), ("glw", "(gon)na|(got)ta|(lem)me|(gim)me|(wan)na")]
    patterns = [*split, *_words(), *_abbreviations(), *_signs()]
    functions: list[tuple[str, Rule]] = [
        (f"(+0-9{DIGIT}", _digit_groups),
        ("a-z0-9", _dotted),
        ("a-z0-9", _slashed),
        ("<>:;=(~^'x-", _smiley),
    ]
    rules: list[tuple[str, Rule]] = [(_STARTS_WORD + r"'`\x91\x92\u2018\u2019\u201b", _apostrophe)]
    rules += [(rf"<a-z0-9#%&*+~{_HIGH}", _address)]
    rules += [(first, _pattern(pattern)) for first, pattern in patterns] + functions
    return [(re.compile(f"[{first}]", re.IGNORECASE | re.ASCII), rule) for first, rule in rules]


@cache
def starting(first: str) -> list[Rule]:
    """The rules whose match can start with this character of a shape, in order."""
    return [rule for start, rule in _rules() if start.match(first)]
