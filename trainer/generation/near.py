"""Answers that are like an earlier one, by MinHash: the same answer in other words here and there."""

from typing import Any

from sparsekd.trainer.run.errors import ConfigError

_STRETCH = 9
"""Characters of a stretch, as is usual for texts that are longer than mails; of any language."""

_FEWEST_STRETCHES = 64
"""Shorter answers are alike by chance ("Yes, it is."), and are no duplicates but exact ones."""

_LOOKED_AT = 100_000
"""Characters of an answer that are compared."""

_PERMUTATIONS = 128


class NearDuplicates:
    """Remembers answers and says which are like an earlier one.

    Args:
        similarity: Jaccard similarity of the sets of stretches from which on they are alike.

    Raises:
        ConfigError: The library is not installed.
    """

    def __init__(self, similarity: float) -> None:
        try:
            import datasketch
        except ImportError as error:
            raise ConfigError(
                "generate.clean.duplicates=near needs the package `datasketch`, which is not installed; "
                "install it with: pip install 'sparsekd[clean]'."
            ) from error
        self._similarity, self._library = similarity, datasketch
        self._index: Any = datasketch.MinHashLSH(threshold=similarity, num_perm=_PERMUTATIONS)
        self._sketches: list[Any] = []

    def is_like_another(self, text: str) -> bool:
        """Whether a text is like one that was kept; remembers it where it is not."""
        text = " ".join(text.split()).casefold()[:_LOOKED_AT]
        stretches = {text[start : start + _STRETCH] for start in range(len(text) - _STRETCH + 1)}
        if len(stretches) < _FEWEST_STRETCHES:
            return False
        sketch: Any = self._library.MinHash(num_perm=_PERMUTATIONS, seed=1)
        sketch.update_batch([stretch.encode("utf-8") for stretch in stretches])
        # What the index finds is only likely to be alike.
        if any(
            sketch.jaccard(self._sketches[found]) >= self._similarity for found in self._index.query(sketch)
        ):
            return True
        self._index.insert(len(self._sketches), sketch)
        self._sketches.append(sketch)
        return False
