"""Routes a resubmitted request away from the replica that lost it; otherwise Serve chooses."""

from __future__ import annotations

import random

from ray.serve._private.request_router.common import PendingRequest
from ray.serve._private.request_router.pow_2_router import PowerOfTwoChoicesRequestRouter
from ray.serve._private.request_router.replica_wrapper import RunningReplica

AVOID = "avoid"
"""Keyword argument of EngineReplica.generate that names the replica to try last."""


class AvoidingRouter(PowerOfTwoChoicesRequestRouter):
    """Puts the replica that lost a request last: Serve may list it for a second or two after its death.

    This is a preference only. Serve assigns replicas to waiting requests in the order of their arrival, so another
    waiting request may get the replica that was chosen for this one. The caller therefore has to retry.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Groups of candidates; a group is tried when all replicas of the groups before it are full or dead."""
        ranks = await super().choose_replicas(candidate_replicas, pending_request)
        avoided = pending_request.kwargs.get(AVOID) if pending_request is not None else None
        if avoided is None:
            return ranks
        others = [replica for replica in candidate_replicas if replica.replica_id.unique_id != avoided]
        return [random.sample(others, min(2, len(others))), *ranks] if others else ranks
