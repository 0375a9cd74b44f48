"""Device functions shared by the attention kernels.

A tile is BLOCK_M query rows by BLOCK_N key columns; i is a query row and j a key column within the
pair's own sequence. Logits are kept in units of log2 (multiplied by log2 e, so `exp2` is the
exponential). With NATURAL they are kept as they are: in fp32, where each rounding counts, and with
a float mask, since log2 e times the smallest finite number is -inf and only -inf hides a pair.
"""

import triton
import triton.language as tl

if triton.knobs.runtime.interpret:
    from . import interpreter

    interpreter.apply()

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def philox4x32(c0, c1, c2, c3, key0, key1):
    """Philox4x32-10 (Salmon et al., SC11): four 32-bit words of each counter. All uint32."""
    for _ in tl.static_range(10):
        hi0 = tl.umulhi(c0, 0xD2511F53)
        lo0 = c0 * 0xD2511F53
        hi1 = tl.umulhi(c2, 0xCD9E8D57)
        lo1 = c2 * 0xCD9E8D57
        c0 = hi1 ^ c1 ^ key0
        c1 = lo1
        c2 = hi0 ^ c3 ^ key1
        c3 = lo0
        key0 = key0 + 0x9E3779B9
        key1 = key1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def dropout_keep(first_row, first_column, dropout, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which probabilities of the tile survive, [BLOCK_M, BLOCK_N] of bool.

    One counter (column // 8, row, head, batch) gives eight 16-bit lanes; first_column % 8 == 0.
    """
    key0, key1, head, batch, threshold = dropout
    GROUPS: tl.constexpr = BLOCK_N // 8
    rows = (first_row + tl.arange(0, BLOCK_M)).to(tl.uint32)
    groups = (first_column // 8 + tl.arange(0, GROUPS)).to(tl.uint32)
    zero = tl.zeros([BLOCK_M, GROUPS], tl.uint32)
    w0, w1, w2, w3 = philox4x32(
        zero + groups[None, :], zero + rows[:, None], zero + head, zero + batch, key0, key1
    )
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    lanes = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(lanes, [BLOCK_M, BLOCK_N]).to(tl.int32) >= threshold


@triton.jit
def tanh(x):
    """tanh in fp32 to about one ulp: a minimax polynomial near 0 (Cephes tanhf), else by exp."""
    z = x * x
    p = -5.70498872745e-3
    p = p * z + 2.06390887954e-2
    p = p * z - 5.37397155531e-2
    p = p * z + 1.33314422036e-1
    p = p * z - 3.33332819422e-1
    small = p * z * x + x
    large = 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2E)) + 1.0)
    return tl.where(tl.abs(x) < 0.625, small, large)


@triton.jit
def program_place(tiles, pairs, section, REVERSE: tl.constexpr):
    """(tile, batch-head pair) of this program; all tiles of a section of pairs run together.

    With REVERSE the last tiles come first: under a causal band they have the most work.
    """
    program = tl.program_id(0)
    group = program // (section * tiles)
    inside = program - group * (section * tiles)
    width = tl.minimum(section, pairs - group * section)
    pair = group * section + inside % width
    tile = inside // width
    if REVERSE:
        tile = tiles - 1 - tile
    return tile, pair


@triton.jit
def find_sequence(cu, sequences, tile, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """The sequence of a tile in a packed batch: the last s with cu[s] // BLOCK + s <= tile.

    Sequence s owns tiles from cu[s] // BLOCK + s on, enough for its rows whatever its length, so
    the host launches total // BLOCK + sequences + 1 tiles without knowing the lengths. Sequence
    number `sequences` is what lies beyond cu[-1].
    """
    count = 0
    for first in range(0, sequences + 1, CHUNK):
        s = first + tl.arange(0, CHUNK)
        start = tl.load(cu + s, mask=s <= sequences, other=0) // BLOCK + s
        count += tl.sum(((s <= sequences) & (start <= tile)).to(tl.int32), 0)
    return tl.maximum(count - 1, 0)


@triton.jit
def sequence_span(cu, s, sequences, total, tail):
    """First row and length of sequence s; beyond cu[-1] it ends at tail (total, or nothing)."""
    first = tl.minimum(tl.maximum(tl.load(cu + s), 0), total)
    end = tl.load(cu + s + 1, mask=s < sequences, other=tail)
    return first, tl.maximum(tl.minimum(end, total) - first, 0)


@triton.jit
def place(tiles, pairs, heads, section, cu, cu_other, sequences, total, total_other,
          BLOCK: tl.constexpr, REVERSE: tl.constexpr, PACKED: tl.constexpr):  # fmt: skip
    """Where this program works, on the axis of its tile and on the other one.

    Returns (batch or sequence, batch in memory, head, first row and rows of its sequence, first
    row and rows of the other side, row of the tile within the sequence, slot: pair * tiles + tile).
    """
    tile, pair = program_place(tiles, pairs, section, REVERSE)
    slot = pair.to(tl.int64) * tiles + tile
    if PACKED:
        s = find_sequence(cu, sequences, tile, BLOCK, 1024)
        origin, rows = sequence_span(cu, s, sequences, total, total)
        other_origin, other_rows = sequence_span(cu_other, s, sequences, total_other, 0)
        first = (tile - origin // BLOCK - s) * BLOCK
        memory = pair.to(tl.int64) * 0
        return (s, memory, pair, origin.to(tl.int64), rows, other_origin.to(tl.int64), other_rows,
                first, slot)  # fmt: skip
    else:
        batch = pair // heads
        none = pair.to(tl.int64) * 0
        return (batch, batch.to(tl.int64), pair % heads, none, total, none, total_other,
                tile * BLOCK, slot)  # fmt: skip


@triton.jit
def head_base(pointer, stride, memory, head, row):
    return pointer + memory * stride[0] + head.to(tl.int64) * stride[1] + row * stride[2]


@triton.jit
def bias_place(slopes, slope_stride, positions, position_stride, diagonals, batch, memory, head,
               sequences, rows, keys, bias_shift, reach, F: tl.constexpr):  # fmt: skip
    """The bias of one head, for `tile_logits`, and its far values at the two ends of the table."""
    if F.BIAS == "table":
        table = diagonals + head.to(tl.int64) * (2 * reach + 1)
        bias = (0.0, table, keys - rows + bias_shift, reach)
        return bias, tl.load(table), tl.load(table + 2 * reach)
    elif F.BIAS == "none":
        return (0.0, 0, 0, 0), 0.0, 0.0
    else:
        owner = batch
        if F.PACKED:
            owner = tl.maximum(tl.minimum(batch, sequences - 1), 0)
        slope = tl.load(slopes + owner.to(tl.int64) * slope_stride[0] + head * slope_stride[1])
        if not F.NATURAL:
            slope = slope * LOG2E
        if F.BIAS == "alibi_positions":
            keyed = positions + memory * position_stride[0]
            return (slope, keyed, position_stride[1], 0), 0.0, 0.0
        else:
            return (slope, 0, 0, 0), 0.0, 0.0


@triton.jit
def dropout_place(seed, batch, head, threshold, F: tl.constexpr):
    if F.DROPOUT:
        key = tl.load(seed).to(tl.uint64)
        return (key.to(tl.uint32), (key >> 32).to(tl.uint32), head.to(tl.uint32),
                batch.to(tl.uint32), threshold)  # fmt: skip
    else:
        return (0, 0, 0, 0, 0)


@triton.jit
def block_ranges(first, last, low, high, limit, offset, left, right, origin, reach,
                 BLOCK: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
                 NEAR: tl.constexpr):  # fmt: skip
    """Blocks of the other axis that a tile meets: (begin, full_lo, near_lo, near_hi, full_hi, end).

    The tile covers first..last of its own axis; the other axis has `limit` elements, of which only
    low..high - 1 can be visible. Element y is visible to x if x + offset - left <= y <=
    x + offset + right. Blocks in [full_lo, full_hi) hold visible pairs only, apart from masks.
    Blocks in [near_lo, near_hi) hold a distance y - x - origin of magnitude below reach.
    """
    full_low = 0
    full_high = limit
    if HAS_LEFT:
        low = tl.maximum(low, first + offset - left)
        full_low = last + offset - left
    if HAS_RIGHT:
        high = tl.minimum(high, last + offset + right + 1)
        full_high = tl.minimum(limit, first + offset + right + 1)
    begin = tl.maximum(low, 0) // BLOCK
    end = tl.maximum(tl.cdiv(tl.maximum(high, 0), BLOCK), begin)
    full_lo = tl.minimum(tl.maximum(tl.cdiv(tl.maximum(full_low, 0), BLOCK), begin), end)
    full_hi = tl.minimum(tl.maximum(tl.maximum(full_high, 0) // BLOCK, full_lo), end)
    near_lo = full_lo
    near_hi = full_lo
    if NEAR:
        near_first = tl.maximum(first + origin - reach + 1, 0)
        near_end = tl.maximum(last + origin + reach, 0)
        near_lo = tl.minimum(tl.maximum(near_first // BLOCK, full_lo), full_hi)
        near_hi = tl.minimum(tl.maximum(tl.cdiv(near_end, BLOCK), near_lo), full_hi)
    return begin, full_lo, near_lo, near_hi, full_hi, end


@triton.jit
def full_count(ranges):
    return ranges[2] - ranges[1] + ranges[4] - ranges[3]


@triton.jit
def edge_count(ranges):
    return ranges[5] - ranges[0] - full_count(ranges)


@triton.jit
def full_block(index, ranges):
    """The index-th block of [full_lo, near_lo) and [near_hi, full_hi)."""
    block = ranges[1] + index
    return tl.where(block >= ranges[2], block + ranges[3] - ranges[2], block)


@triton.jit
def edge_block(index, ranges):
    """The index-th block of [begin, full_lo), [near_lo, near_hi) and [full_hi, end)."""
    block = ranges[0] + index
    block = tl.where(block >= ranges[1], block + ranges[2] - ranges[1], block)
    return tl.where(block >= ranges[3], block + ranges[4] - ranges[3], block)


@triton.jit
def any_block(index, ranges):
    """All blocks, full ones first: the order in which the two loops visit them."""
    full = full_count(ranges)
    return tl.where(index < full, full_block(index, ranges), edge_block(index - full, ranges))


@triton.jit
def careful_start(index, ranges, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """First element of the index-th piece of STEP elements of the blocks of `any_block`."""
    PIECES: tl.constexpr = BLOCK // STEP
    return any_block(index // PIECES, ranges) * BLOCK + (index % PIECES) * STEP


@triton.jit
def mask_visible(value, F: tl.constexpr):
    if F.MASK == "bool":
        return value != 0
    else:
        return value.to(tl.float32) != float("-inf")


@triton.jit
def visible_keys(mask, stride, T, F: tl.constexpr):
    """(low, high): every key that a mask without a row axis shows lies in low..high - 1."""
    CHUNK: tl.constexpr = 1024
    low = T
    high = T * 0
    for first in range(0, T, CHUNK):
        j = first + tl.arange(0, CHUNK)
        value = tl.load(mask + j.to(tl.int64) * stride, mask=j < T, other=0)
        shown = mask_visible(value, F) & (j < T)
        low = tl.minimum(low, tl.min(tl.where(shown, j, T), 0))
        high = tl.maximum(high, tl.max(tl.where(shown, j + 1, 0), 0))
    return low, high


@triton.jit
def load_rows(base, first, limit, stride, width: tl.constexpr, ROWS: tl.constexpr,
              COLS: tl.constexpr, CHECK: tl.constexpr, F: tl.constexpr):  # fmt: skip
    """Rows first..first + ROWS - 1 of a matrix with `width` columns, zero outside."""
    r = tl.arange(0, ROWS)
    c = tl.arange(0, COLS)
    inside_rows = (first + r < limit)[:, None]
    inside_cols = (c < width)[None, :]
    if F.WIDE:
        r = r.to(tl.int64)
        c = c.to(tl.int64)
    base += first.to(tl.int64) * stride[0]
    pointers = base + (r[:, None] * stride[0] + c[None, :] * stride[1])
    if CHECK:
        if width == COLS:
            return tl.load(pointers, mask=inside_rows, other=0.0)
        else:
            return tl.load(pointers, mask=inside_rows & inside_cols, other=0.0)
    elif width == COLS:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=inside_cols, other=0.0)


@triton.jit
def operand(
    rows, first, start, limit, width: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    F: tl.constexpr, RELOAD: tl.constexpr,
):  # fmt: skip
    """The left operand of a product: rows[0] as loaded before the loop, or loaded once more.

    fp32 products hold whole rows of their operands in registers. A load that the compiler cannot
    take out of the loop (start >= 0 is not known to it) keeps them there for one product only.
    """
    if RELOAD:
        return load_rows(
            rows[1], first + tl.minimum(start, 0), limit, rows[2], width, ROWS, COLS, True, F
        )
    else:
        return rows[0]


@triton.jit
def store_rows(base, first, limit, stride, value, width: tl.constexpr, ROWS: tl.constexpr,
               COLS: tl.constexpr, F: tl.constexpr):  # fmt: skip
    r = tl.arange(0, ROWS)
    c = tl.arange(0, COLS)
    inside = (first + r < limit)[:, None] & (c < width)[None, :]
    if F.WIDE:
        r = r.to(tl.int64)
        c = c.to(tl.int64)
    base += first.to(tl.int64) * stride[0]
    pointers = base + (r[:, None] * stride[0] + c[None, :] * stride[1])
    tl.store(pointers, value.to(base.dtype.element_ty), mask=inside)


@triton.jit
def tile_visible(i, j, shape, mask, F: tl.constexpr, EDGE: tl.constexpr):
    """Which pairs of a tile are visible, and the float mask's values there."""
    S, T, offset, left, right = shape
    if EDGE:
        visible = (i < S) & (j < T)
    elif i.shape[1] == 1:  # full blocks are inside on their own axis: a vector's one predicate
        visible = (i < S) & (j == j)
    else:
        visible = (i == i) & (j < T)
    added = 0.0
    if F.MASK != "none":
        values, stride_i, stride_j = mask
        if F.MASK_AXES == "i":
            value = tl.load(values + i.to(tl.int64) * stride_i, mask=i < S, other=0)
        elif F.MASK_AXES == "j":
            value = tl.load(values + j.to(tl.int64) * stride_j, mask=j < T, other=0)
        else:
            place = i.to(tl.int64) * stride_i + j.to(tl.int64) * stride_j
            value = tl.load(values + place, mask=visible, other=0)
        visible = visible & mask_visible(value, F)
        if F.MASK == "float":
            added = value.to(tl.float32)
    if EDGE:
        if F.HAS_LEFT:
            visible = visible & (j >= i + (offset - left))
        if F.HAS_RIGHT:
            visible = visible & (j <= i + (offset + right))
    return visible, added


@triton.jit
def tile_logits(product, i, j, shape, scale, cap, mask, bias, far, F: tl.constexpr,
                EDGE: tl.constexpr):  # fmt: skip
    """softcap(scale * product) + position bias + mask, hidden pairs at -inf.

    i and j are index tensors that broadcast to the tile, in either orientation. With SOFTCAP the
    caller has divided scale by the cap. Returns the logits, the visible pairs (of meaning if EDGE
    or MASK) and the tanh (if SOFTCAP).
    """
    T = shape[1]
    if F.SOFTCAP:
        bent = tanh(product * scale)
        x = bent * cap
    else:
        bent = product
        x = product * scale
    slope, table, origin, reach = bias
    if F.BIAS == "alibi":
        x += slope * j.to(tl.float32)
    elif F.BIAS == "alibi_positions":
        x += slope * tl.load(table + j.to(tl.int64) * origin, mask=j < T, other=0.0)
    elif F.BIAS == "table":
        if EDGE:
            distance = j - i - origin
            x += tl.load(table + (tl.minimum(tl.maximum(distance, -reach), reach) + reach))
        else:
            x += far
    visible, value = tile_visible(i, j, shape, mask, F, EDGE)
    if F.MASK == "float":
        x += value
    if EDGE or F.MASK != "none":
        x = tl.where(visible, x, float("-inf"))
    return x, visible, bent


@triton.jit
def exponential(x, F: tl.constexpr):
    """e to the power of a difference of logits."""
    if F.NATURAL:
        return tl.exp2(x * LOG2E)
    else:
        return tl.exp2(x)


@triton.jit
def is_finite(x):
    return tl.abs(x.to(tl.float32)) < float("inf")


@triton.jit
def any_nonfinite(x):
    return tl.max(tl.where(is_finite(x), 0, 1)) > 0


@triton.jit
def zero_nonfinite(x):
    return tl.where(is_finite(x), x, 0.0).to(x.dtype)


@triton.jit
def nonfinite_reaching(visible, x, F: tl.constexpr):
    """What the NaN and Inf of x [K, N] add to a product with weights [M, K]: only visible ones.

    Codes 1, 256 and -32768 for +inf, -inf and NaN are summed over visible k by one dot; with
    K <= 128 the sum tells which of them were met. Returns [M, N] of 0, +inf, -inf or NaN.
    """
    wide = x.to(tl.float32)
    code = tl.where(wide == float("inf"), 1.0, 0.0) + tl.where(wide == float("-inf"), 256.0, 0.0)
    code = tl.where(wide != wide, -32768.0, code).to(x.dtype)
    weight = tl.where(visible, 1.0, 0.0).to(x.dtype)
    met = tl.dot(weight, code, input_precision=F.PRECISION).to(tl.int32)
    plus = tl.where((met & 255) > 0, float("inf"), 0.0)
    minus = tl.where((met >> 8) > 0, float("-inf"), 0.0)
    return tl.where(met < 0, float("nan"), plus + minus)


# lse rounds to its own magnitude. In fp32, and beyond this magnitude under a float mask (where a
# row may hold one huge number), rows get their sums computed anew, as two numbers.
LSE_TRUSTED = tl.constexpr(256.0)


@triton.jit
def row_statistics(shift, log_total, i, rows, F: tl.constexpr):
    """Per row what p = exp(x - shift) / 2^log_total needs, +inf for rows outside."""
    peak = tl.load(shift + i, mask=i < rows, other=float("inf"))
    if F.NATURAL:
        return peak, tl.load(log_total + i, mask=i < rows, other=0.0)
    else:
        return tl.where(peak == float("-inf"), float("inf"), peak * LOG2E), peak


@triton.jit
def probability(x, peak, log_total, F: tl.constexpr):
    if F.NATURAL:
        return tl.exp2((x - peak) * LOG2E - log_total)
    else:
        return tl.exp2(x - peak)
