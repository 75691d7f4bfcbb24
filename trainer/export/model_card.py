"""The exported model's README: front matter for the Hugging Face Hub, and where the weights came from."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsekd.logit_store.manifest import RecordSpec, TeacherIdentity


@dataclass(frozen=True)
class Provenance:
    """What is known of a trained model.

    Attributes that do not say it themselves:
        teachers: with their records, by the names of a mixture's sources ("" for an only store); none for
            a model trained without a teacher.
        stores: digests of the logit stores, likewise.
        has_code: the model has a class of its own, whose code lies in the folder.
    """

    name: str
    base_model: str | None
    base_revision: str | None
    teachers: Mapping[str, tuple[TeacherIdentity, RecordSpec]]
    stores: Mapping[str, str]
    tokenizer: str
    objective: dict[str, Any]
    step: int
    tokens: int
    heldout: dict[str, Any] | None
    dtype: str
    has_code: bool
    versions: dict[str, str]


def model_card(provenance: Provenance) -> str:
    """The text of README.md."""
    return "\n".join([*_front_matter(provenance), "", *_body(provenance), ""])


def _front_matter(provenance: Provenance) -> list[str]:
    lines = [
        "---",
        "# license: sparsekd does not choose one; add yours, mindful of the data's, the teacher's and the",
        "# base model's terms.",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags:",
        "- sparsekd",
    ]
    if provenance.teachers:
        lines.append("- knowledge-distillation")
    base = provenance.base_model
    # The Hub takes names like owner/model here; a folder of this machine would be a broken link.
    if base is not None and base.count("/") == 1 and not Path(base).exists():
        lines.append(f"base_model: {base}")
    return [*lines, "---"]


def _body(provenance: Provenance) -> list[str]:
    how = "distilled from stored teacher logits" if provenance.teachers else "trained on the text alone"
    facts: list[tuple[str, str]] = []
    for name, (teacher, record) in provenance.teachers.items():
        of = f" ({name})" if name else ""
        revision = f" at revision {teacher.revision}" if teacher.revision else ""
        grid = ", ".join(f"{value:g}" for value in record.temperatures)
        facts += [
            (
                f"teacher{of}",
                f"{teacher.name}{revision} ({teacher.dtype}, weights `{teacher.weights_digest[:16]}`)",
            ),
            (
                f"record{of}",
                f"k={record.k} exact, n={record.n} draws at temperature {record.draw_temperature:g}; "
                f"temperatures {grid}",
            ),
        ]
    base = provenance.base_model
    revision = f" at revision {provenance.base_revision}" if provenance.base_revision else ""
    facts += [
        *(
            (f"logit store ({name})" if name else "logit store", f"`{digest}`")
            for name, digest in provenance.stores.items()
        ),
        ("tokenizer", provenance.tokenizer),
        ("start", "random weights" if base is None else f"{Path(base).name}{revision}"),
        ("objective", ", ".join(f"{name}={value}" for name, value in provenance.objective.items())),
        ("steps", f"{provenance.step:,}"),
        ("tokens seen", f"{provenance.tokens:,}"),
        ("held-out loss", _heldout_text(provenance.heldout)),
        ("dtype", provenance.dtype),
        ("versions", ", ".join(f"{name} {value}" for name, value in provenance.versions.items())),
    ]
    trust = ", trust_remote_code=True" if provenance.has_code else ""
    return [
        f"# {provenance.name}",
        "",
        f"A causal language model, {how} by sparsekd. It loads with plain transformers"
        + (" and the code of the base model that lies here:" if provenance.has_code else ":"),
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", dtype="auto"{trust})',
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")',
        "```",
        "",
        "## Where it came from",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in facts),
        "",
        "No license is stated here: that choice is yours.",
    ]


def _heldout_text(heldout: dict[str, Any] | None) -> str:
    if heldout is None:
        return "not measured"
    return f"cross-entropy {heldout['ce']:.4f} nats per token at step {heldout['step']:,}"
