"""Whether a radiology report says that there is intracranial haemorrhage: by rule, English and simple German.

The rules are in the manner of NegEx (Chapman et al., A simple algorithm for identifying negated findings and diseases
in discharge summaries, J Biomed Inform 2001) and of ConText, which adds history and doubt (Harkema et al., 2009):

1. The impression counts, else the findings; indication, history, technique and comparison never do.
2. In each sentence, terms of haemorrhage are looked for. Bleeds outside of the skull and microbleeds do not count.
3. Words before a term and the first verb after it say whether it is there, is not, is in doubt, or is no statement
   about this scan (asked for, feared, or of the past). Their reach ends with the sentence, or at a word such as "but".
4. One haemorrhage that is there makes the answer yes; else one in doubt, none; else one that is not there, no. A report
   that says nothing of it has no answer. "Likely" asserts, "unlikely" is doubt, "no new haemorrhage" says nothing, a
   chronic subdural haematoma is there, and "no acute intracranial abnormality" and "normal CT" say that there is none.

Such an answer is no truth: whoever uses it says that it came by rule from reports, as Herald does where it shows one.
"""

import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

Status = Literal["there", "doubtful", "not there", "no statement"]


@dataclass(frozen=True)
class ReportAnswer:
    """What a report says: None where it is in doubt or says nothing; kinds by `herald.signatures.FINDINGS`.

    `words` are the terms that decided, each with what changed its meaning; all are of this module's own lists.
    """

    haemorrhage: bool | None
    kinds: tuple[str, ...]
    words: tuple[str, ...]


@dataclass(frozen=True)
class _Mention:
    status: Status
    kinds: frozenset[str]
    words: str


def _any(*patterns: str) -> str:
    return "(?:" + "|".join(patterns) + ")"


# --- sections and sentences ------------------------------------------------------------------------------------------

_CONCLUSION = _any(
    "impressions?", "conclusions?", "opinion", "summary", "interpretation", "beurteilung", "zusammenfassung"
)
_FINDINGS = _any("findings?", "reports?", "results?", "befund")
_OTHER = _any(
    "indications?(?: for (?:exam|study|examination))?",
    "(?:clinical|patient) (?:history|information|indications?|details|data|question)",
    "(?:past medical )?history",
    "reasons? for (?:the )?(?:exam|examination|study|test)",
    "techniques?",
    "comparisons?",
    "procedures?",
    "protocol",
    "examination",
    "exam",
    "recommendations?",
    "klinische (?:angaben|fragestellung)",
    "fragestellung",
    "indikation",
    "anamnese",
    "technik",
    "vergleich",
)
_HEADING = re.compile(
    rf"(?:^|(?<=[\n.;]))[ \t]*(?:(?P<conclusion>{_CONCLUSION})|(?P<findings>{_FINDINGS})|(?P<other>{_OTHER}))"
    r"[ \t]*(?::|-\s|(?=\n)|$)"
)
_ABBREVIATIONS = (
    (re.compile(r"\bv\. ?a\."), "verdacht auf"),
    (re.compile(r"\bz\. ?n\."), "zustand nach"),
    (re.compile(r"\b(vs|dr|approx|incl|e\.g|i\.e|ca|st|no)\.(?= [a-z0-9])"), r"\1"),
)
_WRAPPED = 50
"""A line of at least so many characters goes on in the next one; a shorter one is a statement of its own."""
_REACH = 300
"""Characters before and after a term in which words change its meaning, in a sentence without an end."""
_SENTENCE_END = re.compile(r"\.(?=\s|$)|[;!]|\n")

# --- terms -----------------------------------------------------------------------------------------------------------

_BLEED = _any(
    r"ha?emorrhages?",
    r"ha?emorrhagic(?! (?:shock|fever|cyst|cystitis|gastritis))",
    r"ha?ematomas?",
    r"ha?ematomata",
    r"bleed(?:s|ing)?",
    r"blood(?: products?)?(?! (?:pressure|vessels?|flow|pool|supply|volume|glucose|sugar|cells?|counts?|tests?|"
    r"thinners?|cultures?|alcohol)|-)",
    r"h(?:ä|ae)matome?n?s?",
    r"h(?:ä|ae)morrhagien?",
)
_LAYER = r"(?:sub|epi|extra)[- ]?dural"
_NOT_BLOOD = "(?! (?:hygromas?|empyemas?|abscess|effusions?|spaces?|drains?|catheters?|grids?|electrodes?|injections?))"
_TERM = re.compile(
    r"(?<![\w])(?<!non-)(?<!non )(?<!micro-)(?<!micro )"
    + _any(
        rf"{_LAYER}s?(?:,? (?:and|or|/)? ?(?:subarachnoid|intraventricular))? {_BLEED}",
        rf"{_LAYER}s?{_NOT_BLOOD}",
        rf"subarachnoid {_BLEED}",
        rf"hyper-?(?:dense|attenuating) (?:(?:extra-?axial|{_LAYER}|subarachnoid|fluid) )?collections?",
        r"(?:sub|epi)dural(?:e[snmr]?)?(?:h(?:ä|ae)matome?n?s?|blutung(?:en)?)",
        r"(?!nasen|weichteil|galea|kopfschwarten|netzhaut|schleimhaut|monokel|glaskörper|mikro)[a-zäöü]*blutung(?:en)?",
        r"sab|icb",
        r"[at]?sahs?",
        r"(?:a|c)?sdhs?",
        r"edhs?",
        r"iphs?",
        r"ivhs?",
        r"ich",
        _BLEED,
    )
    + r"(?![\w])"
)
_GERMAN = re.compile(r"\b(?:und|der|die|das|den|kein\w*|nicht|mit|ohne|sehr|wir|keine|befund)\b")
_ABNORMALITY = re.compile(
    r"\b(?:acute(?: intra-?cranial)?|intra-?cranial)(?: traumatic)? "
    r"(?:abnormalit(?:y|ies)|patholog(?:y|ies)|process(?:es)?|findings?|injur(?:y|ies)|events?|disease)\b"
)
_NORMAL = re.compile(
    r"\b(?:normal|unremarkable|unauffällige?s?)"
    r"(?: (?:unenhanced|non-?contrast|cranial|head|brain|natives?|study|appearances?|of|the))*"
    r" (?:c?ct|scan|study|brain|head|examination|schädel-ct)\b"
    r"|\b(?:c?ct|scan|study|examination)(?: (?:of|the|head|brain|scan|examination|is|appears|ist))*"
    r" (?:normal|unremarkable|negative|unauffällig)\b(?! for| in size)"
)
_KINDS = {
    "iph": re.compile(
        r"intra-?parenchymal|parenchymal|intra-?cerebral|intrazerebral|\biphs?\b|\bicb\b|intra-?axial|lobar|ganglionic|thalamic"
        r"|pontine|ha?emorrhagic (?:contusion|transformation|conversion|infarct)|stammganglien|parenchym"
    ),
    "ivh": re.compile(r"intra-?ventricular|intraventrikul|\bivhs?\b|ventrikel\w*blutung"),
    "sah": re.compile(r"subarachnoid|\b[at]?sahs?\b|\bsab\b"),
    "edh_sdh": re.compile(r"(?:sub|epi|extra)[- ]?dural|\b[ac]?sdhs?\b|\bedhs?\b|extra-?axial"),
}
_AFTER_KINDS = {
    "iph": re.compile(r"^ ?(?:contusion|transformation|conversion|infarct)"),
    "ivh": re.compile(r"^ (?:layering )?(?:in|into|within) (?:the )?(?:\w+ ){0,3}(?:ventric|occipital horn)"),
}
_OUTSIDE = _any(
    "scalp",
    "sub-?galeal",
    "galea\\w*",
    "extra-?cranial",
    "soft[- ]tissues?",
    "peri-?orbital",
    "intra-?orbital",
    "orbital",
    "pre-?septal",
    "eyelid",
    "retinal",
    "vitreous",
    "intra-?ocular",
    "subconjunctival",
    "retrobulbar",
    "facial",
    "nasal",
    "(?:maxillary|sphenoid|ethmoid|frontal|paranasal) sinus(?:es)?",
    "gastro-?intestinal\\w*",
    "gi",
    "spinal",
    "neck",
    "face",
    "orbit",
    "subkutane[sn]?",
)
_OUTSIDE_BEFORE = re.compile(rf"\b{_OUTSIDE}(?: (?!intra-?cranial|intra-?cerebral|intra-?axial)[\w-]+){{0,2}} ?$")
_OUTSIDE_AFTER = re.compile(
    rf"^ (?:in|into|of|over|within|along|overlying|involving) (?:the )?(?:[\w-]+ ){{0,3}}{_OUTSIDE}\b"
)

# --- words that change the meaning of a term -------------------------------------------------------------------------

_SIZE = "(?:in |of |to )?(?:the )?(?:size |extent |appearance |volume )?(?:of |in )?"
_SURELY = "(?:definitely |clearly |entirely |completely |definitively |fully |reliably |absolutely |sicher )?"
_NEW = "(?:new|newly|additional|further|other|more|recurrent|interval)"
_BEFORE: tuple[tuple[Status | None, str], ...] = (
    # said of something else: it means nothing
    (
        None,
        r"\b(?:no|not|without)(?: (?:significant(?:ly)?|interval|substantial(?:ly)?|appreciable|much|definite))*"
        r" (?:change[ds]?|increase[ds]?|decrease[ds]?|enlargement|enlarged|progression|progressed|improvement)\b"
        rf" {_SIZE}",
    ),
    (None, r"\bnot only\b|\bno doubt\b|\bwithout doubt\b|\bno question\b"),
    (
        None,
        r"\b(?:partial(?:ly)?|incomplete(?:ly)?|near(?:ly)?[- ]complete(?:ly)?|slowly)"
        r" (?:resolution|resolved|resolving)\b(?: of)?",
    ),
    (None, r"\b(?:prior|previous|old) (?:studies|study|ct|exams?|examinations?|scans?|imaging|mri|reports?|images)\b"),
    (None, r"\bpreviously (?:seen|noted|described|demonstrated|identified|known)\b"),
    # doubt
    (
        "doubtful",
        r"\b(?:cannot|can not|can't|could not|unable to|difficult to|not possible to) (?:be )?"
        rf"{_SURELY}(?:excluded?|rule out)\b",
    ),
    ("doubtful", rf"\bnot {_SURELY}(?:excluded|ruled out)\b|\bunlikely\b"),
    ("doubtful", r"\bpossib(?:le|ly|ility)\b|\bquestion(?:able|ed)\b|\bequivocal\b|\bsuspicio(?:n|us)\b|\bsuspected\b"),
    ("doubtful", r"\bconcern(?:s|ing)?\b|\bworrisome\b|\bmay\b|\bmight\b|\bcould\b|\bversus\b|\bvs\b|\bperhaps\b|\?"),
    ("doubtful", r"\bdifferential\b|\bindeterminate\b|\bverdacht\b|\bfraglich\w*\b|\bmöglich\w*\b|\bquestion of\b"),
    # not about this scan as it is now
    ("no statement", rf"\b(?:no|without)(?: (?:evidence|sign|signs|definite|acute|of|for|any|significant))* {_NEW}\b"),
    (
        "no statement",
        r"\b(?:to )?(?:rule out|exclude)\b|\br/o\b|\b(?:evaluat\w+|assess\w*|looking|query|frage) (?:for|of|nach)\b",
    ),
    (
        "no statement",
        r"\bquery\b|\brisk (?:of|for)\b|\bif\b|\b(?:watch|monitor\w*) for\b|\bzum ausschluss\b|\bprevent\w*\b",
    ),
    # denied
    ("not there", r"\brather than\b|\binstead of\b|\bas opposed to\b|\bmimic\w*\b|\bneither\b|\bnor\b"),
    ("not there", r"\bno (?:convincing |definite |ct |clear )*(?:evidence|signs?|suggestion|indication) (?:of|for)\b"),
    (
        "not there",
        r"\bnegative for\b|\bfree (?:of|from)\b|\babsence of\b|\bclear of\b"
        r"|\bfail(?:s|ed) to (?:show|reveal|demonstrate)\b",
    ),
    (
        "not there",
        r"\b(?:complete |interval )*resolution of\b|\bresolved\b|\brul(?:es|ed|ing) out\b|\bexclud(?:es|ed|ing)\b",
    ),
    ("not there", r"\bno\b|\bnot\b|\bwithout\b|\bdenies\b|\bkein(?:e[snmr]?)?\b|\bohne\b|\bnicht\b|\bausschluss\b"),
)
_PAST = re.compile(
    r"\b(?:history|h/o|hx|prior|previous|old|remote|former|anamnestisch|status post|s/p|zustand nach)\b"
    r"(?: (?:of|known))?(?: [\w-]+){0,4} ?$"
)
_STILL = re.compile(
    r"\b(?:persist\w*|unchanged|stable|increas\w+|enlarg\w+|decreas\w+|residual|again|evolv\w+|resolving|expand\w*|smaller|larger)\b"
)
_ENDS_BEFORE = re.compile(
    r":|\b(?:but|however|although|though|except(?: for)?|apart from|aside from|other than|besides|whereas|while|which"
    r"|(?<!if )there (?:is|are|was|were|has|remains?)|secondary to|due to|because|from|related to|associated with"
    r"|aber|jedoch|ausser)\b"
    r"|, (?:small|tiny|thin|trace|stable|unchanged|persistent|residual|known|redemonstrat\w+)(?= )"
    r"|\b(?:is|are|was|were) (?:seen|identified|present|noted|visible|demonstrated|evident)(?: and|,)"
)
_ENDS_AFTER = re.compile(r"\b(?:but|however|although|though|except|whereas|while|aber|jedoch)\b")
_LINK_ENDS = re.compile(r",|\band\b|\bund\b")

_VERB = "(?:is|are|was|were|has been|have been|had been|has|have|ist|sind)"
_SEEN = (
    "(?:seen|identified|present|visible|visuali[sz]ed|detected|demonstrated|evident|apparent|appreciated|found|noted|shown"
    "|observed|nachweisbar|abgrenzbar|erkennbar|sichtbar|vorhanden)"
)
_AFTER = re.compile(
    rf"(?P<doubtful>\b(?:{_VERB} )?(?:cannot|can not|can't|could not|not|nicht) (?:be )?{_SURELY}"
    r"(?:excluded|ruled out|auszuschliessen|ausgeschlossen)\b"
    rf"|\b{_VERB} (?:not )?(?:considered )?"
    r"(?:possible|suspected|questionable|questioned|considered|equivocal|unlikely|uncertain|fraglich|in question)\b"
    r"|^ ?\?|^ (?:versus|vs)\b)"
    rf"|(?P<partly>\b(?:{_VERB} )?(?:partial(?:ly)?|near(?:ly)?|incomplete(?:ly)?|almost|mostly|largely)\b)"
    rf"|(?P<denied>\b(?:{_VERB} )?(?:not|no longer|nicht|nicht mehr) {_SURELY}{_SEEN}\b"
    r"(?! (?:on|in) (?:the )?(?:prior|previous))"
    rf"|\b{_VERB} (?:now |since |completely |entirely |fully )?"
    r"(?:absent|excluded|ruled out|resolved|cleared|gone|ausgeschlossen)\b"
    r"|^,? ?(?:now |since |completely )?(?:absent|excluded|ruled out|resolved|ausgeschlossen)\b"
    r"|^ ?[:=-] ?(?:none|no|nil|negative|absent|not seen|keine?)\b)"
    rf"|(?P<there>\b{_VERB}\b|\b{_SEEN}\b)"
)


def read_report(text: str) -> ReportAnswer:
    """The answer of one report; never raises, and does not mind the case of its letters."""
    lowered = text.casefold()
    conclusion, findings = _sections(lowered)
    german = len(_GERMAN.findall(lowered)) >= 2
    mentions = _mentions(conclusion, german) or _mentions(findings, german)
    by_status: dict[Status, list[_Mention]] = {}
    for mention in mentions:
        by_status.setdefault(mention.status, []).append(mention)
    answers: tuple[tuple[Status, bool | None], ...] = (("there", True), ("doubtful", None), ("not there", False))
    for status, answer in answers:
        if deciding := by_status.get(status):
            kinds = {kind for mention in deciding for kind in mention.kinds} if status != "not there" else set()
            words = tuple(dict.fromkeys(mention.words for mention in deciding))
            return ReportAnswer(answer, tuple(kind for kind in _KINDS if kind in kinds), words)
    return ReportAnswer(None, (), ())


def _sections(text: str) -> tuple[str, str]:
    """The text of the conclusion, and of what is neither that nor indication, history, technique or comparison."""
    parts = {"conclusion": [""], "findings": [""], "other": [""]}
    current, start = "findings", 0
    for heading in _HEADING.finditer(text):
        parts[current].append(text[start : heading.start()])
        current, start = str(heading.lastgroup), heading.end()
    parts[current].append(text[start:])
    return "\n\n".join(parts["conclusion"]), "\n\n".join(parts["findings"])


def _sentences(text: str) -> list[str]:
    for pattern, meaning in _ABBREVIATIONS:
        text = pattern.sub(meaning, text)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    joined = ""
    for line, following in pairwise([*lines, ""]):
        goes_on = len(line) >= _WRAPPED and following and not re.match(r"[-*•]|\d+[.)]", following)
        joined += line + (" " if goes_on else "\n")
    return [sentence for part in _SENTENCE_END.split(joined) if (sentence := part.strip())]


def _mentions(text: str, german: bool) -> list[_Mention]:
    found = []
    for sentence in _sentences(text):
        end = 0
        for term in _TERM.finditer(sentence):
            if german and term.group() == "ich":  # which is the pronoun there
                continue
            if mention := _judged(sentence, term, end):
                found.append(mention)
            end = term.end()
        if _NORMAL.search(sentence):
            found.append(_Mention("not there", frozenset(), "normal"))
        for term in _ABNORMALITY.finditer(sentence):
            status, why = _before(sentence[max(0, term.start() - _REACH) : term.start()])
            if status == "not there":
                found.append(_Mention("not there", frozenset(), f"{why}: intracranial abnormality"))
    return found


def _judged(sentence: str, term: re.Match[str], end_of_last: int) -> _Mention | None:
    """One term with its status; None for a bleed outside of the skull."""
    before = sentence[max(0, term.start() - _REACH) : term.start()]
    after = sentence[term.end() : term.end() + _REACH]
    own = sentence[max(end_of_last, term.start() - _REACH) : term.start()]
    if _OUTSIDE_BEFORE.search(own) or _OUTSIDE_AFTER.match(after):
        return None
    status, why = _before(before)
    then, because = _after(after)
    if (past := _PAST.search(own)) and not _STILL.search(sentence):
        status, why = "no statement", past.group().split()[0]
    elif status != "no statement" and then in ("doubtful", "not there"):
        status, why = then, because
    near = own[-60:] + term.group() + after[:20]
    kinds = {kind for kind, pattern in _KINDS.items() if pattern.search(own[-60:] + term.group())}
    kinds |= {kind for kind, pattern in _AFTER_KINDS.items() if pattern.search(after)}
    kinds |= {"iph"} if re.search(r"ha?emorrhagic (?:contusion|transformation|conversion|infarct)", near) else set()
    return _Mention(status, frozenset(kinds), f"{why}: {term.group()}" if why else term.group())


def _before(text: str) -> tuple[Status, str]:
    """What the words before a term make of it: those nearest to it count, and a denial also of a doubt."""
    text = text[max((end.end() for end in _ENDS_BEFORE.finditer(text)), default=0) :]
    hits: list[tuple[int, int, Status | None, str]] = []
    for status, pattern in _BEFORE:
        for hit in re.finditer(pattern, text):
            if not any(start < hit.end() and hit.start() < end for start, end, *_ in hits):
                hits.append((hit.start(), hit.end(), status, " ".join(hit.group().split())))
    said = [hit for hit in sorted(hits) if hit[2] is not None]
    if not said:
        return "there", ""
    _, _, nearest, why = said[-1]
    if nearest == "doubtful" and len(said) > 1:  # "no lesion suspicious for": what is denied is the suspicion
        before = said[-2]
        if before[2] in ("not there", "no statement") and not _LINK_ENDS.search(text[before[1] : said[-1][0]]):
            return before[2], before[3]
    assert nearest is not None
    return nearest, why


def _after(text: str) -> tuple[Status, str]:
    """What the first verb after a term, or what directly follows it, makes of it."""
    if end := _ENDS_AFTER.search(text):
        text = text[: end.start()]
    hit = _AFTER.search(text)
    if hit is None:
        return "there", ""
    said = " ".join(hit.group().strip(" ,:=-").split())
    if hit.lastgroup == "doubtful":
        return "doubtful", said
    return ("not there", said) if hit.lastgroup == "denied" else ("there", "")
