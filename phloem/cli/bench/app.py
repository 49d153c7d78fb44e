"""The command group; its commands are imported when they are run."""

from __future__ import annotations

from cyclopts import App


def bench_app() -> App:
    """`phloem bench serve`, `offline`, `transfer` and `compare`."""
    app = App(name="bench", help="Measure servers: TTFT, ITL, throughput, goodput.")
    app.command("phloem.cli.bench.serve:serve", name="serve", help="Load servers and report what users see.")
    app.command(
        "phloem.cli.bench.offline:offline",
        name="offline",
        help="Measure the engine alone, beside its floors.",
    )
    app.command(
        "phloem.cli.bench.transfer:transfer",
        name="transfer",
        help="Measure KV transfer between two devices.",
    )
    app.command("phloem.cli.bench.compare:compare", name="compare", help="Compare two results.")
    return app
