"""The supervisor: what dies starts again, what is stopped ends, and nobody outlives a killed supervisor."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from herald.config import load_config
from herald.errors import ConfigError
from herald.node import EXIT_CONFIG, Supervisor

DEADLINE_S = 40.0


def environment(folder: Path, **settings: str) -> dict[str, str]:
    return {
        **os.environ,
        "HERALD_NODE__DATA_DIR": str(folder),
        "HERALD_RECEIVER__HOST": "127.0.0.1",
        "HERALD_RECEIVER__PORT": "0",
        "HERALD_SERVING__PORT": "0",
        "HERALD_WEBUI__PORT": "0",
        **settings,
    }


def until(what: Callable[[], object], why: str) -> object:
    """Poll another process's state, of which no event tells us."""
    deadline = time.monotonic() + DEADLINE_S
    while not (seen := what()):
        assert time.monotonic() < deadline, why
        time.sleep(0.05)
    return seen


def services(parent: psutil.Process) -> dict[str, psutil.Process]:
    """Running services below `parent`, by name."""
    return {
        child.cmdline()[-1]: child
        for child in parent.children()
        if child.is_running() and child.status() != psutil.STATUS_ZOMBIE and child.cmdline()[-3:-1] == ["herald", "run"]
    }


@pytest.fixture
def node(tmp_path: Path) -> Iterator[psutil.Process]:
    """`herald run` with two services that need nobody else."""
    command = [sys.executable, "-m", "herald", "run", "receiver", "serving"]
    with subprocess.Popen(command, env=environment(tmp_path), stdin=subprocess.DEVNULL) as process:
        yield psutil.Process(process.pid)
        process.kill()


def test_a_service_that_is_killed_starts_again(node: psutil.Process) -> None:
    until(lambda: len(services(node)) == 2, "both services start")
    first = services(node)["receiver"]
    first.kill()
    # the killed one is listed until its supervisor has noticed
    until(lambda: services(node).get("receiver", first) != first, "the receiver starts again")


def test_a_termination_signal_ends_every_service_and_the_node(node: psutil.Process) -> None:
    until(lambda: len(services(node)) == 2, "both services start")
    running = list(services(node).values())
    node.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs([node, *running], timeout=DEADLINE_S)
    assert alive == []


WAITING = """
import signal, threading
from herald.node import stop_at_signals
stop = threading.Event()
stop_at_signals(stop)
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # of this thread: it is not woken
print("waiting", flush=True)
stop.wait()
"""


def test_a_signal_that_does_not_wake_the_main_thread_is_seen_all_the_same() -> None:
    with subprocess.Popen([sys.executable, "-c", WAITING], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        process.terminate()
        try:
            assert process.wait(DEADLINE_S) == 0
        finally:
            process.kill()


def test_no_service_outlives_a_supervisor_that_was_killed(node: psutil.Process) -> None:
    until(lambda: len(services(node)) == 2, "both services start")
    running = list(services(node).values())
    node.kill()
    _, alive = psutil.wait_procs(running, timeout=DEADLINE_S)
    assert alive == []


def test_an_unknown_service_is_refused_before_anything_starts(tmp_path: Path) -> None:
    config = load_config(None, environment(tmp_path))
    with pytest.raises(ConfigError, match="unknown service pager"):
        Supervisor(config, ("receiver", "pager"))


def test_a_service_that_cannot_start_with_this_configuration_stops_the_node_with_a_reason(tmp_path: Path) -> None:
    """The web UI has no secret here."""
    done = subprocess.run(
        [sys.executable, "-m", "herald", "run", "receiver", "webui"],
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == EXIT_CONFIG
    assert "HERALD_WEBUI__" in done.stderr
    assert "Traceback" not in done.stderr


def test_stopping_the_supervisor_stops_its_children(tmp_path: Path) -> None:
    env = environment(tmp_path)
    stop = threading.Event()
    supervisor = Supervisor(load_config(None, env), ("receiver",), env)
    thread = threading.Thread(target=supervisor.run, args=(stop,))
    thread.start()
    me = psutil.Process()
    until(lambda: services(me), "the receiver starts")
    running = list(services(me).values())
    stop.set()
    thread.join(DEADLINE_S)
    assert not thread.is_alive()
    assert not any(process.is_running() for process in running)
