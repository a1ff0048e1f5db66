"""What `describe` found, in lines for people."""

from collections.abc import Mapping, Sequence
from typing import Any


def describe_lines(found: Mapping[str, Any]) -> list[str]:
    """What `describe_model` found, for people."""
    dims, stored = found["dims"], found["stored"]
    sizes = f"D {dims['model']}, F {dims['expert_hidden']}"
    sizes += f", shared {dims['shared_hidden']}" if dims["shared_hidden"] else ""
    sizes += f", latent {dims['latent']}" if dims["latent"] else ""
    identity = f" and {found['identity_experts']} identity experts" if found["identity_experts"] else ""
    num_layers = len(found["layers"])
    expert, layers = stored["expert_bytes"], [layer["experts_bytes"] for layer in stored["layers"]]
    lines = [
        f"model   {found['model']}",
        f"family  {found['family']}, {found['dtype']}; experts stored as {found['stored_as']}",
        f"files   {found['files']} with {_bytes(found['files_bytes'])}, "
        f"{stored['bytes'] / found['files_bytes']:.1%} of it routed experts",
        f"layers  {num_layers} MoE layers of {found['transformer_layers']}: {found['layer_ranges']}",
        f"experts {found['experts']}{identity} per layer, top {found['top_k']}; {sizes}; "
        f"{found['expert_params']:,} parameters each, {found['routed_params']:,} in all",
        "",
        f"gate    {found['gate']}",
        f"expert  {found['expert']}",
        f"shared  {found['shared'] or 'none'}",
        f"around  {found['around'] or 'nothing'}",
    ]
    lines += [f"layers {other['ranges']}: {'; '.join(other['words'])}" for other in found["differing_layers"]]
    if found["needs_token_ids"]:
        lines.append("requests for layers that look experts up need token ids")
    lines += [
        "",
        f"stored  an expert {_span(expert['smallest'], expert['largest'])}, "
        f"a layer's experts {_span(min(layers), max(layers))}, all {_bytes(stored['bytes'])}; "
        f"every router reads {_bytes(stored['router_bytes'])} (gates, shared experts, what surrounds them)",
        "",
        *_memory_lines(found["memory"]),
        "",
        *_cluster_lines(found["cluster"]),
    ]
    return lines


def _memory_lines(memory: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [f"{'in memory':<12}{'computing in':<14}{'expert':>12}{'layer':>12}{'all':>12}"]
    for row in memory:
        sizes = "".join(f"{_bytes(row[key]):>12}" for key in ("expert_bytes", "layer_bytes", "bytes"))
        lines.append(f"{row['weight_dtype']:<12}{row['compute_dtype']:<14}{sizes}")
    return lines


def _cluster_lines(cluster: Mapping[str, Any]) -> list[str]:
    kept = "" if cluster["weight_dtype"] == "compute" else f"with {cluster['weight_dtype']} weights, "
    lines = [
        f"a cluster {kept}computing in {cluster['compute_dtype']}: {cluster['experts']:,} experts, "
        f"{_bytes(cluster['bytes'])} for one copy of each"
    ]
    budget = cluster["budget_bytes"]
    if budget is not None:
        needed = cluster["servers_needed"]
        lines.append(
            f"{_bytes(budget)} for each server hold {cluster['copies_per_server']:,} copies; "
            + (f"{needed:,} servers hold one copy of every expert" if needed else "not a single expert fits")
        )
    lines.append(f"{'servers':>7}{'experts each':>16}{'memory each':>14}" + ("" if budget is None else "  room"))
    for row in cluster["sizes"]:
        held = row["experts_per_server"]
        each = f"{held['smallest']:,}" + (f"-{held['largest']:,}" if held["largest"] != held["smallest"] else "")
        room = ""
        if row["missing_experts"]:
            room = f"  {row['missing_experts']:,} experts do not fit"
        elif budget is not None:
            room = f"  for {row['spare_copies']:,} more copies"
        lines.append(f"{row['servers']:>7,}{each:>16}{_bytes(row['bytes_per_server']):>14}{room}")
    return lines


def _span(smallest: int, largest: int) -> str:
    return _bytes(smallest) if smallest == largest else f"{_bytes(smallest)} to {_bytes(largest)}"


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:,.0f} {unit}" if unit == "bytes" else f"{size:,.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} TiB"
