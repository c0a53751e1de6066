"""The fewest suffixes of module names that tell a set of modules from all others, as PEFT condenses long lists."""

MIN_TARGETS = 20  # fewer names are kept as they are


def minimal_suffixes(wanted, others):
    """Suffixes (whole parts between dots) that end the names ``wanted`` and none of ``others``.

    ``["a.0.q", "a.1.q"], ["a.0.k"]`` -> ``{"q"}``.

    Raises:
        ValueError: ``wanted`` is a str, is empty or holds "", or the two have a name in common.
    """
    if isinstance(wanted, str) or not wanted:
        raise ValueError("target_modules should be a list or set of strings.")
    wanted, others = set(wanted), set(others)
    if "" in wanted:
        raise ValueError("target_modules should not contain an empty string.")
    if wanted & others:
        raise ValueError(
            f"target_modules and other_module_names contain common elements: {sorted(wanted & others)[:4]}"
        )
    taken = {suffix for name in others for suffix in _suffixes(name)}
    found = set()
    for name in sorted(wanted, key=_suffixes):
        if any(name.endswith("." + suffix) for suffix in found):
            continue
        found.update([suffix for suffix in _suffixes(name) if suffix not in taken and suffix not in found][:1])
    return found or wanted


def _suffixes(name):
    """Of "a.b.c": "c", "b.c", "a.b.c"."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]
