"""Bounds of the benches that measure more than cases: one dict each, as the results files hold them."""

import json
import pathlib

from .measure import facts


def bound(case, what, limit, measured, at_least=False):
    """``measured`` must be at most ``limit`` (at least, with ``at_least``)."""
    met = measured >= limit if at_least else measured <= limit
    return {"case": case, "what": what, "at_least": at_least, "bound": limit, "measured": measured, "met": met}


def bound_line(found):
    sign, verdict = "≥" if found["at_least"] else "≤", "pass" if found["met"] else "missed"
    return f"{found['case']}: {found['what']} {found['measured']:.3f} ({sign} {found['bound']:.4g}) {verdict}"


def finish(targets, path, results=(), **values):
    """Writes all to ``path`` as JSON where there is one; the exit status: 0 where every bound is met."""
    if path is not None:
        path = pathlib.Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        found = {**facts(), "targets": targets, "results": list(results), **values}
        path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0 if all(target["met"] for target in targets) else 1
