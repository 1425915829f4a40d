"""Operators by the name of what they do, for ``[recompute] save``."""

from __future__ import annotations

SETS = {
    "matmul": (
        "aten.mm",
        "aten.addmm",
        "aten.bmm",
        "aten.baddbmm",
        "aten.mv",
        "aten.addmv",
        "aten.linear",
        "aten._scaled_mm",
        "aten._grouped_mm",
        "aten._scaled_grouped_mm",
    ),
    "attention": (
        "aten._scaled_dot_product_flash_attention",
        "aten._scaled_dot_product_efficient_attention",
        "aten._scaled_dot_product_cudnn_attention",
        "aten._scaled_dot_product_flash_attention_for_cpu",
        "aten._scaled_dot_product_fused_attention_overrideable",
        "aten._scaled_dot_product_attention_math_for_mps",
        "aten._flash_attention_forward",
        "aten._efficient_attention_forward",
        "higher_order.flex_attention",
        "flash_attn._flash_attn_forward",
        "flash_attn._flash_attn_varlen_forward",
        "flash_attn_3._flash_attn_forward",
    ),
    "convolution": (
        "aten.convolution",
        "aten._convolution",
        "aten.cudnn_convolution",
        "aten.mkldnn_convolution",
        "aten.miopen_convolution",
    ),
    "norm": (
        "aten.native_layer_norm",
        "aten._fused_rms_norm",
        "aten.native_group_norm",
        "aten.native_batch_norm",
    ),
}
"""Those that this version of torch, and what is installed beside it, has not are left out."""

ALIASES = {"mm": "matmul", "sdpa": "attention", "conv": "convolution"}
"""Short names of sets."""
