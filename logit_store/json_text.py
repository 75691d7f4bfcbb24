"""The one text of a JSON value, and texts that carry their own digest."""

import hashlib
import json
import re
from typing import Any

from sparsekd.logit_store.errors import DamagedStoreError


def canonical_json(value: object) -> str:
    """Returns the one text of a value: sorted keys, indent 1, ASCII, final newline."""
    return json.dumps(value, sort_keys=True, indent=1, ensure_ascii=True, allow_nan=False) + "\n"


def signed_json(content: dict[str, Any]) -> bytes:
    """Returns canonical JSON that carries its own digest.

    The field `digest` is the sha256 (hex) of the same text with an empty string there.
    """
    unsigned = canonical_json({**content, "digest": ""}).encode("ascii")
    digest = hashlib.sha256(unsigned).hexdigest()
    return canonical_json({**content, "digest": digest}).encode("ascii")


def read_signed_json(path: object, data: bytes) -> dict[str, Any]:
    """Reads what `signed_json` returned.

    Raises:
        DamagedStoreError: any byte differs.
    """
    damaged = DamagedStoreError(
        f"{path} is damaged (its digest does not fit its text): restore it from a copy."
    )
    try:
        content = json.loads(data.decode("ascii"))
        digest = content["digest"]
        field = b'"digest": "' + digest.encode("ascii") + b'"'
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise damaged from None
    unsigned = data.replace(field, b'"digest": ""', 1)
    if len(digest) != 64 or hashlib.sha256(unsigned).hexdigest() != digest:
        raise damaged
    return content


def signed_digest(data: bytes) -> str:
    """Returns the `digest` of canonical signed JSON, which the caller knows to be sound."""
    match = re.search(rb'^ "digest": "([0-9a-f]{64})"', data, re.MULTILINE)
    assert match is not None
    return match[1].decode()
