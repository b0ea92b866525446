"""The gated delta rule in plain torch: correct on every device, linear memory in the sequence length.

In chunks of C tokens (arXiv 2406.06484 section 3.2, 2412.06464 section 3.3). With b_j the log decay summed from the
start of a chunk to its token j, and S the state that enters it, what token i writes is row i of U - W S,

    (I + A) [U W] = [beta v, beta k exp(b)] ,     A_ij = beta_i exp(b_i - b_j) k_i . k_j   for j < i

and the outputs and the next state are those of gated retention with U - W S in place of v.

Tensor legend: B batch, T time, H heads, K key width, V value width, N chunks, C chunk size.
"""

import torch
from torch import Tensor

from yoco_megatron.ops.gated_delta.reference import check_layout
from yoco_megatron.ops.gated_retention.torch import compute_dtype, decays_in_chunks, in_chunks

CHUNK = 64


def chunkwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    document_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The rule over a whole sequence, differentiable in all but document_ids: arguments and errors of
    `reference.recurrent`. Any strides.

    Returns o [B, T, H, V] in q.dtype and the final state [B, H, K, V]. The arithmetic and the final state are float32,
    or float64 if q is float64.
    """
    check_layout(q, k, v, log_decay, beta, initial_state, document_ids)
    B, T, H, K = q.shape
    V, C, compute = v.shape[-1], min(CHUNK, T), compute_dtype(q)
    q_BHNCK, k_BHNCK, v_BHNCV, beta_BHNC = (in_chunks(x, C, compute) for x in (q, k, v, beta))
    q_BHNCK, beta_BHNC1 = q_BHNCK * (K**-0.5 if scale is None else scale), beta_BHNC[..., None]
    decay_BHNCC, from_start_BHNC1, to_end_BHNC1 = decays_in_chunks(log_decay, document_ids, C, compute)

    # Inside the chunks: all of them at once.
    beta_k = k_BHNCK * beta_BHNC1
    A_BHNCC = (beta_k @ k_BHNCK.transpose(-1, -2) * decay_BHNCC).tril(-1)
    # The solver takes the diagonal for ones.
    written = torch.cat([v_BHNCV * beta_BHNC1, beta_k * from_start_BHNC1], dim=-1)
    written = torch.linalg.solve_triangular(A_BHNCC, written, upper=False, unitriangular=True)
    U_BHNCV, W_BHNCK = written.split((V, K), dim=-1)
    scores_BHNCC = q_BHNCK @ k_BHNCK.transpose(-1, -2) * decay_BHNCC
    q_BHNCK, k_BHNCK = q_BHNCK * from_start_BHNC1, k_BHNCK * to_end_BHNC1

    S_BHKV = q.new_zeros(B, H, K, V, dtype=compute) if initial_state is None else initial_state.to(compute)
    outputs = []
    of_chunks = (x.unbind(2) for x in (q_BHNCK, k_BHNCK, U_BHNCV, W_BHNCK, scores_BHNCC, from_start_BHNC1[..., -1:, :]))
    for q_, k_, U, W, scores, decay in zip(*of_chunks, strict=True):
        new_BHCV = U - W @ S_BHKV
        outputs.append(q_ @ S_BHKV + scores @ new_BHCV)
        S_BHKV = decay * S_BHKV + k_.transpose(-1, -2) @ new_BHCV
    o_BHTV = torch.cat(outputs, dim=2)[:, :, :T]
    return o_BHTV.transpose(1, 2).to(q.dtype).contiguous(), S_BHKV


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    state: Tensor | None,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """One token of the recurrence, for decoding.

    Shapes: q, k [B, H, K]; v [B, H, V]; log_decay, beta [B, H]; state [B, H, K, V] (zeros if None).
    Returns o [B, H, V] in q.dtype and the new state, a new tensor: float32, or float64 if q is float64.
    """
    compute, dtype = compute_dtype(q), q.dtype
    if state is None:
        state = q.new_zeros(*q.shape, v.shape[-1], dtype=compute)
    q, k, v, log_decay, beta = (x.to(compute) for x in (q, k, v, log_decay, beta))
    S_BHKV = log_decay.exp()[..., None, None] * state.to(compute)
    written_BH1V = beta[..., None, None] * (v[..., None, :] - k[..., None, :] @ S_BHKV)
    S_BHKV = S_BHKV + k[..., :, None] * written_BH1V
    o_BHV = (q[..., None, :] @ S_BHKV).squeeze(-2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return o_BHV.to(dtype), S_BHKV
