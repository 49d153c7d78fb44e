"""The `phloem` command. Commands are imported when they are run: `--help` touches no service, nor torch."""

from __future__ import annotations

import sys

from cyclopts import App, CycloptsError

import phloem
from phloem.cli.bench.app import bench_app
from phloem.cli.services import SERVICES
from phloem.shared.errors import PhloemError

EXIT_USAGE = 2


def build_app() -> App:
    """The whole command tree."""
    app = App(
        name="phloem",
        help="Disaggregated LLM serving: prefill and decode in separate pools, one prefix index.",
        version=phloem.__version__,
        help_format="plaintext",
        result_action="return_value",
        print_error=False,
        exit_on_error=False,
    )
    app.command("phloem.cli.up.command:up", name="up", help="Start a whole cluster on this machine.")
    app.command(_serve_app())
    app.command("phloem.cli.pull:pull", name="pull", help="Fetch a model into the model cache.")
    app.command("phloem.cli.chat:chat", name="chat", help="Talk to a running cluster.")
    app.command(bench_app())
    app.command("phloem.cli.simulate:simulate", name="simulate", help="Replay a trace on modelled workers.")
    app.command("phloem.cli.doctor:doctor", name="doctor", help="Check what this machine has.")
    return app


def _serve_app() -> App:
    serve = App(name="serve", help="Run one service in the foreground.")
    for spec in SERVICES:
        target = f"phloem.cli.serve:{spec.name.replace('-', '_')}"
        serve.command(target, name=spec.name, help=spec.summary)
    return serve


def run(argv: list[str]) -> int:
    """Runs the command line `argv` (without the program's name); returns the exit code."""
    from phloem.shared.lifecycle.service import report_error

    try:
        code = build_app()(argv)
    except CycloptsError as error:
        command = " ".join(("phloem", *(error.command_chain or ())))
        print(f"phloem: error: {error}\nSee `{command} --help`.", file=sys.stderr)
        return EXIT_USAGE
    except PhloemError as error:
        return report_error(error)
    except KeyboardInterrupt:
        return 130
    return code if isinstance(code, int) else 0


def main() -> None:
    """The entry point of the `phloem` script."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
