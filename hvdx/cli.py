"""The ``hvdx`` command: ``install``, ``doctor`` and ``run``.

Each command imports its module only when called: ``hvdx --help`` loads no framework.
"""

from __future__ import annotations

import sys

import click

from hvdx.errors import HvdxError


class _Group(click.Group):
    """Print an :class:`HvdxError` as one clear message instead of a traceback."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except HvdxError as error:
            click.echo(f"hvdx {ctx.invoked_subcommand}: {error}", err=True)
            ctx.exit(1)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="hvdx")
def main() -> None:
    """Horovod for today's PyTorch, TensorFlow and Keras 3."""


@main.command(
    context_settings={"ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def run(arguments: tuple[str, ...]) -> None:
    """Start a job: `hvdx run -np 4 [-H h1:2,h2:2] [horovodrun's flags] -- python train.py`."""
    from hvdx.launch import run_command

    sys.exit(run_command(list(arguments)))


if __name__ == "__main__":
    main()
