"""The embedded model server's process."""

import logging
import threading

from herald.config import Config
from serving.server import ModelServer

logger = logging.getLogger(__name__)


def serve(config: Config, stop: threading.Event) -> None:
    """Serve the models of `config.serving` until `stop` is set; requests under way are finished.

    Raises ConfigError where the address is taken.
    """
    server = ModelServer(config.serving)
    server.start()
    stop.wait()
    server.stop()
    logger.info("model server stopped")
