"""What `phloem up` prints when the cluster is up: a table, the URL, a curl line."""

from __future__ import annotations

import json
import shlex

from rich.console import Console
from rich.table import Table

from phloem.cli.up.first_answer import QUESTION, Answer
from phloem.cli.up.plan import WORKER_KINDS
from phloem.cli.up.readiness import index_record, worker_record
from phloem.cli.up.supervisor import Child
from phloem.shared.discovery.snapshot import ClusterSnapshot
from phloem.shared.host_port import split_host_port


def service_table(children: list[Child], snapshot: ClusterSnapshot) -> Table:
    """One row per process: service, pid, port, device."""
    table = Table("service", "pid", "port", "device", box=None, pad_edge=False, header_style="bold")
    for child in children:
        port, device = _place(child, snapshot)
        table.add_row(child.name, str(child.pid or "-"), port, device)
    return table


def _place(child: Child, snapshot: ClusterSnapshot) -> tuple[str, str]:
    """Port and device: from the plan, or what the process registered."""
    if child.spec.kind in WORKER_KINDS:
        worker = worker_record(child.spec, snapshot)
        return (_port(worker.rpc_address), worker.device) if worker is not None else ("-", "-")
    if child.spec.port is not None:
        return str(child.spec.port), "-"
    index = index_record(child.spec, snapshot)
    return (_port(index.address) if index is not None else "-"), "-"


def _port(address: str) -> str:
    """Of HOST:PORT."""
    return str(split_host_port(address)[1])


def curl_line(url: str, model: str, *, needs_key: bool) -> str:
    """A command that asks the cluster `QUESTION`, to paste into a shell; as `ask` does, for the likeliest
    tokens: at the API's default temperature of 1 a small model rambles."""
    body = {"model": model, "messages": [{"role": "user", "content": QUESTION}], "temperature": 0}
    key = ' -H "Authorization: Bearer $API_KEY"' if needs_key else ""
    data = shlex.quote(json.dumps(body))
    return f"curl {url}/v1/chat/completions{key} -H 'Content-Type: application/json' -d {data}"


def print_answer(console: Console, answer: Answer) -> None:
    times = f"first token {answer.first_token_s * 1000:.0f} ms, all {answer.total_s * 1000:.0f} ms"
    console.print(f"  > {QUESTION}", markup=False, highlight=False)
    console.print(f"  {answer.text}   ({times})", markup=False, highlight=False, soft_wrap=True)
