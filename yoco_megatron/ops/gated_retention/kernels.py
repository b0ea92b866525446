"""The Triton kernels of gated retention. The algebra, the traffic and the hazards are in docs/kernels.md.

One kernel body, `_scan`, runs over chunks of BT tokens with the state S [DIN, BV] in fp32 registers:

    forward   out_i = e^{b_i} x_i S + sum_{j<=i} e^{b_i-b_j} (x_i . y_j) z_j
              S    <- e^{b_C} S + sum_j e^{b_C-b_j} y_j^T z_j
    reverse   out_j = e^{b_C-b_j} x_j S + sum_{i>=j} e^{b_i-b_j} (x_j . y_i) z_i
              S    <- e^{b_C} S + sum_i e^{b_i} y_i^T z_i

and is used four times: o = scan(q, k, v), dq = scan(do, v, k), dk = reverse(v, do, q), dv = reverse(k, q, do). All
exponents are <= 0 (exp2 of log2 decays, summed inside a chunk and a document), so nothing overflows at any decay. No
accumulator is ever transposed: Triton 3.4 to 3.7.0 miscompiles that on Hopper (flash-linear-attention issue 640).

Packed documents: reads and writes of the state are masked by document, so no value of one reaches another.

Queries and keys may be shared by GROUP heads each: heads i_xy of x and y, i_zw of z and w are then not i_h.

Legend: B batch, T time (TP: rounded up to whole chunks), H heads, DIN and DOUT widths of x, y and of z, out.
Descriptors show a tensor as [B, H, T, D]. Decay sums b are [B * H, TP], ids [B, TP]; states [B * H, ..., DIN, DOUT].
"""

import triton
import triton.language as tl

# log2 of the decay below which earlier updates of a state are neglected: 2^-40 of a state is 2^-16 of its fp32
# rounding. To change the last bit of a state, the earlier updates must be 65,536 times as large as those since.
NEGLIGIBLE_LOG2 = tl.constexpr(-40.0)


@triton.jit
def _segmented_add(a, a_start, b, b_start):
    """Associative: running sums that restart where a start flag is set."""
    return tl.where(b_start != 0, b, a + b), a_start | b_start


@triton.jit
def decay_sums(
    G, IDS, OUT, T, TP, stride_b, stride_t, stride_h, tau,
    H: tl.constexpr, BT: tl.constexpr, N: tl.constexpr, DOCS: tl.constexpr, LOGITS: tl.constexpr,
):  # fmt: skip
    """OUT[bh, t] = sum of log2 decay from the start of t's chunk, or of its document inside the chunk, to t.

    G [B, T, H] (any strides): natural log decays, or with LOGITS gate logits, log decay = logsigmoid(G) / tau.
    One program sums N chunks of one head.
    """
    bh = tl.program_id(1)
    t = (tl.program_id(0) * N + tl.arange(0, N))[:, None] * BT + tl.arange(0, BT)[None, :]
    g = tl.load(
        G + (bh // H).to(tl.int64) * stride_b + t.to(tl.int64) * stride_t + bh % H * stride_h, mask=t < T, other=0.0
    )
    g = g.to(tl.float32)
    if LOGITS:
        # log sigmoid(x) = min(x, 0) - log(1 + e^-|x|), which neither overflows nor cancels.
        g = (tl.minimum(g, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(g)))) / tau
    g = tl.where(t < T, g * 1.4426950408889634, 0.0)
    if DOCS:
        ids = IDS + (bh // H).to(tl.int64) * TP
        here = tl.load(ids + t, mask=t < TP, other=0)
        before = tl.load(ids + t - 1, mask=(t < TP) & (t > 0), other=0)
        start = ((t > 0) & (t < T) & (here != before)).to(tl.int32)
        # Nothing decays into a document's first token.
        g, _ = tl.associative_scan((tl.where(start != 0, 0.0, g), start), 1, _segmented_add)
    else:
        g = tl.cumsum(g, 1)
    tl.store(OUT + bh.to(tl.int64) * TP + t, g, mask=t < TP)


@triton.jit
def _scan(
    X, Y, Z, OUT, W, ANCHORS, SUM_TILES, SUMS, IDS, S0, FINAL, DOTS,
    i_b, i_h, i_xy, i_zw, i_bh, i_slice, i_seg, T, TP, SEG, NSEG, NANCHOR, log2_scale, s0_row, s0_col,
    DIN: tl.constexpr, DOUT: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr, REVERSE: tl.constexpr,
    DOCS: tl.constexpr, HAS_S0: tl.constexpr, HAS_FINAL: tl.constexpr, ANCHOR: tl.constexpr, ROW_DOTS: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One head, one slice of BV columns of z, one segment of SEG tokens; see the module's docstring."""
    rows = tl.arange(0, DIN)
    cols = i_slice * BV + tl.arange(0, BV)
    rt = tl.arange(0, BT)
    SUMS += i_bh.to(tl.int64) * TP
    IDS += i_b.to(tl.int64) * TP
    # Entering states lie in the order in which the state walks through the segments.
    state = (i_bh * NSEG + (NSEG - 1 - i_seg if REVERSE else i_seg)).to(tl.int64) * DIN * DOUT
    if HAS_S0:
        S = tl.load(S0 + state + rows[:, None] * s0_row + cols[None, :] * s0_col)
    else:
        S = tl.zeros([DIN, BV], tl.float32)

    begin = i_seg * SEG
    chunks = tl.cdiv(tl.minimum(SEG, T - begin), BT)
    for i in tl.range(0, chunks, num_stages=STAGES):
        t0 = begin + (chunks - 1 - i if REVERSE else i) * BT
        b = SUM_TILES.load([i_bh, t0]).reshape(BT)
        b_last = tl.load(SUMS + t0 + BT - 1)
        if REVERSE:
            visible = rt[:, None] <= rt[None, :]
            decay = b[None, :] - (b - log2_scale)[:, None]
            reads = tl.exp2(b_last - b + log2_scale)
            writes = tl.exp2(b)
        else:
            visible = rt[:, None] >= rt[None, :]
            decay = (b + log2_scale)[:, None] - b[None, :]
            reads = tl.exp2(b)
            writes = tl.exp2(b_last - b + log2_scale)
        chunk_decay = tl.exp2(b_last)
        if DOCS:
            ids = tl.load(IDS + t0 + rt)
            visible = visible & (ids[:, None] == ids[None, :])
            first = tl.load(IDS + t0)
            last = tl.load(IDS + t0 + BT - 1)
            # Documents of the state that comes in, and of the one that goes out.
            if REVERSE:
                comes = tl.load(IDS + tl.minimum(t0 + BT, TP - 1))
                goes = first
            else:
                comes = tl.load(IDS + tl.maximum(t0 - 1, 0))
                goes = last
            reads = tl.where(ids == comes, reads, 0.0)
            writes = tl.where(ids == goes, writes, 0.0)
            chunk_decay = tl.where(comes == goes, chunk_decay, 0.0)

        z = Z.load([i_b, i_zw, t0, i_slice * BV]).reshape(BT, BV)
        zs = (z.to(tl.float32) * writes[:, None]).to(z.dtype)
        S_low = S.to(Z.dtype)
        if ANCHOR > 0 and (t0 + BT if REVERSE else t0) % ANCHOR == 0:
            # The state that enters a block of ANCHOR tokens, for the gradient of the decay.
            anchor = (i_bh * NANCHOR + t0 // ANCHOR).to(tl.int64) * DIN * DOUT
            tl.store(ANCHORS + anchor + rows[:, None] * DOUT + cols[None, :], S_low)
        x = X.load([i_b, i_xy, t0, 0]).reshape(BT, DIN)
        acc = tl.dot(x, S_low, input_precision=PRECISION)
        y = Y.load([i_b, i_xy, t0, 0]).reshape(BT, DIN)
        S = tl.dot(y.T, zs, S * chunk_decay, input_precision=PRECISION)
        a = tl.dot(x, y.T, input_precision=PRECISION)
        # The mask goes into the exponent, whose unmasked half is positive.
        p = a * tl.exp2(tl.where(visible, decay, -float("inf")))
        # fma, because an addition would be folded into the dot, chain the two dots, and chained dots get a warp layout
        # that does the work of 64 rows twice where there are eight warps.
        inner = tl.dot(p.to(z.dtype), z, input_precision=PRECISION)
        acc = tl.fma(acc, tl.broadcast_to(reads[:, None], BT, BV), inner)
        OUT.store([i_b, i_h, t0, i_slice * BV], acc.to(OUT.dtype).reshape(1, 1, BT, BV))
        if ROW_DOTS:
            w = W.load([i_b, i_zw, t0, i_slice * BV]).reshape(BT, BV)
            tl.store(DOTS + i_bh.to(tl.int64) * TP + t0 + rt, tl.sum(acc * w.to(tl.float32), 1))
    if HAS_FINAL and i_seg == (0 if REVERSE else NSEG - 1):
        p = FINAL + i_bh.to(tl.int64) * DIN * DOUT + rows[:, None] * DOUT + cols[None, :]
        tl.store(p, S)


@triton.jit(do_not_specialize=["log2_scale"])
def forward(
    Q, K, V_, OUT, ANCHORS, SUM_TILES, SUMS, IDS, S0, FINAL, T, TP, SEG, NSEG, NANCHOR, log2_scale,
    H: tl.constexpr, GROUP: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr,
    DOCS: tl.constexpr, HAS_S0: tl.constexpr, HAS_FINAL: tl.constexpr, ANCHOR: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """o = scan(q, k, v). Slices of one head are neighbours in the grid, so that they share q and k in L2."""
    i_bh = tl.program_id(2)
    _scan(
        Q, K, V_, OUT, OUT, ANCHORS, SUM_TILES, SUMS, IDS, S0, FINAL, SUMS,
        i_bh // H, i_bh % H, i_bh % H // GROUP, i_bh % H, i_bh, tl.program_id(0), tl.program_id(1),
        T, TP, SEG, NSEG, NANCHOR, log2_scale, DV, 1,
        DK, DV, BT, BV, False, DOCS, HAS_S0, HAS_FINAL, ANCHOR, False, STAGES, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["log2_scale"])
def backward(
    Q, K, V_, DO, Q_SLICE, K_SLICE, DO_SLICE, DQ, DK_, DV_, ANCHORS, SUM_TILES, SUMS, IDS, S0, R0, DS0, Q_DOTS, K_DOTS,
    T, TP, SEG, NSEG, NANCHOR, dots_stride, log2_scale,
    H: tl.constexpr, GROUP: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, DOCS: tl.constexpr, HAS_S0: tl.constexpr, HAS_R0: tl.constexpr, HAS_DS0: tl.constexpr,
    ANCHOR: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, dk and dv as one launch; the first grid axis picks role and slice, so all roles of a head run together.

    dq and dk are those of each head, also where heads share a query and a key. They come with the row dots q . dq and
    k . dk of their columns, from fp32 accumulators.
    """
    NK: tl.constexpr = DK // BK
    role = tl.program_id(0)
    i_seg = tl.program_id(1)
    i_bh = tl.program_id(2)
    i_b = i_bh // H
    i_h = i_bh % H
    shared = i_h // GROUP
    if role < NK:
        _scan(
            DO, V_, K_SLICE, DQ, Q_SLICE, ANCHORS, SUM_TILES, SUMS, IDS, S0, DS0,
            Q_DOTS + role.to(tl.int64) * dots_stride,
            i_b, i_h, i_h, shared, i_bh, role, i_seg, T, TP, SEG, NSEG, NANCHOR, log2_scale, 1, DV,
            DV, DK, BT, BK, False, DOCS, HAS_S0, False, 0, True, STAGES, PRECISION,
        )  # fmt: skip
    elif role < 2 * NK:
        _scan(
            V_, DO, Q_SLICE, DK_, K_SLICE, ANCHORS, SUM_TILES, SUMS, IDS, R0, DS0,
            K_DOTS + (role - NK).to(tl.int64) * dots_stride,
            i_b, i_h, i_h, shared, i_bh, role - NK, i_seg, T, TP, SEG, NSEG, NANCHOR, log2_scale, 1, DV,
            DV, DK, BT, BK, True, DOCS, HAS_R0, False, 0, True, STAGES, PRECISION,
        )  # fmt: skip
    else:
        _scan(
            K, Q, DO_SLICE, DV_, DO_SLICE, ANCHORS, SUM_TILES, SUMS, IDS, R0, DS0, K_DOTS,
            i_b, i_h, shared, i_h, i_bh, role - 2 * NK, i_seg, T, TP, SEG, NSEG, NANCHOR, log2_scale, DV, 1,
            DK, DV, BT, BV, True, DOCS, HAS_R0, HAS_DS0, ANCHOR, False, STAGES, PRECISION,
        )  # fmt: skip


@triton.jit
def _relevant_chunks(
    SUMS, IDS, begin, chunks, BT: tl.constexpr, CHUNKS: tl.constexpr, REVERSE: tl.constexpr, DOCS: tl.constexpr
):
    """How many chunks of a segment, counted from where the state leaves it, still matter there."""
    n = tl.arange(0, CHUNKS)
    # The update of the n-th of them passes through those nearer to the exit, the (n - 1)-th and so on. Their decays are
    # summed without its own: subtracting it from a sum would cancel where decay is fast.
    nearer = n if REVERSE else chunks - n + 1
    passed = tl.cumsum(tl.load(SUMS + begin + nearer * BT - 1, mask=(n > 0) & (n < chunks), other=0.0), 0)
    relevant = (n < chunks) & (passed >= NEGLIGIBLE_LOG2)
    if DOCS:
        # It writes into the document at its own exit.
        exits = n * BT if REVERSE else (chunks - n) * BT - 1
        goes = tl.load(IDS + begin + (0 if REVERSE else chunks * BT - 1))
        relevant = relevant & (tl.load(IDS + begin + exits, mask=n < chunks, other=0) == goes)
    return tl.sum(relevant.to(tl.int32), 0)


@triton.jit(do_not_specialize=["log2_scale"])
def segment_states(
    Y, Z, SUMS, IDS, STATES, DECAYS, T, TP, SEG, NSEG, log2_scale,
    H: tl.constexpr, GROUP: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, CHUNKS: tl.constexpr, REVERSE: tl.constexpr, DOCS: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The state update of one segment alone, fp32, and its decay of the state that comes in.

    Segment j in the order of the state's walk (the second grid axis: the first n of the NSEG, at most CHUNKS chunks
    each) writes STATES[bh, j + 1] of n + 1 and DECAYS[bh, j] of n. Only chunks that still matter at its end are read.
    """
    NV: tl.constexpr = DV // BV
    i_k = tl.program_id(0) // NV
    i_v = tl.program_id(0) % NV
    j = tl.program_id(1)
    n = tl.num_programs(1)
    i_bh = tl.program_id(2)
    i_b = i_bh // H
    rt = tl.arange(0, BT)
    SUMS += i_bh.to(tl.int64) * TP
    IDS += i_b.to(tl.int64) * TP
    S = tl.zeros([BK, BV], tl.float32)
    begin = (NSEG - 1 - j if REVERSE else j) * SEG
    chunks = tl.cdiv(tl.minimum(SEG, T - begin), BT)
    relevant = _relevant_chunks(SUMS, IDS, begin, chunks, BT, CHUNKS, REVERSE, DOCS)
    for i in tl.range(chunks - relevant, chunks, num_stages=STAGES):
        t0 = begin + (chunks - 1 - i if REVERSE else i) * BT
        b = tl.load(SUMS + t0 + rt)
        b_last = tl.load(SUMS + t0 + BT - 1)
        writes = tl.exp2(b if REVERSE else b_last - b + log2_scale)
        chunk_decay = tl.exp2(b_last)
        if DOCS:
            first = tl.load(IDS + t0)
            last = tl.load(IDS + t0 + BT - 1)
            comes = tl.load(IDS + (tl.minimum(t0 + BT, TP - 1) if REVERSE else tl.maximum(t0 - 1, 0)))
            goes = first if REVERSE else last
            writes = tl.where(tl.load(IDS + t0 + rt) == goes, writes, 0.0)
            chunk_decay = tl.where(comes == goes, chunk_decay, 0.0)
        y = Y.load([i_b, i_bh % H // GROUP, t0, i_k * BK]).reshape(BT, BK)
        z = Z.load([i_b, i_bh % H, t0, i_v * BV]).reshape(BT, BV)
        zs = (z.to(tl.float32) * writes[:, None]).to(z.dtype)
        S = tl.dot(y.T, zs, S * chunk_decay, input_precision=PRECISION)
    rows = i_k * BK + tl.arange(0, BK)
    cols = i_v * BV + tl.arange(0, BV)
    state = (i_bh * (n + 1) + j + 1).to(tl.int64) * DK * DV
    tl.store(STATES + state + rows[:, None] * DV + cols[None, :], S)
    if tl.program_id(0) == 0:
        c = tl.arange(0, CHUNKS)
        decay = tl.exp2(tl.sum(tl.load(SUMS + begin + (c + 1) * BT - 1, mask=c < chunks, other=0.0), 0))
        if DOCS:
            end = begin + chunks * BT
            comes = tl.load(IDS + (tl.minimum(end, TP - 1) if REVERSE else tl.maximum(begin - 1, 0)))
            goes = tl.load(IDS + (begin if REVERSE else end - 1))
            decay = tl.where(comes == goes, decay, 0.0)
        tl.store(DECAYS + i_bh * n + j, decay)


@triton.jit
def chain_segments(STATES, DECAYS, START, N, KV, BLOCK: tl.constexpr, HAS_START: tl.constexpr):
    """STATES[bh, j], the update of segment j - 1 alone, becomes the state that enters segment j, 0 <= j <= N.

    A scan over segments in the order of the state's walk, in place, fp32, BLOCK elements of the state a program.
    """
    bh = tl.program_id(1).to(tl.int64)
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    STATES += bh * (N + 1) * KV + o
    S = tl.load(START + bh * KV + o) if HAS_START else tl.zeros([BLOCK], tl.float32)
    tl.store(STATES, S)
    for j in range(N):
        STATES += KV
        S = S * tl.load(DECAYS + bh * N + j) + tl.load(STATES)
        tl.store(STATES, S)


@triton.jit
def anchor_products(
    S, R, S_END, R_END, OUT, N, KV, BLOCK: tl.constexpr, HAS_END: tl.constexpr,
):  # fmt: skip
    """OUT[bh, i] = <state entering block i + 1, gradient entering block i from the right>, the end's for the last."""
    i = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    acc = tl.zeros([BLOCK], tl.float32)
    for j in range(0, KV, BLOCK):
        o = j + tl.arange(0, BLOCK)
        if i < N - 1:
            s = tl.load(S + (bh * N + i + 1) * KV + o).to(tl.float32)
            acc += s * tl.load(R + (bh * N + i) * KV + o).to(tl.float32)
        elif HAS_END:
            acc += tl.load(S_END + bh * KV + o) * tl.load(R_END + bh * KV + o)
    tl.store(OUT + bh * N + i, tl.sum(acc, 0))


@triton.jit
def decay_gradient(
    Q_DOTS, K_DOTS, PRODUCTS, IDS, G, OUT, T, TP, N, dots_stride, g_b, g_t, g_h, out_b, out_t, out_h, tau,
    H: tl.constexpr, SLICES: tl.constexpr, BLOCK: tl.constexpr, DOCS: tl.constexpr, LOGITS: tl.constexpr,
):  # fmt: skip
    """d_t = sum_{s >= t} (q_s . dq_s - k_s . dk_s), of one block and from its anchor, the product at its right edge.

    A sum over the whole sequence loses accuracy like sqrt(T). OUT [B, T, H] (any strides) is the gradient of the
    natural log decay, or with LOGITS of the gate logits G.
    """
    i = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    b = bh // H
    h = bh % H
    t = i * BLOCK + tl.arange(0, BLOCK)
    inside = t < T
    d = tl.zeros([BLOCK], tl.float32)
    for s in range(SLICES):
        o = s * dots_stride + bh * TP + t
        d += tl.load(Q_DOTS + o, mask=inside, other=0.0) - tl.load(K_DOTS + o, mask=inside, other=0.0)
    carry = tl.load(PRODUCTS + bh * N + i)
    if DOCS:
        ids = IDS + b * TP
        here = tl.load(ids + t, mask=t < TP, other=0)
        after = tl.load(ids + t + 1, mask=t + 1 < TP, other=0)
        before = tl.load(ids + t - 1, mask=inside & (t > 0), other=0)
        right = tl.minimum((i + 1) * BLOCK, TP) - 1
        end = tl.load(ids + right)
        beyond = tl.load(ids + tl.minimum(right + 1, TP - 1))
        stop = ((t + 1 < T) & (here != after)).to(tl.int32)
        d, _ = tl.associative_scan((d, stop), 0, _segmented_add, reverse=True)
        d += tl.where((here == end) & (end == beyond), carry, 0.0)
        d = tl.where((t > 0) & (here != before), 0.0, d)
    else:
        d = carry + tl.cumsum(d, 0, reverse=True)
    if LOGITS:
        # d logsigmoid(x) / dx = sigmoid(-x)
        x = tl.load(G + b * g_b + t.to(tl.int64) * g_t + h * g_h, mask=inside, other=0.0).to(tl.float32)
        d = d * tl.sigmoid(-x) / tau
    tl.store(OUT + b * out_b + t.to(tl.int64) * out_t + h * out_h, d.to(OUT.dtype.element_ty), mask=inside)


@triton.jit
def step(
    Q, K, V_, G, STATE, NEW, OUT, q_b, q_h, k_b, k_h, v_b, v_h, g_b, g_h, scale,
    H: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr, HAS_STATE: tl.constexpr,
):  # fmt: skip
    """One token: NEW = e^g STATE + scale k^T v, OUT = q NEW, all fp32 inside. NEW may be STATE."""
    bh = tl.program_id(1).to(tl.int64)
    b = bh // H
    h = bh % H
    rows = tl.arange(0, DK)
    cols = tl.program_id(0) * BV + tl.arange(0, BV)
    q = tl.load(Q + b * q_b + h * q_h + rows).to(tl.float32)
    k = tl.load(K + b * k_b + h * k_h + rows).to(tl.float32) * scale
    v = tl.load(V_ + b * v_b + h * v_h + cols).to(tl.float32)
    S = k[:, None] * v[None, :]
    at = bh * DK * DV + rows[:, None] * DV + cols[None, :]
    if HAS_STATE:
        S += tl.exp(tl.load(G + b * g_b + h * g_h).to(tl.float32)) * tl.load(STATE + at)
    tl.store(NEW + at, S)
    tl.store(OUT + bh * DV + cols, tl.sum(q[:, None] * S, 0).to(OUT.dtype.element_ty))
