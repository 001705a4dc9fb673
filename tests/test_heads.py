"""Training of all users' heads: the optimum, the ablations, the scale, and what a new user gets."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression
from torch.nn.functional import logsigmoid

from prlhf.core.mixture import fit_mixture
from prlhf.core.users import make_user_model
from prlhf.prm.head_config import HeadConfig
from prlhf.prm.head_steps import make_steps
from prlhf.prm.heads import Examples, fit_heads, log_loss, train
from prlhf.prm.new_user import OffsetPrior, PriorTrial, choose_prior, fit_offsets

D = 6


def examples(rows: int, users: int, seed: int = 0, contrast: float = 3.0) -> Examples:
    """Comparisons of users whose taste is +first for even rows of the table and -first for odd ones."""
    random = torch.Generator().manual_seed(seed)
    z = torch.randn(rows, D, generator=random)
    ids = torch.randint(1, users, (rows,), generator=random)
    sign = torch.where(ids % 2 == 0, 1.0, -1.0)
    liked = torch.rand(rows, generator=random) < torch.sigmoid(contrast * sign * z[:, 0])
    return Examples(torch.where(liked[:, None], z, -z), ids)


def paper_loss(users: torch.nn.Module, data: Examples, alpha: float) -> torch.Tensor:
    """P-RM's objective (F.2) as the paper writes it."""
    own = (users(data.users) * data.z).sum(1)
    generic = (users(torch.zeros_like(data.users)) * data.z).sum(1)
    return -(alpha * logsigmoid(own) + (1 - alpha) * logsigmoid(generic)).mean()


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    ("name", "options"),
    [("uniform", {}), ("individualized", {}), ("individualized", {"shared": False}), ("cluster", {"clusters": 3})],
)
def test_a_step_follows_the_gradient_of_the_papers_loss(name: str, options: dict, alpha: float) -> None:
    """Without a pull, one tiny step changes the loss by what autograd says it should, in sign and to first order."""
    data = examples(64, 5)
    config = HeadConfig(user_model=name, user_loss_alpha=alpha, learning_rate=1e-6)
    users = make_user_model(name, 5, 0.1 * torch.ones(D), **options)
    before = {key: value.detach().clone() for key, value in users.named_parameters()}
    loss = paper_loss(users, data, alpha)
    loss.backward()
    gradients = {key: value.grad for key, value in users.named_parameters()}
    for value in users.parameters():
        value.grad = None
    with torch.no_grad():
        make_steps(users, torch.bincount(data.users, minlength=5), config, 0.0, 0.0, torch.zeros(D)).step(
            data.z, data.users
        )
        moves = {key: value - before[key] for key, value in users.named_parameters()}
        after = paper_loss(users, data, alpha)
    predicted = sum(float((gradients[key] * moves[key]).sum()) for key in moves if gradients[key] is not None)
    assert predicted < 0
    assert float((after - loss).detach()) == pytest.approx(predicted, rel=0.05, abs=1e-7)


@pytest.mark.parametrize("name", ["individualized", "cluster"])
def test_users_on_a_checkerboard_are_learned_and_row_0_stays_at_chance(name: str) -> None:
    data, held, test = examples(2000, 9), examples(500, 9, 1), examples(4000, 9, 2, contrast=50.0)
    personal, uniform = fit_heads(data, held, 9, torch.zeros(D), HeadConfig(user_model=name))
    own = (personal.users(test.users) * test.z).sum(1) > 0
    row0 = (personal.users(torch.zeros_like(test.users)) * test.z).sum(1) > 0
    assert own.float().mean() > 0.9
    assert 0.35 < row0.float().mean() < 0.65
    assert uniform.log_loss > 0.6 > personal.log_loss


def test_training_reaches_the_convex_optimum() -> None:
    """Row-sparse steps end where L-BFGS on the whole objective ends."""
    data, alpha, strength, base = examples(300, 4), 0.5, 20.0, 5.0

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        table = torch.tensor(flat.reshape(4, D), requires_grad=True)
        own, generic = table[0] + table[data.users], table[0]
        losses = -alpha * logsigmoid((own * data.z).sum(1)) - (1 - alpha) * logsigmoid(data.z.double() @ generic)
        value = losses.sum() + strength / 2 * table[1:].square().sum() + base / 2 * table[0].square().sum()
        value.backward()
        return value.item(), table.grad.numpy().ravel()

    best = minimize(objective, np.zeros(4 * D), jac=True, method="L-BFGS-B", options={"maxiter": 500, "ftol": 1e-14})
    optimum = best.x.reshape(4, D)
    users = make_user_model("individualized", 4, torch.zeros(D))
    config = HeadConfig(learning_rate=0.05, batch_size=100, max_epochs=1500, patience=1500)
    steps = make_steps(users, torch.bincount(data.users, minlength=4), config, base, strength, torch.zeros(D))
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _ in range(1500):
            for index in torch.randperm(300, generator=random).split(100):
                steps.step(data.z[index], data.users[index])
    found = np.concatenate([users.base.detach().numpy()[None], users.offsets.weight.detach().numpy()[1:]])
    assert np.abs(found - optimum).max() < 0.03 * np.abs(optimum).max()


def test_strong_prior_keeps_users_at_row_0() -> None:
    data, held = examples(500, 5), examples(200, 5, 1)
    config = HeadConfig(user_strengths=(1e7,), max_epochs=10)
    personal, _ = fit_heads(data, held, 5, torch.zeros(D), config)
    assert personal.users.spread()[1:].max() < 0.05 or personal.users.offsets.weight.abs().max() < 1e-3


def test_strength_and_epoch_are_those_of_the_lowest_validation_loss() -> None:
    data, held = examples(400, 5), examples(200, 5, 1)
    personal, _ = fit_heads(data, held, 5, torch.zeros(D), HeadConfig(max_epochs=15))
    losses = [tried["log_loss"] for tried in personal.tried]
    assert personal.log_loss == min(losses)
    assert log_loss(personal.users, held) == pytest.approx(personal.log_loss)
    assert len(losses) == len(HeadConfig.user_strengths)


def test_the_same_seed_gives_the_same_heads() -> None:
    data, held = examples(300, 5), examples(100, 5, 1)
    fits = [fit_heads(data, held, 5, torch.zeros(D), HeadConfig(max_epochs=5))[0] for _ in range(2)]
    assert torch.equal(fits[0].users.offsets.weight, fits[1].users.offsets.weight)


def test_rows_without_user_leave_offsets_alone() -> None:
    data = examples(300, 5)
    nobody = Examples(data.z, torch.zeros_like(data.users))
    personal, _ = fit_heads(nobody, nobody, 5, torch.zeros(D), HeadConfig(max_epochs=3))
    assert personal.users.offsets.weight.abs().max() == 0


def test_nan_stops_training() -> None:
    data = examples(100, 3)
    bad = Examples(torch.full_like(data.z, float("nan")), data.users)
    users = make_user_model("uniform", 3, torch.zeros(D))
    config = HeadConfig(user_model="uniform")
    steps = make_steps(users, torch.bincount(data.users, minlength=3), config, 0.0, 0.0, torch.zeros(D))
    with pytest.raises(FloatingPointError, match="epoch 1"):
        train(steps, bad, data, config)


@pytest.mark.parametrize("rows", [1, 7, 100])
def test_new_users_fit_is_the_map_optimum(rows: int) -> None:
    """Against scikit-learn: penalised logistic regression without intercept on z and -z."""
    random = np.random.default_rng(rows)
    z = random.normal(size=(rows, 40))
    found = fit_offsets(z[None], np.zeros((1, rows)), OffsetPrior(0.5, np.zeros((0, 40))))[0]
    both, labels = np.concatenate([z, -z]), np.repeat([1, 0], rows)
    # Each comparison stands twice, so C is half the prior variance.
    other = LogisticRegression(C=0.25, fit_intercept=False, tol=1e-10, max_iter=10_000).fit(both, labels)
    assert np.abs(found - other.coef_[0]).max() < 1e-4


def test_new_users_fit_does_not_diverge_in_many_dimensions() -> None:
    random = np.random.default_rng(0)
    z, base = random.normal(size=(3, 50, 1000)) * 3, random.normal(size=(3, 50)) * 30
    prior = OffsetPrior(1.0, np.zeros((0, 1000)))
    offsets = fit_offsets(z, base, prior)
    margins = base + (z @ offsets[..., None])[..., 0]
    residual = offsets - (z.swapaxes(1, 2) @ (1 / (1 + np.exp(margins)))[..., None])[..., 0]
    assert np.abs(residual).max() < 1e-5


def test_population_prior_is_its_second_moment() -> None:
    offsets = np.random.default_rng(0).normal(size=(30, 5)).astype(np.float32)
    prior = OffsetPrior.from_population(offsets, 0.0, 1.0)
    assert np.allclose(prior.factor.T @ prior.factor, offsets.T @ offsets / 30, atol=1e-4)
    few = OffsetPrior.from_population(offsets[:3], 0.0, 1.0)
    assert np.allclose(few.factor.T @ few.factor, offsets[:3].T @ offsets[:3] / 3, atol=1e-4)


def test_batch_of_users_of_different_sizes_equals_one_by_one() -> None:
    random = np.random.default_rng(1)
    z, base = random.normal(size=(4, 9, 12)), random.normal(size=(4, 9))
    mask = np.arange(9) < np.array([9, 1, 4, 0])[:, None]
    prior = OffsetPrior.from_population(random.normal(size=(20, 12)), 0.2, 1.0)
    together = fit_offsets(z, base, prior, mask)
    for i in range(4):
        alone = fit_offsets(z[i : i + 1, mask[i]], base[i : i + 1, mask[i]], prior)
        assert np.allclose(together[i], alone[0], atol=1e-6)
    assert np.abs(together[3]).max() == 0  # no comparisons: row 0


def test_mixture_of_no_comparisons_is_row_0s_and_moves_towards_the_right_centre() -> None:
    logits = np.array([0.3, -0.2, 0.0])
    same = fit_mixture(np.zeros((0, 3)), logits, 1.0)
    assert np.allclose(np.exp(same) / np.exp(same).sum(), np.exp(logits) / np.exp(logits).sum(), atol=1e-4)
    moved = fit_mixture(np.tile([-5.0, 5.0, 0.0], (10, 1)), logits, 1.0)
    assert moved.argmax() == 1


def test_prior_is_chosen_without_the_judged_users_own_offset() -> None:
    """A population of two opposite tastes along one axis: the prior finds the axis."""
    random = np.random.default_rng(0)
    offsets = np.zeros((40, 20), dtype=np.float32)
    offsets[:, 0] = np.where(np.arange(40) % 2, 3.0, -3.0)
    trials = []
    for row in range(1, 41):
        z = random.normal(size=(45, 20))
        z *= np.sign(z @ offsets[row - 1])[:, None]
        trials.append(PriorTrial(z[:5], np.zeros(5), z[5:], np.zeros(40), row))
    prior, tried = choose_prior(offsets, trials, 10.0)
    assert len(prior.factor) > 0
    assert prior.factor[0].argmax() == 0 or np.abs(prior.factor[0]).argmax() == 0
    weightless = min(t["log_loss"] for t in tried if t["weight"] == 0)
    assert min(t["log_loss"] for t in tried) < 0.7 * weightless


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"user_loss_alpha": 1.5}, "between 0 and 1"),
        ({"user_strengths": (float("nan"),)}, "user_strengths"),
        ({"base_strengths": ()}, "base_strengths"),
        ({"batch_size": 0}, "batch_size"),
        ({"learning_rate": 0.0}, "learning_rate"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        HeadConfig(**changes)
