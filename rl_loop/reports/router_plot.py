"""Router plot, router.png: how evenly the experts of a mixture were chosen, and how sure the routers were, by step."""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from rl_loop.reports.metrics import RouterMetrics


def plot_routers(file: Path, routed: Mapping[int, RouterMetrics]) -> None:
    """`routed`: by step, none without experts. Loads are multiples of an equal share, so 1 is a balanced expert."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    numbers = list(routed)
    loads_SLE = np.array([metrics.expert_load for metrics in routed.values()])
    _, layers, experts = loads_SLE.shape
    loads_SLE *= experts
    entropies_SL = np.array([metrics.router_entropy for metrics in routed.values()])

    figure = Figure(figsize=(8, 9), layout="constrained")
    of_experts, range_of_load, entropy = figure.subplots(3, 1)
    image = of_experts.imshow(loads_SLE[-1], aspect="auto", vmin=0.0, vmax=max(2.0, loads_SLE[-1].max()))
    figure.colorbar(image, ax=of_experts, label="load / equal share")
    of_experts.set_title(f"load of each expert in step {numbers[-1]}")
    of_experts.set_ylabel("layer")
    of_experts.set_yticks(range(0, layers, math.ceil(layers / 12)))
    of_experts.set_xlabel("expert")
    of_experts.set_xticks(range(0, experts, math.ceil(experts / 16)))

    colours = colormaps["plasma"](np.linspace(0.0, 0.9, layers))
    for layer, colour in enumerate(colours):
        label = f"layer {layer}" if layer in {0, layers // 2, layers - 1} else None
        range_of_load.plot(numbers, loads_SLE[:, layer].max(1), color=colour, label=label)
        range_of_load.plot(numbers, loads_SLE[:, layer].min(1), color=colour, linestyle="--")
        entropy.plot(numbers, entropies_SL[:, layer], color=colour)
    range_of_load.axhline(1.0, color="grey", linestyle=":", linewidth=0.8)
    range_of_load.set_ylabel("load / equal share\n(line: most, dashed: least)")
    range_of_load.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize="small")
    entropy.axhline(math.log(experts), color="grey", linestyle=":", linewidth=0.8)
    entropy.set_ylim(0.0, 1.05 * math.log(experts))
    entropy.set_ylabel("router entropy in nats\n(dotted: all experts alike)")
    entropy.set_xlabel("step")
    for axes in (range_of_load, entropy):
        axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120)
