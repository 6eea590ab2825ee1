"""How heterogeneous a partition is."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.special import rel_entr

from fedsim.data.dealing import class_counts_of
from fedsim.data.partition import Partition, VirtualPartition

SAMPLED = 1000  # virtual clients in a report: their classes must be counted client by client


def gini(sizes: np.ndarray) -> float:
    """Gini coefficient of sizes `[C]` >= 0: 0 when all are equal, 1 - 1/C when one client holds everything."""
    ordered = np.sort(np.asarray(sizes, dtype=np.float64))
    total, clients = ordered.sum(), ordered.size
    if total == 0:
        return 0.0
    ranks = np.arange(1, clients + 1)
    return max(0.0, float((2 * ranks - clients - 1) @ ordered / (clients * total)))


def js_divergence(counts: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Jensen-Shannon divergence in bits of each row of `counts` `[C, L]` to `reference` `[L]`: float64 `[C]` in [0, 1].

    Both are normalized here; a client without examples has NaN. This is the divergence, not its square root (the distance).

    Source: Lin 1991, eq. 4.1 with equal weights and base-2 logarithms.
    """
    with np.errstate(invalid="ignore"):
        p = counts / counts.sum(axis=1, keepdims=True)
        q = reference / reference.sum()
    middle = (p + q) / 2
    bits = (rel_entr(p, middle) + rel_entr(np.broadcast_to(q, p.shape), middle)).sum(axis=1) / (2 * np.log(2))
    return np.clip(bits, 0.0, 1.0)


def measure(partition: Partition | VirtualPartition, labels: np.ndarray, num_classes: int) -> dict[str, Any]:
    """How heterogeneous a partition is, ready for JSON.

    Of a `VirtualPartition` of more than 1,000 clients, whatever is by client or by class is of 1,000 of them, drawn by
    its key: class_counts, sizes, client_names, js, js_mean, js_max. The rest is of all clients.

    Args:
        labels: int64 `[n]`, values 0 ... num_classes - 1.

    Returns:
        class_counts `[C][L]`, sizes `[C]`, client_names `[C]`, num_clients, rows, min_rows, median_rows, max_rows,
        js `[C]` (bits, divergence of a client's label mix to that of all examples held by clients; None for an empty
        client), js_mean (weighted by examples) and js_max, size_gini, empty_clients (names), notes. js_mean and js_max are
        None when no client holds an example. Of a `VirtualPartition` also sampled_clients, the C of the above.
    """
    virtual = isinstance(partition, VirtualPartition)
    if isinstance(partition, VirtualPartition):
        clients = partition.sample(SAMPLED)
        counts = np.stack([np.bincount(labels[partition.rows(c)], minlength=num_classes) for c in clients.tolist()])
    else:
        clients = np.arange(partition.num_clients)
        counts = class_counts_of(partition, labels, num_classes)
    every, sizes = partition.sizes, counts.sum(axis=1)
    js, held = js_divergence(counts, counts.sum(axis=0)), sizes > 0
    names = [partition.name(client) for client in clients.tolist()]
    return {
        "num_clients": partition.num_clients,
        **({"sampled_clients": clients.size} if virtual else {}),
        "rows": int(every.sum()),
        "client_names": names,
        "class_counts": counts.tolist(),
        "sizes": sizes.tolist(),
        "min_rows": int(every.min()),
        "median_rows": float(np.median(every)),
        "max_rows": int(every.max()),
        "size_gini": gini(every),
        "js": [float(bits) if some else None for bits, some in zip(js, held, strict=True)],
        "js_mean": float(np.average(js[held], weights=sizes[held])) if held.any() else None,
        "js_max": float(js[held].max()) if held.any() else None,
        "empty_clients": [names[client] for client in np.flatnonzero(~held)],
        "notes": dict(partition.notes),
    }
