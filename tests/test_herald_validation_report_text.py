"""What made-up sentences of radiology reports say of haemorrhage, by rule."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herald.signatures import FINDINGS
from herald.validation.report_text import read_report

THERE = [
    ("There is a small left subdural hematoma.", "edh_sdh"),
    ("Acute right-sided subdural haematoma measuring 8 mm.", "edh_sdh"),
    ("Large intraparenchymal hemorrhage in the right basal ganglia.", "iph"),
    ("Acute intracerebral haemorrhage with surrounding oedema.", "iph"),
    ("Diffuse subarachnoid hemorrhage in the basal cisterns.", "sah"),
    ("SAH in the left sylvian fissure.", "sah"),
    ("tSAH over the convexities.", "sah"),
    ("Acute-on-chronic SDH with 5 mm midline shift.", "edh_sdh"),
    ("Left temporal epidural hematoma.", "edh_sdh"),
    ("Extradural haematoma with mass effect.", "edh_sdh"),
    ("Small amount of intraventricular blood layering in the occipital horns.", "ivh"),
    ("Blood in the left lateral ventricle.", "ivh"),
    ("Haemorrhagic transformation of the right MCA infarct.", "iph"),
    ("Bifrontal haemorrhagic contusions.", "iph"),
    ("Subarachnoid and subdural hemorrhage.", "sah edh_sdh"),
    ("IPH with IVH.", "iph ivh"),
    ("Hyperdense extra-axial collection over the left convexity.", "edh_sdh"),
    ("Hyperdense collection along the falx.", ""),
    ("Acute intracranial hemorrhage.", ""),
    ("ICH, see above.", ""),
    ("Blood products in the surgical cavity.", ""),
    ("Chronic subdural haematoma, unchanged.", "edh_sdh"),
    ("No significant change in the left subdural hematoma.", "edh_sdh"),
    ("No interval change in size of the SDH.", "edh_sdh"),
    ("The subdural hematoma is not significantly changed.", "edh_sdh"),
    ("The haemorrhage has not increased.", ""),
    ("No mass effect, but there is a thin subdural hematoma.", "edh_sdh"),
    ("No midline shift. Small SDH along the tentorium.", "edh_sdh"),
    ("No mass effect from the subdural hematoma.", "edh_sdh"),
    ("No hydrocephalus associated with the intraventricular hemorrhage.", "ivh"),
    ("No abnormality other than a tiny subarachnoid hemorrhage.", "sah"),
    ("No fracture, small subdural hematoma.", "edh_sdh"),
    ("Previously seen subdural hematoma has decreased in size.", "edh_sdh"),
    ("Resolving left frontal hematoma.", ""),
    ("Near-complete resolution of the subdural hematoma.", "edh_sdh"),
    ("The haematoma has partially resolved.", ""),
    ("Likely hypertensive haemorrhage in the pons.", ""),
    ("Findings are consistent with acute subarachnoid haemorrhage.", "sah"),
    ("Known SDH again seen.", "edh_sdh"),
    ("Prior subdural hematoma is unchanged.", "edh_sdh"),
    ("Compared with the prior study the intraparenchymal hemorrhage is larger.", "iph"),
    ("No acute haemorrhage. Chronic subdural haematoma.", "edh_sdh"),
    ("No SAH is seen and SDH is present on the left.", "edh_sdh"),
    ("Scalp hematoma and underlying subdural hematoma.", "edh_sdh"),
    ("Subdural hematoma with no midline shift.", "edh_sdh"),
    ("Subdural hematoma is seen and subarachnoid hemorrhage is not seen.", "edh_sdh"),
    ("SDH with possible mass effect.", "edh_sdh"),
    ("Subdural hematoma along the transverse sinus.", "edh_sdh"),
    ("Akute Subarachnoidalblutung links.", "sah"),
    ("Großes Subduralhämatom rechts.", "edh_sdh"),
    ("Intrazerebrale Blutung in den Stammganglien.", "iph"),
]
NOT_THERE = [
    "No acute intracranial hemorrhage.",
    "No evidence of intracranial haemorrhage.",
    "There is no evidence of acute infarct, mass, or hemorrhage.",
    "No SAH, SDH or EDH.",
    "Negative for intracranial hemorrhage.",
    "Without evidence of hemorrhage.",
    "Intracranial haemorrhage is not seen.",
    "Intracranial haemorrhage or infarct is not identified.",
    "Haemorrhage has been ruled out.",
    "Haemorrhage: none.",
    "Hemorrhage: No",
    "The subdural hematoma has resolved.",
    "Interval resolution of the subdural hematoma.",
    "The previously seen SDH is no longer visible.",
    "Resolved subdural hematoma.",
    "Brain parenchyma is free of haemorrhage.",
    "CT excludes subarachnoid haemorrhage.",
    "Calcification rather than haemorrhage.",
    "No findings suspicious for hemorrhage.",
    "No definite haemorrhage.",
    "Neither haemorrhage nor infarction.",
    "No acute intracranial abnormality.",
    "No acute intracranial process or fracture.",
    "Normal CT of the head.",
    "Unremarkable non-contrast head CT.",
    "CT head is normal.",
    "No intra-axial or extra-axial bleed.",
    "No blood products.",
    "No hyperdense collection.",
    "No subdural or subarachnoid hemorrhage is evident.",
    "No scalp or intracranial haemorrhage.",
    "Scalp hematoma without intracranial hemorrhage.",
    "The scan does not show any bleeding.",
    "Absence of acute blood.",
    "Kein Nachweis einer intrakraniellen Blutung.",
    "Keine Blutung, keine Raumforderung.",
    "Blutung nicht nachweisbar.",
    "CCT unauffällig.",
]
DOUBTFUL = [
    "Possible small subarachnoid hemorrhage.",
    "Subarachnoid haemorrhage cannot be excluded.",
    "Cannot exclude a small subdural hematoma.",
    "Cannot entirely rule out haemorrhage.",
    "Questionable SAH versus artefact.",
    "Hyperdensity may represent blood.",
    "Findings suspicious for subdural hematoma.",
    "? SAH",
    "Subdural haematoma?",
    "Haemorrhage is considered unlikely.",
    "Hyperdensity, unlikely to be haemorrhage.",
    "No fracture, possible subdural hematoma.",
    "Concern for epidural hematoma.",
    "V.a. Subarachnoidalblutung.",
    "Eine Blutung ist nicht sicher auszuschließen.",
]
NO_STATEMENT = [
    "",
    "Small vessel disease.",
    "Right frontal scalp hematoma.",
    "Hematoma of the left scalp.",
    "Subgaleal haematoma over the vertex.",
    "Epistaxis with blood in the maxillary sinus.",
    "Retinal hemorrhage.",
    "Rule out hemorrhage.",
    "Evaluate for ICH.",
    "History of subarachnoid hemorrhage.",
    "Old hemorrhage in the left thalamus.",
    "Status post evacuation of subdural hematoma.",
    "No new haemorrhage.",
    "Chronic microhaemorrhages.",
    "Micro-haemorrhages in the pons.",
    "Non-haemorrhagic infarct.",
    "Risk of hemorrhagic transformation.",
    "If there is concern for haemorrhage, MRI is advised.",
    "Left subdural hygroma.",
    "Normal blood flow voids; blood pressure is high.",
    "Zustand nach Subarachnoidalblutung.",
    "Sehr geehrter Kollege, ich danke für die Zuweisung und grüße.",
    "Nasenblutung.",
]


@pytest.mark.parametrize(("sentence", "kinds"), THERE)
def test_a_haemorrhage_that_is_there_is_one(sentence: str, kinds: str) -> None:
    answer = read_report(sentence)
    assert answer.haemorrhage is True, answer
    assert set(kinds.split()) <= set(answer.kinds), answer
    assert answer.words


@pytest.mark.parametrize("sentence", NOT_THERE)
def test_a_haemorrhage_that_is_denied_is_none(sentence: str) -> None:
    answer = read_report(sentence)
    assert answer.haemorrhage is False, answer
    assert answer.kinds == ()
    assert answer.words


@pytest.mark.parametrize("sentence", DOUBTFUL)
def test_a_haemorrhage_in_doubt_has_no_answer_and_says_by_which_words(sentence: str) -> None:
    answer = read_report(sentence)
    assert answer.haemorrhage is None, answer
    assert answer.words


@pytest.mark.parametrize("sentence", NO_STATEMENT)
def test_a_report_that_says_nothing_of_it_has_no_answer(sentence: str) -> None:
    answer = read_report(sentence)
    assert (answer.haemorrhage, answer.kinds) == (None, ()), answer
    assert answer.words == ()


REPORT = """CT HEAD WITHOUT CONTRAST

INDICATION: Fall, on warfarin. Rule out subdural hematoma.
COMPARISON: None.
FINDINGS: {findings}
Ventricles: normal in size.
IMPRESSION:
{impression}
"""


@pytest.mark.parametrize(
    ("findings", "impression", "haemorrhage"),
    [
        ("There is a possible subdural hematoma.", "1. No acute intracranial hemorrhage.\n2. Scalp hematoma.", False),
        ("No haemorrhage.", "1. Right scalp hematoma.\n2. Thin left subdural hematoma.", True),
        ("Thin left subdural hematoma.", "As described above.", True),
        ("No haemorrhage.", "Stable examination.", False),
        ("No evidence of an acute intra-axial or extra-axial\nhaemorrhage.", "Sinusitis.", False),
        ("No midline shift\nSubdural hematoma on the left", "See above.", True),
        ("No haemorrhage.", "Likely old infarct. CT cannot exclude a small haemorrhage.", None),
    ],
)
def test_the_impression_counts_else_the_findings_and_the_indication_never(
    findings: str, impression: str, haemorrhage: bool | None
) -> None:
    assert read_report(REPORT.format(findings=findings, impression=impression)).haemorrhage is haemorrhage


def test_the_words_that_decided_are_told_and_nothing_else_of_the_report() -> None:
    answer = read_report("Patient John Doe, 4711. No evidence of haemorrhage in Mr Doe. Dr. Smith")
    assert answer.words == ("no evidence of: haemorrhage",)
    assert read_report("Acute subdural hematoma of John Doe.").words == ("subdural hematoma",)


SENTENCES = [sentence for sentence, _ in THERE] + NOT_THERE + DOUBTFUL + NO_STATEMENT


def test_there_are_enough_sentences_and_each_is_there_once() -> None:
    assert len(SENTENCES) == len(set(SENTENCES)) >= 80


@pytest.mark.parametrize("sentence", SENTENCES)
def test_the_case_of_letters_does_not_matter(sentence: str) -> None:
    assert read_report(sentence.upper()) == read_report(sentence) == read_report(sentence.lower())


WORDS = sorted({word for sentence in SENTENCES for word in sentence.split()} | {"\n", ". ", "IMPRESSION:", "FINDINGS:"})


@given(st.one_of(st.text(max_size=300), st.lists(st.sampled_from(WORDS), max_size=40).map(" ".join)))
@settings(deadline=None, max_examples=300)
def test_any_text_has_an_answer_whatever_the_case(text: str) -> None:
    answer = read_report(text)
    assert set(answer.kinds) <= set(FINDINGS)
    assert answer.haemorrhage is None or answer.words
    if text.isascii():
        assert read_report(text.swapcase()) == answer


def test_a_long_report_is_read_at_once() -> None:
    assert read_report("no " * 5000 + "haemorrhage. " * 2000).haemorrhage is True
