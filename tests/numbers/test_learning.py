"""Learned rounding: begins at what was decided, moves by gradients, and is what is packed."""

import pytest
import torch
from torch import Tensor

from fxq.numbers import nvfp4
from fxq.numbers.learning import LearnedWeights, relative_error

GRID = torch.tensor([-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6])


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _packed(w: Tensor, scale: str = "mse") -> nvfp4.Packed:
    return nvfp4.quantize_weight(w, w.abs().amax((1, 2)), scale)


def _whatever(shape: tuple[int, int, int]) -> nvfp4.Packed:
    """Codes that have nothing to do with any weight."""
    n, rows, width = shape
    codes = torch.randint(0, 256, (n, rows, width // 2), generator=torch.Generator().manual_seed(1))
    scales = torch.randint(1, 127, (n, rows, width // 16), generator=torch.Generator().manual_seed(2))
    return nvfp4.Packed(
        codes.to(torch.uint8), scales.to(torch.uint8).view(torch.float8_e4m3fn), torch.full((n,), 0.01)
    )


@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize("scales", [False, True])
def test_nothing_has_changed_at_the_beginning(codes: bool, scales: bool) -> None:
    """Even if codes are not the nearest, as after feedback."""
    w = _random(2, 24, 64)
    for made in (_packed(w), _whatever((2, 24, 64))):
        learned = LearnedWeights(w, made, codes=codes, scales=scales)
        before, after = (
            nvfp4.dequantize(made),
            nvfp4.dequantize(nvfp4.Packed(*learned.packed(), made.scale_2)),
        )
        assert torch.equal(before, after)
        torch.testing.assert_close(learned.values(), before)
        assert [t is not None for t in (learned.v, learned.r)] == [codes, scales]


@pytest.mark.parametrize("there", [-100.0, 0.0, 100.0])
@pytest.mark.parametrize("sign", [-1, 1])
def test_half_a_width_reaches_a_neighbour_and_no_further(there: float, sign: int) -> None:
    """Of every point of the grid, wherever in what rounds to it the weight lies."""
    points = torch.cat([GRID, torch.zeros(1)])[None, None]  # a block
    one = torch.ones(1, 1, 1).to(torch.float8_e4m3fn)
    made = nvfp4.Packed(nvfp4.pack(points, one.float(), torch.ones(1)), one, torch.ones(1))
    learned = LearnedWeights(points + there, made, codes=True, scales=False)
    assert learned.v is not None
    learned.v.data.fill_(3.0 * sign)
    learned.limit()
    moved = torch.searchsorted(GRID, learned.values().detach()[0, 0, :15]) - torch.arange(15)
    assert ((moved * sign >= 0) & (moved * sign <= 1)).all()
    if there * sign > 0:  # it lies at the end that it is moved toward
        assert (moved.abs()[1:-1] == 1).all()


@pytest.mark.parametrize("what", ["codes", "scales", "both"])
def test_gradients_lower_what_the_output_loses(what: str) -> None:
    w, x = _random(1, 32, 64), _random(500, 64, seed=3) @ (torch.eye(64) + 0.4 * _random(64, 64, seed=4))
    made = _packed(w, "max" if what == "scales" else "mse")
    learned = LearnedWeights(w, made, codes=what != "scales", scales=what != "codes")
    rates = (learned.v, 3e-3), (learned.r, 1e-3)
    adam = torch.optim.Adam(
        [{"params": [t], "lr": lr} for t, lr in rates if t is not None], betas=(0.9, 0.95)
    )

    def lost() -> Tensor:
        return (x @ (learned.values()[0] - w[0]).T).square().sum()

    losses = []
    for _ in range(100):
        loss = lost()
        losses.append(float(loss.detach()))
        adam.zero_grad()
        loss.backward()
        adam.step()
        learned.limit()
    found = nvfp4.dequantize(nvfp4.Packed(*learned.packed(), made.scale_2))
    torch.testing.assert_close(learned.values().detach(), found)
    assert min(losses) < 0.97 * losses[0]
    if what == "scales":
        assert torch.equal(learned.packed()[0] & 0x77, made.weight & 0x77)


def test_every_row_counts_alike() -> None:
    wanted = _random(2, 3, 8)
    found = wanted * torch.tensor([1.0, 1.1, 0.8])[:, None]
    assert float(relative_error(found, wanted)) == pytest.approx((0 + 0.01 + 0.04) / 3, rel=1e-4)
    wanted[0, 1] *= 1000
    found = wanted * torch.tensor([1.0, 1.1, 0.8])[:, None]
    assert float(relative_error(found, wanted)) == pytest.approx((0 + 0.01 + 0.04) / 3, rel=1e-4)
    wanted[1] = 0
    assert torch.isfinite(relative_error(wanted, wanted))
