"""In which language an answer is, by py3langid: the same for the same text, on any machine."""

import re
from collections.abc import Collection

from sparsekd.trainer.run.errors import ConfigError

_CODE = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
"""Code between fences, which is in no language that people speak."""

_FEWEST_LETTERS = 40
"""Of shorter texts, such as a name or "42", nobody can tell; they pass."""

_LOOKED_AT = 10_000
"""Characters of an answer by which its language is told."""


class Languages:
    """Says which answers are in another language than those that are wanted.

    Args:
        wanted: Codes of ISO 639-1, such as `en`.

    Raises:
        ConfigError: The library is not installed, or does not know one of them.
    """

    def __init__(self, wanted: Collection[str]) -> None:
        try:
            import py3langid
        except ImportError as error:
            raise ConfigError(
                "generate.clean.languages needs the package `py3langid`, which is not installed; install it "
                "with: pip install 'sparsekd[clean]'."
            ) from error
        self._classify, self._wanted = py3langid.classify, frozenset(wanted)
        known = {language for language, _ in py3langid.rank("")}
        if unknown := sorted(self._wanted - known):
            raise ConfigError(
                f"generate.clean.languages holds {unknown[0]!r}, expected some of {', '.join(sorted(known))}."
            )

    def is_another(self, text: str) -> bool:
        """Whether a text is in none of the languages."""
        said = _CODE.sub(" ", text)[:_LOOKED_AT]
        if sum(map(str.isalpha, said)) < _FEWEST_LETTERS:
            return False
        language, _ = self._classify(said)
        return language not in self._wanted
