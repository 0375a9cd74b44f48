"""The formula of attention in plain, differentiable PyTorch, to check kernels against."""

import numpy as np
import torch


def dropout_keep(seed: int, batch: int, heads: int, rows: int, columns: int, p: float):
    """Philox4x32-10 keep mask [heads, rows, columns]: counter (column // 8, row, head, batch)."""
    threshold = min(65535, int(p * 65536 + 0.5))
    low = np.uint64(0xFFFFFFFF)
    half = np.uint64(32)
    key0, key1 = np.uint64(seed & 0xFFFFFFFF), np.uint64((seed >> 32) & 0xFFFFFFFF)
    c0, c1, c2, c3 = np.broadcast_arrays(
        np.arange((columns + 7) // 8, dtype=np.uint64)[None, None, :],
        np.arange(rows, dtype=np.uint64)[None, :, None],
        np.arange(heads, dtype=np.uint64)[:, None, None],
        np.uint64(batch),
    )
    for _ in range(10):
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1 = (p1 >> half) ^ c1 ^ key0, p1 & low
        c2, c3 = (p0 >> half) ^ c3 ^ key1, p0 & low
        key0, key1 = (key0 + np.uint64(0x9E3779B9)) & low, (key1 + np.uint64(0xBB67AE85)) & low
    words = np.stack([c0, c1, c2, c3], -1)
    lanes = np.stack([words & np.uint64(0xFFFF), words >> np.uint64(16)], -1)
    lanes = lanes.reshape(heads, rows, 8 * ((columns + 7) // 8))[:, :, :columns].astype(np.int64)
    return torch.from_numpy(lanes >= threshold), 65536 / (65536 - threshold)


def _one(q, k, v, mask, slopes, positions, table, lut, seed, batch, scale, softcap, dropout_p,
         left, right, lower_right, bias_shift):  # fmt: skip
    """One batch entry or sequence: q [H,S,D], k and v [G,T,.], mask broadcasting to [H,S,T]."""
    H, S, _ = q.shape
    G, T, _ = k.shape
    k, v = (x.repeat_interleave(H // G, 0) for x in (k, v))
    logits = scale * q @ k.transpose(1, 2)
    if softcap > 0:
        logits = softcap * torch.tanh(logits / softcap)
    i, j = torch.arange(S)[:, None], torch.arange(T)[None, :]
    if slopes is not None:
        place = j[0] if positions is None else positions
        logits = logits + (slopes[:, None, None] * place).to(logits.dtype)
    if table is not None:
        reach = lut.numel() // 2
        distance = (j - (i + T - S + bias_shift)).clamp(-reach, reach) + reach
        logits = logits + table[lut.long()[distance]].permute(2, 0, 1)
    offset = T - S if lower_right else 0
    visible = torch.ones(1, S, T, dtype=torch.bool)
    if left >= 0:
        visible = visible & (j >= i + offset - left)
    if right >= 0:
        visible = visible & (j <= i + offset + right)
    if mask is not None and mask.dtype == torch.bool:
        visible = visible & mask
    elif mask is not None:
        logits = logits + mask.masked_fill(mask == -torch.inf, 0)
        visible = visible & (mask != -torch.inf)
    logits = logits.masked_fill(~visible, -torch.inf)
    lse = torch.logsumexp(logits, -1)
    empty = (lse == -torch.inf)[..., None]
    p = torch.softmax(logits.masked_fill(empty, 0), -1).masked_fill(empty, 0)
    if int(dropout_p * 65536 + 0.5) > 0:
        keep, gain = dropout_keep(int(seed), batch, H, S, T, dropout_p)
        p = torch.where(keep, p * gain, 0)
    return p @ v, lse


def attention(q, k, v, mask=None, slopes=None, positions=None, table=None, lut=None, cu_q=None,
              cu_k=None, seed=None, scale=1.0, softcap=0.0, dropout_p=0.0, left=-1, right=-1,
              lower_right=False, bias_shift=0, dtype=torch.float64):  # fmt: skip
    """(out, lse) computed in `dtype`, differentiable in q, k, v, a float mask and the table."""
    B, H, S, _ = q.shape
    T, DV = v.shape[2:]
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    table = None if table is None else table.to(dtype)
    if mask is not None:
        mask = mask if mask.dtype == torch.bool else mask.to(dtype)
        mask = mask.expand(B, H, S, T)

    def row(x, b):
        return None if x is None else x[b if x.size(0) > 1 else 0]

    options = scale, softcap, dropout_p, left, right, lower_right, bias_shift
    if cu_q is None:
        parts = [
            _one(q[b], k[b], v[b], row(mask, b), row(slopes, b), row(positions, b), table, lut,
                 seed, b, *options)
            for b in range(B)
        ]  # fmt: skip
        if not parts:
            return q.new_zeros(B, H, S, DV), q.new_zeros(B, H, S)
        return torch.stack([o for o, _ in parts]), torch.stack([x for _, x in parts])
    outs, lses = [], []
    for s in range(cu_q.numel() - 1):
        a, b = int(cu_q[s]), int(cu_q[s + 1])
        c, d = int(cu_k[s]), int(cu_k[s + 1])
        o, x = _one(q[0, :, a:b], k[0, :, c:d], v[0, :, c:d], None, row(slopes, s), None, table,
                    lut, seed, s, *options)  # fmt: skip
        outs.append(o)
        lses.append(x)
    tail = S - int(cu_q[-1])
    outs.append(q.new_zeros(H, tail, DV))
    lses.append(q.new_full((H, tail), -torch.inf))
    return torch.cat(outs, 1)[None], torch.cat(lses, 1)[None]
