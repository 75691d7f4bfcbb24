"""How hidden states are made narrower, and what a capture stores of them.

Shapes: N positions, H numbers of a hidden state, d of what is kept.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparsekd.logit_store.manifest import FeatureSpec, Manifest
from sparsekd.logit_store.places.paths import StorePath
from sparsekd.logit_store.projections import Projection, digest_of, projected, projection_of
from sparsekd.logit_store.protocol.reader import LogitStore
from sparsekd.logit_store.row import Row, is_real
from sparsekd.logit_store.spacing import evenly
from sparsekd.trainer.config.feature_requests import FeatureRequest
from sparsekd.trainer.data.inputs import model_inputs
from sparsekd.trainer.models.causal_lm import layers_of, states_of_layers
from sparsekd.trainer.models.opened import OpenModel
from sparsekd.trainer.run.errors import ModelError

# Rows of the training split on which principal directions and the kept variance are computed: at the usual
# length a hundred times as many positions as a hidden state has numbers.
PROBE_ROWS = 64


def make_features(
    requests: Sequence[FeatureRequest],
    teacher: OpenModel,
    tokens: LogitStore,
    *,
    seed: int,
    rows_at_once: int,
) -> tuple[tuple[FeatureSpec, ...], dict[str, bytes]]:
    """What the manifest says of the features, and the files of their projections by plane.

    Args:
        requests: Checked.
        teacher: The teacher.
        tokens: The tokens; the probe is taken evenly from their training split.
        seed: Of orthonormal matrices.
        rows_at_once: Rows in one forward pass.

    Raises:
        ModelError: The teacher has no such layer, or narrower hidden states.
    """
    depth, size = (len(layers_of(teacher.decoder)) if requests else 0), teacher.head.weight.shape[1]
    for request in requests:
        if request.layer > depth:
            raise ModelError(
                f"store.features asks for layer {request.layer}, but the teacher has {depth}: name 0 (the "
                f"embeddings) to {depth} (what the head reads)."
            )
        if request.width is not None and request.width >= size:
            raise ModelError(
                f"store.features asks for {request.width} numbers of layer {request.layer}, whose hidden "
                f"states have {size}: name fewer, or leave width away to keep them whole."
            )
    narrow = [request for request in requests if request.width is not None]
    moments = _probe(narrow, teacher, tokens, rows_at_once) if narrow else {}
    specs, files = [], {}
    for request in requests:
        digest, kept = None, 1.0
        if request.width is not None:
            mean, covariance = moments[request.layer]
            projection = _projection(request, request.width, mean, covariance, seed)
            kept = _kept(projection, mean, covariance)
            content = projection.to_bytes()
            digest = digest_of(content)
            files[f"feature_{request.layer}"] = content
        specs.append(
            FeatureSpec(
                layer=request.layer,
                width=request.width or size,
                source_width=size,
                projection=request.projection,
                projection_digest=digest,
                kept=kept,
                kind=request.kind,
                positions=request.positions,
            )
        )
    return tuple(specs), files


def _projection(
    request: FeatureRequest, width: int, mean: NDArray[np.float64], covariance: NDArray[np.float64], seed: int
) -> Projection:
    if request.projection == "pca":
        _, directions = np.linalg.eigh(covariance)  # ascending
        matrix = directions[:, ::-1][:, :width]
    else:
        generator = np.random.Generator(np.random.Philox([seed, request.layer]))
        matrix, _ = np.linalg.qr(generator.standard_normal((len(mean), width)))
        mean = np.zeros_like(mean)
    # Each direction's largest number is positive, so that a library's choice of sign does not matter.
    largest = np.abs(matrix).argmax(axis=0)
    matrix = matrix * np.sign(matrix[largest, np.arange(width)])
    return Projection(mean=mean.astype(np.float32), matrix=matrix.astype(np.float32))


def _kept(projection: Projection, mean: NDArray[np.float64], covariance: NDArray[np.float64]) -> float:
    """Share of the variance around the mean that lies in the projection's directions."""
    matrix = projection.matrix.astype(np.float64)
    inside = float(np.einsum("hd,hi,id->", matrix, covariance, matrix, optimize=True))
    return min(1.0, max(0.0, inside / max(float(np.trace(covariance)), 1e-300)))


@torch.inference_mode()
def _probe(
    requests: Sequence[FeatureRequest], teacher: OpenModel, tokens: LogitStore, rows_at_once: int
) -> dict[int, tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Mean [H] and covariance [H, H] of each layer's hidden states over the probe, in float64."""
    layers = [request.layer for request in requests]
    chosen = evenly(tokens.rows("train"), PROBE_ROWS)
    size = teacher.head.weight.shape[1]
    count = 0
    sums = {layer: torch.zeros(size, dtype=torch.float64, device=teacher.device) for layer in layers}
    squares = {layer: torch.zeros(size, size, dtype=torch.float64, device=teacher.device) for layer in layers}
    for start in range(0, len(chosen), rows_at_once):
        rows = [tokens.read_text("train", index) for index in chosen[start : start + rows_at_once]]
        token_ids, places = model_inputs(rows, teacher.device)
        passes = slice(token_ids.shape[1])
        real = torch.from_numpy(np.concatenate([is_real(row)[passes] for row in rows])).to(teacher.device)
        _, found = states_of_layers(teacher.decoder, token_ids, places, layers)
        count += int(real.sum())
        for layer in layers:
            states = found[layer].flatten(0, 1)[real].double()
            sums[layer] += states.sum(0)
            squares[layer] += states.T @ states
    result = {}
    for layer in layers:
        mean = sums[layer] / count
        covariance = squares[layer] / count - torch.outer(mean, mean)
        result[layer] = (mean.cpu().numpy(), covariance.cpu().numpy())
    return result


def read_projections(path: StorePath, manifest: Manifest) -> dict[str, Projection]:
    """The projections of a store by plane."""
    return {spec.plane: projection_of(path, spec) for spec in projected(manifest)}


def stored_features(
    states: Mapping[int, Tensor],  # layer -> (B, L, H)
    rows: Sequence[Row],
    recorded: Sequence[NDArray[np.bool_]],
    manifest: Manifest,
    projections: Mapping[str, Projection],
) -> list[dict[str, NDArray[np.float32]]]:
    """The feature planes of each row, float32 [positions, d]: projected in float32."""
    found: list[dict[str, NDArray[np.float32]]] = [{} for _ in rows]
    for spec in manifest.features:
        for index, row in enumerate(rows):
            there = is_real(row) if spec.positions == "all" else recorded[index]
            part = states[spec.layer][index]
            part = part[torch.from_numpy(np.flatnonzero(there)).to(part.device)].float()  # (N, H)
            if spec.plane in projections:
                projection = projections[spec.plane]
                mean = torch.from_numpy(projection.mean).to(part.device)
                part = (part - mean) @ torch.from_numpy(projection.matrix).to(part.device)
            found[index][spec.plane] = part.cpu().numpy()
    return found
