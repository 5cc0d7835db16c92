"""guide(pipe, negative) around compiled denoisers."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from fine_tunes import changed
from pipelines import CASES, CLOSE
from selfnpo import guide
from selfnpo.errors import UserError

CASE = CASES["text to image"]


@pytest.mark.parametrize("way", ["module", "in place", "blocks"])
def test_one_compiled_graph_serves_both_weights(pipe, way):
    negative, counter = changed(pipe.unet), CompileCounter()
    with guide(pipe, negative):
        expected = CASE.run(pipe)
    plain = CASE.run(pipe)
    compile_(pipe, way, counter)
    with guide(pipe, negative):
        torch.testing.assert_close(CASE.run(pipe), expected, **CLOSE)
        graphs = counter.frame_count
    assert graphs == 1
    torch.testing.assert_close(CASE.run(pipe), plain, **CLOSE)


def compile_(pipe, way, backend):
    if way == "module":
        pipe.unet = torch.compile(pipe.unet, backend=backend, fullgraph=True, dynamic=False)
    elif way == "in place":
        pipe.unet.compile(backend=backend, fullgraph=True, dynamic=False)
    else:
        pipe.unet.mid_block.compile(backend=backend, fullgraph=True, dynamic=False)


@pytest.mark.parametrize("way", ["module", "in place", "blocks"])
def test_compiled_code_notices_a_lora(pipe, negative_of, way):
    lora = negative_of("lora", pipe)
    with guide(pipe, lora):
        expected = CASE.run(pipe)
    plain, counter = CASE.run(pipe), CompileCounter()
    compile_(pipe, way, counter)
    torch.testing.assert_close(CASE.run(pipe), plain, **CLOSE)
    for _ in range(2):
        with guide(pipe, lora):
            torch.testing.assert_close(CASE.run(pipe), expected, **CLOSE)
        torch.testing.assert_close(CASE.run(pipe), plain, **CLOSE)
    if way != "blocks":
        assert counter.frame_count == 2  # one plain, one with the offsets, however often that is attached


@pytest.mark.parametrize("fullgraph", [False, True])
def test_compiling_while_attached(pipe, fullgraph):
    negative = changed(pipe.unet)
    with guide(pipe, negative):
        CASE.run(pipe)
        pipe.unet.compile(backend="eager", fullgraph=fullgraph)
        with pytest.raises((UserError, torch._dynamo.exc.Unsupported), match="compile first, then guide"):
            CASE.run(pipe)
        pipe.unet._compiled_call_impl = None
        torch._dynamo.reset()
        pipe.unet = torch.compile(pipe.unet, backend="eager", fullgraph=fullgraph)
        with pytest.raises((UserError, torch._dynamo.exc.Unsupported), match="compile first, then guide"):
            CASE.run(pipe)
