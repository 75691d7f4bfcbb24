"""An S3 server on loopback for the tests of stores there, which counts what it is asked."""

import logging
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from moto.server import ThreadedMotoServer

BUCKET = "bucket"


class S3Server:
    """A server that holds one bucket.

    Attributes:
        address: of the server.
        requests: (method, key, whether it lists) of every request so far.
        answer: the WSGI application itself.
        before: is given the WSGI environment of each request first, and may change it.
        accepted: how often an object was made or replaced, by its key.
        honours_conditions: whether it looks at `If-None-Match`; some services do not, and replace.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self.requests: list[tuple[str, str, bool]] = []
        self.accepted: Counter[str] = Counter()
        self.honours_conditions = True
        self.answer: Callable[..., Any]
        self.before: Callable[[dict[str, Any]], None] = lambda environment: None

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

    @cached_property
    def _client(self) -> Any:
        import boto3

        return boto3.client("s3", endpoint_url=self.address, region_name="us-east-1")

    def put(self, key: str, content: bytes) -> None:
        """Makes an object of any name, as a stranger can who needs none of our code."""
        self._client.put_object(Bucket=BUCKET, Key=key, Body=content)

    def fill(self, objects: Mapping[str, bytes]) -> None:
        """Makes many objects at once, without a request."""
        from moto.s3.models import s3_backends

        backend = s3_backends["123456789012"]["aws"]
        for key, content in objects.items():
            backend.put_object(BUCKET, key, content)

    def counting(self, application: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps the server's WSGI application."""

        self.answer = application

        def counted(environment: dict[str, Any], start: Callable[..., Any]) -> Any:
            # As it was sent: `PATH_INFO` has no `..` any more.
            path, _, query = environment["RAW_URI"].partition("?")
            key = urllib.parse.unquote(path).removeprefix(f"/{BUCKET}").removeprefix("/")
            self.requests.append((environment["REQUEST_METHOD"], key, "list-type" in query))
            self.before(environment)
            # Google's words for the same two things.
            if not environment.get("HTTP_AUTHORIZATION", "").startswith("AWS4"):
                environment["HTTP_AUTHORIZATION"] = (
                    "AWS4-HMAC-SHA256 Credential=a/20260101/us-east-1/s3/aws4_request, Signature=0"
                )
            if environment.pop("HTTP_X_GOOG_IF_GENERATION_MATCH", "") == "0":
                environment["HTTP_IF_NONE_MATCH"] = "*"
            if not self.honours_conditions:
                environment.pop("HTTP_IF_NONE_MATCH", None)

            def noted(status: str, *rest: Any) -> Any:
                if environment["REQUEST_METHOD"] == "PUT" and status.startswith("2"):
                    self.accepted[key] += 1
                return start(status, *rest)

            return self.answer(environment, noted)

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
