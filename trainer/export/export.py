"""`export`: a checkpoint becomes a folder that plain transformers loads, and is proved to be the same model.

The float32 master weights are gathered on the CPU in one process and cast once. The folder appears under its
name only after it was loaded again and gave the same logits.
"""

import contextlib
import dataclasses
import io
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from sparsekd.logit_store.protocol.reader import LogitStore, open_store
from sparsekd.logit_store.row import segment_lengths
from sparsekd.trainer.config.schema import Config, require, run_folder
from sparsekd.trainer.export.model_card import Provenance, model_card
from sparsekd.trainer.models.causal_lm import DTYPES, ModelSource, load_config
from sparsekd.trainer.models.source import student_source
from sparsekd.trainer.run.errors import CheckpointError, ConfigError
from sparsekd.trainer.run.ranks import Ranks, ranks
from sparsekd.trainer.run.tracking import read_metrics
from sparsekd.trainer.state.checkpoint import newest_verified, verify
from sparsekd.trainer.state.record import ENGINE_FOLDER, Commit, read_commit

EXPORT_NAME = "sparsekd_export.json"
"""Says which checkpoint of which run an exported folder holds."""

# The engine's module is `student.Student`, which holds the model under this name.
_PREFIX = "model."
_MODEL_STATES = "mp_rank_00_model_states.pt"
# Relative difference of logits that is still the same model; bit for bit is what is seen.
_TOLERANCE = 1e-6
_PROBE_TOKENS = 64


def run(config: Config) -> None:
    """Exports the newest whole checkpoint of a run, or the one that export.checkpoint names.

    Raises:
        CheckpointError: No checkpoint is whole, its store is another one, or the reloaded model differs.
        ConfigError: The run has no configuration, or the target holds something else than its older export.
    """
    transformers_logging.disable_progress_bar()
    folder = Path(run_folder(config))
    run_config = read_run_config(folder)
    target = Path(config.export.path or folder / "export")
    _check_target(target, config.run.name)
    launch = dataclasses.replace(config.launch, device="cpu")
    with ranks(launch, timeout_minutes=config.engine.timeout_minutes) as here:
        if here.world_size != 1:
            raise ConfigError(
                f"export runs in one process, but was started with {here.world_size}; "
                "call it without torchrun."
            )
        checkpoint = choose_checkpoint(folder, config.export.checkpoint, here)
    commit = read_commit(checkpoint)
    store = _store_of(run_config, commit, folder)
    print(f"exporting {checkpoint} as {config.export.dtype}", flush=True)
    model = model_from_checkpoint(checkpoint, run_config, store, dtype=DTYPES[config.export.dtype])
    working = target.with_name(f".{target.name}.tmp-export")
    shutil.rmtree(working, ignore_errors=True)
    try:
        write_model(model, store, working)
        provenance = _provenance(config, run_config, commit, store, folder)
        (working / "README.md").write_text(model_card(provenance), encoding="utf-8")
        mark = {"run": config.run.name, "step": commit.step, "config_digest": commit.config_digest}
        (working / EXPORT_NAME).write_text(json.dumps(mark, indent=1, sort_keys=True) + "\n")
        difference = reload_difference(model, working, _probe(store))
        if difference > _TOLERANCE:
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
    print(
        f"next: sparsekd evaluate store.path={run_config.store.path} run.root={config.run.root} "
        f"'evaluate.models={{{config.run.name}: {target}}}' evaluate.student={config.run.name} "
        "evaluate.baseline=null",
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
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"{place} is not a configuration of this version of sparsekd: {reason}") from error
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
    checkpoint: Path, run_config: Config, store: LogitStore, *, dtype: torch.dtype
) -> PreTrainedModel:
    """The trained model in memory, its weights cast once from float32.

    Raises:
        CheckpointError: Names or shapes of the weights are not those of the run's student.
    """
    source = student_source(run_config.student, store.manifest.tokenizer)
    weights = consolidated_weights(checkpoint)
    model = AutoModelForCausalLM.from_config(
        load_config(source, "student"),
        dtype=dtype,
        attn_implementation=source.attention,
        trust_remote_code=source.trust_remote_code,
    )
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
    model.generation_config = _generation_config(model, source, store)
    return model.eval()


def write_model(model: PreTrainedModel, store: LogitStore, folder: Path) -> None:
    """Writes weights (safetensors), configuration, generation defaults and the store's tokenizer files."""
    # The tokenizer first: where a tokenizer's folder came with a model's config.json, ours must win.
    shutil.copytree(store.tokenizer_path, folder)
    model.save_pretrained(folder)


def reload_difference(model: PreTrainedModel, folder: Path, token_ids: Tensor) -> float:
    """Relative difference of the logits of a model in memory and of the same one loaded from a folder.

    Raises:
        CheckpointError: The loaded model has another dtype, or lost the tie of embedding and head.
    """
    loaded = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", attn_implementation=model.config._attn_implementation
    ).eval()
    for name, found, wanted in (
        ("dtype", loaded.dtype, model.dtype),
        ("tied weights", _is_tied(loaded), _is_tied(model)),
    ):
        if found != wanted:
            raise CheckpointError(
                f"The exported model comes back with {name} {found}, expected {wanted}; "
                "report the model type."
            )
    with torch.inference_mode():
        ours, theirs = (each(input_ids=token_ids).logits.double() for each in (model, loaded))
    return float((ours - theirs).norm() / ours.norm().clamp_min(1e-30))


def _is_tied(model: PreTrainedModel) -> bool:
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight


def _generation_config(model: PreTrainedModel, source: ModelSource, store: LogitStore) -> GenerationConfig:
    """A pretrained student's own defaults where there are any, and the tokenizer's special tokens."""
    own = None
    if source.path is not None:
        # Most models have such a file; for those that do not, the model's configuration speaks.
        with contextlib.suppress(OSError):
            own = GenerationConfig.from_pretrained(source.path, revision=source.revision or "main")
    found = own or GenerationConfig.from_model_config(model.config)
    tokenizer = AutoTokenizer.from_pretrained(store.tokenizer_path)
    end = store.manifest.tokenizer.eos_token_id
    if found.eos_token_id is None:
        found.eos_token_id = end
    if found.bos_token_id is None:
        found.bos_token_id = tokenizer.bos_token_id
    if found.pad_token_id is None:
        found.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end
    return found


def _store_of(run_config: Config, commit: Commit, folder: Path) -> LogitStore:
    """The run's store, whose tokenizer goes into the export."""
    path = require(run_config.store.path, "store.path", f"in {folder / 'config.yaml'}, for the tokenizer")
    store = open_store(path)
    if store.digest != commit.store_digest:
        raise CheckpointError(
            f"{path} is not the store that {folder} was trained on: its digest is {store.digest[:12]}, the "
            f"checkpoint names {commit.store_digest[:12]}; bring that store back to this place."
        )
    return store


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


def _probe(store: LogitStore) -> Tensor:
    """Token ids of the beginning of a row, int64 [1, L]."""
    split = "heldout" if store.rows("heldout") else "train"
    row = store.read_row(split, 0)
    first = min(int(segment_lengths(row)[0]), _PROBE_TOKENS)
    return torch.from_numpy(row.token_ids[:first].astype("int64"))[None]


def _provenance(
    config: Config, run_config: Config, commit: Commit, store: LogitStore, folder: Path
) -> Provenance:
    manifest, objective = store.manifest, run_config.objective
    return Provenance(
        name=config.run.name,
        base_model=run_config.student.path,
        base_revision=run_config.student.revision,
        teacher=manifest.teacher if objective.kd_weight > 0 else None,
        record=manifest.record if objective.kd_weight > 0 else None,
        store_digest=store.digest,
        tokenizer=manifest.tokenizer.name,
        objective=dataclasses.asdict(objective),
        step=commit.step,
        tokens=commit.tokens,
        heldout=_heldout_metrics(folder, commit.step),
        dtype=config.export.dtype,
        versions=commit.versions,
    )


def _heldout_metrics(folder: Path, step: int) -> dict[str, Any] | None:
    """The last held-out line of a run's metrics up to a step; None where there is none."""
    found = [entry for entry in read_metrics(folder) if entry["kind"] == "heldout" and entry["step"] <= step]
    return found[-1] if found else None
