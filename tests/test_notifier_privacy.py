"""What leaves the hospital's imaging network in a page, held against every identifying element of the study."""

import base64
import io
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import date, timedelta
from functools import partial
from typing import Any, get_args

import numpy as np
import pytest
from notifier_fakes import HttpServer, Mailbox, MllpListener, configured, free_port, smtp_server
from PIL import Image
from pydicom._dicom_dict import DicomDictionary
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid
from receiver_fakes import config_under, ct_slice, receiving, send_all
from router_fakes import FixedModels

from herald.config import ChannelName, PagingStep, RouterConfig
from herald.events import SeriesTriaged
from herald.store import StudyStore
from notifier.channels import Message, open_channel
from notifier.channels.webui import WebuiChannel
from notifier.message import page_text
from notifier.picture import key_slice
from notifier.record import page_id
from router.triage import triage_series

ACCESSION_NUMBER = "ZQACC7X9Y8W6V5U4"
SLICES = 12
SIZE = 128

ANNEX_E = [
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "PatientBirthTime",
    "PatientAddress",
    "PatientTelephoneNumbers",
    "OtherPatientIDs",
    "OtherPatientNames",
    "PatientBirthName",
    "PatientMotherBirthName",
    "MilitaryRank",
    "IssuerOfPatientID",
    "MedicalRecordLocator",
    "PatientAge",
    "ReferringPhysicianName",
    "ReferringPhysicianAddress",
    "PhysiciansOfRecord",
    "PerformingPhysicianName",
    "OperatorsName",
    "NameOfPhysiciansReadingStudy",
    "RequestingPhysician",
    "InstitutionName",
    "InstitutionAddress",
    "InstitutionalDepartmentName",
    "StudyID",
    "StudyDate",
    "SeriesDate",
    "AcquisitionDate",
    "ContentDate",
    "StudyDescription",
    "SeriesDescription",
    "ProtocolName",
    "DeviceSerialNumber",
    "AdmissionID",
    "CurrentPatientLocation",
    "RequestedProcedureID",
    "RequestedProcedureDescription",
    "ImageComments",
    "PatientComments",
    "AdditionalPatientHistory",
    "Occupation",
    "PersonName",
    "PersonAddress",
    "ScheduledProcedureStepID",
    "PerformedProcedureStepID",
    "FillerOrderNumberImagingServiceRequest",
    "PlacerOrderNumberImagingServiceRequest",
    "RequestAttributesSequence",
    "OtherPatientIDsSequence",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "SOPInstanceUID",
    "FrameOfReferenceUID",
]
"""Of PS3.15 table E.1-1 what a CT most often carries; the study below has far more, and they must be among it."""

UIDS = ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "InstanceCreatorUID", "DeviceUID")
TEXT = {"PN", "LO", "SH", "ST", "LT", "UT", "UC", "AE"}
GROUPS = {0x0008, 0x0010, 0x0012, 0x0018, 0x0020, 0x0032, 0x0038, 0x0040, 0x4008}
ALLOWED = {"AccessionNumber", "StationName"}
TECHNICAL = {"ConvolutionKernel"}
"""What the event carries for the validation record and no page does; PS3.15 Annex E does not name it."""
"""The end of the one and the whole of the other stand in a page on purpose."""


@dataclass(frozen=True)
class Study:
    """One positive study whose header is nothing but markers, after receiver and router; what they logged."""

    event: SeriesTriaged
    store: StudyStore
    markers: dict[str, str]
    """By element; without UIDs, which Herald's own rows and logs need."""
    uids: dict[str, str]
    log: str


class Markers:
    """Values that occur nowhere else, each remembered."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}

    def fill(self, ds: Dataset, path: str = "") -> Dataset:
        """Every element of text, date or time of the groups that describe patient, study, people and equipment."""
        for tag, (vr, _, _, _, keyword) in DicomDictionary.items():
            if tag >> 16 not in GROUPS or not keyword or keyword in ALLOWED:
                continue
            if value := self._value(vr, path + keyword):
                setattr(ds, keyword, value)
        return ds

    def _value(self, vr: str, name: str) -> str:
        number = len(self.values)
        if vr in TEXT:
            value = f"ZQ{number:04d}X"  # no two are alike, and 0 and 1 are not in the alphabet of a token
        elif vr in ("DA", "DT"):
            value = f"{date(1801, 1, 1) + timedelta(days=number):%Y%m%d}"
        elif vr == "TM":
            value = f"010203.7{number:05d}"
        elif vr == "AS":
            value = f"{100 + number % 900}Y"
        else:
            return ""
        self.values[name] = value
        return value


class Lines(logging.Handler):
    """Everything that is logged, with tracebacks."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.setFormatter(logging.Formatter("%(name)s %(message)s"))
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text += self.format(record) + "\n"


@contextmanager
def listening() -> Iterator[Lines]:
    """Hear the services at their most talkative, and everybody else as the node does."""
    lines = Lines()
    loggers = {name: logging.getLogger(name) for name in ("", "herald", "receiver", "router", "notifier")}
    levels = {name: logger.level for name, logger in loggers.items()}
    for name, logger in loggers.items():
        logger.setLevel(logging.DEBUG if name else logging.INFO)
    loggers[""].addHandler(lines)
    try:
        yield lines
    finally:
        loggers[""].removeHandler(lines)
        for name, logger in loggers.items():
            logger.setLevel(levels[name])


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    markers = Markers()
    uids = {keyword: str(generate_uid()) for keyword in UIDS}
    datasets = [marked_slice(i, markers if i == 0 else Markers(), uids) for i in range(SLICES)]
    uids |= {f"SOPInstanceUID {i}": str(ds.SOPInstanceUID) for i, ds in enumerate(datasets)}
    with listening() as lines, receiving(config_under(tmp_path_factory.mktemp("node"))) as receiver:
        assert send_all(receiver.port, datasets) == [0] * SLICES
        (received,) = receiver.bus.wait_for(1)
        models: Any = FixedModels(bleeds=True)
        event = triage_series(received, receiver.store, models, RouterConfig())
    assert event.disposition == "positive", event.reasons
    return Study(event, receiver.store, markers.values, uids, lines.text)


def marked_slice(index: int, markers: Markers, uids: dict[str, str]) -> Dataset:
    row, column = np.mgrid[:SIZE, :SIZE] - SIZE / 2
    radius = np.hypot(row, column * 1.2)
    pixels = np.where(radius < 50, 1000, -1000)
    pixels[radius < 45] = 35
    ds = ct_slice(uids["StudyInstanceUID"], uids["SeriesInstanceUID"], 5.0 * index, index + 1)
    technical = {element.keyword: element for element in ds}
    markers.fill(ds)
    for sequence in ("OtherPatientIDsSequence", "RequestAttributesSequence", "PersonIdentificationCodeSequence"):
        setattr(ds, sequence, [markers.fill(Dataset(), f"{sequence}/")])
        markers.values[sequence] = markers.values[f"{sequence}/PatientID"]
    private = ds.private_block(0x0029, "ZQPRIVATECREATOR", create=True)
    private.add_new(0x10, "LO", "ZQPRIVATEVALUE")
    markers.values |= {"private creator": "ZQPRIVATECREATOR", "private element": "ZQPRIVATEVALUE"}
    for keyword, element in technical.items():
        if keyword not in markers.values:
            ds[keyword] = element
    for keyword, uid in uids.items():
        if keyword in UIDS:
            setattr(ds, keyword, uid)
    ds.AccessionNumber = ACCESSION_NUMBER
    ds.Rows = ds.Columns = SIZE
    ds.PixelSpacing, ds.RescaleSlope, ds.RescaleIntercept = [1.8, 1.8], 1, 0
    ds.PixelData = pixels.astype("<i2").tobytes()
    return ds


# --- channels --------------------------------------------------------------------------------------------------------


def over_smtp(channel: ChannelName, message: Message) -> str:
    mailbox, port = Mailbox(), free_port()
    config = replace(configured().notifier, smtp_port=port, reply_address="herald@hospital.example")
    with smtp_server(mailbox, port):
        open_channel(PagingStep(to="reader@hospital.example", channel=channel), config).send(message)
    (email,) = mailbox.emails
    said = [email.as_string(), *(f"{name}: {value}" for part in email.walk() for name, value in part.items())]
    for part in email.walk():
        if part.is_multipart():
            continue
        content = part.get_content()
        said.append(content if isinstance(content, str) else of_picture(content))
    return "\n".join(said)


def of_picture(png: bytes) -> str:
    """The bytes as text, and every chunk that is not pixels."""
    opened = Image.open(io.BytesIO(png))
    opened.load()
    return png.decode("latin-1") + repr(opened.info) + repr(opened.getexif())


def over_http(channel: ChannelName, message: Message) -> str:
    with ExitStack() as stack:
        http = HttpServer()
        stack.callback(http.close)
        http.status = 200
        secret = base64.b64encode(b"a secret for tests of webhooks").decode()
        to = f"{http.url}/hook" if channel == "webhook" else f"json://127.0.0.1:{http.port}/hook"
        config = replace(configured().notifier, webhook_secret=secret)
        open_channel(PagingStep(to=to, channel=channel), config).send(message)
        ((_, path, headers, body),) = http.requests
    return f"{path}\n{headers}\n{body.decode()}\n{json.dumps(json.loads(body), ensure_ascii=False)}"


def over_mllp(channel: ChannelName, message: Message) -> str:
    with ExitStack() as stack:
        ris = MllpListener()
        stack.callback(ris.close)
        open_channel(PagingStep(to=ris.address, channel=channel), configured().notifier).send(message)
    (sent,) = ris.messages
    return sent


CAPTURES: dict[str, Callable[[ChannelName, Message], str]] = {
    "smtp": over_smtp,
    "pager": over_smtp,
    "webhook": over_http,
    "apprise": over_http,
    "hl7": over_mllp,
}

needs_apprise = pytest.mark.filterwarnings("ignore:'imghdr' is deprecated:DeprecationWarning")


def page_of(study: Study) -> Message:
    text = page_text(study.event, configured())
    return Message(
        page_id(study.event.study_instance_uid, 0),
        text.subject,
        text.body,
        text.short,
        text.link,
        study.event,
        partial(key_slice, study.store, study.event),
    )


def found(values: dict[str, str], text: str) -> list[str]:
    """The elements whose values are in a text, as they stand or as a date with hyphens."""
    lower = text.lower()
    forms = {name: {v.lower(), f"{v[:4]}-{v[4:6]}-{v[6:]}" if v.isdigit() else v.lower()} for name, v in values.items()}
    return [name for name, written in forms.items() if any(form in lower for form in written)]


def test_every_channel_that_can_be_configured_is_captured_here() -> None:
    assert set(CAPTURES) == set(get_args(ChannelName))


def test_the_study_has_a_marker_in_every_element_that_identifies(study: Study) -> None:
    assert set(ANNEX_E) - set(study.markers) - set(study.uids) - {"SOPInstanceUID"} == set()
    assert len(study.markers) > 500
    named = [v for k, v in study.markers.items() if not k.endswith("Sequence")]
    assert len(named) == len(set(named))
    stored = b"".join(
        path.read_bytes()
        for path in study.store.series_paths(study.event.study_instance_uid, study.event.series_instance_uid)
    ).decode("latin-1")
    assert set(study.markers) - set(found(study.markers, stored)) == set()


def test_what_the_router_says_of_the_study_identifies_nobody(study: Study) -> None:
    assert set(found(study.markers, study.event.to_json().decode())) <= TECHNICAL


def test_receiver_and_router_log_nothing_that_identifies(study: Study) -> None:
    assert study.event.series_instance_uid in study.log  # so that it is known to have been heard
    assert found(study.markers, study.log) == []


@needs_apprise
@pytest.mark.parametrize("channel", get_args(ChannelName))
def test_a_page_identifies_nobody(study: Study, channel: ChannelName) -> None:
    with listening() as lines:
        sent = CAPTURES[channel](channel, page_of(study))
    assert "very likely 0.97" in sent
    assert found(study.markers | study.uids, sent) == []
    assert found(study.markers, lines.text) == []
    assert ACCESSION_NUMBER not in lines.text


@needs_apprise
@pytest.mark.parametrize("channel", get_args(ChannelName))
def test_the_accession_number_is_given_away_to_a_ris_only(study: Study, channel: ChannelName) -> None:
    sent = CAPTURES[channel](channel, page_of(study))
    assert ACCESSION_NUMBER[-4:] in sent
    assert (ACCESSION_NUMBER[-5:] in sent) == (channel == "hl7")
    assert (ACCESSION_NUMBER in sent) == (channel == "hl7")


def test_the_key_slice_is_in_what_was_searched(study: Study) -> None:
    picture = key_slice(study.store, study.event)
    assert picture is not None
    assert picture.decode("latin-1") in over_smtp("smtp", page_of(study))


@needs_apprise
@pytest.mark.parametrize("channel", get_args(ChannelName))
def test_a_leak_would_be_found_whatever_the_encoding(study: Study, channel: ChannelName) -> None:
    name, birth = study.markers["PatientName"], study.markers["PatientBirthDate"]
    leak = f"Müller {name}, {birth[:4]}-{birth[4:6]}-{birth[6:]}"
    message = replace(page_of(study), body=leak, short=leak)
    assert set(found(study.markers, CAPTURES[channel](channel, message))) == {"PatientName", "PatientBirthDate"}


def test_the_web_ui_of_the_node_gets_the_event_and_nothing_else(study: Study) -> None:
    with ExitStack() as stack:
        http = HttpServer()
        stack.callback(http.close)
        WebuiChannel(configured(webui_url=http.url)).put(study.event)
    ((_, path, headers, body),) = http.requests
    assert body == study.event.to_json()
    assert set(found(study.markers, f"{path} {headers} {body.decode()}")) <= TECHNICAL
