"""The one text of a JSON value, and texts that carry their own digest."""

import hashlib
import json
import re
from typing import Any

from sparsekd.logit_store.errors import DamagedStoreError
from sparsekd.logit_store.typed_json import parse_json, short

_DIGEST = re.compile(rb'^ "digest": "([0-9a-f]{64})"', re.MULTILINE)
"""The field of the outermost object: in canonical text nothing deeper is indented by one space."""


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


def read_signed_json(path: object, data: bytes, version: int) -> tuple[dict[str, Any], str]:
    """Reads what `signed_json` returned.

    Args:
        path: where the text is from, for messages.
        data: the text, whose length the caller has bounded.
        version: that its `format_version` must have.

    Returns:
        (content without `digest` and `format_version`, digest).

    Raises:
        DamagedStoreError: any byte differs, it is no such text, or of another version.
    """
    content = parse_json(data, str(path))
    found = _DIGEST.findall(data)
    digest = content.pop("digest", None) if isinstance(content, dict) else None
    unsigned = _DIGEST.sub(b' "digest": ""', data)
    if len(found) != 1 or digest != found[0].decode() or hashlib.sha256(unsigned).hexdigest() != digest:
        raise DamagedStoreError(
            f"{path} is damaged (its digest does not fit its text): restore it from a copy."
        )
    if (stated := content.pop("format_version", None)) != version or type(stated) is not int:
        raise DamagedStoreError(
            f"{path} has {short(stated)} as format_version, expected {version}: restore it from a copy."
        )
    return content, digest


def signed_digest(data: bytes) -> str:
    """Returns the `digest` of canonical signed JSON, which the caller knows to be sound."""
    match = _DIGEST.search(data)
    assert match is not None
    return match[1].decode()
