"""Precision of each piece in bf16 and fp16 runs: the parameters that stay in fp32, and the dtype of each computation.

| piece | parameters | computed in |
| --- | --- | --- |
| sinusoid of the timestep, rotary tables | none | fp64, given out as fp32 |
| time_embedding, time_projection, motion_controller | fp32 | fp32 |
| modulation of blocks and head, its shift, scale and gate | fp32 | fp32 |
| LayerNorms without weights, norm3, img_emb.proj.0 and .4 | fp32 | fp32, cast back to the stream's dtype |
| norm_q, norm_k, norm_k_img | the model's dtype | fp32, cast back |
| rotation of queries and keys, gated residual additions | none | fp32, cast back |
| patch_embedding, text_embedding, the rest of img_emb | the model's dtype | the same |
| q, k, v, k_img, v_img, o, ffn, cross attention's sum and residual addition | the model's dtype | the same |
| head: norm, modulation and linear; the velocity | fp32 | fp32 |

The official Wan runs time embedding, time projection, modulation and head with fp32 autocast. diffusers keeps
time_embedder, scale_shift_table and the LayerNorms in fp32 (`_keep_in_fp32_modules`) but computes time_proj and
proj_out in the model's dtype; this follows the official implementation, of which that list is a part. So one model
holds parameters of two dtypes. Do not run it under autocast, which would put the fp32 pieces back into the low dtype.
"""

from __future__ import annotations

_FP32_MODULES = ("time_embedding", "time_projection", "motion_controller", "head")
_IMAGE_NORMS = ("img_emb.proj.0.", "img_emb.proj.4.")


def keep_fp32(name: str) -> bool:
    """Tell whether the parameter of this native name stays fp32 whatever the model's dtype is."""
    parts = name.split(".")
    in_norm = "norm3" in parts or name.startswith(_IMAGE_NORMS)
    return parts[0] in _FP32_MODULES or parts[-1] == "modulation" or in_norm
