"""The edge to Hydra: overrides and YAML groups become a checked `Config`, or one sentence that says why not.

Everything that can be wrong without loading a model is found here, before torch is imported.
"""

import dataclasses
import difflib
import re
import sysconfig
from collections.abc import Sequence
from contextlib import redirect_stderr
from importlib import resources
from io import StringIO
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import GrammarParseError, InterpolationResolutionError, OmegaConfBaseException
from yaml import YAMLError

from sparsekd.logit_store.errors import StoreError
from sparsekd.logit_store.manifest import read_manifest
from sparsekd.logit_store.places.paths import RemotePath, StorePath, store_path
from sparsekd.trainer.config.corpus import check_corpus
from sparsekd.trainer.config.generate import check_generate
from sparsekd.trainer.config.options import Option, options
from sparsekd.trainer.config.schema import Config, TeacherConfig, require
from sparsekd.trainer.config.text import UNREADABLE, as_typed, exact_schema, quoted, without_interpolation
from sparsekd.trainer.run.errors import ConfigError, FolderError

CONFIG_MODULE = "sparsekd.conf"


def compose_config(overrides: Sequence[str], *, config_directory: str | None = None) -> Config:
    """Composes groups and overrides into a typed configuration and checks every value by itself.

    Args:
        overrides: Hydra overrides, such as `objective=ce_only` or `train.steps=100`.
        config_directory: A folder with groups of the user's own, searched besides sparsekd's.

    Raises:
        ConfigError: An unknown key or group, a wrong type, or a value outside its range; the message names
            the key, the value, the legal values and the nearest key.
    """
    _check_keys(overrides, config_directory)
    ConfigStore.instance().store(name="schema", node=exact_schema())
    OmegaConf.register_new_resolver("python_stdlib", _python_stdlib, replace=True)
    search_path = (
        [] if config_directory is None else [f"hydra.searchpath=[{_search_entry(config_directory)}]"]
    )
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module(CONFIG_MODULE, version_base="1.3"), redirect_stderr(StringIO()):
            words = [_allow_free_keys(as_typed(text)) for text in overrides]
            composed = compose("config", overrides=[*words, *search_path])
        # Here an interpolation becomes what its key needs, also text made of a number.
        values = OmegaConf.create(OmegaConf.to_container(composed, resolve=False))
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), values))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_first_sentence(error)) from error
    except YAMLError as error:
        raise ConfigError(f"A group is not YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(config, Config):
        raise ConfigError(
            "conf/config.yaml does not start from the schema; its defaults list must begin with it."
        )
    for leaf in options(config):
        _check_value(leaf)
    return config


def checked_again(config: Config) -> Config:
    """The same configuration with types and values checked, where a program set its fields.

    Raises:
        ConfigError: As `compose_config`.
    """
    try:
        values = OmegaConf.create(_without_interpolations(dataclasses.asdict(config)))
        found = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), values))
    except OmegaConfBaseException as error:
        raise ConfigError(_first_sentence(error)) from error
    assert isinstance(found, Config)
    for leaf in options(found):
        _check_value(leaf)
    return found


def as_yaml(config: Config) -> str:
    """The whole configuration as YAML, as a run folder keeps it; text with `${` in it comes back as text."""
    return OmegaConf.to_yaml(OmegaConf.create(_without_interpolations(dataclasses.asdict(config))))


def _without_interpolations(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_interpolations(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_without_interpolations(entry) for entry in value]
    return without_interpolation(value) if isinstance(value, str) else value


def groups() -> dict[str, list[str]]:
    """The configuration groups that sparsekd ships, each with the names of its choices."""
    root = resources.files(CONFIG_MODULE)
    return {
        folder.name: sorted(
            item.name.removesuffix(".yaml") for item in folder.iterdir() if _is_yaml(item.name)
        )
        for folder in sorted(root.iterdir(), key=lambda entry: entry.name)
        if folder.is_dir() and not folder.name.startswith("_")
    }


def check_for_verb(config: Config, verb: str) -> None:
    """Checks what one verb needs: keys that must be set, combinations, and folders that must exist.

    Raises:
        ConfigError: One sentence that names the keys, what was found and what is legal.
    """
    checks = {
        "generate": _check_generate,
        "prepare": _check_prepare,
        "capture": _check_capture,
        "train": _check_train,
        "evaluate": _check_evaluate,
        "plan": _check_plan,
    }
    _check_placement(config.teacher)
    _check_tensor_parallel(config, verb)
    if verb in checks:
        checks[verb](config)


def check_folder(path: str | None, key: str, purpose: str) -> Path:
    """The existing folder that `key` names, or FolderError with the nearest name beside it."""
    folder = Path(require(path, key, purpose))
    if not folder.is_dir():
        siblings = [entry.name for entry in folder.parent.iterdir()] if folder.parent.is_dir() else []
        near = difflib.get_close_matches(folder.name, siblings, n=1, cutoff=0.6)
        hint = f"; did you mean {folder.parent / near[0]}?" if near else "."
        raise FolderError(f"{key}={path} is not an existing folder, but is needed {purpose}{hint}")
    return folder


def check_store(path: str | None, key: str, purpose: str) -> StorePath:
    """The place of the store that `key` names: an existing folder, or an address, which is not asked yet."""
    place = store_path(require(path, key, purpose))
    return place if isinstance(place, RemotePath) else check_folder(str(place), key, purpose)


def _check_model_path(path: str | None, key: str) -> None:
    """Refuses what can only be a mistyped folder, before transformers looks for it on the hub for a while."""
    if path is None or Path(path).exists():
        return
    parent = Path(path).parent
    if Path(path).is_absolute() or path.startswith(".") or (parent != Path() and parent.is_dir()):
        near = difflib.get_close_matches(
            Path(path).name, [entry.name for entry in parent.iterdir()] if parent.is_dir() else [], n=1
        )
        hint = f"; did you mean {parent / near[0]}?" if near else "."
        raise FolderError(f"{key}={path} is not an existing folder{hint}")


def _check_generate(config: Config) -> None:
    generate, teacher = config.generate, config.teacher
    require(generate.prompts, "generate.prompts", "to know what to ask")
    require(generate.path, "generate.path", "to know where the answers go")
    check_generate(generate)
    if (generate.endpoint is None) == (teacher.path is None):
        found = "neither is" if teacher.path is None else "both are"
        raise ConfigError(
            f"Set teacher.path (a folder or hub name) or generate.endpoint (a server); {found} set."
        )
    _check_model_path(teacher.path, "teacher.path")


def _check_prepare(config: Config) -> None:
    corpus = config.corpus
    require(corpus.paths, "corpus.paths", "to know which documents to read")
    require(config.store.tokens, "store.tokens", "to know where the token store goes")
    if (corpus.tokenizer is None) == (corpus.train_vocabulary_size is None):
        found = "neither is" if corpus.tokenizer is None else "both are"
        raise ConfigError(
            f"Set corpus.tokenizer (a folder or hub name) or corpus.train_vocabulary_size; {found} set."
        )
    check_corpus(corpus)
    _check_model_path(corpus.tokenizer, "corpus.tokenizer")


def _check_capture(config: Config) -> None:
    _check_teacher_pass(config)
    require(config.store.path, "store.path", "to know where the logit store goes")


def _check_teacher_pass(config: Config) -> None:
    """Of a teacher over tokens, wherever its records go."""
    store = config.store
    check_store(
        store.tokens, "store.tokens", "as the token store that the teacher reads (written by `prepare`)"
    )
    _check_model_path(
        require(config.teacher.path, "teacher.path", "to know which teacher to run"), "teacher.path"
    )
    from sparsekd.trainer.config.feature_requests import feature_requests

    if store.k == 0 and store.n == 0 and not feature_requests(store.features):
        raise ConfigError(
            "store.k=0 and store.n=0 keep nothing of the teacher; set store.k, store.n or both."
        )
    if (store.positions == "sampled") != (store.share < 1):
        raise ConfigError(
            f"store.positions={store.positions} with store.share={store.share:g}: sampled needs a share "
            "above 0 and below 1, the other rules have store.share=1."
        )
    if store.temperatures != sorted(set(store.temperatures)):
        raise ConfigError(
            f"store.temperatures={store.temperatures} is not ascending; "
            f"write store.temperatures={sorted(set(store.temperatures))}."
        )
    if store.draw_temperature not in store.temperatures:
        raise ConfigError(
            f"store.draw_temperature={store.draw_temperature} is not one of store.temperatures="
            f"{store.temperatures}; the draws' temperature must be a point of the grid."
        )
    if store.mass is not None and (store.codec != "compact" or store.n > 0):
        raise ConfigError(
            f"store.mass={store.mass} cuts heads short, which takes store.codec=compact and store.n=0, but "
            f"they are {store.codec} and {store.n}; set these, or leave store.mass out."
        )


def _check_placement(teacher: TeacherConfig) -> None:
    if teacher.max_memory and teacher.device_map is None:
        raise ConfigError(
            "teacher.max_memory divides a teacher among devices, which takes teacher.device_map=auto; set "
            "that, or leave teacher.max_memory out."
        )
    for name, size in teacher.max_memory.items():
        is_device = name == "cpu" or (type(name) is int and name >= 0)
        if not is_device or not re.fullmatch(r"\d{1,9}[KMG]i?B", str(size)):
            raise ConfigError(
                f"teacher.max_memory={{{name}: {size}}}: expected a GPU's number or cpu, and a size such as "
                "70GiB or 500MB."
            )


def _check_tensor_parallel(config: Config, verb: str) -> None:
    teacher = config.teacher
    if teacher.tensor_parallel == 1:
        return
    asked = f"teacher.tensor_parallel={teacher.tensor_parallel}"
    is_forecast = verb == "plan" and config.plan.probe_rows == 0  # of that very command line
    if verb != "capture" and not is_forecast:
        raise ConfigError(
            f"{asked} divides the teacher of `capture` among its ranks; leave it out of `{verb}`, where "
            "teacher.device_map=auto divides a teacher."
        )
    others = {
        "teacher.device_map": teacher.device_map,
        "teacher.quantization": teacher.quantization,
        "teacher.impl": "triton" if teacher.impl == "triton" else None,
        "store.features": config.store.features or None,
    }
    for key, value in others.items():
        if value is not None:
            raise ConfigError(f"{asked} does not go with {key}={value}; leave one of the two out.")


def _check_train(config: Config) -> None:
    # Only now: a shared module must not need a room, except for the verb that is the room's own.
    from sparsekd.trainer.config.checks import check_train, shared_objective
    from sparsekd.trainer.config.mixture import check_alike, requested_stores

    folders = {
        request.name: check_store(request.path, request.key, "as a store that train reads")
        for request in requested_stores(config.store, config.data)
    }
    _check_model_path(config.student.path, "student.path")
    check_train(config)
    try:
        manifests = {name: read_manifest(folder) for name, folder in folders.items()}
    except StoreError as error:
        raise FolderError(str(error)) from error
    check_alike(manifests)
    shared_objective(config.objective, {name: manifest.record for name, manifest in manifests.items()})


def _check_plan(config: Config) -> None:
    if config.data.mixture:
        raise ConfigError(
            f"plan speaks of one store, but data.mixture names {len(config.data.mixture)}: call it for each, "
            "with its store.tokens, and leave data.mixture out."
        )
    if config.plan.probe_rows:
        _check_teacher_pass(config)


def _check_evaluate(config: Config) -> None:
    evaluate = config.evaluate
    check_store(config.store.path, "store.path", "for its held-out rows")
    require(evaluate.models, "evaluate.models", "to know what to compare, such as {kd: runs/kd/export}")
    for name, folder in evaluate.models.items():
        check_folder(folder, f"evaluate.models.{name}", "as a model written by `export`")
    for key in ("student", "baseline"):
        name = getattr(evaluate, key)
        if name is not None and name not in evaluate.models:
            raise ConfigError(
                f"evaluate.{key}={name} is not one of evaluate.models: {', '.join(evaluate.models)}"
                + ("; set evaluate.baseline=null to compare with none." if key == "baseline" else ".")
            )
    if evaluate.teacher == "load":
        path = require(config.teacher.path, "teacher.path", "by evaluate.teacher=load")
        _check_model_path(path, "teacher.path")


def _check_value(leaf: Option) -> None:
    """Range and choice of one value; types were checked by OmegaConf."""
    choices = leaf.choices
    if leaf.default is None:
        return
    if choices is not None:
        for value in leaf.default if isinstance(leaf.default, list) else [leaf.default]:
            _check_one_of(leaf.key, value, choices)
    if leaf.type_name in ("list[str]", "dict[str, str]"):
        entries = leaf.default.values() if isinstance(leaf.default, dict) else leaf.default
        nested = next((entry for entry in entries if not isinstance(entry, str)), None)
        if nested is not None:  # OmegaConf lets lists and mappings of YAML pass
            raise ConfigError(f"{leaf.key} holds {nested}, which is not text{_expected(leaf)}.")
    numbers = leaf.default if isinstance(leaf.default, list) else [leaf.default]
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int | float):
            continue
        below = leaf.minimum is not None and not number >= leaf.minimum
        above = leaf.maximum is not None and not number <= leaf.maximum
        if below or above:
            bounds = (
                f"at least {leaf.minimum:g}"
                if leaf.maximum is None
                else f"{leaf.minimum:g} to {leaf.maximum:g}"
            )
            raise ConfigError(f"{leaf.key}={leaf.default} is out of range; legal is {bounds}.")


def _check_keys(overrides: Sequence[str], config_directory: str | None) -> None:
    """Unknown keys and groups, with the nearest legal one: Hydra's own messages name neither."""
    leaves = {leaf.key: leaf for leaf in options()}
    sections = sorted({key.rpartition(".")[0] for key in leaves})
    known_groups = groups()
    for text in overrides:
        if re.match(r"[+~]*hydra([./@=]|$)", text):
            raise ConfigError(
                f"{text!r} is a setting of Hydra itself, and sparsekd takes none; a run's folder is "
                "run.root/run.name."
            )
        try:
            override = OverridesParser.create().parse_override(as_typed(text))
        except UNREADABLE as error:
            raise ConfigError(_about_form(text, leaves)) from error
        key = override.key_or_group
        if override.is_delete() and key in leaves:
            raise ConfigError(f"{text!r} takes a key away, and every key has a value; set {key}=... instead.")
        if override.is_sweep_override():
            raise ConfigError(_about_sweep(text))
        if key in known_groups and not override.is_delete():
            _check_choice(key, str(override.value()), known_groups[key], config_directory)
            continue
        if key in leaves or _is_free(key) or (config_directory is not None and "." not in key):
            continue
        names = [*leaves, *sections, *known_groups]
        near = difflib.get_close_matches(key, names, n=1, cutoff=0.62)
        if not near:
            tail = key.rpartition(".")[2]
            near = [name for name in leaves if name.rpartition(".")[2] == tail][:1]
        if key in sections:
            inside = ", ".join(name.rpartition(".")[2] for name in leaves if name.startswith(f"{key}."))
            raise ConfigError(f"{text!r} sets a whole section; set one of its keys: {inside}.")
        section = key.rpartition(".")[0]
        inside = ", ".join(name.rpartition(".")[2] for name in leaves if name.rpartition(".")[0] == section)
        raise ConfigError(
            f"{key!r} is not a configuration key (in {text!r})"
            + (f"; did you mean {near[0]!r}?" if near else ".")
            + (f" Keys of {section}: {inside}." if inside else f" Sections: {', '.join(sections)}.")
        )


def _is_free(key: str) -> bool:
    """Whether `key` is, or lies in, a mapping whose keys the user chooses, such as `student.config`."""
    return any(f"{key}.".startswith(f"{leaf.key}.") for leaf in options() if "dict" in leaf.type_name)


def _allow_free_keys(text: str) -> str:
    """Hydra wants `++` before a key that the schema does not know; in a free mapping that is every key."""
    return f"++{text}" if text[:1] not in "+~" and _is_free(text.partition("=")[0]) else text


def _check_choice(group: str, value: str, choices: list[str], config_directory: str | None) -> None:
    if config_directory is not None:
        own = Path(config_directory, group)
        choices = choices + [item.stem for item in own.glob("*.yaml")]
    _check_one_of(group, value, choices)


def _check_one_of(key: str, value: str, choices: Sequence[str]) -> None:
    if value in choices:
        return
    if set(value.split(",")) <= set(choices):
        raise ConfigError(_about_sweep(f"{key}={value}"))
    near = difflib.get_close_matches(value, choices, n=1)
    hint = f"; did you mean {near[0]}?" if near else "."
    raise ConfigError(f"{key}={value} is not one of {', '.join(choices)}{hint}")


def _about_sweep(text: str) -> str:
    return f"{text!r} is a sweep: add --multirun to train once for each value."


def _about_form(text: str, leaves: dict[str, Option]) -> str:
    """The sentence about an override that Hydra's grammar cannot read."""
    key, equals, _ = text.lstrip("+~").partition("=")
    if not equals:
        return f"{text!r} is not an override of the form key=value."
    if key in leaves:
        return f"{text!r} has a value that cannot be read{_expected(leaves[key])}."
    if _is_free(key):
        return (
            f"{text!r} has a value that cannot be read; text that holds more than letters, digits and "
            f"/-+.$%*@?| is written in quotes, such as {key}='\"a=b\"'."
        )
    return f"{text!r} is not an override of the form key=value: {key!r} cannot be a key."


def _search_entry(config_directory: str) -> str:
    folder = Path(config_directory)
    if not folder.is_dir():
        raise ConfigError(f"--config-dir {config_directory} is not an existing folder.")
    return quoted(f"file://{folder.resolve()}")


def _first_sentence(error: Exception) -> str:
    """Hydra's and OmegaConf's messages end with lines for programmers; the first lines say what is wrong."""
    details: dict[str, Any] = {}
    lines = []
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    for line in str(cause).strip().splitlines():
        name, _, value = line.strip().replace("=", ":", 1).partition(":")
        if name in ("full_key", "object_type", "reference_type"):
            details[name] = value.strip()
        elif line.strip():
            lines.append(line.strip())
    key = details.get("full_key", "")
    leaf = next((leaf for leaf in options() if leaf.key == key), None)
    said = re.sub(r": \w+ raised while composing config:", ":", " ".join(lines[:2]).rstrip("."))
    message = said.replace("Union[str, bytes]", "str")  # `exact_schema`'s name for text
    if message != said and "incompatible" in said:
        message += "; text that reads like a number or a switch is written in quotes"
    if leaf is None and "." not in key:  # an element, which OmegaConf calls by its number or name alone
        _, merging, word = str(error).partition("Error merging override ")
        key = word if merging and cause is not error else ""
    if isinstance(cause, GrammarParseError | InterpolationResolutionError):
        message += "; ${ begins the name of another key, and \\${ stands for the characters themselves"
    return f"{key + ': ' if key else ''}{message}{_expected(leaf) if leaf else ''}."


def _expected(leaf: Option) -> str:
    forms = {"list": ", written as [first,second]", "dict": ", written as {name: value, other: value}"}
    form = forms.get(leaf.type_name[:4], "")
    return f" (expected {leaf.type_name}{form}: {leaf.comment.rstrip('.')})"


def _python_stdlib() -> str:
    """The interpreter's standard library: real text on every machine (resolver `${python_stdlib:}`)."""
    return sysconfig.get_paths()["stdlib"]


def _is_yaml(name: str) -> bool:
    return name.endswith(".yaml") and not name.startswith("_")
