"""The typed configuration: the one home of every default but a corpus's (`corpus.py`) and a plan's
(`plan.py`), with the comments that `--help` shows.

YAML groups in `conf/` only override what stands here. This module and `compose.py` stay free of torch, so
that `--help`, `plan` and a mistyped key answer at once.
"""

from dataclasses import dataclass, field
from typing import Any

from sparsekd.kernels.objective import DIVERGENCES, TARGET_MODES
from sparsekd.logit_store.codecs.codec import CODECS, DEFAULT_CODEC
from sparsekd.logit_store.manifest_checks import POSITION_RULES
from sparsekd.logit_store.places.access import KINDS as ACCESS_KINDS
from sparsekd.trainer.config.corpus import CorpusConfig
from sparsekd.trainer.config.generate import GenerateConfig
from sparsekd.trainer.config.option import option
from sparsekd.trainer.config.plan import PlanConfig
from sparsekd.trainer.run.errors import ConfigError


@dataclass
class RunConfig:
    name: str = option("student", "Name of the run; its folder is run.root/run.name.")
    root: str = option("runs", "Folder that holds run folders.")


@dataclass
class StoreConfig:
    tokens: str | None = option(None, "Token store: `prepare` writes it, `capture` reads it.")
    path: str | None = option(None, "Logit store: `capture` writes it, `train` and `evaluate` read it.")
    k: int = option(16, "Exact head: how many of the most likely tokens are kept.", minimum=0)
    n: int = option(24, "Sampled tail: draws with replacement from the rest.", minimum=0)
    temperatures: list[float] = option(
        [1.0, 2.0, 4.0], "Grid of temperatures for which the rest's log mass is exact.", minimum=0.05
    )
    draw_temperature: float = option(1.0, "Temperature of the draws; one of the grid.", minimum=0.05)
    tail_logprobs: bool = option(False, "Keep the draws' log-probabilities, too; no loss of ours reads them.")
    positions: str = option(
        "counted",
        "Where `capture` records: counted, where the loss counts; all, everywhere but at padding; sampled, "
        "at store.share of the counted positions of train, which the loss weighs by the inverse. At equal "
        "bytes fewer draws everywhere beat full records at fewer positions.",
        choices=POSITION_RULES,
    )
    share: float = option(
        1.0, "With positions=sampled: the probability that a position is recorded.", minimum=0.0, maximum=1.0
    )
    features: list[Any] = option(
        [],
        "Hidden states that `capture` keeps, one entry a layer: {layer: 12, width: 128, projection: pca, "
        "kind: int8, positions: all}. layer counts from 0, the embeddings; without width they are kept "
        "whole; projection is orthonormal (default) or pca; kind int8 (default) or float16; positions all "
        "(default) or recorded.",
    )
    seed: int = option(
        0, "Seed of draws and sampled positions (with each row's token ids and the position).", minimum=0
    )
    codec: str = option(
        DEFAULT_CODEC,
        "How `prepare` and `capture` encode rows (docs/format.md); a reader takes it from the manifest.",
        choices=tuple(CODECS),
    )
    mass: float | None = option(
        None, "With codec=compact and n=0: heads end where their probabilities reach this, say 0.99."
    )
    access: str = option(
        "positional",
        "How `train` reads local shards; mapped spares a copy, but a file cut short kills the reader.",
        choices=ACCESS_KINDS,
    )
    vocabulary_size: int | None = option(
        None,
        "`capture`: take the teacher's distribution over so many ids only, for students with a smaller head "
        "(262144 for Gemma 3 1B); the text must have no other. null: all that tokenizer and teacher have.",
        minimum=2,
    )
    rows_per_shard: int = option(
        256, "Rows in one shard of `prepare`; `capture` makes shards of the same rows.", minimum=1
    )


@dataclass
class TeacherConfig:
    path: str | None = option(None, "Teacher: a folder or hub name that from_pretrained loads.")
    revision: str | None = option(None, "Revision of a hub model.")
    dtype: str = option("bfloat16", "Dtype of the teacher's weights.", choices=("bfloat16", "float32"))
    attention: str = option(
        "auto", "attn_implementation of transformers; auto is what it picks for the model, and is announced."
    )
    trust_remote_code: bool = option(False, "Run code that comes with the model.")
    gguf_file: str | None = option(
        None, "File of teacher.path in GGUF, llama.cpp's format; null: that of a folder with no other model."
    )
    quantization: str | None = option(
        None,
        "Load the weights of the layers in 8 bits (int8) or 4 (nf4), by bitsandbytes; null as they are "
        "saved. A part of the records' identity.",
        choices=("int8", "nf4"),
    )
    device_map: str | None = option(
        None,
        "Divide the layers among all GPUs of the machine, its memory and its disk, by accelerate: for a "
        "teacher beyond one device, in one process a machine. null: whole on one device.",
        choices=("auto", "balanced", "balanced_low_0", "sequential"),
    )
    tensor_parallel: int = option(
        1,
        "Ranks of `capture` that hold one teacher together, each a part of every layer and of the head, by "
        "transformers' tensor-parallel plan: all ranks of the job. A part of the records' identity.",
        minimum=1,
    )
    max_memory: dict[Any, Any] = option(
        {},
        "With teacher.device_map: what each GPU, by its number, and cpu may hold of the weights, such as "
        "{0: 70GiB, cpu: 200GiB}; what is beyond goes to the disk.",
    )
    micro_batch_rows: int = option(8, "Rows in one forward pass; a part of the records' identity.", minimum=1)
    sort_rows: int = option(
        64,
        "Of so many neighbouring rows those of a length pass the teacher together, since padding behind the "
        "longest row of a micro-batch passes nothing; 0 keeps their order. Rows that are packed full are of "
        "one length. A part of the records' identity.",
        minimum=0,
    )
    unit_rows: int = option(
        64,
        "Rows that a worker of `capture` takes at a time, rounded up to a multiple of sort_rows; what a "
        "death costs, and what memory holds three times. The store is the same with any number.",
        minimum=1,
    )
    impl: str = option(
        "auto",
        "Implementation of the head's statistics; auto is triton on a GPU and torch elsewhere, and is "
        "announced; a part of the records' identity.",
        choices=("auto", "torch", "triton"),
    )
    chunk_positions: int | None = option(
        None,
        "Positions whose logits exist at one time; null takes as many as fit into about 1 GB; a part of the "
        "records' identity.",
        minimum=1,
    )


@dataclass
class StudentConfig:
    path: str | None = option(None, "Start from this model (folder or hub name) instead of student.config.")
    revision: str | None = option(None, "Revision of a hub model.")
    config: dict[str, Any] = option(
        {},
        "Fields of a transformers configuration, model_type among them, for a student with random weights.",
    )
    attention: str = option(
        "auto", "attn_implementation of transformers; auto is what it picks for the model, and is announced."
    )
    trust_remote_code: bool = option(False, "Run code that comes with the model.")
    activation_checkpointing: bool = option(
        False, "Recompute activations in the backward pass to save memory."
    )
    router_loss: float | None = option(
        None,
        "Weight of the load-balancing loss of a mixture of experts, 0 for none; null is as the model's "
        "configuration says (router_aux_loss_coef where output_router_logits is true).",
        minimum=0.0,
    )


@dataclass
class ObjectiveConfig:
    kd_weight: float = option(1.0, "Weight of the distillation loss; 0 is the CE-only baseline.", minimum=0.0)
    ce_weight: float = option(0.0, "Weight of the cross-entropy with the true tokens.", minimum=0.0)
    divergence: str = option("forward_kl", "Divergence between teacher and student.", choices=DIVERGENCES)
    # What DistiLLM uses for its skewed divergences (arXiv 2402.03898), and the one of GKD's values for
    # Jensen-Shannon, 0.1, 0.5 and 0.9, that is nearest to forward KL (arXiv 2306.13649); docs/losses.md, 4.
    mixture: float = option(
        0.1,
        "Share of the teacher in jensen_shannon's mixture (beta; 0.5 is the symmetric one), or of the "
        "distribution itself in that of the skewed divergences (alpha); the others do not read it.",
        minimum=0.0,
        maximum=1.0,
    )
    target_mode: str = option(
        "auto",
        "What the record's rest becomes; auto is sampled for n>0 and tail_bucket for n=0.",
        choices=("auto", *TARGET_MODES),
    )
    temperature: float = option(
        1.0,
        "Temperature of the distillation loss, on the store's grid or between 1 and its highest.",
        minimum=0.05,
    )
    label_smoothing: float = option(
        0.0, "Share of the cross-entropy spread over the vocabulary.", minimum=0.0, maximum=0.999
    )
    z_loss: float = option(0.0, "Weight of the squared log-normaliser in the cross-entropy.", minimum=0.0)
    impl: str = option(
        "auto",
        "Implementation of the loss; auto is triton on a GPU and torch elsewhere, and is announced.",
        choices=("auto", "reference", "torch", "triton"),
    )
    chunk_positions: int | None = option(
        None, "Positions whose logits exist at one time; the default follows the sizes.", minimum=1
    )
    memory_gib: float | None = option(
        None,
        "Most memory of the loss in GiB, its gradients included, instead of chunk_positions; where little, "
        "logits are made twice, in slices of the vocabulary. `plan` shows what the default takes.",
        minimum=0.0,
    )


@dataclass
class OptimizerConfig:
    learning_rate: float = option(3e-4, "Peak learning rate of AdamW.", minimum=0.0)
    betas: list[float] = option([0.9, 0.95], "AdamW's two decay rates.", minimum=0.0, maximum=1.0)
    epsilon: float = option(1e-8, "AdamW's epsilon.", minimum=0.0)
    weight_decay: float = option(0.1, "Weight decay of matrices; vectors get none.", minimum=0.0)
    gradient_clipping: float = option(
        1.0, "Largest global gradient norm; 0 switches clipping off.", minimum=0.0
    )


@dataclass
class ScheduleConfig:
    kind: str = option("cosine", "Course of the learning rate.", choices=("cosine", "wsd", "constant"))
    warmup_steps: int = option(100, "Steps of linear warm-up.", minimum=0)
    decay_fraction: float = option(
        0.2, "wsd: share of the steps, at the end, in which the rate decays.", minimum=0.0, maximum=1.0
    )
    final_ratio: float = option(
        0.1, "Learning rate at the end as a share of the peak.", minimum=0.0, maximum=1.0
    )


@dataclass
class EngineConfig:
    zero_stage: int = option(3, "DeepSpeed ZeRO stage; 0 needs dtype=float32.", minimum=0, maximum=3)
    dtype: str = option(
        "bfloat16",
        "Dtype of forward and backward; master weights and accumulated gradients are float32.",
        choices=("bfloat16", "float32"),
    )
    persistence_threshold: int = option(
        100_000, "ZeRO-3: parameters below this size stay on every rank.", minimum=0
    )
    max_live_parameters: int = option(
        1_000_000_000, "ZeRO-3: parameters gathered at one time, at most.", minimum=0
    )
    max_reuse_distance: int = option(
        1_000_000_000, "ZeRO-3: keep a parameter that is used again within so many parameters.", minimum=0
    )
    prefetch_bucket_size: int = option(50_000_000, "ZeRO-3: elements gathered ahead.", minimum=0)
    reduce_bucket_size: int = option(50_000_000, "Elements reduced at a time.", minimum=1)
    offload: str = option("none", "Where optimizer states live besides the device.", choices=("none", "cpu"))
    timeout_minutes: float = option(30.0, "Collectives that take longer fail.", minimum=0.1)
    deepspeed: dict[str, Any] = option(
        {}, "Further keys for DeepSpeed's configuration; keys that sparsekd sets itself are refused."
    )


@dataclass
class TrainConfig:
    steps: int = option(1000, "Optimizer steps.", minimum=1)
    global_batch_rows: int = option(32, "Rows in one optimizer step, over all ranks.", minimum=1)
    micro_batch_rows: int = option(4, "Rows in one forward pass of one rank.", minimum=1)
    seed: int = option(0, "Seed of the student's weights and of the data order.", minimum=0)
    log_every: int = option(10, "Steps between lines of metrics.", minimum=1)
    evaluate_every: int = option(
        200, "Steps between losses on held-out rows; 0 for only at the end.", minimum=0
    )
    evaluate_rows: int = option(64, "Held-out rows in each such loss, at most; 0 for none.", minimum=0)
    checkpoint_every: int = option(
        200, "Steps between checkpoints; one is always written at the end.", minimum=1
    )
    keep_checkpoints: int = option(2, "Newest checkpoints that are kept.", minimum=1)
    keep_every: int = option(
        0, "Checkpoints at multiples of so many steps are kept as well; 0 for none.", minimum=0
    )
    keep_best: int = option(
        0, "So many checkpoints with the least held-out loss are kept as well.", minimum=0
    )
    save_behind: bool = option(
        True,
        "Write checkpoints while the next steps run; false holds the steps until they are written. Both from "
        "a copy in host memory as large as what each rank writes (`plan` shows it).",
    )
    resume: str = option(
        "auto", "auto goes on from the newest checkpoint, never begins anew, or a checkpoint folder."
    )
    allow: list[str] = option(
        [],
        "What may differ from the checkpoint that a run goes on from: schedule, the learning rates of the "
        "steps taken; objective; store, other rows of the same teacher and records. Kept in starts.jsonl.",
        choices=("schedule", "objective", "store"),
    )
    skip_damaged_rows: int = option(
        0,
        "Damaged rows of the store that a run may leave out, each logged and kept in the checkpoint; 0 stops "
        "at the first.",
        minimum=0,
    )
    nonfinite: str = option(
        "stop",
        "A step whose loss or gradient is no finite number: stop ends the run, skip leaves the step out, so "
        "that it changes neither weights nor optimizer.",
        choices=("stop", "skip"),
    )
    nonfinite_most: int = option(
        10, "skip: steps that each start of a run may leave out; one more ends it.", minimum=1
    )
    spike_factor: float = option(
        5.0,
        "A step whose loss or gradient norm is so many times the median of the steps before is logged with "
        "its rows; 0 looks for none.",
        minimum=0.0,
    )
    prefetch_steps: int = option(2, "Optimizer steps whose rows are read ahead.", minimum=1)


@dataclass
class DataConfig:
    shuffle: str = option(
        "global",
        "Order of the training rows: global, any row after any other, for stores that fit a local disk; "
        "chunked, 16 neighbouring rows by one read, for stores elsewhere. Neither depends on the number of "
        "ranks.",
        choices=("global", "chunked"),
    )
    streams: int = option(
        64,
        "chunked: streams that a batch is taken from. A rank reads its share of them, without reading twice "
        "where the number of ranks divides them (of a mixture, nearly so); at most one for each row of a "
        "batch is made.",
        minimum=1,
    )
    window: int = option(
        4,
        "chunked: chunks in which a stream's rows are permuted. All ranks together hold the stored bytes of "
        "data.streams windows in memory.",
        minimum=1,
    )
    mixture: dict[str, Any] = option(
        {},
        "Several stores instead of store.path, by names of your choice: {web: {path: runs/web/store, weight: "
        "0.7}, code: {path: runs/code/store, weight: 0.3}}. Rows are taken in proportion to the weights; "
        "without any, as many as each store has. Records may differ; target, sequence length, tokenizer and "
        "draw temperature may not.",
    )
    readers: int = option(
        1,
        "Threads of a rank that read and decode rows; the batches and their order stay the same. More help "
        "where one waits for a network.",
        minimum=1,
        maximum=256,
    )


@dataclass
class TrackingConfig:
    wandb: str = option(
        "auto",
        "Mirror metrics.jsonl to Weights & Biases; auto is online with a key and offline without.",
        choices=("auto", "online", "offline", "disabled"),
    )
    project: str = option("sparsekd", "W&B project.")
    entity: str | None = option(None, "W&B team or user.")
    group: str | None = option(None, "W&B group.")
    tags: list[str] = option([], "W&B tags.")


@dataclass
class SlurmConfig:
    nodes: int = option(1, "Nodes of the job; with launch.slurm.array of each of its tasks.", minimum=1)
    tasks_per_node: int = option(1, "Ranks on each node, one for each GPU.", minimum=1)
    gpus_per_node: int | None = option(None, "GPUs of each node; null asks for none.", minimum=1)
    cpus_per_task: int | None = option(None, "CPUs of each rank; null is Slurm's own.", minimum=1)
    time: str | None = option(None, "Time limit, such as 24:00:00; null is the partition's.")
    partition: str | None = option(None, "Partition; null is Slurm's own.")
    account: str | None = option(None, "Account; null is Slurm's own.")
    signal_seconds: int = option(
        180, "So long before the time limit the ranks are told to save and leave.", minimum=1, maximum=65535
    )
    array: int = option(
        1, "capture: so many jobs, each with nodes of its own, share one store.", minimum=1, maximum=10_000
    )
    extra: list[str] = option([], "Further options for sbatch, such as [--constraint=a100,--exclusive].")


@dataclass
class LaunchConfig:
    scheduler: str = option(
        "none",
        "slurm: train and capture write a batch script and submit it (--dry-run shows it); none runs here.",
        choices=("none", "slurm"),
    )
    threads_per_rank: int = option(
        1, "CPU threads of each rank; records and losses are bit-equal only for an equal number.", minimum=1
    )
    device: str = option(
        "auto", "auto is cuda where there is one, else cpu.", choices=("auto", "cpu", "cuda")
    )
    start_minutes: float = option(5.0, "Ranks that have not met by then end with a sentence.", minimum=0.01)
    sweep_ranks: int = option(
        1, "Ranks that `train --multirun` starts on this machine for each run, by torchrun.", minimum=1
    )
    slurm: SlurmConfig = field(default_factory=SlurmConfig)


@dataclass
class ExportConfig:
    checkpoint: str = option("latest", "Checkpoint folder, or latest for the run's newest.")
    path: str | None = option(None, "Where the model goes; by default run.root/run.name/export.")
    dtype: str = option("bfloat16", "Dtype of the exported weights.", choices=("bfloat16", "float32"))


@dataclass
class EvaluateConfig:
    models: dict[str, str] = option(
        {}, "Name and folder of each model to compare, such as {kd: ..., ce: ...}."
    )
    student: str = option("kd", "Which of the models is the distilled student.")
    baseline: str | None = option("ce", "Which of the models the student is compared with; null for none.")
    teacher: str = option(
        "store",
        "store uses the held-out records; load runs the teacher too, which makes every figure exact.",
        choices=("store", "load"),
    )
    rows: int | None = option(None, "Held-out rows, at most; null for all.", minimum=1)
    micro_batch_rows: int = option(8, "Rows in one forward pass.", minimum=1)
    dtype: str = option("float32", "Dtype in which the models run.", choices=("bfloat16", "float32"))
    bootstrap_samples: int = option(10_000, "Resamples of the paired bootstrap over documents.", minimum=100)
    seed: int = option(0, "Seed of the bootstrap.", minimum=0)
    path: str | None = option(None, "Folder of the result; by default run.root/evaluation.")


@dataclass
class ReportConfig:
    evaluation: str | None = option(None, "Result folder of `evaluate`; by default as evaluate.path says.")
    runs: dict[str, str] = option({}, "Name and run folder of each run whose curves are drawn.")
    path: str | None = option(None, "The page; by default run.root/report.html.")
    title: str = option("Distillation report", "Heading of the page.")
    continuations: int = option(3, "Held-out prompts that every model continues.", minimum=0)
    continuation_tokens: int = option(48, "Tokens in each continuation.", minimum=1)


@dataclass
class DebugConfig:
    check_values: bool = option(False, "Check teacher values on the device in every step (slow).")
    detect_anomaly: bool = option(False, "torch.autograd.set_detect_anomaly.")


@dataclass
class Config:
    """Everything that a verb can be told; each verb reads the groups that concern it."""

    run: RunConfig = field(default_factory=RunConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    debug: DebugConfig = field(default_factory=DebugConfig)


def run_folder(config: Config) -> str:
    """The folder of the run, relative to where the command was started unless run.root is absolute."""
    return f"{config.run.root}/{config.run.name}"


def require(value: Any, key: str, purpose: str) -> Any:
    """Returns `value`, or raises ConfigError when the configuration lacks it.

    Raises:
        ConfigError: naming the key and what it is needed for.
    """
    if value is None or value == "" or value == [] or value == {}:
        raise ConfigError(f"{key} is not set, but is needed {purpose}; add {key}=... to the command.")
    return value
