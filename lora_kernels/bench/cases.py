"""What is measured: named shapes, and cases with the limit that their FLOPs or bytes set."""

import dataclasses
import itertools

# name: (in_features, out_features)
SHAPES = {
    "llama3-8b-qo": (4096, 4096),
    "llama3-8b-kv": (4096, 1024),
    "llama3-8b-gate-up": (4096, 14336),
    "llama3-8b-down": (14336, 4096),
    "square-2048": (2048, 2048),
    "minilm-384": (384, 384),
}
# The same, too large for the suites of a CPU.
GPU_SHAPES = {"square-8192": (8192, 8192)}
# name: (in_features, out_features a projection) of a ``grouped`` case; a plain shape stands for two projections of it.
GROUPS = {"llama3-8b-qkv": (4096, (4096, 1024, 1024))}
NUM_TOKENS = (1, 4, 8, 16, 64, 512, 4096)
NUM_ADAPTERS = 16  # of a ``multi`` case, taken by its rows in turn
OPS = ("forward", "multi", "grouped", "merge", "unmerge", "switch", "train", "overhead")
GPU_OPS = ("gemm", "dx", "exact", "switch_exact")  # of the benchmark on a GPU alone, see gpu.py
DTYPES = ("bfloat16", "float32", "float16")


@dataclasses.dataclass(frozen=True)
class Case:
    """One thing to time. ``adapter_dtype`` None is ``dtype``; ``adapters``: of a ``multi`` case."""

    op: str
    shape: str
    num_tokens: int = 0
    rank: int = 16
    dtype: str = "bfloat16"
    adapter_dtype: str | None = None
    dropout: float = 0.0
    adapters: int = NUM_ADAPTERS

    @property
    def sizes(self):
        """(in_features, out_features), of a ``grouped`` case those of all projections together."""
        if self.op == "overhead":
            return (4, 4)
        return (self._group[0], sum(self.widths)) if self.op == "grouped" else (SHAPES | GPU_SHAPES)[self.shape]

    @property
    def _group(self):
        in_features, out_features = SHAPES.get(self.shape, (None, None))
        return GROUPS.get(self.shape, (in_features, (out_features, out_features)))

    @property
    def widths(self):
        """out_features of each projection of a ``grouped`` case."""
        return self._group[1]

    @property
    def name(self):
        parts = [self.op, self.shape, f"M={self.num_tokens}" if self.num_tokens else "", f"r={self.rank}", self.dtype]
        parts += ["A,B " + self.adapter_dtype] if self.adapter_dtype not in (None, self.dtype) else []
        parts += [f"dropout {self.dropout}"] if self.dropout else []
        parts += [f"{self.adapters} adapters"] if self.adapters != NUM_ADAPTERS else []
        return " ".join(part for part in parts if part)

    @property
    def limit(self):
        """Least possible time relative to the base; None where it is not that of the base product."""
        in_features, out_features = self.sizes
        skinny = self.rank * (in_features + out_features) / (in_features * out_features)
        if self.op in ("forward", "dx"):
            return 1 + skinny
        if self.op == "gemm":
            return 1.0
        if self.op == "train":
            return 1 + 1.5 * skinny  # six skinny products beside the base's two
        if self.op == "grouped":
            return 1 + self.rank * (len(self.widths) * in_features + out_features) / (in_features * out_features)
        if self.op == "multi":
            return 1 + min(self.num_tokens, self.adapters) * skinny  # bytes: rows bring their own adapters
        return None


def _forward(shapes, dtypes, tokens, ranks):
    return [
        Case("forward", shape, m, rank, dtype)
        for shape, dtype, rank, m in itertools.product(shapes, dtypes, ranks, tokens)
    ]


def _around(shapes, dtypes):
    """Everything but the forward of one adapter."""
    found = []
    for shape, dtype in itertools.product(shapes, dtypes):
        found += [Case("multi", shape, 16, dtype=dtype), Case("grouped", shape, 16, dtype=dtype)]
        found += [Case(op, shape, dtype=dtype) for op in ("merge", "unmerge", "switch")]
        found += [Case("train", shape, 512, dtype=dtype, dropout=p) for p in (0.0, 0.1)]
    return [*found, *(Case("overhead", "4x4", 4, rank=4, dtype=dtype) for dtype in dtypes)]


def suite(name):
    """The cases of a named suite; ``targets`` is in targets.py."""
    both = ("bfloat16", "float32")
    if name == "quick":
        return [*_forward(["minilm-384"], ["float32"], [4], [8]), Case("merge", "minilm-384", rank=8, dtype="float32")]
    if name == "default":
        shapes = ("minilm-384", "square-2048", "llama3-8b-qo")
        return _forward(shapes, both, (1, 16, 512), (16,)) + _around(shapes, both)
    if name == "full":
        return _forward(SHAPES, both, NUM_TOKENS, (16, 64)) + _around(SHAPES, both)
    raise ValueError(f"suite: expected quick, default, full or targets, got {name!r}")
