"""What an engine says of itself: its load with every report, and the audit of its pages when asked."""

from __future__ import annotations

from phloem.shared.engine.handover_receive import HandoverReceiver
from phloem.shared.engine.handover_send import HandoverSender
from phloem.shared.engine.page_account import PageAccount
from phloem.shared.engine.rates import Rates
from phloem.shared.engine.scheduler import Scheduler
from phloem.shared.protocol.cluster import WorkerLoad
from phloem.shared.protocol.engine import AuditReply
from phloem.shared.transfer.stats import SendRates, TransferStatus


class EngineStatus:
    """Reads the parts of an engine; owns the counts of its turns and steps."""

    def __init__(
        self,
        scheduler: Scheduler,
        account: PageAccount,
        rates: Rates,
        sender: HandoverSender,
        receiver: HandoverReceiver,
    ) -> None:
        self._scheduler = scheduler
        self._account = account
        self._rates = rates
        self._sender = sender
        self._receiver = receiver
        self.num_turns = 0
        self.num_steps = 0
        self.send_rates = SendRates()
        self.transfer = TransferStatus()

    def load(self) -> WorkerLoad:
        """For every report: counts and moving averages, nothing that takes a walk."""
        scheduler = self._scheduler
        return WorkerLoad(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            queued_tokens=scheduler.num_queued_tokens,
            free_pages=self._account.num_available_pages,
            total_pages=self._account.pool.num_pages,
            prefill_tokens_per_s=self._rates.prefill_tokens_per_s,
            decode_step_s=self._rates.decode_step_s,
            transfer_bytes_per_s=self.send_rates.overall,
            tree_pages=self._account.tree.num_pages,
            exposed_transfer_s=self._sender.exposure.average_s,
            num_handing_over=scheduler.num_requests - scheduler.num_running - scheduler.num_waiting,
            cut_off=tuple(sorted(self.transfer.cut_off)),
            num_channels=self.transfer.num_channels,
            staging_quarantined_bytes=self.transfer.staging_quarantined_bytes,
        )

    def audit(self, tag: int) -> AuditReply:
        """Walks over all pages and tree nodes: tens of milliseconds in a large pool."""
        requests = self._scheduler.requests()
        return AuditReply(
            tag,
            problems=self._account.audit(requests),
            total_pages=self._account.pool.num_pages,
            free_pages=self._account.pool.num_free_pages,
            tree_pages=self._account.tree.num_pages,
            request_pages=sum(len(request.own_page_ids) for request in requests),
            num_requests=len(requests),
            locked_nodes=self._account.tree.num_locked_nodes(),
            counters={
                "steps": self.num_steps,
                "turns": self.num_turns,
                "retractions": self._scheduler.num_retractions,
                "bytes_sent": self._sender.num_bytes_sent,
                "pages_sent": self._sender.num_pages_sent,
                "bytes_received": self._receiver.num_bytes_received,
                "pages_received": self._receiver.num_pages_received,
                "channels": self.transfer.num_channels,
                "staging_lent_bytes": self.transfer.staging_lent_bytes,
                "staging_quarantined_bytes": self.transfer.staging_quarantined_bytes,
            },
            exposed_transfer_s=self._sender.exposure.latest_s,
        )
