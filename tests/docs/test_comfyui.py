"""The workflows of docs/comfyui against ComfyUI's definitions of its nodes, an extract of what a running ComfyUI tells."""

import json
from pathlib import Path

import pytest

from selfnpo.export.negative import KOHYA_FILE

ROOT = Path(__file__).parents[2]
DEFINITIONS = json.loads((ROOT / "tests/docs/comfyui_nodes.json").read_text())["nodes"]
WORKFLOWS = sorted((ROOT / "docs/comfyui").glob("*.json"))
WIDGETS = {"INT": int, "FLOAT": (int, float), "STRING": str, "COMBO": str}


class Workflow:
    """A saved graph: nodes by number, and which node feeds an input."""

    def __init__(self, content: dict):
        self.content = content
        self.nodes = {node["id"]: node for node in content["nodes"]}
        self.links = {link[0]: link[1:] for link in content["links"]}

    def find(self, *kinds: str) -> list[dict]:
        return [node for node in self.nodes.values() if node["type"] in kinds]

    def feeds(self, node: dict) -> dict[str, int]:
        """Linked inputs: their names, and the numbers of the nodes that feed them."""
        return {each["name"]: self.links[each["link"]][0] for each in node["inputs"] if each["link"]}

    def origins(self, node: dict) -> set[int]:
        """The numbers of all nodes that a node depends on."""
        direct = set(self.feeds(node).values())
        return direct.union(*(self.origins(self.nodes[number]) for number in direct))


@pytest.fixture(params=WORKFLOWS, ids=lambda path: path.stem)
def workflow(request):
    return Workflow(json.loads(request.param.read_text()))


def test_every_workflow_is_tested():
    assert {path.stem for path in WORKFLOWS} == {"negative_lora_sd15", "negative_lora_sdxl", "negative_unet_sd15"}


def test_links_join_slots_of_one_type(workflow):
    content = workflow.content
    assert (content["version"], content["last_node_id"]) == (0.4, max(workflow.nodes))
    assert content["last_link_id"] == max(workflow.links) == len(content["links"])
    seen = 0
    for number, (origin, out, target, into, kind) in workflow.links.items():
        source, sink = workflow.nodes[origin]["outputs"][out], workflow.nodes[target]["inputs"][into]
        assert number in source["links"]
        assert sink["link"] == number
        assert kind == source["type"] == sink["type"]
        seen += 1
    assert seen == sum(len(out["links"]) for node in workflow.nodes.values() for out in node["outputs"])


def test_nodes_are_those_that_comfyui_defines(workflow):
    for node in workflow.nodes.values():
        definition = DEFINITIONS[node["type"]]
        assert [out["type"] for out in node["outputs"]] == definition["outputs"][: len(node["outputs"])]
        for each in node["inputs"]:
            assert each["type"] == definition["inputs"][each["name"]]["type"]
        sockets = {name for name, each in definition["inputs"].items() if each["type"] not in WIDGETS}
        linked = set(workflow.feeds(node))
        assert sockets <= {each["name"] for each in node["inputs"]}
        assert {name for name in sockets if "optional" not in definition["inputs"][name]} <= linked


def test_widgets_hold_legal_values_in_comfyuis_order(workflow):
    for node in workflow.nodes.values():
        values = iter(node["widgets_values"])
        for name, each in DEFINITIONS[node["type"]]["inputs"].items():
            if each["type"] not in WIDGETS:
                continue
            value = next(values)
            where = f"{node['type']}.{name}"
            assert isinstance(value, WIDGETS[each["type"]]), where
            if "min" in each:
                assert each["min"] <= value <= each["max"], where
            if each.get("options") == ["*.safetensors"]:
                assert value.endswith(".safetensors"), where
            elif "options" in each:
                assert value in each["options"], where
            if each.get("control_after_generate"):
                assert next(values) in ("fixed", "increment", "decrement", "randomize"), where
        assert next(values, None) is None, node["type"]


def test_only_the_negative_branch_of_one_picture_sees_the_negative(workflow):
    (negative,) = workflow.find("CreateHookLoraModelOnly", "UNETLoader")
    plain, guided = workflow.find("KSampler") or workflow.find("CFGGuider", "DualModelGuider")
    assert negative["id"] not in workflow.origins(plain)
    inputs = workflow.feeds(guided)
    reached = [
        name for name, origin in inputs.items() if negative["id"] in {origin} | workflow.origins(workflow.nodes[origin])
    ]
    assert reached == ["negative" if negative["type"] == "CreateHookLoraModelOnly" else "model_negative"]
    same = {name: origin for name, origin in inputs.items() if name not in reached}
    assert same == {name: origin for name, origin in workflow.feeds(plain).items() if name not in reached}


def test_both_pictures_are_made_alike(workflow):
    """All that samples and decodes has equal inputs and widgets, but for the guidance and what it leads to."""
    for kind in ("KSampler", "SamplerCustomAdvanced", "VAEDecode"):
        if pair := workflow.find(kind):
            plain, guided = pair
            assert plain["widgets_values"] == guided["widgets_values"]
            differ = {name for name, origin in workflow.feeds(plain).items() if workflow.feeds(guided)[name] != origin}
            assert differ <= {"negative", "guider", "samples"}


def test_a_lora_is_the_file_that_comfyui_finds(workflow):
    for node in workflow.find("CreateHookLoraModelOnly"):
        assert node["widgets_values"] == [KOHYA_FILE, 1.0]


def test_sdxl_takes_zeros_for_the_empty_prompt_as_diffusers_does(workflow):
    (base,) = workflow.find("CheckpointLoaderSimple")
    assert len(workflow.find("ConditioningZeroOut")) == (base["widgets_values"] == ["sd_xl_base_1.0.safetensors"])


def test_no_lora_feeds_a_guider_of_two_models(workflow):
    """ComfyUI has one copy of a loaded model's weights: the guider would sample as if there were no LoRA."""
    for guider in workflow.find("DualModelGuider"):
        inputs = workflow.feeds(guider)
        loaders = workflow.nodes[inputs["model"]], workflow.nodes[inputs["model_negative"]]
        assert [each["type"] for each in loaders] == ["CheckpointLoaderSimple", "UNETLoader"]
