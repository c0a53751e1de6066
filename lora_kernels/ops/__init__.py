"""The operations: see ``library.py`` for the schemas, ``dispatch.py`` for which backend runs.

A folder a family: ``linear`` (one adapter), ``multi`` (one adapter a row), ``grouped`` (projections of one input),
``embedding``, ``merge`` (into the weight), ``exact`` (into the weight, undone bit for bit), ``dora``.
In each, ``api.py`` is public, ``reference.py`` states the maths.
"""

from .embedding.api import lora_embedding
from .exact.api import merge_exact_, switch_exact_, unmerge_exact_
from .exact.residual import MergeResidual
from .grouped.api import grouped_lora_linear
from .linear.api import lora_add_, lora_linear
from .merge.api import merge_, merge_list_, switch_, unmerge_, unmerge_list_
from .multi.api import lora_expand_, lora_shrink, multi_lora_linear
from .multi.plan import BatchPlan, plan_batch

__all__ = [
    "BatchPlan",
    "MergeResidual",
    "grouped_lora_linear",
    "lora_add_",
    "lora_embedding",
    "lora_expand_",
    "lora_linear",
    "lora_shrink",
    "merge_",
    "merge_exact_",
    "merge_list_",
    "multi_lora_linear",
    "plan_batch",
    "switch_",
    "switch_exact_",
    "unmerge_",
    "unmerge_exact_",
    "unmerge_list_",
]
