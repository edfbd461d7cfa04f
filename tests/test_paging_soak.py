"""A small run of `benchmarks/paging.py`: a real notifier that is killed, between a bus and a faulty mail server."""

import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "paging.py"


@pytest.fixture(scope="module")
def paging() -> Any:
    """The benchmark as a module."""
    spec = importlib.util.spec_from_file_location("benchmark_paging", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.timeout(900)  # half a minute on an idle machine
def test_no_page_is_lost_or_doubled_while_the_notifier_is_killed_and_mail_ledger_and_bus_are_at_fault() -> None:
    command = [sys.executable, str(BENCHMARK), "--only", "faults", "--bus", "sqlite"]
    size = ["--results", "150", "--positives", "0.2", "--kills", "2", "--seed", "4"]
    done = subprocess.run([*command, *size], capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    run = json.loads(done.stdout)["sqlite"]["faults"]
    assert run["pages_lost"] == run["pages_doubled"] == run["pages_of_no_positive_study"] == run["dead_letters"] == 0
    # the faults were there
    assert run["positive_studies"] > 20
    assert run["notifier_killed"] == 2
    assert run["delivered_again"] > 5
    assert run["ledger_locked"]["times"] > 0
    assert run["smtp_faults"]["5xx"] > 0
    assert sum(run["smtp_faults"].values()) > run["smtp_faults"]["5xx"]
    # who refused for good was passed over, and everybody else was paged once
    assert run["states"]["sent"] == run["positive_studies"]


def test_the_account_tells_lost_doubled_and_repeated_pages_apart(paging: Any) -> None:
    studies = {f"{paging.UIDS}.{i}" for i in (1, 2, 3)}

    def accepted(study: int, message_id: str, to: int = 0, late: bool = False) -> Any:
        return paging.Accepted(0.0, paging.RECIPIENTS[to], message_id, paging.mark(f"{paging.UIDS}.{study}"), late)

    clean = [accepted(1, "a"), accepted(2, "b"), accepted(3, "c"), accepted(3, "d", to=1)]
    assert paging.account(studies, clean) == {
        "pages_accepted": 4,
        "pages_lost": 0,
        "pages_doubled": 0,
        "pages_of_no_positive_study": 0,
        "same_message_id_again": {"after_a_late_answer": 0, "after_a_kill": 0},
    }
    faulty = [accepted(1, "a"), accepted(1, "other"), accepted(2, "b", late=True), accepted(2, "b"), accepted(9, "e")]
    found = paging.account(studies, [*faulty, accepted(1, "a")])
    assert (found["pages_lost"], found["pages_doubled"], found["pages_of_no_positive_study"]) == (1, 1, 1)
    assert found["same_message_id_again"] == {"after_a_late_answer": 1, "after_a_kill": 1}


def test_results_come_with_the_share_of_positives_that_was_asked_for_and_some_come_again(paging: Any) -> None:
    events, again = paging.deliveries(4000, 0.05, random.Random(1))
    assert len(events) == 4000 + again
    assert 300 < again < 500
    positive = {event.study_instance_uid for event in events if event.disposition == "positive"}
    assert 150 < len(positive) < 250
    several = {event.series_instance_uid for event in events if event.disposition == "positive"}
    assert len(several) > len(positive)
    first = {}
    for event in events:
        first.setdefault(event.event_id, event)
    assert len(first) == 4000


def test_the_mark_of_a_study_is_what_the_link_of_its_page_names(paging: Any) -> None:
    from base64 import b32decode

    from herald.config import WebuiConfig
    from herald.links import page_token
    from notifier.record import page_id

    study = f"{paging.UIDS}.1"
    token = page_token(WebuiConfig(secret_key="k"), page_id(study, 0))
    assert b32decode(token, casefold=True)[:8].hex() == paging.mark(study)
