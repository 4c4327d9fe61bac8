"""The command line: a lazy group, so that --help does not import torch; one thin file per command."""

from __future__ import annotations

import errno
import importlib
import logging
import os
import shlex
import sys
import traceback
from collections.abc import Sequence

import click

from pdtrim_deploy import __version__
from pdtrim_deploy.cli.exit_codes import EXIT_CODES
from pdtrim_deploy.cli.interrupt import OTHERWISE, RESUME, install, pressed
from pdtrim_deploy.errors import ServingError, UserError

# Heading -> command -> module and attribute, in the order in which a user needs them.
GROUPS = {
    "Look before": {"doctor": "doctor:doctor", "recipe": "recipe:recipe", "plan": "plan:plan"},
    "Build": {"build": "build:build", "verify": "verify:verify", "inspect": "inspect:inspect"},
    "Serve": {"serve": "serve:serve", "deploy": "deploy:deploy"},
    "Judge": {
        "eval": "eval:evaluate",
        "fidelity": "fidelity:fidelity",
        "loadtest": "loadtest:loadtest",
        "compare": "compare:compare",
        "report": "report:report",
        "gpu-check": "gpu_check:gpu_check",
    },
    "All of it, and the shell": {"demo": "demo:demo", "completion": "completion:completion"},
}
COMMANDS = {name: place for group in GROUPS.values() for name, place in group.items()}
# The extra that installs each module, by the name under which it is imported.
EXTRA_OF = {
    **dict.fromkeys(
        ("torch", "transformers", "safetensors", "gguf", "onnx", "modelopt", "peft", "httpx", "prometheus_client"),
        "build",
    ),
    **dict.fromkeys(("sglang", "sglang_router"), "serve"),
}
# Errors of the machine, not of this program: reported in one sentence.
TO_MEND = {
    errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST,
    errno.ENOENT, errno.ENAMETOOLONG, errno.ELOOP, errno.EFBIG,
}  # fmt: skip


class LazyGroup(click.Group):
    """Imports a command's file only when it is named, or listed by --help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of use."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """The command, or None for an unknown name."""
        if name not in COMMANDS:
            return None
        module, attribute = COMMANDS[name].split(":")
        return _verbose(getattr(importlib.import_module(f"pdtrim_deploy.cli.{module}"), attribute))

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Commands below their headings, each with its full first sentence."""
        for heading, names in GROUPS.items():
            commands = [(name, self.get_command(ctx, name)) for name in names]
            with formatter.section(heading):
                formatter.write_dl([(name, c.get_short_help_str(200)) for name, c in commands if c], col_spacing=4)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The meaning of each exit code."""
        with formatter.section("Exit codes"):
            formatter.write_dl([(str(code), meaning) for code, meaning in EXIT_CODES.items()], col_spacing=4)


def _log(ctx: click.Context, param: click.Parameter, count: int) -> None:
    if count:
        logging.basicConfig(format="%(name)s: %(message)s")
        logging.root.setLevel(logging.INFO if count == 1 else logging.DEBUG)


VERBOSE = click.Option(
    ["-v", "--verbose"],
    count=True,
    expose_value=False,
    callback=_log,
    help="Log more on stderr (-vv: everything), and show the traceback of an error.",
)


def _verbose(command: click.Command) -> click.Command:
    """Accept `-v` after the command's name too."""
    if isinstance(command, click.Group):
        for inside in command.commands.values():
            _verbose(inside)
    elif VERBOSE not in command.params:
        command.params.append(VERBOSE)
    return command


@click.group(
    cls=LazyGroup, params=[VERBOSE], context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(__version__, prog_name="pdtrim-deploy")
def cli() -> None:
    """Prune a model for prefill-decode disaggregation and serve it in SGLang with sparse KV transfer.

    \b
    Examples:
      pdtrim-deploy doctor                                              what this machine can do
      pdtrim-deploy plan llama-3.1-8b --isl 8192 --link 100Gbps         bytes, link time and memory, in a second
      pdtrim-deploy build recipes/smollm2-demo.yaml --out out/bundle    prune, choose KV, seal
      pdtrim-deploy serve out/bundle --prefill 1 --decode 1             until Ctrl-C
    """


def main(args: Sequence[str] | None = None) -> None:
    """Entry point: turns errors that a user can fix into one line on stderr and an exit code."""
    arguments = list(sys.argv[1:] if args is None else args)
    _reopen_closed()
    install()
    typed = shlex.join(["pdtrim-deploy", *arguments])  # the context's object: every result records it
    colour = False if os.environ.get("NO_COLOR") else None  # None: colour only on a terminal
    try:
        code = cli.main(arguments, "pdtrim-deploy", standalone_mode=False, obj=typed, color=colour)
    except UserError as error:
        _die(str(error), 2)
    except ServingError as error:
        _die(str(error), 1)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        _stopped(arguments)
    except ModuleNotFoundError as error:
        extra = EXTRA_OF.get((error.name or "").split(".")[0])
        if extra is None:
            raise
        _die(f"this command needs {error.name}; install it with: pip install 'pdtrim-deploy[{extra}]'", 2)
    except OSError as error:
        if error.errno == errno.EPIPE:
            os.dup2(
                os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
            )  # the reader of the pipe (head, less) has ended: no error
            sys.exit(141)
        if error.errno not in TO_MEND:
            raise
        place = error.filename2 or error.filename or "cannot write"  # the second: what a file was to replace
        _die(f"{place}: {error.strerror}; fix that and run the same command again", 2)
    except UnicodeEncodeError as error:
        _die(_cannot_encode(error), 2)
    except Exception:
        if pressed():  # numpy, whose import was cut short and then tried again, has another error for it
            _stopped(arguments)
        raise
    sys.exit(code if isinstance(code, int) else 0)


def _cannot_encode(error: UnicodeEncodeError) -> str:
    wrong = error.object[error.start : error.end]
    if error.encoding.lower() not in ("utf-8", "utf8"):  # that of a stream
        return f"{wrong!a} cannot be printed in {error.encoding}; set PYTHONIOENCODING=utf-8"
    return f"{wrong!r} in a name, as this machine decodes it, is no UTF-8; rename the file or folder"


def _reopen_closed() -> None:
    """A stream that the caller closed (`2>&-`) is None: what is said goes nowhere, and the exit code stays right."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (until the process ends)


def _stopped(arguments: Sequence[str]) -> None:
    command = next((word for word in arguments if word in COMMANDS), "")
    _die(f"stopped by Ctrl-C; {RESUME.get(command, OTHERWISE)}", 130)


def _die(message: str, code: int) -> None:
    if logging.root.isEnabledFor(logging.INFO):  # -v
        traceback.print_exc()
    click.echo(f"pdtrim-deploy: {message}", err=True)
    sys.exit(code)
