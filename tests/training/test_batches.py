"""Training samples as functions of the draw index. Oracle: properties; the laws of `randomness` and `weighting` have
their own tests."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pixart_ft.data.cache import CachedPictures, TensorStore
from pixart_ft.model.vae import LatentScale
from pixart_ft.training.batches import Batch, DrawLaws, TrainingSet, draw_batch
from tests.helpers.toy_run import LAWS as TOY_LAWS

LAWS = replace(TOY_LAWS, caption_dropout=0.5, timestep_law="uniform")
COUNT = 5


@pytest.fixture
def data(tmp_path: Path) -> TrainingSet:
    """Five pictures whose latent mean is 10 i with standard deviation 0, captions of i + 1 tokens filled with i + 1."""
    store = TensorStore(tmp_path)
    mean_and_std = [torch.stack([torch.full((4, 2, 2), 10.0 * i), torch.zeros(4, 2, 2)]) for i in range(COUNT)]
    store.add({f"latent{i}": x for i, x in enumerate(mean_and_std)})
    store.add({f"text{i}": torch.full((i + 1, 3), i + 1.0) for i in range(COUNT)})
    pictures = CachedPictures(store, [f"latent{i}" for i in range(COUNT)], [f"text{i}" for i in range(COUNT)])
    return TrainingSet(pictures, scale=LatentScale(0.1, 2.0), null_caption=torch.full((1, 3), -1.0))


def draw(data: TrainingSet, draws: Sequence[int], laws: DrawLaws = LAWS, **more: Any) -> Batch:
    return draw_batch(data, list(draws), laws, global_batch=4, **{"num_steps": 1000} | more)


def test_a_draw_does_not_depend_on_its_batch(data: TrainingSet) -> None:
    together, alone = draw(data, range(4, 12)), draw(data, [9])
    row = 9 - 4
    assert torch.equal(together.x0[row], alone.x0[0])
    assert torch.equal(together.eps[row], alone.eps[0])
    assert together.t[row] == alone.t[0]
    length = int(alone.mask.sum())
    assert torch.equal(together.embeds[row, :length], alone.embeds[0, :length])
    assert together.mask[row].sum() == length


def test_every_epoch_shows_every_picture_once_in_another_order(data: TrainingSet) -> None:
    epochs = [
        draw(data, range(e * COUNT, (e + 1) * COUNT)).x0[:, 0, 0, 0].add(0.2).round().int().tolist() for e in range(4)
    ]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs)  # (10 i - 2) 0.1 = i - 0.2
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_picture_and_caption_belong_together(data: TrainingSet) -> None:
    batch = draw(data, range(20), replace(LAWS, caption_dropout=0.0))
    for x0, embeds, mask in zip(batch.x0, batch.embeds, batch.mask, strict=True):
        picture = round(x0[0, 0, 0].item() + 0.2)
        assert mask.sum() == picture + 1
        assert (embeds[: picture + 1] == picture + 1).all() and (embeds[picture + 1 :] == 0).all()


def test_of_several_captions_each_draw_takes_one_by_their_shares(data: TrainingSet, tmp_path: Path) -> None:
    """Picture 2 says 3, or 7 in three draws of four; the others say what they said, and noise and t stay."""
    store = TensorStore(tmp_path)
    store.add({"other": torch.full((3, 3), 7.0)})
    texts = [f"text{i}" for i in range(COUNT)]
    more = CachedPictures(store, [f"latent{i}" for i in range(COUNT)], [*texts, "other"])
    several = replace(data, pictures=more, captions={2: ((2, COUNT), (0.25, 0.75))})
    laws, draws = replace(LAWS, caption_dropout=0.0), range(COUNT * 400)
    plain, batch = draw(data, draws, laws), draw(several, draws, laws)
    assert torch.equal(plain.x0, batch.x0) and torch.equal(plain.eps, batch.eps) and torch.equal(plain.t, batch.t)
    first, before = batch.embeds[:, 0, 0], plain.embeds[:, 0, 0]
    assert torch.equal(first[before != 3], before[before != 3])
    said = first[before == 3]
    assert said.unique().tolist() == [3, 7]
    assert abs((said == 7).float().mean().item() - 0.75) < 4 * (0.75 * 0.25 / 400) ** 0.5
    assert torch.equal(draw(several, [1234], laws).embeds[0, 0], batch.embeds[1234, 0])


def test_dropout_takes_the_null_caption_at_its_rate(data: TrainingSet) -> None:
    batch = draw(data, range(2000), replace(LAWS, caption_dropout=0.3))
    dropped = batch.embeds[:, 0, 0] == -1
    assert abs(dropped.float().mean().item() - 0.3) < 4 * (0.3 * 0.7 / 2000) ** 0.5
    assert (batch.mask[dropped].sum(1) == 1).all()
    everything = draw(data, range(8), replace(LAWS, caption_dropout=1.0))
    assert everything.embeds.shape == (8, 1, 3) and (everything.embeds == -1).all()


def test_the_posterior_is_sampled_with_its_own_deviation(data: TrainingSet, tmp_path: Path) -> None:
    store = TensorStore(tmp_path)
    store.add({"wide": torch.stack([torch.zeros(4, 2, 2), torch.full((4, 2, 2), 2.0)])})
    one = TrainingSet(CachedPictures(store, ["wide"], ["text0"]), LatentScale(0.1, 3.0), data.null_caption)
    x0 = draw(one, range(500)).x0
    assert abs(x0.std().item() - 0.2) < 0.01 and abs(x0.mean().item() + 0.3) < 0.01
    assert torch.equal(draw(one, range(3), replace(LAWS, latents="mode")).x0, torch.full((3, 4, 2, 2), -0.1 * 3.0))


def test_stratified_t_visits_every_stratum_of_a_global_batch(data: TrainingSet) -> None:
    for step in range(3):
        t = draw(data, range(step * 4, step * 4 + 4), replace(LAWS, timestep_law="stratified")).t
        assert sorted((t // 250).tolist()) == [0, 1, 2, 3]


def test_other_laws_of_t_need_no_weight(data: TrainingSet) -> None:
    for law in ("uniform", "stratified", "logit_normal"):
        batch = draw(data, range(8), replace(LAWS, timestep_law=law))
        assert batch.t.dtype == torch.int64 and torch.equal(batch.weight, torch.ones(8))


def test_logit_normal_t_has_the_law_that_was_named(data: TrainingSet) -> None:
    laws = replace(LAWS, timestep_law="logit_normal", logit_mean=-0.5, logit_std=0.7)
    count = 1500
    t = draw(data, range(count), laws).t
    logit = torch.logit((t + 0.5) / 1000)
    assert abs(logit.mean().item() + 0.5) < 4 * 0.7 / count**0.5
    assert abs(logit.std().item() - 0.7) < 4 * 0.7 / (2 * count) ** 0.5
    assert torch.equal(draw(data, [9], laws).t, t[9:10])


def test_importance_t_follows_its_law_by_draw_index_with_the_weights_that_undo_it(data: TrainingSet) -> None:
    laws, count = replace(LAWS, timestep_law="importance"), 1500
    law = torch.tensor([0.5, 0.1, 0.15, 0.25], dtype=torch.float64)
    batch = draw(data, range(count), laws, num_steps=4, law=law)
    share = torch.bincount(batch.t, minlength=4) / count
    assert ((share - law).abs() < 4 * (law * (1 - law) / count).sqrt()).all()
    assert batch.weight.dtype == torch.float32
    torch.testing.assert_close(batch.weight, (1 / (4 * law[batch.t])).float())
    part = draw(data, [17, 3, 250], laws, num_steps=4, law=law)
    assert torch.equal(part.t, batch.t[[17, 3, 250]]) and torch.equal(part.weight, batch.weight[[17, 3, 250]])
    with pytest.raises(AssertionError, match="needs the law"):
        draw(data, range(4), laws)


def test_a_second_noise_is_drawn_where_it_is_asked_for(data: TrainingSet) -> None:
    assert draw(data, range(8)).rest is None
    batch = draw(data, range(8), two_noises=True)
    assert torch.equal(batch.eps, draw(data, range(8)).eps)
    alone, many = draw(data, [5], two_noises=True), draw(data, range(500), two_noises=True)
    assert batch.rest is not None and alone.rest is not None and many.rest is not None
    assert torch.equal(batch.rest[5], alone.rest[0])
    correlation = torch.corrcoef(torch.stack([many.eps.flatten(), many.rest.flatten()]))
    assert abs(correlation[0, 1].item()) < 4 / many.eps.numel() ** 0.5
    assert abs(many.rest.std().item() - 1) < 0.05


def test_each_draw_shows_one_of_the_views(tmp_path: Path) -> None:
    store = TensorStore(tmp_path)
    values = {f"{i} {view}": torch.full((4, 2, 2), 10.0 * i + view) for i in range(2) for view in range(3)}
    store.add({key: torch.stack([mean, 0 * mean]) for key, mean in values.items()})
    store.add({f"text{i}": torch.full((1, 3), float(i)) for i in range(2)})
    pictures = CachedPictures(store, list(values), ["text0", "text1"], views=3)
    data = TrainingSet(pictures, LatentScale(1.0), torch.zeros(1, 3))
    batch = draw(data, range(300), replace(LAWS, caption_dropout=0.0))
    shown = batch.x0[:, 0, 0, 0].round().int()
    assert torch.equal(shown // 10, batch.embeds[:, 0, 0].int())
    share = torch.bincount(shown % 10, minlength=3) / 300
    assert ((share - 1 / 3).abs() < 4 * (2 / 9 / 300) ** 0.5).all()
    assert torch.equal(draw(data, [123], replace(LAWS, caption_dropout=0.0)).x0[0], batch.x0[123])


def test_of_each_two_draws_one_is_of_the_prior_and_each_set_has_epochs_of_its_own(data: TrainingSet) -> None:
    """Three own pictures, two of the prior: numbers 0, 1, 2 and 3, 4."""
    both = replace(data, prior=2, prior_weight=0.25)
    batch = draw(both, range(240), replace(LAWS, caption_dropout=0.0))
    shown = batch.x0[:, 0, 0, 0].add(0.2).round().int()
    is_prior = shown >= 3
    assert (is_prior.view(-1, 2).sum(1) == 1).all()
    assert (is_prior.view(-1, 2)[:, 0].float().mean() - 0.5).abs() < 4 * 0.5 / 120**0.5  # either comes first
    assert all(sorted(epoch) == [0, 1, 2] for epoch in shown[~is_prior].view(-1, 3).tolist())
    assert all(sorted(epoch) == [3, 4] for epoch in shown[is_prior].view(-1, 2).tolist())
    assert torch.equal(batch.weight, torch.where(is_prior, 0.25, 1.0))
    assert (batch.mask.sum(1) == shown + 1).all()


def test_the_prior_is_seen_at_every_stratum_of_t(data: TrainingSet) -> None:
    """With two pictures a batch a draw's parity is its stratum: that must not decide which set it is of."""
    both = replace(data, prior=2)
    laws = replace(LAWS, timestep_law="stratified")
    batch = draw_batch(both, range(100), laws, global_batch=2, num_steps=1000)
    late = batch.t[batch.x0[:, 0, 0, 0].add(0.2).round() >= 3] >= 500
    assert 0.2 < late.float().mean() < 0.8
