"""What `plan` is told of sizes, speeds and prices."""

from dataclasses import dataclass

from sparsekd.trainer.config.option import option


@dataclass
class PlanConfig:
    tokens: float | None = option(None, "Tokens of the corpus, where no token store is given.", minimum=1)
    vocabulary_size: int | None = option(None, "Vocabulary, where no token store is given.", minimum=2)
    hidden_size: int | None = option(
        None, "Width of the student's head, where student.config has none.", minimum=1
    )
    teacher_hidden_size: int | None = option(
        None,
        "Width of the teacher's hidden states, where store.features keeps them whole and teacher.path is no "
        "folder.",
        minimum=1,
    )
    probe_rows: int = option(
        0,
        "Rows of store.tokens that teacher.path records now, so that speed, bytes and tail are measured and "
        "not estimated; --probe is 16 of them.",
        minimum=0,
    )
    teacher_tokens_per_second: float | None = option(
        None, "Measured speed of one worker of the teacher pass, for its hours.", minimum=1e-9
    )
    workers: int = option(1, "Workers of the teacher pass, each on a device of its own.", minimum=1)
    student_tokens_per_second: float | None = option(
        None, "Measured speed of the training on all its devices together, for its hours.", minimum=1e-9
    )
    student_devices: int = option(1, "Devices of the training.", minimum=1)
    trainings: int = option(1, "Trainings that read this one store.", minimum=1)
    hour_price: float | None = option(
        None, "Price of one device for an hour, in any currency, for what all this costs.", minimum=0.0
    )
    teacher_price: float | None = option(
        None, "Price of a million tokens that the teacher serves, in that currency.", minimum=0.0
    )
    student_price: float = option(0.0, "Price of a million tokens that the student serves.", minimum=0.0)
    request_tokens: int = option(1000, "Tokens of a request, its answer included.", minimum=1)
    upkeep_price: float = option(
        0.0,
        "What the student costs a month however much it is asked: storage, watching, training it again.",
        minimum=0.0,
    )
    months: float = option(
        12.0, "Months in which the student is to repay teacher pass and trainings.", minimum=0.01
    )
