"""What can be wrong with the settings of `generate` is one sentence, before anything is asked."""

import pytest

from sparsekd.trainer.config.compose import check_for_verb, compose_config
from sparsekd.trainer.run.errors import ConfigError

FILES = ["generate.prompts=[p.jsonl]", "generate.path=a"]
SERVED = ["generate.endpoint=http://host:8000/v1", "generate.model=m"]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ([], r"generate\.prompts is not set"),
        (FILES, r"teacher\.path .* or generate\.endpoint .*neither is set"),
        ([*FILES, *SERVED, "teacher.path=x"], "both are set"),
        ([*FILES, "teacher.path=x", "generate.model=m"], r"generate\.model speaks of an endpoint"),
        ([*FILES, SERVED[0]], r"needs generate\.model"),
        ([*FILES, SERVED[1], "generate.endpoint=host/v1"], "no address of the form"),
        ([*FILES, SERVED[1], "generate.endpoint=ftp://host/v1"], "no address of the form"),
        ([*FILES, SERVED[1], "generate.endpoint='http://host/v1?key=1'"], "no address of the form"),
        ([*FILES, *SERVED, "generate.key_variable=OF_NOBODY"], "OF_NOBODY.*is not set"),
        ([*FILES, *SERVED, "generate.request.seed=1"], r"the field seed.*generate\.seed"),
        ([*FILES, *SERVED, "generate.request.model=null"], "the field model"),
        ([*FILES, *SERVED, "generate.format=lines"], r"needs generate\.template"),
        ([*FILES, *SERVED, "generate.template='no field'"], "expected names of fields"),
        ([*FILES, *SERVED, "generate.top_p=0"], "leaves no token"),
        ([*FILES, *SERVED, "generate.clean.refusals=['(']"], "no regular expression"),
        ([*FILES, *SERVED, "generate.clean.filter=f"], "expected module:function"),
        (
            [*FILES, *SERVED, "generate.clean.max_characters=3", "generate.clean.min_characters=4"],
            "no answer",
        ),
    ],
)
def test_wrong_settings_are_refused(overrides: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        check_for_verb(compose_config(overrides), "generate")


def test_secrets_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    for word in ("generate.endpoint=http://me:hidden@host/v1", "generate.key_variable=sk-hidden"):
        with pytest.raises(ConfigError) as found:
            check_for_verb(compose_config([*FILES, *SERVED, word]), "generate")
        assert "hidden" not in str(found.value)
    monkeypatch.setenv("OF_TEST", "hidden\n")
    with pytest.raises(ConfigError, match="something else than a key") as found:
        check_for_verb(compose_config([*FILES, *SERVED, "generate.key_variable=OF_TEST"]), "generate")
    assert "hidden" not in str(found.value)
    monkeypatch.setenv("OF_TEST", "a-key")
    check_for_verb(compose_config([*FILES, *SERVED, "generate.key_variable=OF_TEST"]), "generate")
