"""What ``accelerate`` did, to print and to read."""

import dataclasses

import torch


@dataclasses.dataclass
class Group:
    """Layers that are alike: of one kind, shape, dtype and fate.

    Attributes:
        what: kind, shape, ranks and dtype, as text.
        reason: why the layers were left as PEFT made them; None when they were replaced.
        remark: what of a replaced layer still runs PEFT's own forward, or None.
        names: the layers, as ``named_modules`` names them.
        peft_ms, our_ms: time of all of them in one run of the model, where it was measured.
    """

    what: str
    reason: str | None
    remark: str | None
    names: list[str] = dataclasses.field(default_factory=list)
    peft_ms: float | None = None
    our_ms: float | None = None
    layers: list[torch.nn.Module] = dataclasses.field(default_factory=list, repr=False)

    def _line(self):
        times = "" if self.peft_ms is None else f"; {self.peft_ms:.3f} ms with peft, {self.our_ms:.3f} ms with ours"
        note = self.reason or self.remark
        example = self.names[0] + (", ..." if len(self.names) > 1 else "")
        return f"  {len(self.names):4} x {self.what}{times}{': ' + note if note else ''} ({example})"


@dataclasses.dataclass
class Report:
    """What was replaced, what was left, and why. ``print`` it.

    Attributes:
        groups: all layers of peft in the model, alike ones together.
        measured: whether the model was run on a sample.
    """

    groups: list[Group]
    measured: bool = False

    @property
    def replaced(self) -> list[str]:
        """Names of the layers that compute with our kernels now."""
        return [name for group in self.groups if group.reason is None for name in group.names]

    @property
    def left(self) -> dict[str, str]:
        """Name -> reason of the layers that are as PEFT made them."""
        return {name: group.reason for group in self.groups if group.reason for name in group.names}

    def __str__(self):
        lines = [f"accelerate: {len(self.replaced)} layers replaced, {len(self.left)} left"]
        for title, fate in (("replaced", True), ("left as peft made them", False)):
            found = [group for group in self.groups if (group.reason is None) is fate]
            if found:
                lines += [title + ":", *(group._line() for group in found)]
        if not self.measured and self.replaced:
            lines.append("not measured here: accelerate(model, sample=batch) keeps only what is faster on your model")
        return "\n".join(lines)
