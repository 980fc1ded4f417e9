"""What every number format promises: the graph, the writer and the simulator ask it alone."""

from __future__ import annotations

import pytest
import torch

import fxq
from fxq.numbers import nvfp4
from fxq.numbers.formats import FORMATS, Format, check_pair

W = torch.randn(2, 160, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
AMAX = W.abs().amax((1, 2)).float() * 1.25
every_format = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)


@every_format
def test_parts_are_what_packing_gives(format: Format) -> None:
    packed = format.quantize(W, AMAX, format.scales[0])
    tensors = {**format.rows(packed), **format.scalars(packed)}
    assert list(tensors) == [part.name for part in format.parts]
    for part in format.parts:
        assert tensors[part.name].shape == part.shape(tuple(W.shape))
        assert tensors[part.name].dtype == part.dtype


@every_format
def test_the_last_part_is_the_scale_of_the_tensor(format: Format) -> None:
    scalars = list(format.scalars(format.quantize(W, AMAX, format.scales[0])).values())
    assert len(scalars) == format.has_amaxes
    if not format.has_amaxes:  # the scales of its blocks are all that there are
        return
    (scale,) = scalars
    assert torch.equal(scale, format.scale_of(AMAX))
    torch.testing.assert_close(scale.double(), AMAX.double() / format.largest, rtol=1e-6, atol=0)
    assert float(format.scale_of(torch.tensor(0.0))) > 0


@every_format
def test_a_weight_is_simulated_as_it_is_decoded(format: Format) -> None:
    for scale in format.scales:
        packed = format.quantize(W, AMAX, scale)
        for e in range(len(W)):
            decoded = format.dequantize(packed.part(e, slice(None))).to(W.dtype)
            assert torch.equal(decoded, format.fake_quantize(W[e], AMAX[e], scale))


@every_format
def test_what_packing_lost_is_measured(format: Format) -> None:
    for scale in format.scales:
        measured = format.measured(W, AMAX, scale)
        lost = (format.dequantize(measured).double() - W.double()).square().sum((1, 2))
        torch.testing.assert_close(measured.error, lost, rtol=1e-6, atol=0)
        torch.testing.assert_close(measured.energy, W.double().square().sum((1, 2)), rtol=1e-6, atol=0)


@every_format
def test_inputs_of_any_rank_keep_shape_and_dtype(format: Format) -> None:
    x = W.reshape(2, 4, 40, 256)
    found = format.fake_quantize(x, AMAX[0], format.input_scale)
    assert (found.shape, found.dtype) == (x.shape, x.dtype)
    assert 0 < float((found - x).abs().max()) < float(x.abs().max()) / 4


@every_format
def test_block_scales_that_reach_the_maximum_are_those_of_plain_maxima(format: Format) -> None:
    assert (format.reach is None) == (format.block is None or not format.has_amaxes)
    if format.reach is not None and format.block is not None:
        blocks = W.float().unflatten(-1, (-1, format.block)).abs().amax(-1).flatten(1)
        found = format.reach(blocks, format.scale_of(AMAX)).float()
        wanted = nvfp4.max_scales(W, format.scale_of(AMAX)).float().flatten(1)
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("width", [0, 16, 24, 48])
def test_nvfp4_holds_whole_blocks_and_fp8_any_row(width: int) -> None:
    assert FORMATS["nvfp4"].holds(width) == (width % 16 == 0)
    assert FORMATS["fp8"].holds(width)


def test_pairs_that_no_engine_multiplies_are_refused() -> None:
    for weights, inputs in [("nvfp4", "nvfp4"), ("nvfp4", "none"), ("fp8", "fp8")]:
        check_pair(weights, inputs, "a-pass")
    for weights, inputs in [("nvfp4", "fp8"), ("fp8", "none"), ("fp8", "nvfp4")]:
        with pytest.raises(fxq.SpecError, match=rf"^a-pass: weights: {weights} and inputs: {inputs} do not"):
            check_pair(weights, inputs, "a-pass")
