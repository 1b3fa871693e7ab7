"""Which Engine replica a request goes to: Serve's choice, but a resubmission tries another replica first."""

from __future__ import annotations

import random

from ray.serve._private.request_router.common import PendingRequest
from ray.serve._private.request_router.pow_2_router import PowerOfTwoChoicesRequestRouter
from ray.serve._private.request_router.replica_wrapper import RunningReplica

AVOID = "avoid"
"""Keyword argument of EngineReplica.generate that names the replica to try last."""


class AvoidingRouter(PowerOfTwoChoicesRequestRouter):
    """Tries the replica that lost a request last: Serve may still list it for a second or two after its death.

    Serve hands replicas to waiting requests in the order of their arrival, so where others wait as well, one of them
    can get the replica that was chosen for this request. So this is a preference, and the caller has to try again.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks of candidates, each tried when all of the ranks before are full or gone."""
        ranks = await super().choose_replicas(candidate_replicas, pending_request)
        avoided = pending_request.kwargs.get(AVOID) if pending_request is not None else None
        if avoided is None:
            return ranks
        others = [replica for replica in candidate_replicas if replica.replica_id.unique_id != avoided]
        return [random.sample(others, min(2, len(others))), *ranks] if others else ranks
