"""uvicorn on a service: listens, stops gracefully."""

from __future__ import annotations

import logging
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from proteus_deploy.errors import InputError
from proteus_deploy.serving.app import create_app
from proteus_deploy.serving.service import Service, ServiceSettings

__all__ = ["serve"]

_log = logging.getLogger("proteus_deploy.serving")

_CLOSE_CONNECTIONS_S = 5


class _Server(uvicorn.Server):
    """Tells the service of Ctrl-C at once, so that streams end and waiting requests are answered."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by uvicorn for SIGINT and SIGTERM."""
        self._service.stopping.set()
        super().handle_exit(sig, frame)


def serve(
    settings: ServiceSettings, host: str, port: int, *, on_listening: Callable[[str], None] | None = None
) -> None:
    """Serve until SIGINT or SIGTERM; call it in the main thread.

    on_listening: told the URL when the workers have their pipelines and requests are accepted.
    Raises InputError when the address can't be had, the data folder is in use, or the pipeline can't be
    opened.
    """
    # uvicorn raises the signals again behind its own shutdown; by default SIGTERM would end us there.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with _listen(host, port) as listener:
        service = Service(settings)
        try:
            service.start()
            # Before the first request: who asked for what can't run here is told now, by name.
            service.supervisor.wait_until_ready()
            config = uvicorn.Config(
                create_app(service),
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=_CLOSE_CONNECTIONS_S,
                h11_max_incomplete_event_size=64 << 10,
            )
            if on_listening is not None:
                shown = f"[{host}]" if ":" in host else host
                on_listening(f"http://{shown}:{listener.getsockname()[1]}")
            _Server(config, service).run(sockets=[listener])
        except KeyboardInterrupt:
            _log.info("stopping")
        finally:
            service.close()
            _log.info("stopped")


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise InputError(
            f"can't listen on {host} port {port} ({error.strerror}); choose another --host or --port"
        ) from error
