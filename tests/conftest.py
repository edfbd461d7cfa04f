"""Fixtures that several test files share."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

import pytest

BROKER = Path(__file__).parents[1] / "deploy" / "kafka" / "broker.py"


def pytest_configure(config: pytest.Config) -> None:
    # kafka-python 3.0.12 reads its message schemas through a deprecated function of importlib.
    for name in ("read_text", "open_text"):
        config.addinivalue_line("filterwarnings", f"ignore:{name} is deprecated:DeprecationWarning")


class KafkaBroker:
    """A real Kafka broker on loopback, as a process that can be killed and started again on the same data."""

    def __init__(self, data: Path) -> None:
        self._data = data
        self._port = free_port_pair()
        self.servers = f"127.0.0.1:{self._port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        from herald.bus.kafka import KafkaBus
        from herald.errors import BusError

        command = [sys.executable, str(BROKER), "run", "--port", str(self._port), "--data", str(self._data)]
        self._data.mkdir(parents=True, exist_ok=True)
        with (self._data / "output.txt").open("ab") as output:
            self._process = subprocess.Popen(command, stdout=output, stderr=output)
        while True:
            bus = KafkaBus(self.servers)
            try:
                bus.check()
                return
            except BusError:
                if self._process.poll() is not None:
                    pytest.fail(f"the broker ended: {(self._data / 'output.txt').read_text()}")
                with pytest.raises(subprocess.TimeoutExpired):
                    self._process.wait(0.2)
            finally:
                bus.close()

    def kill(self) -> None:
        """End it without a chance to tidy up, as a power cut does."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()


@contextmanager
def running_kafka(data: Path) -> Iterator[KafkaBroker]:
    """A broker for the block; without Java and Maven a laptop skips, and CI fails."""
    missing = [program for program in ("java", "mvn") if shutil.which(program) is None]
    if missing:
        message = f"no real Kafka broker without {' and '.join(missing)}; `make tools` installs them"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    broker = KafkaBroker(data)
    broker.start()
    try:
        yield broker
    finally:
        broker.kill()


@pytest.fixture(scope="session")
def kafka_servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """HOST:PORT of a broker that all tests share; keep apart by the prefix in kafka://HOST:PORT/PREFIX."""
    with running_kafka(tmp_path_factory.mktemp("kafka")) as broker:
        yield broker.servers


@pytest.fixture(params=["sqlite", "kafka"])
def bus_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty bus, once per implementation."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'bus.sqlite'}"
    servers: str = request.getfixturevalue("kafka_servers")
    return f"kafka://{servers}/{tmp_path.name}."


def free_port_pair() -> int:
    """A port that is free together with the next one, which the broker's controller takes."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port: int = first.getsockname()[1]
            try:
                second.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port


# --- PostgreSQL ---


@contextmanager
def running_postgres(data: Path) -> Iterator[str]:
    """SQLAlchemy URL of a private PostgreSQL cluster; without Debian's package a laptop skips, and CI fails."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not programs:
        message = "no real PostgreSQL without Debian's package postgresql; `make tools` installs it"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    binaries = programs[-1].parent
    # the server refuses to run as root
    user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    if user:
        shutil.chown(data, "postgres")
    cluster = data / "cluster"
    port = free_port_pair()

    def run(program: str, *arguments: str) -> None:
        command = [*user, str(binaries / program), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=data, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    run("initdb", "-D", str(cluster), "-U", "herald", "-A", "trust", "--no-sync", "-E", "UTF8")
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories='{data}' -c fsync=off"
    run("pg_ctl", "-D", str(cluster), "-l", str(data / "server.txt"), "-w", "-o", options, "start")
    try:
        yield f"postgresql+psycopg://herald@127.0.0.1:{port}/postgres"
    finally:
        run("pg_ctl", "-D", str(cluster), "-m", "immediate", "-w", "stop")


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """SQLAlchemy URL of a PostgreSQL server that all tests share."""
    # not under pytest's own folder, which only its user may enter
    with TemporaryDirectory(prefix="herald-postgres-") as data, running_postgres(Path(data)) as url:
        yield url


@pytest.fixture
def postgres_url(postgres_server: str) -> Iterator[str]:
    """SQLAlchemy URL of an empty PostgreSQL database."""
    from sqlalchemy import create_engine, make_url, text

    name = f"herald_{uuid4().hex}"
    engine = create_engine(postgres_server, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"create database {name}"))
    yield make_url(postgres_server).set(database=name).render_as_string(hide_password=False)
    with engine.connect() as connection:
        connection.execute(text(f"drop database {name} with (force)"))
    engine.dispose()


@pytest.fixture(params=["sqlite", "postgresql"])
def ledger_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty ledger, once per database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'ledger.sqlite'}"
    url: str = request.getfixturevalue("postgres_url")
    return url


CHROMIUM = os.environ.get("HERALD_TEST_CHROMIUM") or shutil.which("chromium")  # else Playwright's own, as on Ubuntu
ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A browser without a window; a machine without one must not pass for CI."""
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        if not Path(CHROMIUM or playwright.chromium.executable_path).exists():
            message = "no browser test without Chromium: run `make tools`"
            if os.environ.get("CI"):
                pytest.fail(message)
            pytest.skip(message)
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(ARGUMENTS))
        yield browser
        browser.close()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Any]:
    """A web UI in live mode on SQLite; files that drive a browser have one that is served."""
    from webui_site import open_site

    with open_site(tmp_path) as site:
        yield site


@pytest.fixture
def shadow(tmp_path: Path) -> Iterator[Any]:
    """A web UI in shadow mode."""
    from webui_site import open_site

    with open_site(tmp_path, mode="shadow") as site:
        yield site


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Where screenshots go: $HERALD_TEST_SCREENSHOTS to look at them, else a temporary folder."""
    folder = Path(os.environ.get("HERALD_TEST_SCREENSHOTS", tmp_path / "screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder
