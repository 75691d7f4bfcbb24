"""Triton kernels for the teacher's record: no matrix products, no atomics, two reads of the logits.

They run in this order on a slab of raw products hidden @ weight.T (docs/losses.md, 7):
`scan` makes the logsumexp and a bound below the k-th largest entry in the first read;
`collect` lists the few entries above that bound and sums all others in the second;
`settle` takes the head from the sorted list, adds what the list holds beyond it to the sums, and punches the
head out of the slab as -inf;
`draw` reads one part of a row for each draw.
Separate kernels, because none may read what another thread of the same program just wrote.

C positions of the slab, V vocabulary (true), k head, n draws, z = softcap(scale * (product + bias)),
l = z - logsumexp of z. A part is PART neighbouring columns, P their number in a row. S sums of a row: of
exp((z - reference) / T) for each temperature, then of that times its exponent for each entropy.
"""

# Annotations of a kernel's arguments are instructions to Triton's compiler, so they cannot serve the checker.
# mypy: disable-error-code="no-untyped-def, assignment"
# Triton's compiler knows the sum of two tuples, not the unpacking of one; and no conditional with two types.
# ruff: noqa: RUF005, SIM108

import triton
import triton.language as tl

from sparsekd.kernels.triton_logits import joined_lanes, streamed_sums, transform_product


@triton.jit
def _ordered(value):
    """The int32 that orders as the float32 does."""
    bits = value.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _from_ordered(ordered):
    """The float32 of `_ordered`."""
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _kth_largest(values, k):
    """The k-th largest of a block of float32, bit by bit of its ordered integer; NaN for k = 0."""
    ordered = _ordered(values)
    not_negative = tl.sum((ordered >= 0).to(tl.int32), 0) >= k
    bound = tl.where(not_negative, 0, -2147483648).to(tl.int32)
    step = 1 << 30
    for _ in range(31):
        trial = bound + step
        bound = tl.where(tl.sum((ordered >= trial).to(tl.int32), 0) >= k, trial, bound)
        step = step >> 1
    return _from_ordered(bound)


@triton.jit
def scan_kernel(
    slab_ptr,  # float32 [C, stride]
    bias_ptr,  # float32 [stride]
    labels_ptr,  # int64 [C], negative is ignored
    normaliser_ptr,  # float32 [C] out: logsumexp of z
    threshold_ptr,  # float32 [C] out: at least k entries l reach it; inf for k = 0
    reference_ptr,  # float32 [C] out: z of an entry below it, from which the sums count
    label_ptr,  # float32 [C] out: l of the label, 0 where ignored
    slab_stride,
    vocabulary_size,
    entries,  # k
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slab_row = slab_ptr + row * slab_stride
    # The bias is as long as the stride, which keeps loads wide where the vocabulary is odd.
    maximum, _, sums, _ = streamed_sums(
        slab_row,
        bias_ptr,
        slab_stride,
        vocabulary_size,
        slab_stride,
        scale,
        softcap,
        1.0,
        HAS_BIAS,
        HAS_SOFTCAP,
        0,
        False,
        BLOCK_V,
    )
    highest = tl.max(maximum, 0)
    shift = tl.where(highest > float("-inf"), highest, 0.0)
    normaliser = tl.log(joined_lanes(maximum, sums, highest, 1.0)) + shift

    # The k-th largest of the lanes' maxima is no larger than the k-th largest entry. The margin is for the
    # rounding of l, which `collect` computes anew.
    kth = _kth_largest(maximum, entries)
    margin = 1e-6 * (tl.abs(kth) + tl.abs(normaliser))
    threshold = tl.where(entries > 0, kth - normaliser - margin, float("inf"))
    # The largest of a lane whose entries all lie below: some entry of the rest, close to the largest of them.
    below = tl.where(maximum - normaliser < threshold, maximum, float("-inf"))
    reference = tl.max(below, 0)
    reference = tl.where(reference > float("-inf"), reference, shift)
    tl.store(normaliser_ptr + row, normaliser)
    tl.store(threshold_ptr + row, threshold)
    tl.store(reference_ptr + row, reference)

    # (One lane instead of a scalar: the interpreter takes no scalar masks.)
    one = tl.arange(0, 1)
    label = tl.load(labels_ptr + row + one)
    known = (label >= 0) & (label < vocabulary_size)
    product = tl.load(slab_row + label, mask=known, other=0.0)
    label_bias = tl.zeros([1], tl.float32)
    if HAS_BIAS:
        label_bias = tl.load(bias_ptr + label, mask=known, other=0.0)
    logit, _ = transform_product(product, label_bias, scale, softcap, HAS_SOFTCAP)
    tl.store(label_ptr + row + one, tl.where(known, logit - normaliser, 0.0))


@triton.jit
def collect_kernel(
    slab_ptr,  # float32 [C, stride]
    bias_ptr,  # float32 [stride]
    normaliser_ptr,  # float32 [C]
    threshold_ptr,  # float32 [C]
    reference_ptr,  # float32 [C]
    keys_ptr,  # int64 [C, ROOM] out: entries l >= threshold, the first ROOM of them; empty places are kept
    found_ptr,  # int32 [C] out: how many such entries there are
    sums_ptr,  # float32 [C, S] out: over all other entries; 0 at the draw temperature
    masses_ptr,  # float32 [C, P] out: the sum at the draw temperature, part by part
    slab_stride,
    vocabulary_size,
    parts,  # P
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    INVERSES: tl.constexpr,  # 1 / T of each temperature, ascending
    SQUARES: tl.constexpr,  # for each, whether its power is the square of the one before
    ENTROPIES: tl.constexpr,  # which of them have an entropy
    DRAWN: tl.constexpr,  # which of them is the draw temperature
    ROOM: tl.constexpr,
    PARTS: tl.constexpr,  # parts in a block
    PART: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slab_row = slab_ptr + row * slab_stride
    normaliser = tl.load(normaliser_ptr + row)
    threshold = tl.load(threshold_ptr + row)
    reference = tl.load(reference_ptr + row)
    part = tl.arange(0, PARTS)
    place = part[:, None] * PART + tl.arange(0, PART)[None, :]
    sums = ()
    for _i in tl.static_range(len(INVERSES) + len(ENTROPIES)):
        sums = sums + (tl.zeros([PARTS, PART], tl.float32),)
    found = 0
    ahead = tl.load(slab_row + place, mask=place < slab_stride, other=0.0)
    for start in range(0, vocabulary_size, PARTS * PART):
        column = start + place
        inside = column < vocabulary_size
        # The next block is asked for before this one is worked on. (Padding is read along, as in `scan`.)
        products = tl.where(inside, ahead, float("-inf"))
        after = column + PARTS * PART
        ahead = tl.load(slab_row + after, mask=after < slab_stride, other=0.0)
        bias = tl.zeros([PARTS, PART], tl.float32)
        if HAS_BIAS:
            bias = tl.load(bias_ptr + column, mask=column < slab_stride, other=0.0)
        logits, _ = transform_product(products, bias, scale, softcap, HAS_SOFTCAP)
        logprobs = logits - normaliser

        hit = inside & (logprobs >= threshold)
        hits = tl.sum(hit.to(tl.int32), 1)  # of each part
        number = tl.sum(hits, 0)
        if number > 0:
            before = found + tl.cumsum(hits, 0) - hits
            rank = before[:, None] + tl.cumsum(hit.to(tl.int32), 1) - 1
            # Descending keys are descending entries, ties by ascending id.
            key = (_ordered(logprobs).to(tl.int64) << 32) | (0x7FFFFFFF - column).to(tl.int64)
            tl.store(keys_ptr + row * ROOM + rank, key, mask=hit & (rank < ROOM))
        found += number

        kept = (logprobs < threshold) & (logits > float("-inf"))
        shifted = tl.where(kept, logits - reference, 0.0)
        power = shifted
        powers = ()
        added = ()
        for i in tl.static_range(len(INVERSES)):
            if SQUARES[i]:
                power = power * power
            else:
                power = tl.where(kept, tl.exp(shifted * INVERSES[i]), 0.0)
            powers = powers + (power,)
            if i == DRAWN:
                column_of_part = start // PART + part
                tl.store(
                    masses_ptr + row * parts + column_of_part, tl.sum(power, 1), mask=column_of_part < parts
                )
                added = added + (sums[i],)
            else:
                added = added + (sums[i] + power,)
        for i in tl.static_range(len(ENTROPIES)):
            exponent = shifted * INVERSES[ENTROPIES[i]]
            added = added + (sums[len(INVERSES) + i] + powers[ENTROPIES[i]] * exponent,)
        sums = added
    tl.store(found_ptr + row, found)
    for i in tl.static_range(len(INVERSES) + len(ENTROPIES)):
        count = len(INVERSES) + len(ENTROPIES)
        tl.store(sums_ptr + row * count + i, tl.sum(tl.sum(sums[i], 1), 0))


@triton.jit
def settle_kernel(
    slab_ptr,  # float32 [C, stride]; entries of the head become -inf
    keys_ptr,  # int64 [C, ROOM], descending
    found_ptr,  # int32 [C]
    sums_ptr,  # float32 [C, S]
    masses_ptr,  # float32 [C, P]
    normaliser_ptr,  # float32 [C]
    reference_ptr,  # float32 [C]
    head_ids_ptr,  # int32 [C, k] out
    head_logprobs_ptr,  # float32 [C, k] out
    totals_ptr,  # float32 [C, S] out: the sums over the whole rest
    cumulative_ptr,  # float64 [C, P] out: cumulative sums of the masses, in units of which 2^50 are the whole
    slab_stride,
    parts,  # P
    entries,  # k
    INVERSES: tl.constexpr,
    ENTROPIES: tl.constexpr,
    DRAWN: tl.constexpr,
    ROOM: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_P: tl.constexpr,  # at least P
):
    row = tl.program_id(0).to(tl.int64)
    found = tl.load(found_ptr + row)
    shift = tl.load(reference_ptr + row) - tl.load(normaliser_ptr + row)
    lane = tl.arange(0, ROOM)
    key = tl.load(keys_ptr + row * ROOM + lane)
    logprobs = _from_ordered((key >> 32).to(tl.int32))
    ids = 0x7FFFFFFF - (key & 0x7FFFFFFF)
    head = (lane < entries) & (lane < found)
    tl.store(head_ids_ptr + row * entries + lane, ids.to(tl.int32), mask=head)
    tl.store(head_logprobs_ptr + row * entries + lane, logprobs, mask=head)
    tl.store(slab_ptr + row * slab_stride + ids, tl.full([ROOM], float("-inf"), tl.float32), mask=head)

    # The list of a row that did not fit is not whole: such a row is done again elsewhere.
    limit = tl.where(found > ROOM, entries, found)
    beyond = (lane >= entries) & (lane < limit)
    shifted = tl.where(beyond, logprobs - shift, 0.0)
    column = tl.arange(0, BLOCK_P)
    masses = tl.load(masses_ptr + row * parts + column, mask=column < parts, other=0.0)
    for place in range(entries, limit):
        one = tl.load(keys_ptr + row * ROOM + place)
        power = tl.exp((_from_ordered((one >> 32).to(tl.int32)) - shift) * INVERSES[DRAWN])
        part = (0x7FFFFFFF - (one & 0x7FFFFFFF)) // PART
        masses += tl.where(column == part, power, 0.0)
    total = tl.sum(masses, 0)
    whole = tl.sum(masses.to(tl.float64), 0)
    # In whole units sums are exact in any order: nothing rises where the mass is 0.
    share = masses.to(tl.float64) / tl.where(whole > 0, whole, 1.0)
    cumulative = tl.cumsum(tl.floor(share * 1125899906842624.0), 0)
    tl.store(cumulative_ptr + row * parts + column, cumulative, mask=column < parts)

    count = len(INVERSES) + len(ENTROPIES)
    for i in tl.static_range(len(INVERSES)):
        if i != DRAWN:
            power = tl.where(beyond, tl.exp(shifted * INVERSES[i]), 0.0)
            total_i = tl.load(sums_ptr + row * count + i) + tl.sum(power, 0)
            tl.store(totals_ptr + row * count + i, total_i)
    tl.store(totals_ptr + row * count + DRAWN, total)
    for i in tl.static_range(len(ENTROPIES)):
        exponent = shifted * INVERSES[ENTROPIES[i]]
        weighted = tl.where(beyond, tl.exp(exponent) * exponent, 0.0)
        place = row * count + len(INVERSES) + i
        tl.store(totals_ptr + place, tl.load(sums_ptr + place) + tl.sum(weighted, 0))


@triton.jit
def draw_kernel(
    slab_ptr,  # float32 [C, stride], punched
    bias_ptr,  # float32 [stride]
    normaliser_ptr,  # float32 [C]
    reference_ptr,  # float32 [C]
    cumulative_ptr,  # float64 [C, P]
    uniforms_ptr,  # float64 [C, n]
    drawn_ptr,  # int32 [C, n] out: the id of each draw, -1 where the rest is empty
    drawn_logprobs_ptr,  # float32 [C, n] out: its l, -inf where the rest is empty
    slab_stride,
    vocabulary_size,
    parts,  # P
    draws,  # n
    inverse_temperature,
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    STEPS: tl.constexpr,  # 2^STEPS > P
    PART: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    draw = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    cumulative_row = cumulative_ptr + row * parts
    total = tl.load(cumulative_row + parts - 1)
    uniform = tl.load(uniforms_ptr + row * draws + draw, mask=draw < draws, other=0.0)
    # A product that rounds up to the total belongs to the last part. (2^-52)
    point = tl.minimum(uniform * total, total - total * 2.220446049250313e-16)
    # The first part whose cumulative sum exceeds the point: how many do not, by bisection.
    below = tl.zeros([BLOCK_N], tl.int32)
    for i in tl.static_range(STEPS):
        trial = below + (1 << (STEPS - 1 - i))
        value = tl.load(cumulative_row + trial - 1, mask=trial <= parts, other=float("inf"))
        below = tl.where(value <= point, trial, below)
    some = (draw < draws) & (below < parts)
    start = tl.load(cumulative_row + below - 1, mask=some & (below > 0), other=0.0)
    stop = tl.load(cumulative_row + below, mask=some, other=1.0)
    fraction = (point - start) / (stop - start)

    lane = tl.arange(0, PART)[None, :]
    column = below[:, None] * PART + lane
    stored = some[:, None] & (column < slab_stride)
    products = tl.load(slab_ptr + row * slab_stride + column, mask=stored, other=0.0)
    products = tl.where(stored & (column < vocabulary_size), products, float("-inf"))
    bias = tl.zeros([BLOCK_N, PART], tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + column, mask=stored, other=0.0)
    logits, _ = transform_product(products, bias, scale, softcap, HAS_SOFTCAP)
    kept = logits > float("-inf")
    shifted = tl.where(kept, logits - tl.load(reference_ptr + row), 0.0)
    power = tl.where(kept, tl.exp(shifted * inverse_temperature), 0.0)
    # float64, as the sum of the parts; an entry of probability 0 is never the first that exceeds.
    within = tl.cumsum(power.to(tl.float64), 1)
    within = tl.where(power > 0, within, 0.0)
    most = tl.max(within, 1)
    reached = (power > 0) & ((within > (fraction * most)[:, None]) | (within >= most[:, None]))
    first = tl.min(tl.where(reached, lane, PART), 1)
    drawn = tl.where(some & (first < PART), below * PART + first, -1)
    tl.store(drawn_ptr + row * draws + draw, drawn, mask=draw < draws)
    logit = tl.max(tl.where(lane == first[:, None], logits, float("-inf")), 1)
    logprob = tl.where(drawn >= 0, logit - tl.load(normaliser_ptr + row), float("-inf"))
    tl.store(drawn_logprobs_ptr + row * draws + draw, logprob, mask=draw < draws)
