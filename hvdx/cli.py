"""The ``hvdx`` command: ``install``, ``doctor``, ``run``, ``plan``, ``report`` and ``bench``.

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


@main.command()
@click.option("--frameworks", metavar="NAMES", help="torch, tensorflow or both, by comma.")
@click.option("--mpi", type=click.Choice(["auto", "on", "off"]), default="auto", show_default=True)
@click.option(
    "--gpu",
    type=click.Choice(["auto", "nccl", "none"]),
    default="auto",
    show_default=True,
    help="auto: NCCL if torch was built for CUDA and a GPU is present.",
)
@click.option("--cuda-arch", metavar="LIST", help="Compute capabilities, as 80,90.")
@click.option("--jobs", "-j", type=click.IntRange(min=1), help="Compilers to run at once.")
@click.option(
    "--wheel-only",
    metavar="DIR",
    type=click.Path(file_okay=False),
    help="Put the wheel in DIR and install nothing.",
)
@click.option("--untested", is_flag=True, help="Go on with versions that were never tried.")
@click.option("--force", is_flag=True, help="Build anew even if a wheel is cached or installed.")
@click.option("--verbose", "-v", is_flag=True, help="Print the build's output.")
def install(
    frameworks: str | None,
    mpi: str,
    gpu: str,
    cuda_arch: str | None,
    jobs: int | None,
    wheel_only: str | None,
    untested: bool,
    force: bool,
    verbose: bool,
) -> None:
    """Build Horovod for the frameworks installed here, and install it."""
    import signal
    from pathlib import Path

    from hvdx.build.install import install as install_horovod
    from hvdx.build.target import Options

    # Unwind as on Ctrl-C: end the compilers, remove the build tree.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

    def parts(text: str | None) -> tuple[str, ...]:
        return tuple(part.strip() for part in (text or "").split(",") if part.strip())

    install_horovod(
        Options(parts(frameworks), mpi, gpu, parts(cuda_arch), untested),
        force=force,
        verbose=verbose,
        wheel_only=Path(wheel_only) if wheel_only else None,
        jobs=jobs,
    )


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--no-run", is_flag=True, help="Leave out the jobs of two processes.")
def doctor(as_json: bool, no_run: bool) -> None:
    """Say what is installed, try it, and tell how to mend what is wrong."""
    from hvdx.doctor import doctor as examine

    sys.exit(examine(as_json_text=as_json, run=not no_run))


class _Verbatim(click.Command):
    """A command that reads its line itself: ``--`` too, which click would take away."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.params["arguments"] = tuple(args)
        return []


@main.command(cls=_Verbatim, add_help_option=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def run(arguments: tuple[str, ...]) -> None:
    """Start a job: `hvdx run -np 4 [-H h1:2,h2:2] [horovodrun's flags] -- python train.py`."""
    from hvdx.launch import run_command

    sys.exit(run_command(list(arguments)))


@main.command("plan")
@click.argument("script", type=click.Path(exists=True, dir_okay=False), required=False)
@click.option("--ranks", type=click.IntRange(min=1), required=True, help="Of the job.")
@click.option(
    "--place",
    type=click.Choice(["auto", "stages"]),
    default="auto",
    show_default=True,
    help="auto: replicas, stages or both; stages: one rank for each.",
)
@click.option(
    "--micro-batches", type=click.IntRange(min=1), help="8, or with --place auto the quickest."
)
@click.option("--schedule", default="auto", show_default=True, help="1f1b, zbv and so on.")
@click.option(
    "--by",
    type=click.Choice(["time", "params", "memory"]),
    default="time",
    show_default=True,
    help="What the cuts even out, with --place stages.",
)
@click.option("--memory", metavar="SIZE", help="Of a rank: 500M, 2G, or a number of GiB.")
@click.option("--link", metavar="RATE,LATENCY", help="Between ranks, or hosts, as 100mbit,200us.")
@click.option("--model", default="model", show_default=True, help="The script's name for it.")
@click.option("--sample", default="sample", show_default=True, help="Its name for a batch.")
@click.option(
    "--output",
    metavar="FILE",
    type=click.Path(dir_okay=False),
    help="Also draw the schedule: .html, .png, or .json for Chrome's trace viewer.",
)
@click.option(
    "--save",
    metavar="FILE",
    type=click.Path(dir_okay=False),
    help="Keep the plan, for stages=; with --hosts the profile, for --profile.",
)
@click.option(
    "--hosts", type=click.IntRange(min=1), help="Predict what the ranks would do on so many hosts."
)
@click.option("--inner", help="With --hosts: within one, as 200gbit,2us, the default.")
@click.option(
    "--profile",
    metavar="FILE",
    type=click.Path(dir_okay=False),
    help="With --hosts, instead of SCRIPT: what --save has kept.",
)
@click.option("--ways", help="With --hosts: of training, as ring,int8,powersgd=4,stages=4+int8.")
@click.option(
    "--speed",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    show_default=True,
    help="With --hosts: times as fast as measured that ranks compute.",
)
@click.option(
    "--goodput",
    type=click.FloatRange(min=0, max=1, min_open=True),
    default=0.94,
    show_default=True,
    help="With --hosts: share of its rate that programs get (TCP: 0.94).",
)
@click.option(
    "--json",
    "json_",
    metavar="FILE",
    type=click.Path(dir_okay=False),
    help="With --hosts: also write the numbers to FILE.",
)
def plan(
    script: str | None,
    ranks: int,
    place: str,
    micro_batches: int | None,
    schedule: str,
    by: str,
    memory: str | None,
    link: str | None,
    model: str,
    sample: str,
    output: str | None,
    save: str | None,
    hosts: int | None,
    inner: str | None,
    profile: str | None,
    ways: str | None,
    speed: float,
    goodput: float,
    json_: str | None,
) -> None:
    """Print how the model of SCRIPT would be spread over ranks; launch nothing.

    First all plans, by what a step takes: data parallel, in stages, or both; then how the quickest
    one cuts the model, and its schedule.

    The script names a model and a batch for it, as objects or as functions without arguments.
    What is under `if __name__ == "__main__"` does not run.

    With --hosts, print how long a step would take on so many ranks and hosts, for many ways of
    training: data parallel, compressed, staged. `hvdx plan model.py --ranks 1024 --hosts 128
    --link 25gbit,5us` measures the model here, on one rank.
    """
    if hosts is not None:
        from hvdx.scaling.command import Wanted, scale

        try:
            scale(Wanted(script, ranks, hosts, link, inner, profile, ways, speed, goodput, model,
                         sample, output, save, json_))  # fmt: skip
        except OSError as error:
            raise click.ClickException(str(error)) from error
        return
    if script is None or profile:
        raise click.UsageError("give a SCRIPT; --profile needs --hosts")
    from hvdx.pipeline.dispatch import dry_run
    from hvdx.pipeline.dry_run import ONE_MACHINE, load
    from hvdx.pipeline.partition import size_of
    from hvdx.pipeline.plan import Link

    try:
        limit = size_of(memory) if memory else None
        between = Link.parse(link) if link else ONE_MACHINE
        network, batch = load(script, [model, sample])
        made = dry_run(
            network,
            batch,
            ranks,
            micro_batches=micro_batches,
            schedule=schedule,
            by=by,
            memory=limit,
            link=between,
            place="auto" if place == "auto" else (),
        )
        click.echo(str(made))
        if output:
            made.draw(output)
        if save:
            made.plan.save(save)
    except (TypeError, OSError) as error:  # no model, no such folder
        raise click.ClickException(str(error)) from error


@main.command()
@click.argument("files", nargs=-1, required=True, metavar="RUN.JSONL...")
@click.option(
    "--output",
    "-o",
    metavar="FILE",
    type=click.Path(dir_okay=False),
    help="Where to draw: .png, .html, .svg, .pdf. Default: beside the first file, .png.",
)
def report(files: tuple[str, ...], output: str | None) -> None:
    """Compare trainings by what `hvd.Metrics` has written: print a table, draw a picture."""
    from pathlib import Path

    from hvdx.metrics.report import load, table, write

    found = load(files)
    click.echo(table(found))
    output = output or str(Path(files[0]).with_suffix(".png"))
    write(output, found)
    click.echo(f"drawn: {output}")


@main.group()
def bench() -> None:
    """Measure what training depends on."""


@bench.command("link")
@click.option(
    "-np",
    "ranks",
    type=click.IntRange(min=1),
    default=2,
    show_default=True,
    help="Ranks to start, unless inside of a job.",
)
@click.option(
    "--framework",
    type=click.Choice(["torch", "tensorflow"]),
    help="Whose Horovod core; torch where both are installed.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    show_default=True,
    help="For the network.",
)
@click.option(
    "--megabytes",
    type=click.FloatRange(min=0, min_open=True),
    default=25.0,
    show_default=True,
    help="Of the model for which to choose.",
)
@click.option(
    "--budget",
    type=click.Choice(["safe", "balanced", "bold"]),
    default="bold",
    show_default=True,
    help="Which methods to look at.",
)
@click.option(
    "--json",
    "file",
    metavar="FILE",
    type=click.Path(dir_okay=False),
    help="Also write the numbers to FILE.",
)
def bench_link(
    ranks: int,
    framework: str | None,
    seconds: float,
    megabytes: float,
    budget: str,
    file: str | None,
) -> None:
    """Print what the network costs, what compressing costs, and what would be quickest.

    Inside of a job (`hvdx run -np 4 -H h1:2,h2:2 -- hvdx bench link`) that job's network is
    measured; outside of one, two ranks are started here.
    """
    from hvdx.link_report import Wanted
    from hvdx.link_report import bench_link as measure

    sys.exit(measure(Wanted(framework, seconds, megabytes, budget, file), ranks))


if __name__ == "__main__":
    main()
