"""What the channels of an endpoint share."""

from __future__ import annotations

from phloem.shared.protocol.session import PeerRef
from phloem.shared.transfer.channel import ChannelEnd
from phloem.shared.transfer.config import TransferConfig
from phloem.shared.transfer.events import Side
from phloem.shared.transfer.opening import StuckOpenings
from phloem.shared.transfer.planes import PlaneSpec
from phloem.shared.transfer.staging_pool import StagingLease, StagingPool
from phloem.shared.transfer.streams import StreamStock
from phloem.shared.transfer.traffic import DeviceTraffic


class Resources:
    """Thread-safe."""

    def __init__(self, config: TransferConfig) -> None:
        """Allocates the memory of all channels. Raises what torch raises when the device has no room."""
        self._config = config
        self._streams = StreamStock()
        self._traffic = DeviceTraffic()
        self.pool = StagingPool(config)
        self.stuck = StuckOpenings()

    def plane_spec(self, side: Side) -> PlaneSpec:
        config = self._config
        return PlaneSpec(
            host=config.host,
            side=side,
            device=config.device,
            timeout_s=config.timeout_s,
            max_ctas=config.max_ctas,
            opening_timeout_s=config.opening_timeout_s,
            streams=self._streams,
            traffic=self._traffic,
        )

    def take_back(self, peer: PeerRef, lease: StagingLease, end: ChannelEnd) -> None:
        """What the channel has not let go of; the lease is still to be closed."""
        if end.stuck is not None:
            self.stuck.add(peer, end.stuck)
        if end.holder is not None:
            lease.quarantine(end.holder)
