"""From what the blocks gave to the result of the run."""

from __future__ import annotations

from collections.abc import Sequence

from phloem.shared.bench.clients import BlockResult
from phloem.shared.bench.environment import Environment
from phloem.shared.bench.figures import Figures, compute_figures
from phloem.shared.bench.lag_report import judge_lag
from phloem.shared.bench.options import RunOptions
from phloem.shared.bench.plan import SessionSupply
from phloem.shared.bench.probe import Probed
from phloem.shared.bench.rate_search import RateSearch, Trial
from phloem.shared.bench.record import RequestRecord
from phloem.shared.bench.result import Block, RunResult, TargetResult, save_record
from phloem.shared.bench.token_check import CheckedRecords, check_tokens
from phloem.shared.bench.token_counter import TokenCounter


class TargetRun:
    """What is known of one target while the run goes on."""

    def __init__(self, probed: Probed, supply: SessionSupply) -> None:
        self.probed = probed
        self.supply = supply
        self.results: list[BlockResult] = []
        self.trials: list[Trial] = []
        self.found_rate: float | None = None

    @property
    def name(self) -> str:
        return self.probed.spec.name

    def add(self, result: BlockResult) -> None:
        self.results.append(result)

    def judge_trial(self, search: RateSearch, result: BlockResult, options: RunOptions) -> Trial:
        """Tells the search what share of the trial's requests kept the objectives (failed ones did not), and
        whether the client was fast enough to say so."""
        figures = compute_figures(result.records, result.duration_s, objectives=options.objectives)
        gap = _median_gap([figures])
        lag = judge_lag(result.lag, limit_ms=options.max_lag_ms, median_chunk_itl_ms=gap)
        share = figures.goodput.share if figures.goodput is not None else 0.0
        return search.observe(share, is_spoiled=lag.is_spoiled)

    @property
    def records(self) -> list[RequestRecord]:
        return [record for result in self.results for record in result.records]

    @property
    def duration_s(self) -> float:
        return sum(result.duration_s for result in self.results)


def sum_up(
    options: RunOptions,
    targets: Sequence[TargetRun],
    counter: TokenCounter | None,
    *,
    environment: Environment,
    started_at: str,
    command: list[str],
    workload: str,
    is_interrupted: bool,
) -> RunResult:
    """The result with its verdict: a run is invalid when requests failed beyond what was allowed, when
    nothing was measured, or when the client's own lag spoiled it."""
    checked = [check_tokens(target.records, counter) for target in targets]
    figures = [
        compute_figures(
            found.records,
            max(target.duration_s, 1e-9),
            objectives=options.objectives,
            allowed_failures=options.allowed_failures,
            retokenized=found.retokenized,
        )
        for target, found in zip(targets, checked, strict=True)
    ]
    lag = [sample for target in targets for result in target.results for sample in result.lag]
    report = judge_lag(lag, limit_ms=options.max_lag_ms, median_chunk_itl_ms=_median_gap(figures))
    names = [target.name for target in targets]
    problems = [
        f"{name}: {figure.withheld}" for name, figure in zip(names, figures, strict=True) if figure.withheld
    ]
    if report.is_spoiled:
        problems.append(report.reason)
    epoch_s = min((r.started_s for target in targets for r in target.results), default=0.0)
    return RunResult(
        started_at=started_at,
        command=command,
        environment=environment,
        options=options.without_secrets(),
        workload=workload,
        is_valid=not problems,
        is_interrupted=is_interrupted,
        problems=problems,
        remarks=_remarks(targets, checked, figures),
        lag=report,
        targets=[
            _target_result(target, found, figure, epoch_s, with_text=options.save_text)
            for target, found, figure in zip(targets, checked, figures, strict=True)
        ],
    )


def _target_result(
    target: TargetRun, found: CheckedRecords, figures: Figures, epoch_s: float, *, with_text: bool
) -> TargetResult:
    probed = target.probed
    return TargetResult(
        name=probed.spec.name,
        url=probed.spec.url,
        api=probed.spec.api,
        model=probed.spec.model,
        server=probed.server,
        refused=probed.refused,
        blocks=[
            Block(index, result.started_s - epoch_s, result.duration_s)
            for index, result in enumerate(target.results)
        ],
        figures=figures.flat(),
        records=[save_record(record, epoch_s, with_text=with_text) for record in found.records],
        trials=target.trials,
        found_rate=target.found_rate,
    )


def _median_gap(figures: Sequence[Figures]) -> float | None:
    """The smallest median gap between chunks, in ms."""
    gaps = [f.latencies["chunk_itl"].median for f in figures if "chunk_itl" in f.latencies]
    return min(gaps, default=None)


def _remarks(
    targets: Sequence[TargetRun], checked: Sequence[CheckedRecords], figures: Sequence[Figures]
) -> list[str]:
    remarks = []
    for target, found, figure in zip(targets, checked, figures, strict=True):
        name = target.name
        remarks += [f"{name}: {remark}" for remark in found.remarks]
        if target.probed.refused:
            remarks.append(f"{name}: refused {', '.join(target.probed.refused)}, so it was asked without")
        if figure.latencies and "itl" not in figure.latencies and "chunk_itl" in figure.latencies:
            remarks.append(
                f"{name}: it isn't known how many tokens its chunks have, so there is no ITL per token "
                "(--tokenizer estimates it)"
            )
        if figure.short_outputs:
            remarks.append(
                f"{name}: {figure.short_outputs} answers are shorter than asked for: lengths differ"
            )
        if any(trial.is_spoiled for trial in target.trials):
            remarks.append(
                f"{name}: the search met the limit of the client, perhaps before that of the server"
            )
        if figure.resent:
            remarks.append(
                f"{name}: {figure.resent} requests were resent, as a kept-alive connection was closed"
            )
    return remarks
