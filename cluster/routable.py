"""Which copies of one expert the table names while a plan is being carried out."""

from collections.abc import Collection, Set

from router.table import CopyShare


def routable(target: Collection[CopyShare], live: Set[str], stuck: Set[str]) -> tuple[CopyShare, ...]:
    """The observed copies to route to: the target's, plus the old ones while any of it is missing.

    Args:
        target: copies of the plan, with their shares.
        live: servers where a copy is observed.
        stuck: servers that cannot load because they are full of old copies: they keep one only if nobody else has it.

    Returns:
        copies whose shares sum to 1; none if none is live.
    """
    chosen = [copy for copy in target if copy.server_id in live]
    if len(chosen) < len(target) or not target:
        others = sorted(live - {copy.server_id for copy in target})
        others = [other for other in others if other not in stuck] or ([] if chosen else others[:1])
        left = 1 - sum(copy.share for copy in chosen)
        chosen += [CopyShare(server_id=other, share=max(left, 0.01) / len(others)) for other in others]
    total = sum(copy.share for copy in chosen)
    if not chosen or abs(total - 1) < 1e-9:
        return tuple(chosen)
    return tuple(CopyShare(server_id=copy.server_id, share=copy.share / total) for copy in chosen)
