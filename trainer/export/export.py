"""`export`: a checkpoint becomes a folder that plain transformers loads, and is proved to be the same model.

The float32 master weights are gathered on the CPU in one process and cast once. The folder appears under its
name only after it was loaded again and gave the same logits.
"""

import contextlib
import dataclasses
import io
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from sparsekd.logit_store.errors import first_line
from sparsekd.logit_store.protocol.reader import LogitStore, open_store
from sparsekd.logit_store.typed_json import one_line
from sparsekd.trainer.config.checks import objective_that_ran, shared_objective
from sparsekd.trainer.config.mixture import requested_stores
from sparsekd.trainer.config.places import export_folder
from sparsekd.trainer.config.schema import Config, StudentConfig, run_folder
from sparsekd.trainer.data.sources import joined_digest
from sparsekd.trainer.export.model_card import Provenance, model_card
from sparsekd.trainer.models.causal_lm import (
    DTYPES,
    decoder_and_head,
    for_cpu,
    head_transform,
    load_config,
    model_of,
)
from sparsekd.trainer.models.opened import prove
from sparsekd.trainer.models.probe import holds_several
from sparsekd.trainer.models.saved import TOLERANCE, reload_difference, write_model
from sparsekd.trainer.models.source import student_source
from sparsekd.trainer.run.errors import CheckpointError, ConfigError
from sparsekd.trainer.run.ranks import Ranks, one_process
from sparsekd.trainer.run.tracking import read_metrics
from sparsekd.trainer.state.checkpoint import newest_verified, verify
from sparsekd.trainer.state.record import ENGINE_FOLDER, Commit, read_commit

EXPORT_NAME = "sparsekd_export.json"
"""Says which checkpoint of which run an exported folder holds."""

# The engine's module is `student.Student`, which holds the model under this name.
_PREFIX = "model."
_MODEL_STATES = "mp_rank_00_model_states.pt"


def run(config: Config) -> None:
    """Exports the newest whole checkpoint of a run, or the one that export.checkpoint names.

    Raises:
        CheckpointError: No checkpoint is whole, its store is another one, or the reloaded model differs.
        ModelError: transformers does not take the model or its tokenizer from a folder as they are, or its
            documents see what they must not.
        ConfigError: The run has no configuration, or the target holds something else than its older export.
    """
    transformers_logging.disable_progress_bar()
    folder = Path(run_folder(config))
    run_config = read_run_config(folder)
    target = export_folder(config)
    _check_target(target, config.run.name)
    launch = dataclasses.replace(config.launch, device="cpu")
    with one_process(launch, timeout_minutes=config.engine.timeout_minutes, what="export") as here:
        checkpoint = choose_checkpoint(folder, config.export.checkpoint, here)
    commit = read_commit(checkpoint)
    stores = _stores_of(run_config, commit, folder)
    store = next(iter(stores.values()))
    print(f"exporting {checkpoint} as {config.export.dtype}", flush=True)
    model = model_from_checkpoint(checkpoint, run_config.student, store, dtype=DTYPES[config.export.dtype])
    head = decoder_and_head(model)[1]
    size = min(store.manifest.tokenizer.vocabulary_size, head.weight.shape[0])
    prove(
        model,
        head_transform(model.config, size),
        store,
        key="student",
        packed=any(holds_several(each) for each in stores.values()),
    )
    working = target.with_name(f".{target.name}.tmp-export")
    shutil.rmtree(working, ignore_errors=True)
    try:
        source = student_source(run_config.student, store.manifest.tokenizer)
        for remark in write_model(model, source, store, working):
            print(remark, flush=True)
        has_code = any(working.glob("*.py"))
        provenance = _provenance(config, run_config, commit, stores, folder, has_code=has_code)
        (working / "README.md").write_text(model_card(provenance), encoding="utf-8")
        mark = {"run": config.run.name, "step": commit.step, "config_digest": commit.config_digest}
        (working / EXPORT_NAME).write_text(json.dumps(mark, indent=1, sort_keys=True) + "\n")
        difference = reload_difference(model, source, store, working)
        if not difference <= TOLERANCE:
            raise CheckpointError(
                f"The model exported from {checkpoint} gives logits that differ by {difference:.1e} "
                "(relative) after loading it again, expected the same; nothing was written, report the model "
                "type."
            )
        _publish(working, target)
    finally:
        shutil.rmtree(working, ignore_errors=True)
    equal = "bit for bit" if difference == 0 else f"up to a relative {difference:.1e}"
    print(f"written: {target} ({model.num_parameters():,} parameters)")
    print(f"loaded again with transformers: the logits are equal {equal}")
    for name, each in stores.items():  # of a mixture each has its own evaluation
        folder_of = f" evaluate.path={config.run.root}/evaluation-{name}" if name else ""
        print(
            f"next: sparsekd evaluate store.path={each.path} run.root={config.run.root} "
            f"'evaluate.models={{{config.run.name}: {target}}}' evaluate.student={config.run.name} "
            "evaluate.baseline=null" + folder_of + (" student.trust_remote_code=true" if has_code else ""),
            flush=True,
        )


def read_run_config(folder: Path) -> Config:
    """The configuration with which a run was started.

    Raises:
        ConfigError: The folder is no run folder, or its configuration is of another version of sparsekd.
    """
    place = folder / "config.yaml"
    if not place.is_file():
        raise ConfigError(
            f"{folder} is not a run folder: it has no config.yaml; name the run with run.root=... and "
            "run.name=..."
        )
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(place)))
    except OmegaConfBaseException as error:
        raise ConfigError(
            f"{place} is not a configuration of this version of sparsekd: {first_line(error)}."
        ) from error
    assert isinstance(config, Config)
    return config


def choose_checkpoint(folder: Path, wanted: str, here: Ranks) -> Path:
    """The newest checkpoint that is whole, or the named one.

    Raises:
        CheckpointError: There is none, or the named one is damaged.
    """
    checkpoints = folder / "checkpoints"
    if wanted != "latest":
        named = Path(wanted) if Path(wanted).is_dir() else checkpoints / wanted
        read_commit(named)
        problem = verify(named, here)
        if problem is not None:
            raise CheckpointError(f"{problem}; use another checkpoint, or export.checkpoint=latest.")
        return named
    newest, problems = newest_verified(checkpoints, here)
    for problem in problems:
        print(f"left out, damaged: {problem}", flush=True)
    if newest is None:
        raise CheckpointError(f"{checkpoints} holds no whole checkpoint; train the run first.")
    return newest


def consolidated_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The float32 weights of a checkpoint by the model's own names, on the CPU.

    Raises:
        CheckpointError: DeepSpeed cannot put the parts together.
    """
    engine = checkpoint / ENGINE_FOLDER
    parts = sorted(engine.glob("*_optim_states.pt"), key=_rank_of)
    try:
        if not parts:
            # Stage 0: the weights are whole, and float32 already.
            named = _load(engine / _MODEL_STATES)["module"]
        elif "zero_stage" not in _load(parts[0])["optimizer_state_dict"]:
            named = _stage_1_bfloat16_weights(engine, parts)
        else:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                named = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), tag=ENGINE_FOLDER)
    except (ValueError, FileNotFoundError) as error:
        raise CheckpointError(f"{engine} cannot be put together: {error}") from error
    return {name.removeprefix(_PREFIX): value for name, value in named.items()}


def _stage_1_bfloat16_weights(engine: Path, parts: list[Path]) -> dict[str, Tensor]:
    """Float32 weights of stage 1 in bfloat16, where DeepSpeed's own tool finds "not a zero checkpoint".

    Its BF16_Optimizer lays the parameters of a group end to end, in the order of `param_shapes`, pads the
    end, and gives each rank an equal share.
    """
    flat_by_rank = [_load(part)["optimizer_state_dict"]["single_partition_of_fp32_groups"] for part in parts]
    states = _load(engine / _MODEL_STATES)
    named: dict[str, Tensor] = {}
    for group, shapes in enumerate(states["param_shapes"]):
        flat = torch.cat([groups[group] for groups in flat_by_rank])
        start = 0
        for name, shape in shapes.items():
            named[name] = flat[start : start + shape.numel()].view(shape)
            start += shape.numel()
    for name, owner in states["shared_params"].items():
        named[name] = named[owner]
    return named


def _load(path: Path) -> dict[str, Any]:
    """A file of our own checkpoint, verified against its recorded checksum; it holds more than tensors."""
    return torch.load(path, map_location="cpu", weights_only=False)


def _rank_of(path: Path) -> int:
    """The rank in a name such as bf16_zero_pp_rank_3_mp_rank_00_optim_states.pt."""
    return int(path.name.partition("pp_rank_")[2].partition("_")[0])


def model_from_checkpoint(
    checkpoint: Path, student: StudentConfig, store: LogitStore, *, dtype: torch.dtype
) -> PreTrainedModel:
    """The trained model in memory, its weights cast once from float32.

    Raises:
        CheckpointError: Names or shapes of the weights are not those of the run's student.
    """
    source = for_cpu(student_source(student, store.manifest.tokenizer))
    weights = consolidated_weights(checkpoint)
    model = model_of(load_config(source, "student"), source, dtype=dtype)
    # With tied weights one name of a pair is enough.
    wanted = model.state_dict(keep_vars=True)
    filled = {id(value) for name, value in wanted.items() if name in weights}
    missing = [name for name, value in wanted.items() if id(value) not in filled]
    strange = sorted(weights.keys() - wanted.keys())
    if missing or strange:
        raise CheckpointError(
            f"{checkpoint} lacks {len(missing)} weights of the student ({', '.join(missing[:3]) or 'none'}) "
            f"and has {len(strange)} that it does not know ({', '.join(strange[:3]) or 'none'}); was the "
            "run's config.yaml or the installed transformers changed?"
        )
    with torch.no_grad():
        for name, value in weights.items():
            if value.shape != wanted[name].shape:
                raise CheckpointError(
                    f"{checkpoint} has {name} of shape {tuple(value.shape)}, the student's is "
                    f"{tuple(wanted[name].shape)}; was the run's config.yaml changed?"
                )
            wanted[name].copy_(value)
    model.config.dtype = dtype
    model.config.use_cache = True
    return model.eval()


def _stores_of(run_config: Config, commit: Commit, folder: Path) -> dict[str, LogitStore]:
    """The run's stores by their sources' names; the tokenizer of the first, which all share, goes into the
    export."""
    requests = requested_stores(run_config.store, run_config.data)
    stores = {request.name: open_store(request.path) for request in requests}
    digest = joined_digest({name: store.digest for name, store in stores.items()})
    if digest != commit.store_digest:
        paths = ", ".join(request.path for request in requests)
        raise CheckpointError(
            f"{paths}: not what {folder} was trained on, as the digest is {digest[:12]} and the checkpoint "
            f"names {commit.store_digest[:12]}; bring what it was trained on back to this place."
        )
    return stores


def _check_target(target: Path, run_name: str) -> None:
    """Only an older export of the same run may be replaced."""
    if target.is_dir() and not any(target.iterdir()):
        return
    if not target.exists():
        return
    mark = target / EXPORT_NAME
    if not mark.is_file():
        raise ConfigError(
            f"{target} exists and is no export of sparsekd; give another folder with export.path=..."
        )
    found = json.loads(mark.read_text())
    if found["run"] != run_name:
        raise ConfigError(
            f"{target} holds an export of run {found['run']!r} (step {found['step']}), not of {run_name!r}; "
            "remove it, or give another folder with export.path=..."
        )


def _publish(working: Path, target: Path) -> None:
    """Renames the finished folder to its name; an older export steps aside and is removed afterwards."""
    old = target.with_name(f".{target.name}.tmp-replaced")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    working.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _provenance(
    config: Config,
    run_config: Config,
    commit: Commit,
    stores: Mapping[str, LogitStore],
    folder: Path,
    *,
    has_code: bool,
) -> Provenance:
    manifests = {name: store.manifest for name, store in stores.items()}
    objective = shared_objective(
        run_config.objective, {name: manifest.record for name, manifest in manifests.items()}
    )
    return Provenance(
        name=config.run.name,
        base_model=run_config.student.path,
        base_revision=run_config.student.revision,
        teachers={
            name: (manifest.teacher, manifest.record)
            for name, manifest in manifests.items()
            if manifest.teacher is not None and objective.kd_weight > 0
        },
        stores={name: store.digest for name, store in stores.items()},
        tokenizer=next(iter(manifests.values())).tokenizer.name,
        objective=objective_that_ran(objective) | _implementation(commit),
        step=commit.step,
        tokens=commit.tokens,
        heldout=_heldout_metrics(folder, commit.step),
        dtype=config.export.dtype,
        has_code=has_code,
        versions=commit.versions,
    )


def _implementation(commit: Commit) -> dict[str, str]:
    """The implementation of the loss that a checkpoint remembers; text of any content is cut to a line."""
    remembered = commit.settings["bits"].get("objective")
    impl = remembered.get("impl") if isinstance(remembered, dict) else None
    return {} if impl is None else {"impl": one_line(str(impl))}


def _heldout_metrics(folder: Path, step: int) -> dict[str, Any] | None:
    """The last held-out line of a run's metrics up to a step; None where there is none."""
    found = [entry for entry in read_metrics(folder) if entry["kind"] == "heldout" and entry["step"] <= step]
    return found[-1] if found else None
