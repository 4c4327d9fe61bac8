"""`pdtrim-deploy completion`: the shell's own completion of commands, options and files."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from pdtrim_deploy.errors import UserError

RC_FILES = {"bash": "~/.bashrc", "zsh": "~/.zshrc", "fish": "~/.config/fish/config.fish"}


@click.command()
@click.argument("shell", type=click.Choice(list(RC_FILES)))
def completion(shell: str) -> None:
    """Print a shell's completion script.

    \b
    Examples:
      eval "$(pdtrim-deploy completion bash)"            # in ~/.bashrc (zsh: ~/.zshrc)
      pdtrim-deploy completion fish > ~/.config/fish/completions/pdtrim-deploy.fish
    """
    from pdtrim_deploy.cli import cli

    script = get_completion_class(shell)
    assert script is not None
    try:
        text = script(cli, {}, "pdtrim-deploy", "_PDTRIM_DEPLOY_COMPLETE").source()
    except RuntimeError as error:  # click asks bash for its version
        raise UserError(f"no completion for this {shell}: {error}") from None
    click.echo(text)
