"""The parameters of FlashAttention's low-level functions, version by version, as their sources have them.

Read in Dao-AILab/flash-attention and huggingface/kernels-community, in the lines that tests/kernels/README.md lists.
Annotations and comments are left out; order, names and defaults are unchanged. The options of FlashAttention-4 that
only tune its backward are one constant.
"""

_TWO_LENGTHS = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
_TWO_GRADIENTS = "dout, q, k, v, out, softmax_lse, dq, dk, dv"
_TWO_END = "block_table=None, leftpad_k=None, seqused_k=None"


def _two(window: str, window_with_defaults: str, varlen_end: str, backward_end: str) -> dict[str, str]:
    """Return the functions of version 2, for dense and for packed calls."""
    return {
        "_flash_attn_forward": f"q, k, v, dropout_p, softmax_scale, causal, {window}, softcap, alibi_slopes, "
        "return_softmax",
        "_flash_attn_varlen_forward": f"q, k, v, {_TWO_LENGTHS}, dropout_p, softmax_scale, causal, "
        f"{window_with_defaults}, softcap=0.0, alibi_slopes=None, return_softmax=False, {varlen_end}",
        "_flash_attn_backward": f"{_TWO_GRADIENTS}, dropout_p, softmax_scale, causal, {window}, softcap, "
        "alibi_slopes, deterministic, rng_state=None",
        "_flash_attn_varlen_backward": f"{_TWO_GRADIENTS}, {_TWO_LENGTHS}, dropout_p, softmax_scale, causal, "
        f"{window}, softcap, alibi_slopes, deterministic, {backward_end}",
    }


_BOUNDS = "window_size_left, window_size_right", "window_size_left=-1, window_size_right=-1"
_TWO_8 = _two(*_BOUNDS, f"{_TWO_END}, zero_tensors=False", "rng_state=None, zero_tensors=False")

_THREE_8_FORWARD = (
    "q, k, v, k_new, v_new, qv, out, cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new, seqused_q, seqused_k, "
    "max_seqlen_q, max_seqlen_k, page_table, kv_batch_idx, leftpad_k, rotary_cos, rotary_sin, seqlens_rotary, "
    "q_descale, k_descale, v_descale, softmax_scale, causal, window_size=(-1, -1), {chunk}softcap=0.0, "
    "rotary_interleaved=True, scheduler_metadata=None, num_splits=1, pack_gqa=None, sm_margin=0{end}"
)
_THREE_8_BACKWARD = (
    "dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, sequed_q, sequed_k, max_seqlen_q, max_seqlen_k, "
    "dq, dk, dv, softmax_scale, causal, window_size=(-1, -1), softcap=0.0, deterministic=False, sm_margin=0"
)
_THREE_HEAD = {
    "_flash_attn_forward": "q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, "
    "cu_seqlens_k=None, cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, "
    "page_table=None, kv_batch_idx=None, leftpad_k=None, rotary_cos=None, rotary_sin=None, seqlens_rotary=None, "
    "q_descale=None, "
    "k_descale=None, v_descale=None, softmax_scale=None, causal=False, window_size_left=-1, window_size_right=-1, "
    "attention_chunk=0, softcap=0.0, rotary_interleaved=True, scheduler_metadata=None, num_splits=1, pack_gqa=None, "
    "sm_margin=0",
    "_flash_attn_backward": "dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, "
    "sequed_k=None, max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, "
    "is_causal=False, window_size_left=-1, window_size_right=-1, softcap=0.0, deterministic=False, sm_margin=0",
}


def _three_8(chunk: str, end: str) -> dict[str, str]:
    return {
        "_flash_attn_forward": _THREE_8_FORWARD.format(chunk=chunk, end=end),
        "_flash_attn_backward": _THREE_8_BACKWARD,
    }


_FOUR_LENGTHS = (
    "cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None"
)
_FOUR_WINDOW = "window_size_left=None, window_size_right=None"
_FOUR_TUNING = (
    "m_block_size=64, n_block_size=128, num_threads=256, pack_gqa=False, num_stages_Q=2, num_stages_dO=2, "
    "SdP_swapAB=False, dKV_swapAB=False, dQ_swapAB=False, AtomLayoutMSdP=2, AtomLayoutNdKV=2, AtomLayoutMdQ=2, "
    "V_in_regs=False"
)


def _four(qv: str, shortest: str, blocks: str, forward_end: str, scalars: str, backward_end: str) -> dict[str, str]:
    """Return the functions of version 4: the arguments of all betas, and those that some betas added."""
    return {
        "_flash_attn_fwd": f"q, k, v, {qv}{_FOUR_LENGTHS}, {shortest}page_table=None, softmax_scale=None, "
        f"causal=False, softcap=None, {_FOUR_WINDOW}, learnable_sink=None, {blocks}, num_threads=384, num_splits=1, "
        "pack_gqa=None, _arch=None, score_mod=None, mask_mod=None, block_sparse_tensors=None, return_lse=False, "
        f"out=None, lse=None, aux_tensors=None{forward_end}",
        "_flash_attn_bwd": f"q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, {_FOUR_WINDOW}, "
        f"{_FOUR_TUNING}, {_FOUR_LENGTHS}, deterministic=False, dq=None, dk=None, dv=None, score_mod=None, "
        f"score_mod_bwd=None, mask_mod=None, aux_tensors=None, {scalars}block_sparse_tensors=None{backward_end}",
    }


_QV, _SHORTEST, _SCALARS = "qv=None, ", "min_seqlen_k=None, ", "aux_scalars=None, "
_OLD_BLOCKS, _BLOCKS = "m_block_size=128, n_block_size=128", "tile_mn=None, mma_pv_is_rs=None, intra_wg_overlap=None"
_DESCALE = "q_descale=None, k_descale=None, v_descale=None, gather_kv_indices=None"
_SCHEDULE = "scheduler_metadata=None, seqlen_k_per_split=None, disable_scheduler_metadata=False"
_FOUR_26 = _four(
    _QV,
    _SHORTEST,
    _BLOCKS,
    f", aux_scalars=None, {_DESCALE}, {_SCHEDULE}",
    _SCALARS,
    ", dlse=None, learnable_sink=None",
)
_FOUR_8 = _four("", "", _BLOCKS, "", "", ", dlse=None")

# Stand-in -> function -> parameters.
SIGNATURES: dict[str, dict[str, str]] = {
    "2.6.3": _two("window_size", "window_size=(-1, -1)", _TWO_END, "rng_state=None"),
    "2.7.2.post1": _two(*_BOUNDS, _TWO_END, "rng_state=None"),
    "2.8.3": _TWO_8,
    "3-2.8.3": _three_8("attention_chunk=0, ", ""),
    "3-2025-09": _THREE_HEAD,
    "4-beta4": _four("", "", _OLD_BLOCKS, "", "", ""),
    "4-beta10": _four(_QV, _SHORTEST, _BLOCKS, f", {_DESCALE}", "", ", dlse=None"),
    "4-beta24": _four(_QV, _SHORTEST, _BLOCKS, f", aux_scalars=None, {_DESCALE}", _SCALARS, ", dlse=None"),
    "4-beta26": _FOUR_26,
    "kernels-community/flash-attn2": _TWO_8,
    "kernels-community/flash-attn3": _THREE_HEAD,
    "kernels-community/vllm-flash-attn3": _three_8("", ", s_aux=None"),
    "kernels-community/flash-attn4": _FOUR_8,
}
# flash_attn.cute inside wheels of flash-attn 2.8.3: not FlashAttention-4.
CUTE_OF_2_8_3 = {
    "_flash_attn_fwd": "q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, "
    "page_table=None, softmax_scale=None, causal=False, softcap=None, window_size_left=None, window_size_right=None, "
    "learnable_sink=None, m_block_size=128, n_block_size=128, num_threads=384, pack_gqa=None, "
    "_compute_capability=None",
    "_flash_attn_bwd": "q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, m_block_size=64, "
    "n_block_size=128, num_threads=256, num_stages_Q=2, num_stages_dO=2, SdP_swapAB=False, dKV_swapAB=False, "
    "dQ_swapAB=False, AtomLayoutMSdP=2, AtomLayoutNdKV=2, AtomLayoutMdQ=2, V_in_regs=False",
}
# hopper/flash_attn_interface.py at v2.7.4: no `qv`, but a sink.
THREE_OF_2_7_4 = {
    "_flash_attn_forward": "q, k, v, k_new, v_new, out, cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new, seqused_q, "
    "seqused_k, max_seqlen_q, max_seqlen_k, page_table, kv_batch_idx, leftpad_k, rotary_cos, rotary_sin, q_descale, "
    "k_descale, v_descale, softmax_scale, causal, window_size=(-1, -1), sink_token_length=0, softcap=0.0, "
    "rotary_interleaved=True, num_splits=1, pack_gqa=None, sm_margin=0",
    "_flash_attn_backward": "dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, sequed_q, sequed_k, "
    "max_seqlen_q, max_seqlen_k, dq, dk, dv, softmax_scale, causal, window_size=(-1, -1), sink_token_length=0, "
    "softcap=0.0, deterministic=False, sm_margin=0",
}
