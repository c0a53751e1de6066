"""What is said of targets that match nothing: errors and warnings with the names that look most like them."""

import difflib
import re
import warnings

from .layers import LoraLayer, layer_class
from .parameter_targets import closest, unused

# Heads that a task trains in full.
TASK_HEADS = {"SEQ_CLS": ["classifier", "score"], "TOKEN_CLS": ["classifier", "score"], "QUESTION_ANS": ["qa_outputs"]}


def _closest(wanted, names):
    """The module names (last parts, then full names) that look most like ``wanted``."""
    short = list(dict.fromkeys(n.rpartition(".")[2] for n in names))
    short = [n for n in short if not n.isdigit()]
    return difflib.get_close_matches(wanted, short, n=3, cutoff=0.4) or difflib.get_close_matches(
        wanted, list(names), n=3, cutoff=0.4
    )


def nothing_found(model, config, names, excluded):
    wanted = config.target_modules
    if excluded and excluded == len(names):
        return (
            "All modules were excluded. This is likely unintended. Check your `target_modules`, `exclude_modules` and "
            "`modules_to_save` configuration."
        )
    if not wanted:
        message = "No `target_modules` passed but also no `target_parameters` found. Please check the values for "
        message += "these arguments."
        close = [c for w in config.target_parameters or () for c in closest(model, w)]
        return f"{message} Closest names: {', '.join(close)}" if close else message
    adaptable = [n for n, m in names.items() if isinstance(m, LoraLayer) or layer_class(m)]
    listed = [wanted] if isinstance(wanted, str) else sorted(wanted)
    message = f"target_modules: no module matches {listed}"
    if excluded:
        message = (
            "No modules were targeted for adaptation. This might be caused by a combination of mismatched target "
            "modules and excluded modules. Please check your `target_modules` and `exclude_modules` configuration. You "
            "may also have only targeted modules that are marked to be saved (`modules_to_save`). "
            f"{message} ({excluded} left out)"
        )
    else:
        message = f"Target modules {wanted} not found in the base model. Please check the target modules: {message}"
    for name in ("layers_to_transform", "layers_pattern"):
        if getattr(config, name) is not None:
            message += f". Note: You specified '{name}': {getattr(config, name)}"
    close = list(dict.fromkeys(c for w in listed for c in _closest(w, adaptable)))
    if close:
        return f"{message}; closest names: {', '.join(close)}"
    return f"{message}; modules that can be adapted: {', '.join(adaptable[:8]) or 'none'}"


def warn_unused(model, config, names, plan, excluded):
    """What the user named and nothing uses is likely a slip."""
    targeted = [*[t.name for t in plan.lora], *[f"{t.name}.{t.parameter}" for t in plan.parameters]]
    idle = {"target_parameters": unused(config, plan.parameters)}
    if not isinstance(config.target_modules, str):
        unnamed = [t for t in config.target_modules or () if t not in names]
        idle["target_modules"] = [t for t in unnamed if not any(n.endswith("." + t) for n in names)]
    for attribute in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, attribute)
        idle[attribute] = [k for k in patterns if not any(re.match(rf"(.*\.)?({k})$", n) for n in targeted)]
    heads = TASK_HEADS.get(config.task_type, [])
    saved = [n for n, _ in plan.saved]
    idle["modules_to_save"] = [
        m for m in config.modules_to_save or () if m not in heads and not any(n.endswith(m) for n in saved)
    ]
    if config.exclude_modules and not excluded:
        warnings.warn(
            f"You have passed exclude_modules={config.exclude_modules} but no modules were excluded. Please check "
            "that exclude_modules was set correctly.",
            stacklevel=5,
        )
    for attribute, values in idle.items():
        if values:
            near = [closest(model, v) if attribute == "target_parameters" else _closest(v, names) for v in values]
            close = list(dict.fromkeys(c for found in near for c in found))
            hint = f" Closest names: {', '.join(close)}." if close else ""
            given = getattr(config, attribute)
            message = f"{attribute}: {sorted(values)} matched nothing"
            if attribute.startswith("target_") and len(values) == len(given):
                message = f"{attribute}={given} were set but no {attribute[7:-1]} was matched"
            if attribute.endswith("_pattern"):
                message = f"The following {attribute} keys did not match any targeted module and were ignored: "
                message += f"{sorted(values)}"
            warnings.warn(f"{message}.{hint}", RuntimeWarning, stacklevel=5)
