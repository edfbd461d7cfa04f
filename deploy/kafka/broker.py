"""One Apache Kafka broker in KRaft mode on loopback, for development and tests: `python deploy/kafka/broker.py run`.

The jars that pom.xml names are copied once to `.kafka/libs` (git-ignored). Needs Java 17 or newer, and Maven.
Production clusters are run by their own operators; see compose.yaml.
"""

import argparse
import base64
import os
import shutil
import subprocess
import sys
import uuid
from pathlib import Path

POM = Path(__file__).with_name("pom.xml")
HOME = Path(__file__).parents[2] / ".kafka"
LIBS = HOME / "libs"

PROPERTIES = """\
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:{controller_port}
controller.listener.names=CONTROLLER
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller_port}
advertised.listeners=PLAINTEXT://127.0.0.1:{port}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT
log.dirs={logs}
auto.create.topics.enable=false
group.initial.rebalance.delay.ms=0
offsets.topic.num.partitions=1
offsets.topic.replication.factor=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
"""


def missing_programs() -> list[str]:
    """The programs that have to be installed before a broker can run."""
    needed = ["java"] if _jars_are_current() else ["java", "mvn"]
    return [program for program in needed if shutil.which(program) is None]


def fetch_jars() -> None:
    """Copy the jars that pom.xml names, with what they depend on, to `.kafka/libs`."""
    if _jars_are_current():
        return
    fresh = HOME / f"libs.{os.getpid()}"
    goal = ["dependency:copy-dependencies", "-DincludeScope=runtime", f"-DoutputDirectory={fresh}"]
    subprocess.run(["mvn", "-q", "-B", "-f", POM, *goal], check=True, stdout=sys.stderr)
    shutil.copy(POM, fresh / POM.name)
    shutil.rmtree(LIBS, ignore_errors=True)
    fresh.rename(LIBS)


def run(port: int, data: Path) -> None:
    """Become the broker: format `data` when it is new, then replace this process by Java's, until it is signalled."""
    missing = missing_programs()
    if missing:
        sys.exit(f"{' and '.join(missing)} not found: install Java 17 and Maven (`make tools` does)")
    fetch_jars()
    data.mkdir(parents=True, exist_ok=True)
    properties = data / "server.properties"
    logs = data / "logs"
    properties.write_text(PROPERTIES.format(port=port, controller_port=port + 1, logs=logs), encoding="utf-8")
    classpath = ["-cp", f"{LIBS}/*"]
    if not (logs / "meta.properties").exists():
        subprocess.run(
            ["java", *classpath, "kafka.tools.StorageTool", "format", "-t", _cluster_id(), "-c", properties],
            check=True,
            stdout=sys.stderr,
        )
    print(f"Kafka listens on 127.0.0.1:{port} (data in {data}); Ctrl-C stops it", file=sys.stderr, flush=True)
    os.execvp("java", ["java", "-Xmx512M", "-XX:+UseSerialGC", *classpath, "kafka.Kafka", str(properties)])


def _jars_are_current() -> bool:
    stamp = LIBS / POM.name
    return stamp.exists() and stamp.read_bytes() == POM.read_bytes()


def _cluster_id() -> str:
    # Kafka's form of a UUID; the first character must not look like an option.
    return "H" + base64.urlsafe_b64encode(uuid.uuid4().bytes).decode()[1:22]


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("fetch", help="copy the jars to .kafka/libs")
    runs = commands.add_parser("run", help="run the broker in the foreground")
    runs.add_argument("--port", type=int, default=9092, help="PORT serves clients, PORT+1 the controller (%(default)s)")
    runs.add_argument("--data", type=Path, default=HOME / "data", help="folder of the log (.kafka/data)")
    arguments = parser.parse_args()
    if arguments.command == "fetch":
        fetch_jars()
    else:
        run(arguments.port, arguments.data.absolute())


if __name__ == "__main__":
    main()
