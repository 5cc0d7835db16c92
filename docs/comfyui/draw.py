"""Draw a workflow as ComfyUI shows it: `python docs/comfyui/draw.py WORKFLOW.json PICTURE.png`. Needs matplotlib."""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch, PathPatch, Rectangle
from matplotlib.path import Path as Curve

COLOURS = {
    "MODEL": "#8a70d6", "CLIP": "#c9a400", "VAE": "#e05a5a", "CONDITIONING": "#e8871e", "LATENT": "#d957b8",
    "IMAGE": "#3d8fd1", "HOOKS": "#c0202a", "GUIDER": "#27a69a",
}  # fmt: skip
TITLE, ROW, SLOT = 30, 25, 24  # heights, in the workflow's pixels; a node's position is the corner below its title
NEGATIVE = "#322"  # a node's colour in the workflow where it belongs to the negative
RED, GREY = "#c0202a", "#8a8f98"
SIZE = 8.8


def widget_names(kind: str) -> list[str]:
    """Names of a node's widgets in the order of its `widgets_values`."""
    names = []
    definitions = json.loads((Path(__file__).parents[2] / "tests/comfyui_nodes.json").read_text())["nodes"]
    for name, each in definitions[kind]["inputs"].items():
        if each["type"] in ("INT", "FLOAT", "STRING", "COMBO"):
            names += [name, "after"] if each.get("control_after_generate") else [name]
    return names


def slot(node: dict, side: str, number: int) -> tuple[float, float]:
    """Where a link enters or leaves a node."""
    x, y = node["pos"]
    return x + (node["size"][0] if side == "outputs" else 0), y + 14 + SLOT * number


def draw_node(axes: plt.Axes, node: dict) -> None:
    (x, y), (width, height) = node["pos"], node["size"]
    edge = RED if node.get("color") == NEGATIVE else "#4a4f57"
    box = {"boxstyle": "round,pad=0,rounding_size=8", "edgecolor": edge, "linewidth": 1.4, "zorder": 3}
    axes.add_patch(FancyBboxPatch((x, y - TITLE), width, height + TITLE, facecolor="white", **box))
    title = node.get("title") or node["type"]
    axes.text(x + 10, y - TITLE / 2, title, va="center", fontsize=SIZE + 0.4, weight="bold", color=edge, zorder=5)
    axes.plot([x, x + width], [y, y], color=edge, linewidth=0.8, zorder=4)
    for side, align, shift in (("inputs", "left", 9), ("outputs", "right", -9)):
        for number, each in enumerate(node[side]):
            at_x, at_y = slot(node, side, number)
            used = bool(each.get("link") or each.get("links"))
            axes.plot(at_x, at_y, "o", color=COLOURS.get(each["type"], GREY) if used else "#ccc", markersize=4.5, zorder=6)
            style = {"ha": align, "va": "center", "fontsize": SIZE - 0.9, "color": "#333" if used else "#bbb"}
            axes.text(at_x + shift, at_y, each["name"], zorder=5, **style)
    linked = {each["name"] for each in node["inputs"]}
    shown = [(n, v) for n, v in zip(widget_names(node["type"]), node["widgets_values"], strict=True) if n not in linked]
    top = y + 14 + SLOT * max(len(node["inputs"]), len(node["outputs"]))
    for number, (name, value) in enumerate((n, v) for n, v in shown if n != "after"):
        text = {"text": f'"{value}"', "value": str(value)}.get(name, f"{name}: {value}")
        if name in ("ckpt_name", "lora_name", "unet_name", "filename_prefix"):
            text = value
        axes.text(
            x + 12, top + ROW * number, text, va="center", fontsize=SIZE - 1.4, family="monospace", color="#111", zorder=5
        )


def draw(workflow: dict, picture: Path) -> None:
    nodes = {node["id"]: node for node in workflow["nodes"]}
    right = max(node["pos"][0] + node["size"][0] for node in nodes.values()) + 30
    bottom = max(group["bounding"][1] + group["bounding"][3] for group in workflow["groups"]) + 10
    top = min(group["bounding"][1] for group in workflow["groups"]) - 10
    figure, axes = plt.subplots(figsize=((right + 40) / 145, (bottom - top) / 145))
    axes.set(xlim=(-40, right), ylim=(bottom, top), aspect="equal")
    axes.axis("off")
    figure.subplots_adjust(0, 0, 1, 1)
    for group in workflow["groups"]:
        x, y, width, height = group["bounding"]
        axes.add_patch(Rectangle((x, y), width, height, facecolor=group["color"], alpha=0.13, zorder=0))
        axes.text(
            x + 12, y + 18, group["title"], va="center", fontsize=SIZE + 1.5, weight="bold", color=group["color"], zorder=2
        )
    for node in nodes.values():
        draw_node(axes, node)
    for _, origin, out, target, into, kind in workflow["links"]:
        (x0, y0), (x1, y1) = slot(nodes[origin], "outputs", out), slot(nodes[target], "inputs", into)
        bend = max(40, (x1 - x0) / 2)
        curve = Curve([(x0, y0), (x0 + bend, y0), (x1 - bend, y1), (x1, y1)], [1, 4, 4, 4])
        width = 3.2 if nodes[origin].get("color") == NEGATIVE else 1.4
        axes.add_patch(PathPatch(curve, facecolor="none", edgecolor=COLOURS.get(kind, GREY), linewidth=width, zorder=2.5))
    figure.savefig(picture, dpi=110, facecolor="white")


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
