"""Logging of every process: one line per event on stderr, without identity."""

import logging
import sys

FORMAT = "%(asctime)s %(levelname)-7s {service:<9} %(message)s"

_CHATTY = ("pynetdicom", "pydicom", "kafka", "waitress", "werkzeug", "apprise", "urllib3", "grpc", "mail.log")
"""Libraries whose routine messages are noise, or print data sets and with them names."""


def configure_logging(service: str, level: str) -> None:
    """Send the log of this process to stderr, each line with its time, level and service."""
    logging.basicConfig(level=level.upper(), format=FORMAT.format(service=service), stream=sys.stderr, force=True)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.captureWarnings(True)
