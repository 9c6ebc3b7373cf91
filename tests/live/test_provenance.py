"""How tensors were made is known while nothing wrote into them, and unknown after."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from kreg.rewriters.live.provenance import Given, Made, Recorder, origin_of, written


def mask(length: int = 8) -> torch.Tensor:
    places = torch.arange(length)
    return torch.where(places[None, :] <= places[:, None], 0.0, -1.0)


def test_constructors_integers_and_booleans_are_noted_and_weights_are_not() -> None:
    weight = torch.nn.Parameter(torch.randn(8, 8))
    ids = torch.randint(8, (2, 8))
    with Recorder():
        made, looked_up, mixed = mask(), ids == 0, mask() + torch.randn(8, 8)
        product = weight @ weight
    assert isinstance(origin_of(made), Made) and isinstance(origin_of(looked_up), Made)
    assert isinstance(origin_of(ids), Given)
    assert origin_of(mixed) is None and origin_of(product) is None
    assert origin_of(mask()) is None  # nobody was looking


WRITES: dict[str, Callable[[torch.Tensor], object]] = {
    "in place": lambda t: t.fill_(0.0),
    "into a view": lambda t: t[0].fill_(0.0),
    "through data": lambda t: t.data.fill_(0.0),
    "by index": lambda t: t.__setitem__((0, 0), 1.0),
    "as the result": lambda t: torch.neg(torch.ones(8, 8), out=t),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("how", WRITES)
def test_a_write_that_is_seen_makes_a_tensor_unknown(how: str, inference: bool) -> None:
    with torch.inference_mode(inference), Recorder():
        made = mask()
        view = made[:4]
        assert origin_of(made) is not None and origin_of(view) is not None
        WRITES[how](made)
        assert origin_of(made) is None and origin_of(view) is None


def test_a_write_that_nobody_sees_shows_in_the_version() -> None:
    with Recorder():
        made = mask()
    made.mul_(2.0)
    assert origin_of(made) is None


def test_in_inference_mode_who_writes_unseen_has_to_say_so() -> None:
    with torch.inference_mode():
        with Recorder():
            made = mask()
        made.mul_(2.0)
        written(made)
        assert origin_of(made) is None


def test_what_is_random_or_not_defined_is_not_noted() -> None:
    with Recorder():
        found = torch.randint(8, (4,)), torch.randperm(4), torch.empty(4, dtype=torch.long)
    assert all(not isinstance(origin_of(tensor), Made) for tensor in found)


def test_a_tensor_in_the_place_of_one_that_is_gone_is_not_taken_for_it() -> None:
    with Recorder():
        for _ in range(200):
            made = mask()
            assert origin_of(made) is not None
            del made
    others = [torch.zeros(8, 8) for _ in range(200)]
    assert all(origin_of(other) is None for other in others)
