"""Where models come from, as the configuration says it."""

from sparsekd.logit_store.manifest import TokenizerIdentity
from sparsekd.trainer.config.schema import StudentConfig, TeacherConfig
from sparsekd.trainer.models.causal_lm import ModelSource
from sparsekd.trainer.models.gguf_file import gguf_file_of
from sparsekd.trainer.models.placement import Placement


def teacher_source(config: TeacherConfig, path: str) -> ModelSource:
    """Where the teacher comes from.

    Raises:
        ModelError: It is a GGUF file, and which one is not known.
    """
    return ModelSource(
        path=path,
        revision=config.revision,
        attention=config.attention,
        trust_remote_code=config.trust_remote_code,
        setting="teacher.path",
        placement=Placement(
            config.quantization, config.device_map, config.max_memory, config.tensor_parallel
        ),
        gguf_file=gguf_file_of(path, config.gguf_file, setting="teacher.path"),
    )


def student_source(config: StudentConfig, tokenizer: TokenizerIdentity) -> ModelSource:
    """Where the student comes from; a configuration without a vocabulary gets the store's."""
    fields = dict(config.config)
    if fields:
        fields.setdefault("vocab_size", tokenizer.vocabulary_size)
        # The defaults of a model type speak of its own tokenizer, not of the store's.
        fields.setdefault("bos_token_id", None)
        fields.setdefault("eos_token_id", tokenizer.eos_token_id)
        fields.setdefault("pad_token_id", None)
    return ModelSource(
        path=config.path,
        revision=config.revision,
        attention=config.attention,
        trust_remote_code=config.trust_remote_code,
        setting="student.path",
        config=fields,
    )


def judged_source(config: StudentConfig, name: str, path: str) -> ModelSource:
    """Where a model that is judged beside others comes from: loaded as the student is."""
    setting = f"evaluate.models.{name}"
    return ModelSource(path, None, config.attention, config.trust_remote_code, setting)
