"""moto, whose writes wait for each other: s3_mock.py PORT, on loopback.

moto looks whether an object is there and stores it in two steps, on as many threads as there are requests. S3 does
both as one, and so must what stands in for it: two creators of one key may not both succeed.
"""

import io
import os
import sys
import threading

from moto.moto_server.werkzeug_app import (
    DomainDispatcherApplication,
    MotoRequestHandler,
    create_backend_app,
)
from werkzeug.serving import run_simple

port = int(sys.argv[1])
os.environ["MOTO_PORT"] = str(port)
moto = DomainDispatcherApplication(create_backend_app)
one_write = threading.Lock()


def serve(environ, start_response):
    if environ["REQUEST_METHOD"] == "GET":
        return moto(environ, start_response)
    # Before its turn: a client that sends slowly or hangs must not keep the others waiting.
    length = int(environ.get("CONTENT_LENGTH") or 0)
    if length:
        environ["wsgi.input"] = io.BytesIO(environ["wsgi.input"].read(length))
    with one_write:
        return moto(environ, start_response)


run_simple("127.0.0.1", port, serve, threaded=True, request_handler=MotoRequestHandler)
