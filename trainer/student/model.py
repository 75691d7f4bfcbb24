"""The student to train: loaded or made from a configuration, and checked against its store."""

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.integrations import is_deepspeed_zero3_enabled

from sparsekd.logit_store.protocol.reader import LogitStore
from sparsekd.trainer.config.schema import StudentConfig
from sparsekd.trainer.data.used_ids import UsedIds
from sparsekd.trainer.models.causal_lm import ModelSource, load_causal_lm
from sparsekd.trainer.models.opened import check_fit
from sparsekd.trainer.models.tokenizers import check_tokenizer
from sparsekd.trainer.run.errors import ModelError


def check_student(
    config: PretrainedConfig, source: ModelSource, store: LogitStore, *, reads_records: bool
) -> int:
    """Checks that the student can predict every id of the store, means the same by it, and takes its rows.

    Args:
        config: The student's configuration.
        source: Where it comes from.
        store: What it learns from.
        reads_records: Whether it learns from the teacher's records, which speak of the whole vocabulary.

    Returns:
        Over how many ids its distribution is.

    Raises:
        ModelError: The vocabulary is too small, the rows are too long, or the student's own tokenizer differs
            from the store's.
    """
    made = source.path is None
    used = UsedIds(store)
    size = check_fit(
        config,
        entries=config.get_text_config().vocab_size,
        used=used,
        compared=reads_records,
        name="student.config" if made else source.named,
        remedy="choose a student that has all of these ids"
        + (", or leave student.config.vocab_size out" if made else ""),
    )
    if not made:
        check_tokenizer(
            source,
            store=store,
            used=used,
            remedy="choose a student of the same tokenizer, or prepare and capture a store with this one",
        )
    return size


def load_student(
    config: StudentConfig, source: ModelSource, *, dtype: torch.dtype, seed: int
) -> PreTrainedModel:
    """The student's model, seeded, with activation checkpointing if wanted.

    With a live `HfDeepSpeedConfig` of stage 3 the weights are partitioned as they are made or read. Random
    weights depend on the seed alone, not on the number of ranks or the stage.

    Raises:
        ModelError: It cannot be loaded, or its head is not tied as its configuration says.
    """
    if source.path is not None or is_deepspeed_zero3_enabled():
        torch.manual_seed(seed)
        model = load_causal_lm(source, "student", dtype=dtype)
    else:
        # As transformers does it under ZeRO-3: the constructors' own random weights are skipped, or the seed
        # would give another student than there.
        with no_init_weights():
            model = load_causal_lm(source, "student", dtype=dtype)
        torch.manual_seed(seed)
        model.initialize_weights()
        model.tie_weights()
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    if model.config.get_text_config().tie_word_embeddings and not tied:
        raise ModelError(
            "The student's configuration says tie_word_embeddings, but its embedding and head are two "
            "parameters; report the model type."
        )
    model.config.use_cache = False
    if config.activation_checkpointing:
        # Reentrant: the other kind compares shapes of saved tensors, which ZeRO-3 changes in between.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    return model
