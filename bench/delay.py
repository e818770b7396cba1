"""A proxy that makes a server seem to be a millisecond away."""

from contextlib import suppress
from socket import SHUT_WR, create_connection, create_server, socket
from threading import Thread
from time import sleep

DELAY = 0.0005  # seconds, each way


def forward(source: socket, target: socket) -> None:
    with suppress(OSError):
        while chunk := source.recv(65_536):
            sleep(DELAY)
            target.sendall(chunk)
    with suppress(OSError):
        target.shutdown(SHUT_WR)


def accept(listener: socket, port: int) -> None:
    while True:
        near, _ = listener.accept()
        far = create_connection(("127.0.0.1", port))
        for ends in [(near, far), (far, near)]:
            Thread(target=forward, args=ends, daemon=True).start()


def delay(port: int) -> str:
    """Return another port, where the server on this one is a millisecond away."""
    listener = create_server(("127.0.0.1", 0))
    Thread(
        target=accept,
        args=(listener, port),
        daemon=True,
    ).start()
    return str(listener.getsockname()[1])
