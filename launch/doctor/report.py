"""The verdict of a check-up as text for people and as a document for scripts. In: the collected results. No side effects.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launch.doctor.finding import FAIL, OK, Finding, worst
from launch.doctor.network_checks import compare, gbit_s
from launch.doctor.node_checks import check_node
from launch.doctor.request import NETWORK_LOG, NODES_LOG, CheckupRequest
from launch.doctor.results import CheckupResults

# Longer lists are shortened: good nodes are counted, and only the slowest connections are shown.
_LISTED = 32


@dataclass(frozen=True)
class NodeVerdict:
    """The findings of one node and the facts behind them. `verdict` is the worst level."""

    node: str
    findings: tuple[Finding, ...]
    facts: Mapping[str, Any]

    @property
    def verdict(self) -> str:
        return worst(self.findings)


@dataclass(frozen=True)
class CheckupReport:
    """Everything that a check-up found.

    `job` has number, state and reason of the Slurm job, and is None for a check-up of this machine. `job_error` says why
    the job delivered no results or incomplete ones.
    """

    folder: str
    nodes: tuple[NodeVerdict, ...]
    network: Mapping[str, Any] | None
    network_error: str
    job: Mapping[str, Any] | None = None
    job_error: str = ""

    @property
    def ok(self) -> bool:
        sound = all(node.verdict != FAIL for node in self.nodes)
        return sound and bool(self.nodes) and not self.network_error and not self.job_error


def judge(
    results: CheckupResults,
    request: CheckupRequest,
    expected: Sequence[str],
    job: Mapping[str, Any] | None = None,
    job_error: str = "",
) -> CheckupReport:
    """The verdicts of the `expected` nodes, in their order."""
    cross_node_findings = compare(results.facts, results.network, request) if results.facts else {}
    nodes = []
    for node in expected:
        findings = [] if node in results.silent else [*check_node(results.facts[node], request), *cross_node_findings[node]]
        nodes.append(NodeVerdict(node, (*findings, *_findings_from_logs(node, results)), results.facts.get(node, {})))
    return CheckupReport(request.folder, tuple(nodes), results.network, results.network_error, job, job_error)


def _findings_from_logs(node: str, results: CheckupResults) -> Iterator[Finding]:
    """Findings from the logs about a node that delivered no facts or no measurements."""
    if node in results.silent:
        fix = f"see {NODES_LOG}; launch.slurm.exclude keeps the node out"
        yield Finding("answer", FAIL, results.silent[node], "the node reports its facts", fix)
    if node in results.broke:
        fix = f"its ranks ended before the others': see {NETWORK_LOG}; launch.slurm.exclude keeps the node out"
        yield Finding("ranks", FAIL, results.broke[node], "its ranks measure to the end", fix)


def as_document(found: CheckupReport) -> dict[str, Any]:
    """What --json prints."""
    nodes = [
        {
            "node": node.node,
            "verdict": node.verdict,
            "findings": [finding.as_dict() for finding in node.findings],
            "facts": dict(node.facts),
        }
        for node in found.nodes
    ]
    network = None if found.network is None and not found.network_error else dict(found.network or {})
    if network is not None:
        network["error"] = found.network_error or None
    job = None if found.job is None else {**found.job, "error": found.job_error or None}
    return {"ok": found.ok, "nodes": nodes, "network": network, "job": job, "folder": found.folder}


def describe(found: CheckupReport) -> str:
    """One line for each node, then the findings with their fixes, then the network table."""
    lines = [*_node_lines(found.nodes), *_finding_lines(found.nodes)]
    if found.network:
        lines += ["", *_network_lines(found.network)]
    if found.network_error:
        lines += ["", f"FAIL  network between the ranks: {found.network_error}"]
    if found.job_error:
        lines += ["", f"FAIL  {found.job_error}"]
    return "\n".join([*lines, "", _summary(found)])


def _node_lines(nodes: Sequence[NodeVerdict]) -> list[str]:
    if not nodes:
        return []
    width = max(len(node.node) for node in nodes)
    many = len(nodes) > _LISTED
    shown = [node for node in nodes if not many or node.verdict != OK]
    lines = [
        f"{node.node:<{width}}  {node.verdict.upper() if node.verdict != OK else OK:<4}  {_one_line(node)}" for node in shown
    ]
    return lines + ([f"{len(nodes) - len(shown)} more nodes: ok"] if len(shown) < len(nodes) else [])


def _one_line(node: NodeVerdict) -> str:
    bad = [finding.name for finding in node.findings if finding.level != OK]
    if not node.facts:
        return "no answer"
    facts, torch = node.facts, node.facts["torch"]
    gpus = [row["name"] for row in facts["gpus"]["gpus"]] or torch.get("gpus", [])
    kinds = [f"{gpus.count(name)} × {name}" for name in dict.fromkeys(gpus)] or ["no GPU"]
    words = [", ".join(kinds), f"{facts['cores']} cores", f"{facts['memory']['total_gib']:.0f} GiB"]
    words.append(f"torch {facts['packages']['torch'] or 'missing'}")
    return ", ".join(words) + (f"; see {', '.join(bad)}" if bad else "")


def _finding_lines(nodes: Sequence[NodeVerdict]) -> Iterator[str]:
    """Every finding above `ok` once, with all nodes that share it. Failures come first."""
    shared: dict[Finding, list[str]] = {}
    for node in nodes:
        for finding in node.findings:
            if finding.level != OK:
                shared.setdefault(finding, []).append(node.node)
    for finding, names in sorted(shared.items(), key=lambda item: item[0].level != FAIL):
        shown = ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")
        yield ""
        yield f"{finding.level.upper()}  {finding.name} on {shown}: {finding.value}"
        yield f"      rule: {finding.expected}"
        yield f"      fix:  {finding.fix}"


def _network_lines(network: Mapping[str, Any]) -> list[str]:
    rows: list[tuple[str, Mapping[str, float]]] = []
    inside = sorted(network.get("inside", ()), key=gbit_s)
    between = sorted(network.get("between", ()), key=gbit_s)
    rows += [(f"inside {row['node']}, {row['ranks']} ranks", row["gbit_s"]) for row in inside[:_LISTED]]
    rows += [(" – ".join(row["nodes"]), row["gbit_s"]) for row in between[:_LISTED]]
    whole = network.get("all")
    if whole is not None and len(network["nodes"]) > 1:
        rows.append((f"all {whole['ranks']} ranks", whole["gbit_s"]))
    rows = [(name, figures) for name, figures in rows if figures]
    if not rows:
        return []
    width = max(len(name) for name, _ in rows)
    sizes = list(rows[0][1])
    head = f"all-reduce of each rank's so many MiB, bus bandwidth in Gbit/s, slowest first ({network['backend']})"
    table = [f"{'':<{width}}" + "".join(f"{size + ' MiB':>10}" for size in sizes)]
    table += [f"{name:<{width}}" + "".join(f"{figures[size]:>10.1f}" for size in sizes) for name, figures in rows]
    cut = len(inside) + len(between) - len(inside[:_LISTED]) - len(between[:_LISTED])
    return [head, *table, *([f"and {cut} faster ones"] if cut else [])]


def _summary(found: CheckupReport) -> str:
    counts = [(level, sum(node.verdict == level for node in found.nodes)) for level in (FAIL, "warn", OK)]
    told = ", ".join(f"{count} {level}" for level, count in counts if count) or "none was looked at"
    files = f"; files: {found.folder}" if found.folder else ""
    return f"{'fit' if found.ok else 'NOT FIT'} to train; nodes: {told}{files}"
