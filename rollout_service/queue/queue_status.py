"""Status of the batch queue: groups by their state, leases, and why a batch is short.

Only groups that are in the queue are counted here. So the time does not grow with the number that have passed through.
"""

import time
from collections.abc import Set
from typing import Any

from rollout_service.protocol import BatchesStatus, LeaseInfo, LeaseRequest
from rollout_service.queue.database import QueueDatabase


def queue_status(tables: QueueDatabase, generating: Set[int], capacity: int, persistent: bool) -> BatchesStatus:
    database, now = tables.connection, time.time()
    states = count_states(tables)
    finished = database.execute("SELECT finished, oldest FROM groups WHERE state = 'finished'").fetchall()
    leases = database.execute(
        "SELECT leases.id, deadline, count(*) FROM leases JOIN groups ON lease = leases.id GROUP BY leases.id"
    )
    counts = dict(database.execute("SELECT name, value FROM counts"))
    waiting = {arrival for (arrival,) in database.execute("SELECT arrival FROM groups WHERE state = 'waiting'")}
    return BatchesStatus(
        waiting=len(waiting - generating),  # groups under way may have been cancelled since
        generating=len(generating),
        finished=len(finished),
        leased=states.get("leased", 0) + states.get("failed, leased", 0),
        failed=states.get("failed", 0),
        acknowledged=counts["acknowledged"],
        capacity=capacity,
        oldest_seconds=now - min((f for f, _ in finished), default=now),
        oldest_version=min((oldest for _, oldest in finished), default=None),
        ages=sorted((round(now - f, 3) for f, _ in finished), reverse=True),
        leases=[LeaseInfo(lease=name, groups=n, seconds_left=end - now) for name, end, n in leases],
        dropped=counts["dropped"],
        tokens_wasted=counts["wasted_tokens"],
        persistent=persistent,
    )


def count_states(tables: QueueDatabase, where: str = "", *parameters: Any) -> dict[str, int]:
    """The number of groups in each state. Failed groups that are leased count as a state of their own."""
    query = "SELECT CASE WHEN state = 'failed' AND lease IS NOT NULL THEN 'failed, leased' ELSE state END, count(*)"
    return dict(tables.connection.execute(f"{query} FROM groups {where} GROUP BY 1", parameters))


def why_short(tables: QueueDatabase, request: LeaseRequest, given: int, stale: int) -> str:
    """Why a batch that was just leased is short: it has `given` groups, after `stale` ones were dropped."""
    states = count_states(tables, "WHERE run = ?", request.run)
    waiting, failed = states.get("waiting", 0), states.get("failed", 0) + states.get("failed, leased", 0)
    parts = [f"{given} of {request.groups} groups", f"{waiting} are waiting or being generated"]
    parts += [f"{failed} failed"] if failed else []
    parts += [f"{states['leased'] - given} are under other leases"] if states.get("leased", 0) > given else []
    parts += [f"{stale} were older than {request.max_staleness} versions and are generated again"] if stale else []
    return "; ".join(parts)
