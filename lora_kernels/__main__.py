"""`python -m lora_kernels COMMAND`. A command is a module with `main(argv) -> exit code`, imported when asked for."""

import importlib
import os
import sys

from .ops import dispatch

COMMANDS = {
    "env": (".env", "what was built, what runs, and why not the rest"),
    "check": (".check", "self-test of every op on every backend against float64"),
    "demo": (".demo.run", "train, save, serve and merge adapters on a real encoder"),
    "bench": (".bench.run", "times against the base alone, addmm_ and PEFT"),
    "tune": (".tune", "measure the Triton kernels' tiles on the GPU at hand"),
    "merge": (".disk.cli", "adapters into a safetensors checkpoint on disk"),
    "inspect": (".disk.inspect", "what an adapter touches: ranks, scaling, norms, size"),
}


def usage():
    lines = ["usage: python -m lora_kernels COMMAND [--help]", "", "commands:"]
    return "\n".join([*lines, *(f"  {name:<7} {text}" for name, (_, text) in COMMANDS.items())])


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    command, *rest = argv
    if command not in COMMANDS:
        print(f"lora_kernels: no command '{command}'\n\n{usage()}", file=sys.stderr)
        return 2
    return importlib.import_module(COMMANDS[command][0], __package__).main(rest)


def console():
    """:func:`main` for a shell: Ctrl-C, a reader that has gone (`| head`) and a backend that the environment names and
    that can not run here end it without a traceback."""
    try:
        code = main()
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("\nlora_kernels: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more at its end
        return 141
    except RuntimeError as error:
        if str(error) != dispatch.refusal:
            raise
        print(f"lora_kernels: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(console())
