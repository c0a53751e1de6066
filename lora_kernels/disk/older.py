"""What transformers 5 has renamed: checkpoints, and it when it saves, keep the names of transformers 4."""

import re

# A group a family, applied whole: names of now -> older ones.
_GROUPS = (
    ((r"\.mlp\.", ".block_sparse_moe."),),  # Mixtral
    ((r"^lm_head\.", "embed_out."),),  # GPT-NeoX
    (  # ViT, DeiT, BEiT, DINOv2
        (r"\blayers\.(?=\d)", "encoder.layer."),
        (r"\battention\.q_proj\.", "attention.attention.query."),
        (r"\battention\.k_proj\.", "attention.attention.key."),
        (r"\battention\.v_proj\.", "attention.attention.value."),
        (r"\battention\.o_proj\.", "attention.output.dense."),
        (r"\bmlp\.fc1\.", "intermediate.dense."),
        (r"\bmlp\.fc2\.", "output.dense."),
    ),
    (  # Swin
        (r"\battention\.q_proj\.", "attention.self.query."),
        (r"\battention\.k_proj\.", "attention.self.key."),
        (r"\battention\.v_proj\.", "attention.self.value."),
        (r"\battention\.o_proj\.", "attention.output.dense."),
        (r"\bmlp\.fc1\.", "intermediate.dense."),
        (r"\bmlp\.fc2\.", "output.dense."),
    ),
    (  # SegFormer
        (r"\bstages\.(\d+)\.blocks\.(?=\d)", r"encoder.block.\1."),
        (r"\bstages\.(\d+)\.(patch_embeddings|layer_norm)\.", r"encoder.\2.\1."),
        (r"\battention\.q_proj\.", "attention.self.query."),
        (r"\battention\.k_proj\.", "attention.self.key."),
        (r"\battention\.v_proj\.", "attention.self.value."),
        (r"\battention\.sequence_reduction\.sequence_reduction\.", "attention.self.sr."),
        (r"\battention\.sequence_reduction\.layer_norm\.", "attention.self.layer_norm."),
        (r"\battention\.o_proj\.", "attention.output.dense."),
        (r"\bmlp\.fc1\.", "mlp.dense1."),
        (r"\bmlp\.fc2\.", "mlp.dense2."),
        (r"\blinear_projections\.", "linear_c."),
        (r"\blayernorm_before\.", "layer_norm_1."),
        (r"\blayernorm_after\.", "layer_norm_2."),
    ),
)


def older_names(name):
    """What a tensor may have been called, one name a family."""
    names = []
    for rules in _GROUPS:
        older = name
        for pattern, replacement in rules:
            older = re.sub(pattern, replacement, older)
        names.append(older)
    return [older for older in dict.fromkeys(names) if older != name]
