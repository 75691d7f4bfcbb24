"""The table of planes: every kind of number that a row carries, declared once. Everything else goes by it.

A plane stands at some set of places of a row, its first axis:

    position   all L positions                           segment    the S segments (documents or pieces)
    run        the W runs of equal weight                counted    the C positions of the loss mask
    recorded   the M positions with a teacher's record   real       all positions but padding

Hidden states have a plane for each layer that the manifest names, `feature_12`, declared by its entry there.

To add a plane, enter it here; a new way to store, check or export numbers is entered in the table of the
module that does it (`codecs.codec.CODINGS`, `checks.RULES`, `tools.export.COLUMNS`).

Shapes: k head entries, n draws, G grid temperatures, V outcomes.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsekd.logit_store.manifest import FeatureSpec, Manifest
from sparsekd.logit_store.row import PADDING_DOCUMENT, RECORD_NAMES, TeacherRecord, run_lengths

Planes = Mapping[str, NDArray[Any]]
"""Arrays of a row by name."""


def _always(manifest: Manifest) -> bool:
    return True


def _scalar(manifest: Manifest) -> tuple[int, ...]:
    return ()


def _has_teacher(manifest: Manifest) -> bool:
    return manifest.teacher is not None


@dataclass(frozen=True)
class Plane:
    """One kind of number.

    Attributes:
        name: of the column in a shard and of the array in a row.
        stands: the places of its first axis, see above.
        dtype: of the decoded array, which is what a reader gets.
        coding: the name under which codecs know how to store it; planes of one coding that cannot be told
            without one another (a head's ids and its values) share it.
        rule: the name of what must hold of each number (`checks.RULES`).
        width: the shape behind the first axis.
        present: whether a store of this manifest has the plane.
        is_text: whether it belongs to the text and not to the teacher: two captures of one text agree in it.
        is_rounded: whether a codec may round it; all others are stored exactly.
        merged: what `merge` does with it: `kept`, or `documents` (numbers that are shifted apart).
        column: the name under which `export` knows its Parquet column, None for none of its own.
    """

    name: str
    stands: str
    dtype: type[np.generic]
    coding: str
    rule: str
    width: Callable[[Manifest], tuple[int, ...]] = _scalar
    present: Callable[[Manifest], bool] = _always
    is_text: bool = False
    is_rounded: bool = False
    merged: str = "kept"
    column: str | None = None


def _head(manifest: Manifest) -> tuple[int, ...]:
    return (manifest.record.k,)


def _tail(manifest: Manifest) -> tuple[int, ...]:
    return (manifest.record.n,)


def _grid(manifest: Manifest) -> tuple[int, ...]:
    return (len(manifest.record.temperatures),)


def _has_weights(manifest: Manifest) -> bool:
    return "weights" in manifest.planes


def _has_types(manifest: Manifest) -> bool:
    return "token_types" in manifest.planes


def _has_labels(manifest: Manifest) -> bool:
    return manifest.has_labels


def _has_head(manifest: Manifest) -> bool:
    return manifest.record.k > 0


def _has_tail(manifest: Manifest) -> bool:
    return manifest.record.n > 0


def _has_tail_logprobs(manifest: Manifest) -> bool:
    return manifest.record.tail_logprobs


def _tells_recorded(manifest: Manifest) -> bool:
    """With the rule `counted` the recorded positions are those of the loss mask, and nothing is stored."""
    return manifest.teacher is not None and manifest.record.positions != "counted"


# fmt: off
TABLE: tuple[Plane, ...] = (
    Plane("token_ids", "position", np.int32, "ids", "token", is_text=True, column="token"),
    Plane("loss_mask", "position", np.bool_, "bits", "any", is_text=True, column="flag"),
    Plane("segment_starts", "segment", np.int32, "numbers", "starts", is_text=True),
    Plane("segment_documents", "segment", np.int64, "numbers", "document", is_text=True, merged="documents",
          column="document"),
    Plane("weight_starts", "run", np.int32, "numbers", "starts", present=_has_weights, is_text=True),
    Plane("weights", "run", np.float32, "numbers", "weight", present=_has_weights, is_text=True,
          column="weight"),
    Plane("token_types", "position", np.uint8, "bytes", "any", present=_has_types, is_text=True,
          column="type"),
    Plane("labels", "counted", np.int32, "labels", "label", present=_has_labels, is_text=True,
          column="label"),
    Plane("recorded", "position", np.bool_, "recorded", "any", present=_tells_recorded, column="flag"),
    Plane("head_ids", "recorded", np.int32, "head", "head_id", _head, _has_head, column="list"),
    Plane("head_logprobs", "recorded", np.float32, "head", "logprob", _head, _has_head, is_rounded=True,
          column="list"),
    Plane("tail_ids", "recorded", np.int32, "tail", "tail_id", _tail, _has_tail, column="list"),
    Plane("tail_counts", "recorded", np.int32, "tail", "count", _tail, _has_tail, column="list"),
    Plane("tail_logprobs", "recorded", np.float32, "tail", "logprob", _tail, _has_tail_logprobs,
          is_rounded=True, column="list"),
    Plane("log_rest", "recorded", np.float32, "halves", "log_mass", _grid, _has_teacher, is_rounded=True,
          column="grid"),
    Plane("true_logprob", "recorded", np.float32, "halves", "logprob", present=_has_teacher, is_rounded=True,
          column="true"),
    Plane("rest_entropy", "recorded", np.float32, "entropies", "entropy", present=_has_teacher,
          is_rounded=True, column="number"),
    Plane("entropy", "recorded", np.float32, "entropies", "entropy", present=_has_teacher, is_rounded=True,
          column="number"),
)
# fmt: on


def planes_of(manifest: Manifest) -> tuple[Plane, ...]:
    """Returns the planes of every row under a manifest, in stored order."""
    return tuple(plane for plane in TABLE if plane.present(manifest)) + tuple(
        map(_feature_plane, manifest.features)
    )


def _feature_plane(spec: FeatureSpec) -> Plane:
    """Returns the plane of a layer's hidden states, which is named after the layer."""
    return Plane(
        spec.plane,
        "real" if spec.positions == "all" else "recorded",
        np.float32,
        "vectors",
        "vector",
        lambda manifest: (spec.width,),
        is_rounded=True,
        column="vector",
    )


def feature_spec(plane: Plane, manifest: Manifest) -> FeatureSpec:
    """Returns what the manifest says of a plane of hidden states."""
    return next(spec for spec in manifest.features if spec.plane == plane.name)


def names_of(planes: Iterable[Plane]) -> tuple[str, ...]:
    """Returns the planes' names."""
    return tuple(plane.name for plane in planes)


def text_planes(manifest: Manifest) -> tuple[str, ...]:
    """Returns the names of the planes that belong to the text."""
    return names_of(plane for plane in planes_of(manifest) if plane.is_text)


def rounded_planes(manifest: Manifest) -> tuple[str, ...]:
    """Returns the names of the planes that a codec may round."""
    return names_of(plane for plane in planes_of(manifest) if plane.is_rounded)


def place_count(stands: str, planes: Planes, manifest: Manifest) -> int:
    """Returns the length of the first axis of planes that stand at some set of places.

    Args:
        stands: the set.
        planes: of a row; those that say where the set is must be there.
        manifest: of the store.
    """
    if stands == "position":
        return manifest.sequence_length
    if stands == "segment":
        return len(planes["segment_starts"])
    if stands == "run":
        return len(planes["weight_starts"])
    if stands == "real":
        documents = planes["segment_documents"]
        lengths = run_lengths(planes["segment_starts"], manifest.sequence_length)
        return int(lengths[documents != PADDING_DOCUMENT].sum())
    return int(np.count_nonzero(planes["recorded" if stands == "recorded" else "loss_mask"]))


def needed_for(names: Iterable[str], manifest: Manifest) -> frozenset[str]:
    """Returns names of planes, and of those without which these cannot be decoded: they say where they
    stand."""
    wanted = set(names)
    stands = {plane.stands for plane in planes_of(manifest) if plane.name in wanted}
    if stands & {"counted", "recorded"} or "recorded" in wanted:
        wanted.add("loss_mask")
    if "recorded" in stands:
        wanted.add("recorded")
    if "run" in stands:
        wanted.add("weight_starts")
    if "segment" in stands or "real" in stands:
        wanted |= {"segment_starts", "segment_documents"}
    return frozenset(wanted)


def empty_record(manifest: Manifest) -> TeacherRecord:
    """Returns the record of a row without any recorded position."""
    record = (plane for plane in TABLE if plane.name in RECORD_NAMES)
    empty = {plane.name: np.empty((0, *plane.width(manifest)), plane.dtype) for plane in record}
    if not manifest.record.tail_logprobs:
        empty["tail_logprobs"] = np.empty((0, 0), np.float32)
    return TeacherRecord(**empty)
