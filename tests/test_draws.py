"""Training samples as functions of the draw index. Oracle: properties; the laws of `randomness` and `weighting` have
their own tests."""

from dataclasses import replace

import pytest
import torch

from pixart_ft.data.cache import CachedPictures, TensorStore
from pixart_ft.draws import Plan, TrainingSet, draw_batch

PLAN = Plan(
    steps=10,
    batch_size=4,
    accumulation=1,
    seed=3,
    caption_dropout=0.5,
    timestep_law="uniform",
    logit_mean=0.0,
    logit_std=1.0,
    learning_rate=1.0,
    warmup_steps=4,
    decay="cosine",
    clip_norm=1.0,
    log_every=1,
    validate_every=1,
    samples_every=1,
    checkpoint_every=1,
    keep_checkpoints=1,
)
COUNT = 5


@pytest.fixture
def data(tmp_path) -> TrainingSet:
    """Five pictures whose latent mean is 10 i with standard deviation 0, captions of i + 1 tokens filled with i + 1."""
    store = TensorStore(tmp_path)
    mean_and_std = [torch.stack([torch.full((4, 2, 2), 10.0 * i), torch.zeros(4, 2, 2)]) for i in range(COUNT)]
    store.add({f"latent{i}": x for i, x in enumerate(mean_and_std)})
    store.add({f"text{i}": torch.full((i + 1, 3), i + 1.0) for i in range(COUNT)})
    pictures = CachedPictures(store, [f"latent{i}" for i in range(COUNT)], [f"text{i}" for i in range(COUNT)])
    return TrainingSet(pictures, scaling_factor=0.1, null_caption=torch.full((1, 3), -1.0))


def draw(data: TrainingSet, draws, plan: Plan = PLAN):
    return draw_batch(data, list(draws), plan, global_batch=4, num_steps=1000)


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
    epochs = [draw(data, range(e * COUNT, (e + 1) * COUNT)).x0[:, 0, 0, 0].round().int().tolist() for e in range(4)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs)  # 10 i times the scaling factor 0.1
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_picture_and_caption_belong_together(data: TrainingSet) -> None:
    batch = draw(data, range(20), replace(PLAN, caption_dropout=0.0))
    for x0, embeds, mask in zip(batch.x0, batch.embeds, batch.mask, strict=True):
        picture = round(x0[0, 0, 0].item())
        assert mask.sum() == picture + 1
        assert (embeds[: picture + 1] == picture + 1).all() and (embeds[picture + 1 :] == 0).all()


def test_dropout_takes_the_null_caption_at_its_rate(data: TrainingSet) -> None:
    batch = draw(data, range(2000), replace(PLAN, caption_dropout=0.3))
    dropped = batch.embeds[:, 0, 0] == -1
    assert abs(dropped.float().mean().item() - 0.3) < 4 * (0.3 * 0.7 / 2000) ** 0.5
    assert (batch.mask[dropped].sum(1) == 1).all()
    everything = draw(data, range(8), replace(PLAN, caption_dropout=1.0))
    assert everything.embeds.shape == (8, 1, 3) and (everything.embeds == -1).all()


def test_the_posterior_is_sampled_with_its_own_deviation(data: TrainingSet) -> None:
    store = data.pictures.store
    store.add({"wide": torch.stack([torch.zeros(4, 2, 2), torch.full((4, 2, 2), 2.0)])})
    one = TrainingSet(CachedPictures(store, ["wide"], ["text0"]), 0.1, data.null_caption)
    x0 = draw(one, range(500)).x0
    assert abs(x0.std().item() - 0.2) < 0.01 and abs(x0.mean().item()) < 0.01


def test_stratified_t_visits_every_stratum_of_a_global_batch(data: TrainingSet) -> None:
    for step in range(3):
        t = draw(data, range(step * 4, step * 4 + 4), replace(PLAN, timestep_law="stratified")).t
        assert sorted((t // 250).tolist()) == [0, 1, 2, 3]


def test_learning_rate_warms_up_and_decays() -> None:
    assert [PLAN.learning_rate_at(s) for s in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert PLAN.learning_rate_at(7) == pytest.approx(0.5)  # half way down the cosine from 4 to 10
    assert replace(PLAN, decay="linear").learning_rate_at(7) == pytest.approx(0.5)
    assert replace(PLAN, decay="linear").learning_rate_at(10) == 0
    assert replace(PLAN, decay="constant").learning_rate_at(9) == 1
