"""What is tuned and with which configurations: pure functions of sizes and of the GPU."""

import dataclasses
import itertools

from ..ops import tuning
from ..ops.grouped import config as grouped
from ..ops.linear import config as linear
from ..ops.linear import train_config
from ..ops.merge import config as merge
from ..ops.multi import config as multi

_HALF = 2  # bytes of an element: only half precision is tuned
_SPARE = 1024  # bytes of shared memory that barriers and reductions may take beside the tiles


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What rules and filters ask of a GPU; ``shared_limit``: bytes of shared memory that one block may ask for."""

    name: str
    capability: tuple
    num_sms: int
    shared_limit: int


@dataclasses.dataclass(frozen=True)
class Problem:
    """One call to be tuned. ``skinny`` has ``out_features`` 0.

    ``num_slots``: 0 is one adapter for all rows. ``widths``: out_features of projections that share their input.
    ``grad``, ``low``: which products of ``skinny`` are asked for. ``dropout``: through a mask. ``train``: h comes out.
    """

    op: str
    num_tokens: int
    in_features: int
    out_features: int
    rank: int
    num_slots: int = 0
    grad: bool = True
    low: bool = False
    dropout: bool = False
    widths: tuple = ()
    train: bool = False

    @property
    def sizes(self):
        """What the launcher of the op gives to :func:`~lora_kernels.ops.tuning.measured`."""
        m, k, n, r = self.num_tokens, self.in_features, self.out_features, self.rank
        masked, terms = {"D": int(self.dropout), "L": self.num_slots}, {"T": max(1, len(self.widths))}
        if self.op == "lora_linear":
            return {"M": m, "K": k, "N": n, "R": r, "B": _HALF}
        if self.op == "grouped_lora_linear":
            return {"M": m, "K": k, "N": n, "R": r, **terms, "H": int(self.train), "B": _HALF}
        if self.op == "input_gradient":  # g of several projections stands side by side
            return {"M": m, "K": k, "N": n, "R": r * terms["T"], **terms, **masked, "B": _HALF}
        if self.op == "skinny":
            return {"M": m, "K": k, "R": r, "G": int(self.grad), "H": int(self.low), **masked, "B": _HALF}
        if self.op in ("merge_", "switch_"):
            return {"N": n, "K": k, "R": r, "B": _HALF}
        return {"M": m, "K": k, "N": n, "C": r, "L": self.num_slots, "B": _HALF}

    @property
    def key(self):
        return tuning.key(**self.sizes)


def problems(ops, shapes, tokens, ranks, slots, groups=()):
    """Every :class:`Problem` of these ops once; ``shapes`` are (in_features, out_features), ``groups`` (in_features,
    out_features of each projection)."""
    found = []
    for op, rank in itertools.product(ops, ranks):
        for k, n in shapes:
            found += _of_shape(op, k, n, rank, tokens, slots)
        for (k, widths), m in itertools.product(groups, tokens):
            one = Problem(op, m, k, sum(widths), rank, widths=tuple(widths))
            if op == "grouped_lora_linear":
                found += [one, dataclasses.replace(one, train=True)]
            elif op == "input_gradient":
                found.append(one)
    return list({(problem.op, problem.key): problem for problem in found}.values())


def _of_shape(op, k, n, rank, tokens, slots):
    if op == "grouped_lora_linear":
        return []
    if op in ("merge_", "switch_"):
        return [Problem(op, 0, k, n, rank)]
    if op == "skinny":
        each = [_skinny_problems(m, k, n, rank, num_slots) for m in tokens for num_slots in (0, *slots)]
        return [problem for group in each for problem in group]
    if op == "input_gradient":
        variants = [{}, {"dropout": True}, *({"num_slots": num_slots} for num_slots in slots)]
        return [Problem(op, m, k, n, rank, **variant) for m in tokens for variant in variants]
    if op in ("multi_lora_linear", "lora_shrink", "lora_expand_"):
        # The two halves see one dense matrix each: x for the one, y for the other.
        width = {"lora_shrink": k, "lora_expand_": n}.get(op)
        return [Problem(op, m, width or k, width or n, rank, num_slots) for m in tokens for num_slots in slots]
    return [Problem(op, m, k, n, rank) for m in tokens]


def _skinny_problems(m, k, n, rank, num_slots=0):
    """dB and dh from dY, dA from x; of one adapter dA under dropout too, of several h from x."""
    last = {"grad": False, "low": True} if num_slots else {"dropout": True}
    return [
        Problem("skinny", m, n, 0, rank, num_slots, low=True),
        Problem("skinny", m, k, 0, rank, num_slots),
        Problem("skinny", m, k, 0, rank, num_slots, **last),
    ]


def candidates(problem, gpu):
    """Configurations worth measuring, the one of the rule first; none asks for more shared memory than a block has."""
    rule, *others = _CANDIDATES[problem.op](problem, gpu)
    fitting = [each for each in others if shared_bytes(problem, each) <= gpu.shared_limit - _SPARE]
    return list(dict.fromkeys([rule, *fitting]))


def shared_bytes(problem, config):
    """Shared memory that the tiles of a configuration take: those of all stages that are read ahead."""
    if isinstance(config, multi.Config):
        return max(_staged(config.base), _staged(config.shrink))
    if isinstance(config, train_config.SkinnyConfig):
        return config.num_stages * config.block_m * (config.block_n + config.block_r) * _HALF
    if isinstance(config, merge.Tiles):
        return 0
    path = getattr(config, "path", None)
    beside = {"decode": 64, "one_pass": linear.block_rank(problem.rank)}.get(path, 0)  # rows of A in the same loop
    return _staged(config, beside)


def _staged(tiles, beside=0):
    return tiles.num_stages * (tiles.block_m + tiles.block_n + beside) * tiles.block_k * _HALF


def _lora_linear(p, gpu):
    m, k, n, rank = p.num_tokens, p.in_features, p.out_features, p.rank
    found = [linear.choose(m, k, n, rank, _HALF, gpu.capability, num_sms=gpu.num_sms)]
    wide = gpu.capability >= (9, 0)
    if m <= 64 and rank <= linear.DECODE_RANK:
        block_m = 16 if m <= 16 else 32 if m <= 32 else 64
        for block_n, block_k, stages, split in itertools.product((32, 64, 128), (64, 128), (3, 4), (1, 2, 4, 8)):
            if (split == 1 or k // split >= 512) and -(-n // block_n) * split <= 4 * gpu.num_sms:
                found.append(linear.Config("decode", block_m, block_n, block_k, 4, stages, split_k=split))
    if m <= 1024 and rank <= linear.DECODE_RANK:
        for block_m, block_n in ((16, 64), (32, 64), (64, 64), (64, 128), (128, 128)):
            if block_m <= max(16, m):
                found.append(linear.Config("one_pass", block_m, block_n, 64 if wide else 32, 4, 3))
    if m > 16:
        found += [linear.Config("two_pass", *blocks, tma=wide) for blocks in _gemms(m, wide)]
    return [*found, linear.VENDOR]


def _gemms(num_tokens, wide):
    """(block_m, block_n, block_k, num_warps, num_stages) of a dense product."""
    for (block_m, block_n), stages in itertools.product(((64, 128), (128, 128), (128, 256)), (2, 3, 4)):
        if block_m <= num_tokens:
            yield block_m, block_n, 64 if wide else 32, 8 if block_m * block_n > 64 * 128 else 4, stages


def _grouped(p, gpu):
    sizes = (p.num_tokens, p.in_features, p.widths, p.rank, _HALF, gpu.capability)
    found = [grouped.choose(*sizes, keep_h=p.train, num_sms=gpu.num_sms)]
    one = dataclasses.replace(p, op="lora_linear")  # of all columns together
    found += [tiles for tiles in _lora_linear(one, gpu)[1:] if tiles.path in ("decode", "two_pass")]
    few = ((16, 64), (16, 128), (32, 64), (64, 64)) if p.num_tokens <= grouped.FEW_ROWS else ()
    found += [*(linear.Config("two_pass", *blocks, 64, 4, 3) for blocks in few), grouped.APART]
    kept = (tiles for tiles in found[1:] if tiles.split_k == 1 and grouped.takes(tiles, p.num_tokens, p.rank, p.train))
    return [found[0], *kept]


def _input_gradient(p, gpu):
    several = p.num_slots > 0
    rule = train_config.input_gradient(p.num_tokens, _HALF, False, p.dropout, True, several, gpu.capability, False)
    wide = gpu.capability >= (9, 0)
    return [rule, *(linear.Config("dx", *blocks, tma=wide) for blocks in _gemms(max(p.num_tokens, 64), wide))]


def _skinny(p, gpu):
    m, columns, slots = p.num_tokens, p.in_features, max(1, p.num_slots)
    rule = train_config.skinny(
        m, lambda width: -(-columns // width), p.rank, slots, _HALF, False, p.dropout, True, gpu.capability, gpu.num_sms
    )
    found = [rule]
    for block_m, block_n, stages, waves in itertools.product((32, 64, 128), (64, 128, 256), (2, 3), (1, 2, 4)):
        programs = -(-columns // block_n) * -(-p.rank // rule.block_r) * slots
        split = max(1, min(waves * gpu.num_sms // programs, m // (4 * block_m), 64))
        warps = 8 if block_m * block_n > 32 * 128 else 4
        found.append(train_config.SkinnyConfig(block_m, block_n, rule.block_r, split, warps, stages))
    return found


def _multi_rule(p, gpu):
    sizes = (p.num_tokens, p.in_features, p.out_features, p.rank, p.num_slots)
    return multi.choose(*sizes, _HALF, gpu.capability, num_sms=gpu.num_sms)


def _multi(p, gpu):
    rule = _multi_rule(p, gpu)
    wide = gpu.capability >= (9, 0)
    shrinks, expands = _shrinks(p, gpu), _expands()
    found = [rule, dataclasses.replace(rule, route="vendor")]
    found += [multi.Config("vendor", rule.base, rule.shrink, expand) for expand in expands]
    found += [dataclasses.replace(rule, shrink=shrink) for shrink in shrinks if rule.route != "decode"]
    if p.num_tokens <= 64:
        for block_n, block_k, split in itertools.product((32, 64, 128), (64, 128), (1, 2, 4, 8)):
            if split == 1 or p.in_features // split >= 512:
                tiles = dataclasses.replace(rule.base, block_n=block_n, block_k=block_k, split=split)
                found.append(dataclasses.replace(rule, route="decode", base=tiles))
    else:
        found += [dataclasses.replace(rule, route="fused", base=multi.Tiles(*b)) for b in _gemms(p.num_tokens, wide)]
    return found


def _shrinks(p, gpu):
    found = []
    for block_m, block_n, split in itertools.product((16, 64), (16, 32, 64), (1, 2, 4, 8)):
        if (split == 1 or p.in_features // split >= 512) and block_n < 2 * max(16, p.rank):
            found.append(multi.Tiles(block_m, block_n, 128 if block_n <= 32 else 64, 4, 3, split))
    return found


def _expands():
    return [multi.Tiles(m, n, 0, w, 2) for m, n, w in itertools.product((16, 64), (64, 128, 256), (4, 8))]


def _merges(p, gpu):
    rule = merge.choose(_HALF, "tf32", False, False)
    return [rule, *(merge.Tiles(*each) for each in itertools.product((16, 32, 64), (64, 128, 256), (4, 8)))]


_CANDIDATES = {
    "lora_linear": _lora_linear,
    "multi_lora_linear": _multi,
    "lora_shrink": lambda p, gpu: [_multi_rule(p, gpu).shrink, *_shrinks(p, gpu)],
    "lora_expand_": lambda p, gpu: [_multi_rule(p, gpu).expand, *_expands()],
    "input_gradient": _input_gradient,
    "skinny": _skinny,
    "grouped_lora_linear": _grouped,
    "merge_": _merges,
    "switch_": _merges,
}
