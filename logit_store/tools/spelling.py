"""The text of token ids, for people: by the tokenizer's one file that the library tokenizers reads alone."""

from typing import Any

from sparsekd.logit_store.errors import StoreError
from sparsekd.logit_store.protocol.reader import LogitStore
from sparsekd.logit_store.typed_json import one_line


def spelling_tokenizer(store: LogitStore) -> Any | None:
    """Returns a store's tokenizer as a `tokenizers.Tokenizer`, or None where it has no tokenizer.json.

    Raises:
        StoreError: the file is none that the library can read.
    """
    place = store.tokenizer_path / "tokenizer.json"
    if not place.exists():
        return None
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(place))
    except Exception as error:  # the library has no class of its own
        raise StoreError(
            f"{place} cannot be read by the library tokenizers ({one_line(str(error))}): the store was made "
            "with another release of it, or is not to be trusted."
        ) from error
