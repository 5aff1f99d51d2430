"""Runs LocalStack in this process for as long as somebody holds the other end of its standard input.

Started by `tests/it/localstack.rs` with the virtual environment's Python. Prints `listening on HOST:PORT` on standard
output, and `key_status.py` prints `KEY-STATUS-READY` there once it has run.
"""

import os
import shutil
import socket
import tempfile
import threading

ROOT = os.environ["FILESYSTEM_ROOT"]


def end_with(stdin: int) -> None:
    """Ends the process at once when `stdin` does.

    The system closes the test process's end of the pipe however that process ends, SIGKILL included, so LocalStack
    cannot outlive it. `os._exit`, because an orderly shutdown waits for requests that nobody will finish.
    """
    try:
        while os.read(stdin, 4096):
            pass
        shutil.rmtree(ROOT, ignore_errors=True)
    finally:
        os._exit(0)


def listen_on_loopback() -> None:
    """Has LocalStack serve on a loopback port that the system picks, and only there.

    LocalStack ignores the host in `GATEWAY_LISTEN` and listens on every interface; when the port is taken, it says
    `Ready.` all the same. A socket that is bound here and handed over leaves no room for either.
    """
    from twisted.internet import endpoints

    listener = socket.create_server(("127.0.0.1", 0), backlog=128)
    host, port = listener.getsockname()
    os.environ["GATEWAY_LISTEN"] = f"{host}:{port}"

    def endpoint(reactor, wanted, *_args, **_options):
        assert wanted == port, f"LocalStack wants port {wanted} besides {port}"
        return endpoints.AdoptedStreamServerEndpoint(reactor, listener.detach(), socket.AF_INET)

    # Before LocalStack's own modules are loaded, so that it does not matter how they import the name.
    endpoints.TCP4ServerEndpoint = endpoint
    print(f"listening on {host}:{port}", flush=True)


def main() -> None:
    # A descriptor of its own, not inherited: what LocalStack might start must neither read the pipe nor hold it.
    stdin = os.dup(0)
    with open(os.devnull) as null:
        os.dup2(null.fileno(), 0)
    threading.Thread(target=end_with, args=(stdin,), name="end-with-stdin", daemon=True).start()

    try:
        # Uploads are spooled to files: where they go with the rest, not under /tmp. (It warns about `TMPDIR`.)
        tempfile.tempdir = os.path.join(ROOT, "tmp")
        os.makedirs(tempfile.tempdir, exist_ok=True)
        listen_on_loopback()

        from localstack.runtime.main import main as localstack

        localstack()
    finally:
        shutil.rmtree(ROOT, ignore_errors=True)


main()
