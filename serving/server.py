"""uvicorn on a service: listens, stops gracefully."""

from __future__ import annotations

import logging
import signal
import socket
import threading
from collections.abc import Callable
from types import FrameType

import uvicorn

from proteus_deploy.errors import InputError, ProteusError
from proteus_deploy.serving.app import create_app
from proteus_deploy.serving.service import Service, ServiceSettings

__all__ = ["serve"]

_log = logging.getLogger("proteus_deploy.serving")

_CLOSE_CONNECTIONS_S = 5


class _Server(uvicorn.Server):
    """Tells the service of Ctrl-C at once, so that streams end and waiting requests are answered."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by uvicorn for SIGINT and SIGTERM."""
        self.service.stopping.set()
        super().handle_exit(sig, frame)


class _Opening:
    """Waits for the workers beside the running server, and ends it when the pipeline can't be opened."""

    def __init__(self, server: _Server, url: str) -> None:
        self._server, self._url = server, url
        self._refusal: ProteusError | None = None

    def run(self, listener: socket.socket, on_ready: Callable[[str], None] | None) -> None:
        """The server's whole life. Raises what the workers said to the pipeline."""
        _log.info("listening on %s, the model is being opened", self._url)
        threading.Thread(target=self._wait, args=(on_ready,), daemon=True).start()
        self._server.run(sockets=[listener])
        if self._refusal is not None:
            raise self._refusal

    def _wait(self, on_ready: Callable[[str], None] | None) -> None:
        try:
            self._server.service.supervisor.wait_until_ready()
        except ProteusError as error:
            self._refusal = error
            self._server.should_exit = True
        else:
            if on_ready is not None:
                on_ready(self._url)


def serve(
    settings: ServiceSettings, host: str, port: int, *, on_ready: Callable[[str], None] | None = None
) -> None:
    """Serve until SIGINT or SIGTERM; call it in the main thread.

    The server listens while the workers open their pipelines: /healthz answers, /readyz says that it isn't
    ready, and jobs wait. on_ready: told the URL when the workers have their pipelines.
    Raises InputError when the address can't be had, the data folder is in use, or the pipeline can't be
    opened.
    """
    # uvicorn raises the signals again behind its own shutdown; by default SIGTERM would end us there.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with _listen(host, port) as listener:
        service = Service(settings)
        try:
            service.start()
            config = uvicorn.Config(
                create_app(service),
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=_CLOSE_CONNECTIONS_S,
                h11_max_incomplete_event_size=64 << 10,
            )
            shown = f"[{host}]" if ":" in host else host
            opening = _Opening(_Server(config, service), f"http://{shown}:{listener.getsockname()[1]}")
            opening.run(listener, on_ready)
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
