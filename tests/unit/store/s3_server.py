"""An S3 server on loopback for the tests of stores there, which counts what it is asked."""

import logging
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from moto.server import ThreadedMotoServer

BUCKET = "bucket"


class S3Server:
    """A server that holds one bucket.

    Attributes:
        address: of the server.
        requests: (method, key, whether it lists) of every request so far.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self.requests: list[tuple[str, str, bool]] = []

    @property
    def environment(self) -> dict[str, str]:
        """Returns the variables of Amazon's own tools that lead to it."""
        return {
            "AWS_ENDPOINT_URL": self.address,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "NO_PROXY": "127.0.0.1",
        }

    def put(self, key: str, content: bytes) -> None:
        """Makes an object of any name, as a stranger can who needs none of our code."""
        import boto3

        client = boto3.client("s3", endpoint_url=self.address, region_name="us-east-1")
        client.put_object(Bucket=BUCKET, Key=key, Body=content)

    def counting(self, application: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps the server's WSGI application."""

        def counted(environment: dict[str, Any], start: Callable[..., Any]) -> Any:
            # As it was sent: `PATH_INFO` has no `..` any more.
            path, _, query = environment["RAW_URI"].partition("?")
            key = urllib.parse.unquote(path).removeprefix(f"/{BUCKET}").removeprefix("/")
            self.requests.append((environment["REQUEST_METHOD"], key, "list-type" in query))
            return application(environment, start)

        return counted


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """Runs a server in a thread of this process."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    found = S3Server(f"http://127.0.0.1:{port}")
    inner: Any = server._server
    inner.app = found.counting(inner.app)
    urllib.request.urlopen(urllib.request.Request(f"{found.address}/{BUCKET}", method="PUT"))
    yield found
    server.stop()
